"""Everything optional is optional: where a package is missing, one line names the extra that has
it, and nothing is left behind.

`serve` is in test_server.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from odelt_fast.cli import main

EVALUATE = (
    "evaluate",
    "--num-images",
    "2",
    "--depths",
    "4",
    "--steps",
    "1",
    "--metrics",
    "recognised",
    "--allow-few-samples",
)


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        (
            "accelerate",
            ("train", "--recipe", "digits", "--steps", "1", "--output-dir", "made"),
            "train",
        ),
        (
            "sklearn",
            ("train", "--recipe", "digits", "--steps", "1", "--output-dir", "made"),
            "eval",
        ),
        ("sklearn", (*EVALUATE, "--data", "digits", "--out", "made"), "eval"),
        ("pyarrow", (*EVALUATE, "--data", "images.parquet", "--out", "made"), "eval"),
        ("datasets", (*EVALUATE, "--data", "somebody/images", "--out", "made"), "train"),
        ("matplotlib", ("plot", "pareto", "--results", "results", "--out", "made.png"), "eval"),
        (
            "diffusers",
            ("sample", "--model", "mnist", "--decoder", "somebody/vae", "--out", "made.png"),
            "diffusers",
        ),
        ("gradio", ("demo", "--port", "0"), "demo"),
        ("lance", ("generate", "--format", "lance", "--out", "made"), "lance"),
        ("gcsfs", ("generate", "--out", "gs://bucket/made"), "gs"),
    ],
)
def test_a_missing_package_is_answered_with_its_extra(
    package: str,
    command: tuple[str, ...],
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images.parquet").write_bytes(b"PAR1" + bytes(100))
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "study-digits" / "odelt.json"
    Path("results").mkdir()
    Path("results/results.json").write_bytes(results.read_bytes())
    for module in [package, *(name for name in sys.modules if name.startswith(package + "."))]:
        monkeypatch.setitem(sys.modules, module, None)
    assert main(list(command)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.endswith(f"pip install 'odelt-fast[{extra}]'\n")
    assert said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"images.parquet", "results"}
