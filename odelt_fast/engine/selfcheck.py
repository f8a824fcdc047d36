"""Whether the engine draws the model's pictures on this device: found out once, in a process of its
own, and kept.

No card and no compiler is trusted. Before the first use of a configuration, dtype, attention and
precision on a device a child process compares the engine with the model (`trial`). It may crash or
hang: this process lives. The verdict, with the numbers, is a file in the cache folder
(`files.cache_folder`), named by all that it depends on: kernels, torch, Triton, driver, device.
Processes that start together wait for the one that checks.

$ODELT_FAST_SELFCHECK: on (GPUs; the default), off, always (every process anew, on a CPU too).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from odelt_fast.checks import one_of
from odelt_fast.files import cache_folder, locked, one_line, read_object, write_atomically
from odelt_fast.model import DiT
from odelt_fast.operation import Operation

from .engine import Engine
from .plans import DEFAULT, PLANS, require_plan
from .trial import Record, Way
from .tuning import read_tuning, tuning_path, winners

logger = logging.getLogger(__name__)

MODES = ("on", "off", "always")
STATES = ("right", "wrong", "crashed", "hung", "failed", "undecided")
FORMAT = "odelt-fast self-check 1"
LIMIT_S = 300.0  # of a child, which may have to compile every kernel
_PACKAGE = Path(__file__).parents[1]
_LIMIT = 1 << 20  # bytes of a verdict
_TAIL = 4000  # characters that a child leaves of what it printed
# By what a child dies that others end: the system short of memory, a user, a launcher.
_OTHERS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")


class NotTrustedError(RuntimeError):
    """The engine has not been found right on this device; the message is the reason."""


@dataclass(frozen=True)
class Verdict:
    """What was found out.

    Args:
        state: right; wrong (numbers), crashed, hung, failed (an error); undecided (not the
            engine's fault: no memory, say), which is not kept.
        reason: of any but "right", one line.
        comparisons: as `trial.compare` gives them.
        microseconds: by depth, where it was measured.
        seconds: that it took.
        output: the end of what the child printed.
        path: where it is kept.
    """

    state: str
    reason: str = ""
    comparisons: tuple[Record, ...] = ()
    microseconds: dict[str, float] | None = None
    seconds: float = 0.0
    output: str = ""
    path: Path | None = None

    @property
    def right(self) -> bool:
        return self.state == "right"

    @property
    def worst(self) -> Record | None:
        """The comparison that comes nearest to its bound, or farthest beyond it."""
        found = [each for each in self.comparisons if "error" in each]
        return max(found, key=_share, default=None)

    def __str__(self) -> str:
        worst = self.worst
        if not self.right or worst is None:
            return f"{self.state}: {self.reason}"
        return f"right, off by {worst['error']:.1e} at most (allowed: {worst['bound']:.1e})"


def mode() -> str:
    """That of $ODELT_FAST_SELFCHECK; ValueError for another value than `MODES`."""
    return one_of("ODELT_FAST_SELFCHECK", os.environ.get("ODELT_FAST_SELFCHECK") or "on", MODES)


def way_of(
    network: DiT | Engine,
    operation: Operation,
    attention: str,
    precision: str | None,
    kind: str,
    plan: str = DEFAULT,
) -> Way:
    """What of the engine has to be right for a network to be sampled so."""
    whole = operation.adaptive and not operation.torchdiffeq and operation.depth_schedule is None
    return Way.of(
        network.config, network.device, network.dtype,
        attention=attention, precision=precision, adaptive=whole, kind=kind, plan=plan,
    )  # fmt: skip


def require(way: Way) -> None:
    """Raises `NotTrustedError` unless the engine is right, or nobody asks."""
    if not applies(way):
        return
    verdict = known(way)
    if not verdict.right:
        report = f"; report: {verdict.path}" if verdict.path else ""
        raise NotTrustedError(
            f"its self-check on this device {verdict.reason}{report};"
            " ODELT_FAST_SELFCHECK=always checks again, off runs it unchecked"
        )


def trusted_plans(way: Way, plan: str) -> tuple[str, ...]:
    """Plans that may run: the one of that name (if it leaves some batches to the default one, both
    must be right), or, of "auto", that of the way and those that this card's tuning has found
    faster somewhere and that are right; as `require`, and ValueError for one that cannot run."""
    if plan != "auto":
        require_plan(plan, way.setting)
        for name in {plan, DEFAULT} if PLANS[plan].limits else {plan}:
            require(replace(way, plan=name))
        return (plan,)
    require(way)
    others = winners(read_tuning(torch.device(way.device)), "plan") - {way.plan}
    ways = [replace(way, plan=name) for name in sorted(others & PLANS.keys())]
    ways = [each for each in ways if not PLANS[each.plan].unavailable(way.setting)]
    right = [each.plan for each in ways if not applies(each) or known(each).right]
    return (way.plan, *right)


def applies(way: Way) -> bool:
    """Whether a way is checked before it is used."""
    return mode() == "always" or (mode() == "on" and way.device.startswith("cuda"))


def told(way: Way) -> str:
    """What `Sampler.explain` says."""
    return str(known(way)) if applies(way) else "off" if mode() == "off" else "on GPUs only"


@functools.cache
def known(way: Way) -> Verdict:
    """The verdict of this process."""
    return verdict(way, again=mode() == "always")


def verdict(way: Way, again: bool = False, timed: bool = False) -> Verdict:
    """The verdict that is kept, or that of a child started now.

    Args:
        again: whatever is kept is not believed, but for what another process has found out since
            this one asked.
        timed: the child measures, too; a kept verdict without times is not taken.
    """
    facts, asked = key(way), time.time()
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / "selfcheck" / f"{digest}.json"
    with locked(path.with_suffix(".lock")):
        with contextlib.suppress(OSError, ValueError):
            kept = read(path, facts)
            fresh = not again or path.stat().st_mtime >= asked
            if fresh and (kept.microseconds or not timed):
                return kept
        logger.info("self-check of %s begins", facts)
        found = run(way, timed)
        logger.info("self-check: %s", found)
        if found.state == "undecided":
            return found
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            values = {"format": FORMAT, "of": facts} | asdict(found)
            text = json.dumps({**values, "path": None}, indent=1).encode()
            write_atomically(path, lambda file: file.write(text))
        except OSError as error:
            logger.info("the verdict cannot be kept: %s", error)
            return found
        return replace(found, path=path)


def read(path: Path, facts: Record) -> Verdict:
    """A kept verdict; ValueError or OSError for anything that does not say what is needed."""
    values = read_object(path, _LIMIT)
    if values.pop("format", None) != FORMAT or values.pop("of", None) != facts:
        raise ValueError("is no verdict of this")
    found = Verdict(**{**_checked(values), "path": path})
    if found.state not in STATES or found.state != _judged(found).state:
        raise ValueError("contradicts itself")
    return found


def _checked(values: Record) -> Record:
    kinds = {"state": str, "reason": str, "seconds": float, "output": str}
    if values.keys() != {*kinds, "comparisons", "microseconds", "path"}:
        raise ValueError("has other fields")
    comparisons, times = values["comparisons"], values["microseconds"]
    if not all(isinstance(values[name], kind) for name, kind in kinds.items()):
        raise ValueError("has a field of another type")
    if not isinstance(comparisons, list) or not all(map(_is_comparison, comparisons)):
        raise ValueError("has a comparison that is none")
    if times is not None and not (
        isinstance(times, dict) and all(isinstance(each, float) for each in times.values())
    ):
        raise ValueError("has times that are none")
    return values | {"comparisons": tuple(comparisons)}


def _is_comparison(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("what"), str):
        return False
    if "equal" in value:
        return isinstance(value["equal"], bool)
    error = value.get("error", "")
    return isinstance(value.get("bound"), float) and (error is None or isinstance(error, float))


def _share(comparison: Record) -> float:
    """Error of a comparison as a part of its bound."""
    error = comparison["error"]
    return math.inf if error is None else error / comparison["bound"]


def _judged(found: Verdict) -> Verdict:
    """ "wrong" in place of "right" where the numbers say so."""
    if found.state not in ("right", "wrong"):
        return found
    worst = found.worst
    if worst is None:
        return replace(found, state="failed", reason="compared nothing")
    if _share(worst) > 1:
        off = "not finite" if worst["error"] is None else f"off by {worst['error']:.2g}"
        reason = f"found wrong pictures ({worst['what']}: {off}, allowed: {worst['bound']:.2g})"
        return replace(found, state="wrong", reason=reason)
    for each in found.comparisons:
        if not each.get("equal", True):
            return replace(found, state="wrong", reason=f"found other bits ({each['what']})")
    return replace(found, state="right")


def run(way: Way, timed: bool = False, seconds: float | None = None) -> Verdict:
    """What a child finds out within `seconds` (None: LIMIT_S); nothing is read or kept."""
    limit, start = LIMIT_S if seconds is None else seconds, time.monotonic()
    asked = json.dumps({"way": way.to_dict(), "timed": timed, "seconds": 2 * limit})
    try:
        records, code, printed = _child(asked.encode(), limit)
    except OSError as error:
        return Verdict("undecided", f"could not start: {one_line(error)}")
    facts: Record = {}
    for record in records:
        facts |= record
    found = Verdict(
        "right",
        comparisons=tuple(each for each in records if "what" in each),
        microseconds=facts.get("microseconds"),
        seconds=round(time.monotonic() - start, 1),
        output=printed[-_TAIL:],
    )
    at, name = facts.get("at", "its start"), _signal_name(code)
    if code is None:
        found = replace(found, state="hung", reason=f"did not end in {limit:g} s (at: {at})")
    elif name:
        state = "undecided" if name in _OTHERS else "crashed"
        found = replace(found, state=state, reason=f"crashed ({name}, at: {at})")
    elif "state" in facts:
        state, reason = facts["state"], f"failed ({facts['reason']}; at: {at})"
        found = replace(found, state=state, reason=reason)
    elif not facts.get("done"):
        found = replace(found, state="failed", reason=f"ended with code {code} (at: {at})")
    # Before the model itself has run nothing of the engine's has.
    if found.state != "right" and not facts.get("ready"):
        return replace(found, state="undecided")
    return _judged(found)


def _child(asked: bytes, limit: float) -> tuple[list[Record], int | None, str]:
    """(lines of JSON, exit code or None where it was ended, what else it printed)."""
    root = str(_PACKAGE.parent)
    paths = [each for each in sys.path if each]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths if root in paths else [*paths, root]),
        "ODELT_FAST_SELFCHECK": "off",
    }
    command = [sys.executable, "-P", "-m", f"{_PACKAGE.name}.engine.trial"]
    with contextlib.ExitStack() as stack:
        given, lines, printed = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        given.write(asked)
        given.seek(0)
        child = subprocess.Popen(
            command, stdin=given, stdout=lines, stderr=printed, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = child.wait(limit)
        except BaseException as error:
            _end(child)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
        lines.seek(0)
        printed.seek(0)
        text = printed.read().decode(errors="replace")
        return [*_records(lines.read())], code, text


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends it with what it started, compilers for example."""
    with contextlib.suppress(OSError, AttributeError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    # A kernel that hangs may hold its process back: nothing else waits for it.
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(10)


def _records(data: bytes) -> list[Record]:
    records = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):  # torn by a crash
            records.append(json.loads(line))
    return records


def _signal_name(code: int | None) -> str:
    if code is None or code >= 0:
        return ""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def key(way: Way) -> Record:
    """All that a verdict depends on."""
    device = torch.device(way.device)
    facts: Record = {"kernels": sources_digest(device), "torch": torch.__version__}
    facts |= {"triton": triton_version(), "way": way.to_dict() | {"device": device.type}}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "device": f"{properties.name}, {properties.multi_processor_count} processors",
        }
    return facts


def sources_digest(device: torch.device) -> str:
    """Of the code and the tuning that make the engine's launches on a device."""
    digest = hashlib.sha256()
    folders = ("kernels/*.py", "engine/*.py", "engine/native/*.py", "csrc/cuda/*")
    files = [path for folder in folders for path in sorted(_PACKAGE.glob(folder))]
    if device.type == "cuda":
        files += filter(Path.is_file, [tuning_path(torch.cuda.get_device_name(device))])
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def driver_version() -> str:
    """The NVIDIA driver's version, else that of CUDA which it supports (13000), else "unknown"."""
    with contextlib.suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    supported = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(supported))
    return str(supported.value or "unknown")


def triton_version() -> str:
    """Triton's, "none" where it cannot be loaded."""
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return "none"


def without_paths(text: str) -> str:
    """Text with the last name alone of each path in it."""
    return re.sub(r"(?:[A-Za-z]:|~)?[\\/](?:[^\s'\":,;()\\/]+[\\/])+", "", text)
