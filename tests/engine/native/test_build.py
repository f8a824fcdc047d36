"""The native libraries: built from the sources here, and told apart from what cannot be built or
loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from odelt_fast.cli import main
from odelt_fast.engine.native import build
from tests.helpers.engine_cases import run_python


def test_the_name_of_a_library_follows_sources_flags_and_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {build.library_path("cpu"), build.library_path("cuda")}
    monkeypatch.setattr(torch, "__version__", "2.99.1")
    assert build.library_path("cpu") in names  # the stable ABI: one build serves them
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    names.add(build.library_path("cpu"))
    monkeypatch.setattr(build, "CXX_FLAGS", (*build.CXX_FLAGS, "-g"))
    names.add(build.library_path("cpu"))
    for path in build.CSRC.rglob("*.*"):
        copy = tmp_path / path.relative_to(build.CSRC)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "CSRC", tmp_path)
    assert build.library_path("cpu") in names
    for header in ("vec.h", "rows.cpp"):
        (tmp_path / "cpu" / header).write_text((tmp_path / "cpu" / header).read_text() + "\n")
        names.add(build.library_path("cpu"))
    assert len(names) == 6


def tiny_library(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "source.cpp").write_text(text)
    monkeypatch.setattr(build, "sources", lambda library: [folder / "source.cpp"])
    monkeypatch.setenv("ODELT_FAST_CACHE", str(folder / "cache"))


def test_two_builds_at_once_both_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_library(tmp_path, 'extern "C" int answer() { return 42; }', monkeypatch)
    built: list[Path] = []
    threads = [threading.Thread(target=lambda: built.append(build.build("cpu"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [build.library_path("cpu")] * 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [built[0].name]


def test_a_source_that_does_not_compile_gives_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_library(tmp_path, "int answer() { return undeclared; }", monkeypatch)
    with pytest.raises(build.BuildError, match=r"error: .undeclared. was not declared") as raised:
        build.build("cpu")
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "cache").iterdir()) == []


UNUSABLE = """
from odelt_fast.engine.native import build, cpu_ops, while_graph
print(build.load("cpu"), cpu_ops.describe(), while_graph.describe(), sep="\\n")
"""


@pytest.mark.parametrize("broken", ["compiler", "file", "folder"])
def test_what_cannot_be_used_is_one_line_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path))
    environment = {"ODELT_FAST_CACHE": str(tmp_path)}
    if broken == "compiler":
        environment["CXX"] = "/nowhere/g++"
    elif broken == "file":
        build.library_path("cpu").write_bytes(b"\x7fELF, but no library")
    else:
        (tmp_path / "taken").write_text("")
        environment["ODELT_FAST_CACHE"] = str(tmp_path / "taken")
    lines = run_python(UNUSABLE, **environment).splitlines()
    assert len(lines) == 3
    words = {"compiler": "/nowhere/g++", "file": "build-ops --force", "folder": "taken"}
    assert words[broken] in lines[0]
    assert lines[1].startswith("native cpu operators: ")


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(ValueError, match="one of cpu, cuda, not 'rocm'"):
        build.library_path("rocm")


@pytest.mark.parametrize("how", ["script", "variable", "none"])
def test_the_toolkit_behind_a_script_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """torch takes the folder above the nvcc on PATH, which is wrong where that is a script."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    real = tmp_path / "toolkit"
    (real / "bin").mkdir(parents=True)
    (real / "bin" / "nvcc").write_text(
        f'#!/bin/sh\necho "#$ _HERE_={real}/bin" >&2\necho "#$ TOP={real}/bin/.." >&2\n'
    )
    (real / "bin" / "nvcc").chmod(0o755)
    (tmp_path / "nvcc").write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    (tmp_path / "nvcc").chmod(0o755)
    find: Callable[[], Path | None] = build.cuda_toolkit.__wrapped__  # type: ignore[attr-defined]
    if how == "script":
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert find() == real
    elif how == "variable":
        monkeypatch.setenv("CUDA_HOME", str(real))
        assert find() == real
    else:
        monkeypatch.setattr(build, "DEFAULT_NVCC", str(tmp_path / "absent"))
        monkeypatch.setenv("PATH", str(real))
        assert find() is None


def test_the_command_builds_and_says_where(
    native_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODELT_FAST_CACHE", str(native_cache))
    assert main(["build-ops", "--no-cuda"]) == 0
    assert capsys.readouterr().out.startswith(f"cpu: {build.library_path('cpu')} (")
    monkeypatch.setattr(build, "cuda_toolkit", lambda: None)
    assert main(["build-ops"]) == 0
    assert "cuda: left out, there is no nvcc" in capsys.readouterr().out


def test_the_command_ends_in_one_line_where_it_cannot_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path / "taken"))
    assert main(["build-ops", "--no-cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: the cpu operators cannot be built: ")
