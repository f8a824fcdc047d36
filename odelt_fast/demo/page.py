"""The page of `odelt-fast demo` (Gradio, extra `demo`).

The dials l and T, the pictures, what they cost, the paper's 3 x 3 grid.

Pictures are part of the page's HTML: the server keeps no files. Every number that reaches the HTML
was checked (settings.py).
"""

from __future__ import annotations

import base64
import contextlib
import html
import importlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from odelt_fast.checks import show_seconds
from odelt_fast.config import are_numbers, describe_classes
from odelt_fast.evaluation.charts import explored
from odelt_fast.files import one_line
from odelt_fast.sampling.pictures import image_grid

from .settings import (
    GUIDANCE_STEP,
    LONGEST_TEXT,
    STEPS,
    TOLERANCES,
    Dials,
    Setting,
    check_setting,
    guidance_range,
    solvers,
    time_label,
)
from .studio import GRID_STEPS, Drawing, MeasuredQuality, Studio

if TYPE_CHECKING:
    import gradio

    from odelt_fast.config import DiTConfig

_COLUMNS = 5  # images in a row of a picture, as in the paper's Figure 1
_WIDEST = 720  # pixels of a picture of the grid: all nine are sent again with each one
_FIRST_EXPONENT = 2  # T = 4
CSS = """
.gradio-container { max-width: 1240px !important; }
.odelt figure { margin: 0; }
.odelt img { display: block; width: 100%; height: auto; border-radius: 4px; background: white; }
.odelt img.samples { image-rendering: pixelated; }
.odelt figcaption { padding-top: 6px; line-height: 1.5; }
.odelt figcaption, .odelt td { font-variant-numeric: tabular-nums; }
.odelt .wide { overflow-x: auto; }
.odelt table { border: none; border-collapse: separate; border-spacing: 12px 8px; }
.odelt table { width: 100%; min-width: 640px; table-layout: fixed; }
.odelt tr { border: none; }
.odelt th { text-align: center; font-weight: 600; border: none; padding: 0; }
.odelt th.l { width: 64px; }
.odelt td { text-align: center; border: none; padding: 0; vertical-align: top; }
.odelt .empty { width: 100%; border-radius: 4px; background: rgba(128, 128, 128, 0.12); }
.odelt-help { padding: 0 10px; }
.odelt-power .head > :not(label), .odelt-power .min_value, .odelt-power .max_value { display: none }
"""


def build_page(
    studio: Studio,
    name: str,
    *,
    quality: MeasuredQuality | None = None,
    metric: str | None = None,
    waiting: int = 16,
) -> gradio.Blocks:
    """The page of a model.

    Args:
        name: of the model.
        quality: what was measured of `metric`.
        waiting: requests that may wait; more are refused.

    Raises:
        ValueError: Gradio is not there.
    """
    gr = import_gradio()
    page = Page(studio, quality, metric)
    with gr.Blocks(analytics_enabled=False, title=f"odelt-fast: {name}") as blocks:
        gr.Markdown(f"# odelt-fast: {html.escape(name)}\n\n{page.description()}")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                moved, typed = _sliders(gr, studio.config), _texts(gr, studio.config)
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
        dials, exponent, seed = [*moved, *typed], moved[1], typed[0]
        # Values come as they were sent: `check_setting` is the one that judges them, whoever sent
        # them.
        one_at_a_time = {
            "concurrency_id": "studio",
            "concurrency_limit": 1,
            "preprocess": False,
            "show_progress": "minimal",
        }
        drawn = {"inputs": dials, "outputs": [picture, plot], **one_at_a_time}
        label_steps = "k => ({__type__: 'update', label: `Time steps T = ${2 ** k}`})"
        exponent.change(None, exponent, exponent, js=label_steps, api_visibility="private")
        changes = [blocks.load, *(dial.change for dial in moved)]
        changes += [event for dial in typed for event in (dial.submit, dial.blur)]
        gr.on(changes, page.draw, trigger_mode="always_last", api_name="draw", **drawn)
        draw_seed = "() => Math.floor(Math.random() * 1e6)"
        again = another.click(None, None, seed, js=draw_seed, api_visibility="private")
        again.then(page.draw, api_visibility="private", **drawn)
        draw_grid.click(
            page.draw_grid,
            dials,
            [grid, plot],
            trigger_mode="once",
            api_name="grid",
            **one_at_a_time,
        )
    blocks.queue(max_size=waiting, default_concurrency_limit=1, api_open=False)
    return blocks


