"""The page of `odelt-fast demo` (Gradio, extra `demo`): the dials l and T, the pictures, what they
cost, the paper's 3 x 3 grid.

Pictures are part of the page's HTML: the server keeps no files. Every number that reaches the HTML
was checked (`demo_settings`).
"""

from __future__ import annotations

import base64
import html
import importlib
import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from odelt_fast.demo.settings import (
    GUIDANCE_STEP,
    LARGEST_GUIDANCE,
    LONGEST_TEXT,
    STEPS,
    TOLERANCES,
    Setting,
    check_setting,
    solvers,
)
from odelt_fast.demo.studio import GRID_STEPS, Drawing, Known, Studio
from odelt_fast.evaluation.charts import explored
from odelt_fast.sampling.pictures import image_grid

if TYPE_CHECKING:
    import gradio

_COLUMNS = 5  # images in a row of a picture, as in the paper's Figure 1
_CELL = 720  # pixels, the widest picture of the grid: all nine are sent again with each one
_FIRST_EXPONENT = 2  # T = 4
CSS = """
.gradio-container { max-width: 1240px !important; }
.odelt figure { margin: 0; }
.odelt img { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px; background: white; }
.odelt .plot { image-rendering: auto; }
.odelt figcaption { padding-top: 6px; font-variant-numeric: tabular-nums; line-height: 1.5; }
.odelt .wide { overflow-x: auto; }
.odelt table { border: none; border-collapse: separate; border-spacing: 12px 8px; width: 100%; min-width: 640px; table-layout: fixed; }
.odelt tr { border: none; }
.odelt th { text-align: center; font-weight: 600; border: none; padding: 0; }
.odelt th.l { width: 64px; }
.odelt td { text-align: center; border: none; padding: 0; vertical-align: top; font-variant-numeric: tabular-nums; }
.odelt .empty { width: 100%; border-radius: 4px; background: rgba(128, 128, 128, 0.12); }
.odelt-help { padding: 0 10px; }
.odelt-power .head > :not(label), .odelt-power .min_value, .odelt-power .max_value { display: none; }
"""


