"""Steps that cannot harm each other, and the file in which what they found is kept.

A step is a function that gives its results one after the other. It runs in a fork of this process,
which has imported everything and must touch no GPU itself: so a step starts in milliseconds, and an
exception, a crash, a broken CUDA context or a hang costs that step alone. Each step that has ended
is one line of JSON, appended at once, by this process only. Whoever is killed at any moment leaves
a file that the next run goes on with: a torn line is passed over, the steps die with their parent.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from odelt_fast.files import one_line

from .measure import Record

Work = Callable[[Mapping[str, str]], Iterable[Record]]
LEAST_S = 2.0  # before the end of its phase, later than which no step is started
TAIL = 3000  # characters of a failed step's output that are kept


@dataclass(frozen=True)
class Step:
    """Something to be found out.

    Args:
        key: "part: what", its name in the file.
        run: gives results, which are merged; called with {variant: why it must not be measured}.
        limit_s: after which it hangs.
        digest: of what its result holds for; with another one it runs again.
        stands_on: keys of the steps without whose success a variant is not measured ("": none is).
        env: variables that are set for it.
        background: whether it runs beside everything else.
        after: key of a step that must have ended before, if it runs in this phase or beside it.
    """

    key: str
    run: Work
    limit_s: float = 120.0
    digest: str = ""
    stands_on: Mapping[str, Sequence[str]] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    background: bool = False
    after: str = ""


class MissingError(Exception):
    """Something that a step needs is not on this machine; the message says how to bring it."""


def read_log(path: Path) -> tuple[list[Record], dict[str, Record]]:
    """(runs, last record of each step) of a file; nothing of one that is not there.

    Lines: {"run": what results of that run must be read with}; {"step": key, "run": index of its
    run, "state", "seconds", "digest", "result", and, if it is not done, "reason" and "output"}.
    state: done, failed (it raised, crashed, hung or found something wrong), missing (something is
    not on this machine), unfinished (its time was over), refused (what it stands on has failed).

    Raises:
        ValueError: the file holds something else.
    """
    runs: list[Record] = []
    found: dict[str, Record] = {}
    data = path.read_bytes() if path.exists() else b""
    for line in filter(None, data.split(b"\n")):
        try:
            record = json.loads(line)
            if "step" not in record:
                runs.append({"device": record["run"]["device"]} | record["run"])
            elif 0 <= record["run"] < len(runs) and isinstance(record["result"], dict):
                found[str(record["step"])] = {"state": record["state"]} | record
        except (ValueError, KeyError, TypeError):  # torn by a kill
            continue
    begin = b'{"run":'
    if not runs and data[: len(begin)] != begin[: len(data)]:
        raise ValueError(f"{path} does not hold the results of a run; name another folder")
    return runs, found


class Log:
    """The file of a folder, for one process at a time.

    Args:
        run: what this process's results must be read with, its "device" among it.

    Raises:
        ValueError: another process writes it, another device's results are in it, or it is no such
            file.
    """

    def __init__(self, path: Path, run: Record) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.run = path, run
        self.runs, self.found = read_log(path)
        if others := {each["device"] for each in self.runs} - {run["device"]}:
            raise ValueError(
                f"{path} holds results of {', '.join(sorted(others))}, this is {run['device']}:"
                " name another folder"
            )
        self.file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise ValueError(f"{path}: another process writes it") from None
        self.number: int | None = None  # of this run, once it has a record

    def add(self, record: Record) -> None:
        """Appends a record of a step."""
        if self.number is None:
            self.number = len(self.runs)
            self.runs.append(self.run)
            self._append({"run": self.run})
        record = {"step": record["step"], "run": self.number} | record
        self._append(record)
        self.found[record["step"]] = record

    def _append(self, record: Record) -> None:
        # Begun on a new line: what a kill has torn before it stays alone.
        line = b"\n" * (self.file.tell() > 0) + json.dumps(record).encode() + b"\n"
        self.file.write(line)

    def result(self, key: str) -> Record:
        """What a step that is done gave; nothing of any other."""
        return self.found[key]["result"] if self.state(key) == "done" else {}

    def state(self, key: str) -> str:
        """As in `read_log`; "" where it has not run."""
        return str(self.found.get(key, {}).get("state", ""))

    def settled(self, step: Step) -> bool:
        """Whether it need not run: done, or failed or refused with the sources of today."""
        record = self.found.get(step.key, {})
        if record.get("digest") != step.digest:
            return False
        same = self.runs and self.runs[record["run"]].get("sources") == self.run.get("sources")
        return record["state"] == "done" or (
            record["state"] in ("failed", "refused") and bool(same)
        )


@dataclass
class Running:
    """A step in its process. end: when it is killed; hangs: whether that is its own limit."""

    step: Step
    pid: int
    start: float
    end: float
    hangs: bool
    output: IO[bytes]
    answers: IO[bytes]
    refused: dict[str, str]
    unproven: dict[str, list[str]]


class Runner:
    """Runs steps, as many at a time as it is told, and ends with all of them ended.

    Args:
        say: called with a line for each step that has ended.
    """

    def __init__(self, log: Log, say: Callable[[str], None]) -> None:
        self.log, self.say = log, say
        self.running: list[Running] = []
        self.tried: set[str] = set()  # steps that have ended, and not for want of time

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        while self.running:
            self._end(self.running[0], killed=True)

    def phase(self, steps: Sequence[Step], workers: int, until: float, end: float) -> None:
        """Runs what is not settled of `steps`, in order, until the monotonic clock shows `until`.

        Those in the background may go on until `end`.
        """
        waiting: dict[str, Step] = {}
        for step in filter(self._wanted, steps):
            waiting.setdefault(step.key, step)
        while waiting or self._busy():
            pending = waiting.keys() | {each.step.key for each in self.running}
            for step in list(waiting.values()):
                last = end if step.background else until
                if time.monotonic() + LEAST_S >= last:
                    del waiting[step.key]
                elif step.after not in pending and (step.background or self._busy() < workers):
                    self._start(waiting.pop(step.key), last)
            self._poll()
            time.sleep(0.01)

    def _wanted(self, step: Step) -> bool:
        running = (each.step.key for each in self.running)
        return not (self.log.settled(step) or step.key in self.tried or step.key in running)

    def _busy(self) -> int:
        """Steps that run, but for those in the background."""
        return sum(not each.step.background for each in self.running)

    def _poll(self) -> None:
        now = time.monotonic()
        for each in list(self.running):
            pid, status = os.waitpid(each.pid, os.WNOHANG)
            if pid:
                self._end(each, status)
            elif now > each.end:
                self._end(each, killed=True)

    def _start(self, step: Step, last: float) -> None:
        refused: dict[str, str] = {}
        unproven: dict[str, list[str]] = {}
        for variant, keys in step.stands_on.items():
            if red := [key for key in keys if self.log.state(key) == "failed"]:
                refused[variant] = f"what it stands on has failed: {', '.join(red)}"
            elif unknown := [key for key in keys if self.log.state(key) != "done"]:
                unproven[variant] = unknown
        if "" in refused:
            return self._record(step, 0.0, "refused", {}, reason=refused[""])
        now = time.monotonic()
        end, hangs = min((now + step.limit_s, True), (last, False))
        output, answers = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        with warnings.catch_warnings():
            # The threads that Python warns of are OpenBLAS's, which is prepared for forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            self.log.file.close()
            faulthandler.dump_traceback_later(0.9 * (end - now), file=output)
            _work(step, refused, output, answers, parent)
        self.running.append(Running(step, pid, now, end, hangs, output, answers, refused, unproven))

    def _end(self, each: Running, status: int = 0, killed: bool = False) -> None:
        """Records a step that has ended, or that is ended here."""
        self.running.remove(each)
        try:  # it leads a session of its own, with whatever it has started
            os.killpg(each.pid, signal.SIGKILL)
        except ProcessLookupError:
            if killed:  # it has not got so far
                os.kill(each.pid, signal.SIGKILL)
        if killed:
            os.waitpid(each.pid, 0)
        took = time.monotonic() - each.start
        said: Record = {}
        result: Record = {}
        each.answers.seek(0)
        for line in each.answers.read().split(b"\n")[:-1]:
            said = json.loads(line)
            if "found" in said:
                result = _merged(result, said["found"])
        state, more = str(said.get("state", "failed")), {"reason": said.get("reason", "")}
        if killed:
            state = "failed" if each.hangs else "unfinished"
            more["reason"] = f"{'hung' if each.hangs else 'stopped'} after {took:.0f} s"
        elif os.WIFSIGNALED(status):
            more["reason"] = f"its process died of {signal.Signals(os.WTERMSIG(status)).name}"
        elif "state" not in said:
            more["reason"] = f"its process ended with code {os.waitstatus_to_exitcode(status)}"
        if state == "done" and each.refused:
            state, more = "refused", {"reason": max(each.refused.values(), key=len)}
        elif state != "done":
            size = each.output.seek(0, os.SEEK_END)
            each.output.seek(max(0, size - TAIL))
            more["output"] = each.output.read().decode(errors="replace")
        else:
            more = {"unproven": each.unproven} if each.unproven else {}
        each.output.close()
        each.answers.close()
        self._record(each.step, took, state, result, **more)

    def _record(self, step: Step, took: float, state: str, result: Record, **more: Any) -> None:
        if state != "unfinished":
            self.tried.add(step.key)
        record = {"step": step.key, "state": state, "seconds": round(took, 3)}
        self.log.add(record | {"digest": step.digest} | more | {"result": result})
        reason = f": {more['reason']}" if more.get("reason") else ""
        self.say(f"{step.key}: {state}, {took:.1f} s{reason}")


def elsewhere(function: Callable[..., Any], *arguments: Any, limit_s: float = 100) -> Any:
    """function(*arguments) in a process of its own: this one must touch no GPU, import no Triton.

    Raises:
        TimeoutError: it hung, or its process died.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply_async(function, arguments).get(limit_s)
        except multiprocessing.TimeoutError:
            raise TimeoutError(f"{function.__name__} gave nothing in {limit_s:.0f} s") from None