def _sliders(gr: Any, config: DiTConfig) -> list[Any]:
    """Depth, exponent of T, solver, tolerance and guidance scale, in the order of `Dials`."""
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
    told = config.guidance_max is not None
    guidance = gr.Slider(
        *guidance_range(config),
        value=1,
        step=GUIDANCE_STEP,
        label=f"Guidance w (1: labels alone; others cost {'nothing' if told else 'twice'})",
        buttons=[],
        visible=config.num_classes > 1,
        elem_id="guidance",
    )
    names = list(solvers(config))
    tolerances = [(f"{value:g}", value) for value in TOLERANCES]
    narrow = {"min_width": 120}
    with gr.Row():
        solver = gr.Dropdown(names, value="euler", label="Solver", elem_id="solver", **narrow)
        tolerance = gr.Dropdown(
            tolerances, value=1e-2, label="Tolerance", elem_id="tolerance", **narrow
        )
    return [depth, exponent, solver, tolerance, guidance]


def _texts(gr: Any, config: DiTConfig) -> list[Any]:
    """Seed and labels."""
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
    return [seed, labels]


class Page:
    """What the page's events answer: HTML of pictures, or Gradio's error of one line."""

    def __init__(self, studio: Studio, quality: MeasuredQuality | None, metric: str | None) -> None:
        self.studio, self.quality, self.metric = studio, quality, metric

    def description(self) -> str:
        config, model = self.studio.config, self.studio.model
        return (
            f"An ODE_t(ODE_l) transformer of {config.depth} blocks, on {model.device} in"
            f" {str(model.dtype).removeprefix('torch.')}. Its cost is set here, by two dials: l"
            f" blocks, T time steps. Each picture shows {self.studio.num_images} images."
        )

    def help(self) -> str:
        """What the dials without an obvious meaning do."""
        config, lines = self.studio.config, []
        if len(solvers(config)) > 1:
            lines.append(
                "T counts the steps of euler, midpoint, heun2 and rk4; dopri5 and tsit5 choose"
                " theirs by the tolerance."
            )
        if config.num_classes > 1:
            lines.append(
                f"Labels: one or more of 0 to {config.num_classes - 1}, repeated in turn;"
                f" {config.num_classes} is the null label."
            )
            names = self.studio.model.trained_on.class_names
            if names and not are_numbers(names):
                lines.append(f"Or by name: {_markdown(describe_classes(names))}.")
        lines.append("Times are of the whole batch, on this machine, without a decoder.")
        return " ".join(lines)

    def draw(self, *values: Any) -> tuple[str, str]:
        """The picture and the plot, for the values of the dials."""
        with self._refusing():
            setting = self._check(values)
            drawing = self.studio.draw(setting)
        return self.picture_html(setting, drawing), self.plot_html(setting)

    def draw_grid(self, *values: Any) -> Iterator[tuple[str, str]]:
        """The grid, as its pictures come, and the plot."""
        cells = dict[tuple[int, int], Drawing]()
        with self._refusing():
            setting = self._check(values)
            for row, column, drawing in self.studio.grid(setting):
                cells[row, column] = drawing
                yield self.grid_html(cells), self.plot_html(setting)

    def _check(self, values: tuple[Any, ...]) -> Setting:
        studio = self.studio
        trained_on = studio.model.trained_on
        return check_setting(studio.config, studio.num_images, Dials(*values), trained_on)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except ValueError as mistake:
            text = html.escape(one_line(mistake))
            raise import_gradio().Error(text, print_exception=False) from None

    def picture_html(self, setting: Setting, drawing: Drawing) -> str:
        operation, count = setting.operation, self.studio.num_images
        at, evaluations = time_label(operation), drawing.evaluations
        blocks = self.studio.config.live_blocks(operation.depth)
        known = f"{self.metric}: {self._quality(setting)}<br>" if self.metric else ""
        return (
            f"<figure>{_picture(drawing, f'{count} images at l = {operation.depth}, {at}')}"
            f"<figcaption><b>l = {operation.depth}, {at.replace('=', ' = ')}</b>,"
            f" {operation.solver}: <b>{show_seconds(drawing.seconds)}</b> for {count} images<br>"
            f"{evaluations:.4g} evaluation{'' if evaluations == 1 else 's'} of {blocks}"
            f" block{'' if blocks == 1 else 's'} each<br>{known}</figcaption></figure>"
        )

    def _quality(self, setting: Setting) -> str:
        if self.quality is None or setting.operation not in self.quality:
            return "not measured at this setting"
        mean, deviation = self.quality[setting.operation]
        return f"{mean:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")

    def grid_html(self, cells: dict[tuple[int, int], Drawing]) -> str:
        """The grid with the cells that are there, and room for the others."""
        count, rows = self.studio.num_images, []
        aspect = f"{min(count, _COLUMNS)} / {-(-count // _COLUMNS)}"
        empty = f'<td><div class="empty" style="aspect-ratio: {aspect}"></div>&nbsp;</td>'
        for row, depth in enumerate(self.studio.grid_depths):
            line = f'<th class="l" scope="row">l = {depth}</th>'
            for column, steps in enumerate(GRID_STEPS):
                if (drawing := cells.get((row, column))) is None:
                    line += empty
                else:
                    picture = _picture(drawing, f"l = {depth}, T = {steps}", _WIDEST)
                    line += f"<td>{picture}{show_seconds(drawing.seconds)}</td>"
            rows.append(f"<tr>{line}</tr>")
        head = "".join(f'<th scope="col">T = {steps}</th>' for steps in GRID_STEPS)
        return (
            f'<div class="wide"><table><thead><tr><th class="l"></th>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )

    def plot_html(self, setting: Setting) -> str:
        """Quality, or evaluations, against the latency of all that was drawn so far."""
        points = self.studio.points(self.quality)
        if self.metric:
            text = (
                f"Quality ({html.escape(self.metric)}) was measured before, with odelt-fast"
                " evaluate; latency is measured here, by drawing."
            )
        else:
            text = (
                "Quality was not measured: start the page with --quality, a folder of odelt-fast"
                " evaluate, to see it here."
            )
        if not points:
            text += " Nothing drawn so far has a measured quality."
            return f"<figure><figcaption>{text}</figcaption></figure>"
        if current := points.get(setting.operation):
            text += " The ring is the setting above."
        figure = explored([*points.values()], current, self.metric, self.studio.num_images)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=160)
        image = _image(data, "latency of the settings drawn so far", "plot")
        return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _markdown(text: str) -> str:
    """Text of strangers in Markdown: as it is, no link, picture or HTML."""
    return "".join(f"&#{ord(c)};" if c in r"\`*_{}[]()<>#+-.!|~&:/$" else c for c in text)


def _picture(drawing: Drawing, words: str, widest: int | None = None) -> str:
    picture, data = image_grid(drawing.images, _COLUMNS), io.BytesIO()
    if widest is not None and picture.width > widest:
        picture = picture.resize((widest, max(1, round(picture.height * widest / picture.width))))
    picture.save(data, format="png")
    return _image(data, words, "samples")


def _image(png: io.BytesIO, words: str, kind: str) -> str:
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img class="{kind}" alt="{words}" src="data:image/png;base64,{data}">'


def import_gradio() -> Any:
    """The module gradio; ValueError that names the extra if it, or what draws the plot, is not
    there."""
    for name in ("matplotlib", "gradio"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise ValueError(f"the page needs {name}: pip install 'odelt-fast[demo]'") from None
    return module
