"""Measuring: variants take turns, warm and synchronised; every sample is kept.

Beside the samples stand the device and the code that gave them.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odelt_fast.evaluation.machine import package_version, processor_name
from odelt_fast.files import one_line, write_whole

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("odelt_fast/**/*.py", "odelt_fast/**/*.json", "kernels/*.py", "csrc/**/*")
Record = dict[str, Any]  # what is known of one thing: its place in results is JSON
Timer = Callable[[], float]  # runs a variant once and returns its seconds


def command_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`; `text` is shown as it stands."""
    raw = argparse.RawDescriptionHelpFormatter
    prog = f"python -m benchmarks.{name}"
    return argparse.ArgumentParser(prog=prog, description=text, formatter_class=raw)


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_timer(
    call: Callable[[], object], device: torch.device, clock: Timer = time.perf_counter
) -> Timer:
    """Seconds from the call to its finished result, as a user waits for it.

    By the host's clock, the device idle before and after.
    """

    def timed() -> float:
        synchronize(device)
        start = clock()
        call()
        synchronize(device)
        return clock() - start

    return timed


def graph_timer(
    call: Callable[[int], object], sets: int, device: torch.device, clock: Timer = time.perf_counter
) -> Timer:
    """Seconds of one call on the device alone, the mean over call(0) .. call(sets - 1).

    Of enough sets, inputs have left the cache between two uses. On CUDA one graph holds all the
    calls and events stand around its replay, so that the host does not count; elsewhere its clock
    does.
    """
    if device.type != "cuda":
        timed = host_timer(lambda: [call(index) for index in range(sets)], device, clock)
        return lambda: timed() / sets
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Whatever compiles or allocates on first use does it before the capture.
    with torch.cuda.stream(stream):
        for index in (0, sets - 1, 0):
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(sets):
            call(index)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / sets

    return replay


def take_turns(
    timers: Mapping[str, Timer],
    seconds: float,
    least: int = 5,
    most: int = 200,
    warm_seconds: float = 0.2,
) -> dict[str, list[float]]:
    """Samples of every timer, in seconds: all of them once a round, in turning order.

    Before that each runs twice and the whole for `warm_seconds`: an idle GPU's clock is a fifth of
    a busy one's.

    Args:
        timers: by name; none gives no samples.
        seconds: to take about, in `least` to `most` rounds.
    """
    if not timers:
        return {}
    begin, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - begin < warm_seconds:
        for timer in timers.values():
            timer()
        rounds += 1
    names = list(timers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - begin >= seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:  # none always follows the same one
            samples[name].append(timers[name]())
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and the 10 % and 90 % quantiles, in seconds."""
    ordered, last = sorted(samples), len(samples) - 1
    low, high = (ordered[round(share * last)] for share in (0.1, 0.9))
    return {"median_s": statistics.median(ordered), "low_s": low, "high_s": high}


def measured(samples: Mapping[str, list[float]]) -> dict[str, Record]:
    """{name: samples and their summary}, as results store them."""
    return {name: {"samples_s": taken} | summary(taken) for name, taken in samples.items()}


def relative_error(x: Tensor, exact: Tensor) -> float:
    """L2 error of x over the norm of `exact` (float64)."""
    return float(torch.linalg.vector_norm(x.double() - exact) / torch.linalg.vector_norm(exact))


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products and convolutions on a GPU in float32, for what others are held to.

    cuDNN's default for convolutions is TF32, whose error is 500 times float32's.
    """
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)


def check_error(error: float, bound: float, to: str = "") -> float:
    """The error; ValueError above the bound, and for NaN."""
    if not error <= bound:
        raise ValueError(
            f"its result is wrong: relative error {error:.2e}{to}, at most {bound:.2e} is allowed"
        )
    return error


@contextmanager
def reason_in(row: Record) -> Iterator[None]:
    """Puts why the body failed into row["reason"], in one line, and goes on.

    A compiler's or an allocator's fault has any type, and the other variants are still to be
    measured.
    """
    try:
        yield
    except Exception as fault:
        row["reason"] = one_line(f"{type(fault).__name__}: {fault}")


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Calls once: bytes that CUDA's allocator held at the peak over what it held before.

    None elsewhere.
    """
    if device.type != "cuda":
        call()
        return None
    gc.collect()
    torch.cuda.empty_cache()
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def release(device: torch.device) -> None:
    """Gives back what a finished configuration held: graphs, compiled code, cached blocks."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_record() -> Record:
    """What results must be read with: device, clocks, versions, commit, digest of the sources."""
    record: Record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": source_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: package_version(package) for package in ("triton", "jax", "numpy")},
        "platform": platform.platform(),
        "cpu": processor_name() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if not torch.cuda.is_available():
        return {"device": record["cpu"], "kind": "cpu", **record}
    card = torch.cuda.get_device_properties(0)
    record |= {
        "compute_capability": f"{card.major}.{card.minor}",
        "processors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": nvidia_smi(),
    }
    return {"device": card.name, "kind": "cuda", **record}


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks (MHz), temperature (C) and power (W) at this moment.

    None where nvidia-smi is missing or silent.
    """
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
    answer = _output(f"nvidia-smi --query-gpu={fields} --format=csv,noheader,nounits --id=0")
    if answer is None:
        return None
    return dict(zip(fields.split(","), (value.strip() for value in answer.split(","))))


def commit() -> str:
    """The checkout's commit, with "-dirty" for changed files.

    $COMMIT where there is no repository, else "unknown".
    """
    describe = "git describe --always --dirty --abbrev=40 --exclude=*"
    found = _output(describe) if (ROOT / ".git").exists() else None
    return os.environ.get("COMMIT", "unknown") if found is None else found


def _output(command: str) -> str | None:
    """What a command prints, run in the checkout; None if it fails."""
    try:
        run = subprocess.run(
            command.split(), capture_output=True, text=True, timeout=30, check=True, cwd=ROOT
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def source_digest(*patterns: str) -> str:
    """A digest of the files that match (of SOURCES if none is given).

    What was found correct is what is measured.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns or SOURCES for path in ROOT.glob(pattern)}):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_json(path: Path, value: object) -> None:
    """Writes the file whole: a run that is killed leaves the old one."""
    text = json.dumps(value, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))