def build_page(
    studio: Studio,
    name: str,
    *,
    quality: Known | None = None,
    metric: str | None = None,
    waiting: int = 16,
) -> gradio.Blocks:
    """The page of a model called `name`. quality: of `metric`, by `Setting.cost_key`. waiting:
    requests that may wait; more are refused.

    ValueError if Gradio is not there.
    """
    gr = import_gradio()
    config = studio.config
    page = Pages(studio, quality, metric, lambda message: gr.Error(message, print_exception=False))
    with gr.Blocks(analytics_enabled=False, title=f"odelt-fast: {name}") as blocks:
        gr.Markdown(f"# odelt-fast: {html.escape(name)}\n\n{page.description()}")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                depths = config.depths
                depth = gr.Slider(
                    depths[0],
                    depths[-1],
                    value=depths[-1],
                    step=config.depth_group,
                    label="Depth l: active blocks",
                    buttons=[],
                    interactive=len(depths) > 1,
                    elem_id="depth",
                )
                exponent = gr.Slider(
                    0,
                    len(STEPS) - 1,
                    value=_FIRST_EXPONENT,
                    step=1,
                    label=f"Time steps T = {STEPS[_FIRST_EXPONENT]}",
                    buttons=[],
                    elem_id="steps",
                    elem_classes="odelt-power",
                )
                guidance = gr.Slider(
                    0,
                    LARGEST_GUIDANCE,
                    value=1,
                    step=GUIDANCE_STEP,
                    label="Guidance w (1: labels alone; others cost twice)",
                    buttons=[],
                    visible=config.num_classes > 1,
                    elem_id="guidance",
                )
                with gr.Row():
                    solver = gr.Dropdown(
                        list(solvers(config)),
                        value="euler",
                        label="Solver",
                        min_width=120,
                        elem_id="solver",
                    )
                    tolerance = gr.Dropdown(
                        [(f"{value:g}", value) for value in TOLERANCES],
                        value=1e-2,
                        label="Tolerance",
                        min_width=120,
                        elem_id="tolerance",
                    )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, min_width=120, elem_id="seed")
                    labels = gr.Textbox(
                        label="Labels",
                        placeholder="all in turn",
                        max_lines=1,
                        max_length=LONGEST_TEXT,
                        visible=config.num_classes > 1,
                        min_width=120,
                        elem_id="labels",
                    )
                another = gr.Button("Another seed", size="sm", elem_id="another")
            with gr.Column(scale=4, min_width=320):
                picture = gr.HTML(elem_id="picture", elem_classes="odelt")
                gr.Markdown(page.help(), elem_classes="odelt-help")
            with gr.Column(scale=4, min_width=320):
                plot = gr.HTML(elem_id="plot", elem_classes="odelt")
        draw_grid = gr.Button(
            f"Draw l by T: {len(studio.grid_depths)} x {len(GRID_STEPS)} pictures from the same"
            " noise",
            elem_id="draw-grid",
        )
        grid = gr.HTML(page.grid_html({}), elem_id="grid", elem_classes="odelt")
        moved, typed = [depth, exponent, solver, tolerance, guidance], [seed, labels]
        dials = [*moved, *typed]
        # Values come as they were sent: `check_setting` is the one that judges them, whoever sent
        # them.
        one_at_a_time = {"concurrency_id": "studio", "concurrency_limit": 1, "preprocess": False}
        drawn = {
            "inputs": dials,
            "outputs": [picture, plot],
            "show_progress": "minimal",
            **one_at_a_time,
        }
        told = "k => ({__type__: 'update', label: `Time steps T = ${2 ** k}`})"
        exponent.change(None, exponent, exponent, js=told, api_visibility="private")
        gr.on(
            [
                blocks.load,
                *(dial.change for dial in moved),
                *(event for dial in typed for event in (dial.submit, dial.blur)),
            ],
            page.draw,
            trigger_mode="always_last",
            api_name="draw",
            **drawn,
        )
        again = another.click(
            None, None, seed, js="() => Math.floor(Math.random() * 1e6)", api_visibility="private"
        )
        again.then(page.draw, api_visibility="private", **drawn)
        draw_grid.click(
            page.draw_grid,
            dials,
            [grid, plot],
            trigger_mode="once",
            show_progress="minimal",
            api_name="grid",
            **one_at_a_time,
        )
    blocks.queue(max_size=waiting, default_concurrency_limit=1, api_open=False)
    return blocks


