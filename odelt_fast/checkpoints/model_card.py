"""The README.md of a model on the Hub: what the model is, what each depth and number of steps
costs, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from odelt_fast.config import DiTConfig

PICTURE_NAME = "grid.png"
PAPER = "https://arxiv.org/abs/2506.21714"
_STEPS = (128, 4, 1)


def model_card(
    config: DiTConfig,
    *,
    repo_id: str,
    quality: Mapping[tuple[int, int], str] | None = None,
    measured: str = "",
    description: str = "",
    license: str | None = None,
    datasets: Sequence[str] = (),
    has_picture: bool = False,
) -> str:
    """Markdown with the Hub's YAML header, ending in a newline.

    quality: (depth l, steps T) -> what was measured there ("FID 6.1"), and measured: how ("50 000
    images against ..."); without them the table has the cost alone, which needs no measurement.
    description: a paragraph on the data and the training. has_picture: the repository holds
    `PICTURE_NAME`, a grid of samples.

    Raises ValueError for a depth that the model does not have, fewer than one step, and quality
    that does not say how it was measured.
    """
    if quality and not measured:
        raise ValueError(
            "quality needs measured: say what was measured, on how many images, against which data"
        )
    for depth, steps in quality or {}:
        config.check_depth(depth)
        if steps < 1:
            raise ValueError(f"quality at {steps} steps: there must be at least 1")
    tags = "diffusion flow-matching odelt model_hub_mixin pytorch_model_hub_mixin"
    header: dict[str, object] = {
        "library_name": "odelt-fast",
        "pipeline_tag": "unconditional-image-generation",
        "tags": tags.split(),
    }
    if license:
        header["license"] = license
    if datasets:
        header["datasets"] = list(datasets)
    yaml = "\n".join(f"{name}: {json.dumps(value)}" for name, value in header.items())
    inputs = "x".join(map(str, config.image_shape))
    kind = (
        f"{config.depth} blocks of width {config.hidden_size}, patches of {config.patch_size},"
        f" inputs of {inputs}"
    )
    classes = f"{config.num_classes} classes" if config.num_classes > 1 else "no classes"
    name = repo_id.split("/")[-1]
    lowest = config.depths[0]
    parts = [
        f"---\n{yaml}\n---",
        f"# {name}",
        (
            f"An [ODE_t(ODE_l)]({PAPER}) transformer for odelt-fast: {kind}, {classes}. Its cost is"
            f" set when sampling: active blocks l = {', '.join(map(str, config.depths))}, any"
            " number of time steps T."
        ),
        *([description] if description else []),
        *([f"![The same noise and labels over l and T]({PICTURE_NAME})"] if has_picture else []),
        _table(config, quality or {}),
        ("Cells: measured quality, then cost" if quality else "Cells: cost")
        + ", as a share of the largest one of the table (blocks that run, times steps)."
        + (f" Measured: {measured}" if quality else ""),
        "## Use",
        f"```python\nfrom odelt_fast import Sampler, load_model\n\n"
        f'model = load_model("{repo_id}", depth={lowest})  # only the blocks of that depth are'
        " loaded\n"
        f"images = Sampler(model, depth={lowest}, steps=1)(num_images=16, seed=0)  # (16,"
        f" {', '.join(inputs.split('x'))})\n```",
        (
            f"`odelt-fast sample --model {repo_id} --depth {lowest} --steps 1` draws the same from"
            " a shell."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _table(config: DiTConfig, quality: Mapping[tuple[int, int], str]) -> str:
    """Rows of depths, longest first; columns of steps, most first."""
    depths = sorted({depth for depth, _ in quality} or config.depths, reverse=True)
    columns = sorted({steps for _, steps in quality} or _STEPS, reverse=True)
    most = config.live_blocks(depths[0]) * columns[0]
    rows = [["", *(f"T = {steps}" for steps in columns)], ["---"] * (len(columns) + 1)]
    for depth in depths:
        row = [f"l = {depth}"]
        for steps in columns:
            cost = config.live_blocks(depth) * steps
            share = f"1/{most / cost:.4g}" if 0 < cost < most else str(min(cost, 1))
            measured = quality.get((depth, steps), "not measured") + ", " if quality else ""
            row.append(measured + share)
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
