"""`odelt-fast doctor`: what is right here, how fast it is, and what `auto` takes."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from odelt_fast.checks import show_seconds
from odelt_fast.evaluation.arguments import metavar

from .options import Device, File, Text, device_of, dtype_name, reporter

if TYPE_CHECKING:
    from odelt_fast.config import DiTConfig
    from odelt_fast.engine.selfcheck import Verdict
    from odelt_fast.engine.trial import Way

FORMAT = "odelt-fast doctor 1"
Dtypes = Annotated[tuple[Literal["float32", "bfloat16", "float16"], ...], metavar("NAME...")]


@dataclass(frozen=True)
class Command:
    """Try out every backend, attention, precision and plan on this machine, each in a process of
    its own: right or wrong by how much, microseconds, and what auto takes.

    Weights are random: only the shape of a model matters. On a GPU the verdicts are those that
    backend fused asks for before it runs.
    """

    model: Text = None
    """Shape of the network: a preset (DiT-B/2), a folder, a bundled name or a Hub id. Default:
    digits on a CPU, all presets on a GPU, which takes long."""
    dtypes: Dtypes = ("float32", "bfloat16")
    """Some of float32, bfloat16, float16; fp8 is tried beside bfloat16 where the GPU has it."""
    report: File = None
    """File for all that was found, as JSON, to attach to a bug report: versions, driver, clocks,
    numbers; no paths, no names."""
    device: Device = "auto"
    quiet: bool = False
    """Say nothing while measuring."""


@dataclass(frozen=True)
class Row:
    """A way and what was found of it; unavailable: why it was not tried."""

    model: str
    way: Way
    verdict: Verdict | None = None
    unavailable: str = ""
    taken: bool = False

    @property
    def said(self) -> str:
        """The cell of the table."""
        from odelt_fast.engine.selfcheck import without_paths

        if self.verdict is None:
            return f"not here: {self.unavailable}"
        return without_paths(str(self.verdict))


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    if not options.dtypes:
        raise ValueError("--dtypes must have at least one value")
    from odelt_fast.files import check_target, write_json

    if options.report:
        check_target("--report", options.report, (".json",))
    device = device_of(options.device)
    found: list[Row] = []
    because: dict[str, dict[str, str]] = {}
    for name, config in shapes(options.model, device.type).items():
        rows = [*diagnose(name, config, str(device), options.dtypes, reporter(options.quiet))]
        for dtype in dict.fromkeys(options.dtypes):
            rows, because[f"{name}, {dtype}"] = marked(rows, dtype)
        found += rows
    print(table(found))
    for what, reasons in because.items():
        taken = reasons["takes"]
        others = "; ".join(f"not {name}: {why}" for name, why in reasons.items() if name != "takes")
        print(f"{what}: auto takes {taken}" + (f" ({others})" if others else ""))
    print(f"--dtype auto is {dtype_name('auto', device.type)}")
    if options.report:
        write_json(options.report, describe(found, because, str(device)))
        print(f"{options.report}: the report")


def shapes(model: str | None, device: str) -> dict[str, DiTConfig]:
    """The networks to try, by a name that tells nothing of the user's."""
    from odelt_fast.checkpoints.folder import read_config
    from odelt_fast.config import PRESETS

    if model is None:
        return dict(PRESETS) if device == "cuda" else {"digits": PRESETS["digits"]}
    return {model: PRESETS[model]} if model in PRESETS else {"the model": read_config(model)}


def ways(config: DiTConfig, device: str, dtypes: tuple[str, ...]) -> Iterator[tuple[Way, str]]:
    """Each way that there might be, with the reason why it is none here, or an empty text."""
    import torch

    from odelt_fast.engine import availability
    from odelt_fast.engine.native.build import load
    from odelt_fast.engine.operators import ATTENTIONS
    from odelt_fast.engine.plans import PLANS
    from odelt_fast.engine.trial import Way

    place = torch.device(device)
    head = config.hidden_size // config.num_heads
    fused = "it needs an NVIDIA GPU"
    if place.type == "cuda":
        fused = availability.device_unavailable(place) or ""
    for dtype in dict.fromkeys(dtypes):
        plain = Way.of(config, device, getattr(torch, dtype))
        yield replace(plain, backend="eager"), ""
        yield replace(plain, backend="compile"), ""
        if place.type == "cpu":
            reason = "" if dtype != "float16" else "its dtypes are float32 and bfloat16"
            yield replace(plain, backend="native"), reason or load("cpu", False) or ""
        yield plain, fused
        if fused:
            continue
        for name in ATTENTIONS[1:]:
            given = place, getattr(torch, dtype), head
            yield (
                replace(plain, attention=name),
                availability.attention_unavailable(name, *given) or "",
            )
        plans = [name for name in PLANS if name != plain.plan]
        for each in (replace(plain, plan=name) for name in plans):
            yield each, PLANS[each.plan].unavailable(each.setting) or ""
        yield replace(plain, adaptive=True), ""
        if dtype == "bfloat16":
            capable = torch.cuda.get_device_capability(place) >= (8, 9)
            reason = "" if capable else "it needs compute capability 8.9 or newer"
            for name in (plain.plan, *plans):
                each = replace(plain, precision="fp8", plan=name)
                yield each, reason or PLANS[name].unavailable(each.setting) or ""