class Pages:
    """What the page's events answer: HTML of pictures, or `refuse(message)`, raised."""

    def __init__(
        self,
        studio: Studio,
        quality: Known | None,
        metric: str | None,
        refuse: Callable[[str], Exception],
    ) -> None:
        self.studio, self.quality, self.metric, self.refuse = studio, quality, metric, refuse

    def description(self) -> str:
        config, model = self.studio.config, self.studio.model
        return (
            f"An ODE_t(ODE_l) transformer of {config.depth} blocks, on {model.device} in"
            f" {str(model.dtype).removeprefix('torch.')}. Its cost is set here, by two dials: l"
            f" blocks, T time steps. Each picture shows {self.studio.num_images} images."
        )

    def help(self) -> str:
        """What the dials without an obvious meaning do."""
        known = solvers(self.studio.config)
        lines = [
            "T counts the steps of euler, midpoint, heun2 and rk4; dopri5 and tsit5 choose theirs"
            " by the tolerance."
        ] * (len(known) > 1)
        classes = self.studio.config.num_classes
        if classes > 1:
            lines.append(
                f"Labels: one or more of 0 to {classes - 1}, repeated in turn; {classes} is the"
                " null label."
            )
        return " ".join(
            [*lines, "Times are of the whole batch, on this machine, without a decoder."]
        )

    def draw(self, *values: Any) -> tuple[str, str]:
        """The picture and the plot, for the values of the dials."""
        setting = self._check(values)
        drawing = self._asked(lambda: self.studio.draw(setting))
        return self.picture_html(setting, drawing), self.plot_html(setting)

    def draw_grid(self, *values: Any) -> Iterator[tuple[str, str]]:
        """The grid, as its pictures come, and the plot."""
        setting, cells = self._check(values), dict[tuple[int, int], Drawing]()
        drawings = self.studio.grid(setting)
        while (found := self._asked(lambda: next(drawings, None))) is not None:
            row, column, cells[row, column] = found
            yield self.grid_html(cells), self.plot_html(setting)

    def _check(self, values: tuple[Any, ...]) -> Setting:
        return self._asked(
            lambda: check_setting(self.studio.config, self.studio.num_images, *values)
        )

    def _asked(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except ValueError as mistake:
            raise self.refuse(html.escape(" ".join(str(mistake).split())[:300])) from None

    def picture_html(self, setting: Setting, drawing: Drawing) -> str:
        evaluations = (
            f"{drawing.evaluations:.4g} evaluation{'' if drawing.evaluations == 1 else 's'}"
        )
        known = f"{self.metric}: {self._quality(setting)}<br>" if self.metric else ""
        return (
            f"<figure>{_picture(drawing, f'{self.studio.num_images} images at l = {setting.depth}, {setting.at}')}<figcaption><b>l"
            f" = {setting.depth}, {setting.at.replace('=', ' = ')}</b>, {setting.solver}:"
            f" <b>{show_seconds(drawing.seconds)}</b> for {self.studio.num_images}"
            f" images<br>{evaluations} of {drawing.live_blocks}"
            f" block{'' if drawing.live_blocks == 1 else 's'} each<br>{known}</figcaption></figure>"
        )

    def _quality(self, setting: Setting) -> str:
        if self.quality is None or setting.cost_key not in self.quality:
            return "not measured at this setting"
        mean, deviation = self.quality[setting.cost_key]
        return f"{mean:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")

    def grid_html(self, cells: dict[tuple[int, int], Drawing]) -> str:
        """The grid with the cells that are there, and room for the others."""
        rows = []
        for row, depth in enumerate(self.studio.grid_depths):
            line = [f'<th class="l" scope="row">l = {depth}</th>']
            for column, steps in enumerate(GRID_STEPS):
                drawing = cells.get((row, column))
                if drawing is None:
                    line.append(
                        '<td><div class="empty" style="aspect-ratio:'
                        f' {self._aspect()}"></div>&nbsp;</td>'
                    )
                else:
                    line.append(
                        f"<td>{_picture(drawing, f'l = {depth}, T = {steps}', _CELL)}{show_seconds(drawing.seconds)}</td>"
                    )
            rows.append(f"<tr>{''.join(line)}</tr>")
        head = "".join(f'<th scope="col">T = {steps}</th>' for steps in GRID_STEPS)
        return (
            '<div class="wide"><table><thead><tr><th'
            f' class="l"></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        )

    def _aspect(self) -> str:
        count = self.studio.num_images
        return f"{min(count, _COLUMNS)} / {-(-count // _COLUMNS)}"

    def plot_html(self, setting: Setting) -> str:
        """Quality, or evaluations, against the latency of all that was drawn so far."""
        points = self.studio.points(self.quality)
        words = (
            f"Quality ({html.escape(self.metric)}) was measured before, with odelt-fast evaluate;"
            " latency is measured here, by drawing."
            if self.metric
            else (
                "Quality was not measured: start the page with --quality, a folder of odelt-fast"
                " evaluate, to see it here."
            )
        )
        ring = (
            " The ring is the setting above."
            if (current := self.studio.point(setting, self.quality))
            else ""
        )
        if not points:
            return (
                f"<figure><figcaption>{words} Nothing drawn so far has a measured"
                " quality.</figcaption></figure>"
            )
        data = io.BytesIO()
        explored(points, current, self.metric, self.studio.num_images).savefig(
            data, format="png", dpi=160
        )
        return f"<figure>{_image(data, 'latency of the settings drawn so far', 'plot')}<figcaption>{words}{ring}</figcaption></figure>"


def _picture(drawing: Drawing, words: str, widest: int | None = None) -> str:
    picture, data = image_grid(drawing.images, _COLUMNS), io.BytesIO()
    if widest is not None and picture.width > widest:
        picture = picture.resize((widest, max(1, round(picture.height * widest / picture.width))))
    picture.save(data, format="png")
    return _image(data, words, "samples")


def _image(png: io.BytesIO, words: str, kind: str) -> str:
    return (
        f'<img class="{kind}" alt="{words}"'
        f' src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'
    )


def show_seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def import_gradio() -> Any:
    """The module gradio; ValueError that names the extra if it, or what draws the plot, is not
    there."""
    for name in ("matplotlib", "gradio"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise ValueError(f"the page needs {name}: pip install 'odelt-fast[demo]'") from None
    return module