def _merged(old: Record, new: Record) -> Record:
    """`new` over `old`; dictionaries of the same name are joined."""
    both = {key: old[key] | new[key] for key in old.keys() & new.keys() if _dicts(old, new, key)}
    return old | new | both


def _dicts(old: Record, new: Record, key: str) -> bool:
    return isinstance(old[key], dict) and isinstance(new[key], dict)


def _work(
    step: Step, refused: Mapping[str, str], output: IO[bytes], answers: IO[bytes], parent: int
) -> None:
    """The whole life of a step's process: never returns."""
    code = 1
    try:
        os.setsid()
        _die_with(parent)
        with open(os.devnull) as nothing:
            for stream, number in (nothing, 0), (output, 1), (output, 2):
                os.dup2(stream.fileno(), number)
        for name, number in ("stdout", 1), ("stderr", 2):
            setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
        faulthandler.enable(sys.stderr)  # where it crashed

        def say(**said: Any) -> None:
            answers.write(json.dumps(said).encode() + b"\n")
            answers.flush()

        os.environ.update(step.env)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            for found in step.run(refused):
                say(found=found)
            say(state="done")
            code = 0
        except (MissingError, ImportError) as error:
            say(state="missing", reason=one_line(str(error)))
        # a fault of any type is the step's, and the others' are still to be found
        except BaseException as error:
            traceback.print_exc()
            say(state="failed", reason=one_line(f"{type(error).__name__}: {error}"))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent is gone."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