def diagnose(
    name: str,
    config: DiTConfig,
    device: str,
    dtypes: tuple[str, ...],
    report: Callable[[str], None],
) -> Iterator[Row]:
    """All ways of a network, tried one after the other; report: called with a line for each."""
    from odelt_fast.engine import selfcheck

    for way, reason in ways(config, device, dtypes):
        if reason:
            yield Row(name, way, unavailable=reason)
            continue
        report(f"{name}: {' '.join(filter(None, cells(way)))}")
        if way.backend == "fused":
            found = selfcheck.verdict(way, again=True, timed=True)
        else:
            found = selfcheck.run(way, timed=True)
        yield Row(name, way, found)


def marked(rows: list[Row], dtype: str) -> tuple[list[Row], dict[str, str]]:
    """The rows with that marked which `auto` takes in a dtype, and {"takes": it} with the reasons
    why it takes no other."""
    from odelt_fast.engine.selfcheck import without_paths
    from odelt_fast.engine.trial import random_model
    from odelt_fast.sampling.sampler import Sampler

    mine = next(row.way for row in rows if row.way.dtype == dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reasons say it
        told = Sampler(random_model(mine), batch_size=1).explain()
    native = told["backend"] == "eager" and told.get("native_operators")
    taken = "native" if native else told["backend"]
    plain = replace(mine, backend=taken)
    reasons = {name: without_paths(why) for name, why in told["not_taken"].items() if name != taken}
    attention = ""
    if taken == "fused":
        attention = f", attention {told['attention']}, plan {told['plan']}"
        plain = replace(plain, plan=told["plan"])
    rows = [replace(row, taken=row.taken or row.way == plain) for row in rows]
    return rows, {"takes": taken + attention, **reasons}


def cells(way: Way) -> tuple[str, ...]:
    """Backend, attention, precision and plan of a way, as the table has them."""
    fused = way.backend == "fused"
    plan = f"{way.plan}, adaptive" if way.adaptive else way.plan
    precision = way.precision or way.dtype
    return way.backend, way.attention if fused else "", precision, plan if fused else ""


def table(rows: list[Row]) -> str:
    """One line for each way."""
    lines = [
        "| network | backend | attention | precision | plan | | shortest | longest | auto |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [*((row.verdict and row.verdict.microseconds) or {}).values()]
        # A conventional network has one depth.
        shown = [show_seconds(each / 1e6) for each in (times[:1] + times[-1:])] or ["", ""]
        values = (row.model, *cells(row.way), row.said, *shown, "yes" if row.taken else "")
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def describe(rows: list[Row], because: dict[str, dict[str, str]], device: str) -> dict[str, Any]:
    """What --report writes."""
    import torch

    from odelt_fast.engine import selfcheck
    from odelt_fast.evaluation.machine import this_machine

    def result(row: Row) -> dict[str, Any]:
        verdict = row.verdict
        found: dict[str, Any] = {"state": "not here", "reason": row.unavailable}
        if verdict:
            found = asdict(replace(verdict, path=None, output=""))
            del found["path"], found["output"]  # which may name what is not ours to tell
        found["reason"] = selfcheck.without_paths(found["reason"])
        return {"network": row.model, **row.way.to_dict(), "taken": row.taken, **found}

    return {
        "format": FORMAT,
        "machine": asdict(this_machine(device)),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "kernels": selfcheck.sources_digest(torch.device(device)),
        "triton": selfcheck.triton_version(),
        "driver": selfcheck.driver_version() if device != "cpu" else None,
        "clocks": clocks(device),
        "auto": because,
        "results": [*map(result, rows)],
    }


def clocks(device: str) -> dict[str, str] | None:
    """Clocks (MHz), temperature (C) and power (W) at this moment, as far as they can be asked."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, StopIteration):
        if device == "cpu":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            return {"cpu": next(line for line in lines if "MHz" in line).split(":")[1].strip()}
        fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
        return dict(zip(fields.split(","), map(str.strip, answer.stdout.split(","))))
    return None
