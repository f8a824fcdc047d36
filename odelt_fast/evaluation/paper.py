"""The paper's own measurements, to draw ours against: what paper.toml holds, by its tables."""

from __future__ import annotations

import tomllib
from importlib.resources import files

SOURCE = "arXiv 2506.21714"
STEPS = (128, 4, 1)

_DATA = tomllib.loads(files("odelt_fast.evaluation").joinpath("paper.toml").read_text())
TABLE_2: dict[str, tuple[float, ...]] = {k: tuple(v) for k, v in _DATA["table_2"].items()}
ONE_STEP_LATENCY = {int(depth): value for depth, value in _DATA["one_step_latency"].items()}
TABLE_3: dict[tuple[int, str, float], tuple[float, float, float]] = {
    (depth, solver, at): (fid, seconds, memory)
    for depth, solver, at, fid, seconds, memory in _DATA["adaptive"]["table_3"]
}
TABLE_4, TABLE_5 = (
    {(depth, value): tuple(fids) for depth, value, *fids in _DATA["ablations"][name]}
    for name in ("table_4", "table_5")
)
