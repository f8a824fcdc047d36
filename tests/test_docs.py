"""What README and docs/ name exists: commands parse, paths, links and modules are there."""

import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from odelt_fast import cli
from odelt_fast.checkpoints.folder import save_model
from odelt_fast.config import PRESETS
from odelt_fast.model import DiT
from odelt_fast.train.main import parse as parse_training

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/NOTES.md"])


def _texts(page: Path) -> Iterator[str]:
    """The code of a page: lines of its blocks, joined where they go on, and spans in its prose."""
    text = page.read_text()
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", prose):
        yield " ".join(span.split())


def _commands() -> Iterator[tuple[str, str]]:
    """(page, command) of everything that a reader might type, without `VARIABLE=value`."""
    start = re.compile(r"(odelt-fast|accelerate launch|torchrun|pytest|python -m) ")
    for page in PAGES:
        for text in _texts(page):
            for part in re.split(r"&&|;", text):
                command = re.sub(r"^(\w+=\S* )+", "", part.strip())
                if start.match(command):
                    yield page.name, command


def _check_options(name: str, arguments: list[str]) -> None:
    """Raises, or exits, where `odelt-fast NAME` does not know the arguments."""
    if name == "train":
        parse_training(arguments)
    elif not arguments or "--help" in arguments:
        cli.command(name)
    else:
        unknown = tyro.cli(
            cli.command(name).Command,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
            return_unknown_args=True,
        )[1]
        assert not unknown, unknown


def _check_module(name: str, arguments: list[str]) -> None:
    """Fails where `python -m NAME` is no module of ours, or its source does not name an option."""
    if name == "odelt_fast.cli":
        return _check_options(arguments[0], arguments[1:])
    folder = ROOT / name.replace(".", "/")
    sources = [folder.with_suffix(".py")] if not folder.is_dir() else sorted(folder.glob("*.py"))
    text = "".join(source.read_text() for source in sources)
    for option in [word for word in arguments if word.startswith("--")]:
        field = option[2:].split("=")[0].replace("-", "_")
        known = rf'"(--)?{option[2:]}"|^    {field}: '
        assert re.search(known, text, re.MULTILINE), option


def _check(command: str) -> None:
    words = [word for word in shlex.split(command, comments=True) if word not in ("...", "|")]
    words = [word for word in words if not word.startswith(">")]
    if words[0] == "odelt-fast":
        if words[1:2] != ["COMMAND"] and not words[1].startswith("--"):
            _check_options(words[1], words[2:])
    elif words[0] == "pytest":
        for word in words[1:]:
            if "/" in word:
                assert (ROOT / word.split("::")[0]).exists(), word
    elif words[0] == "python":
        if words[2].startswith(("odelt_fast.", "benchmarks.", "tests.")):
            _check_module(words[2], words[3:])
    elif "train/main.py" in words:
        parse_training(words[words.index("train/main.py") + 1 :])
    elif "-m" in words:
        at = words.index("-m")
        _check_module(words[at + 1], words[at + 2 :])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pages' converted model, narrower than it is there."""
    folder = tmp_path_factory.mktemp("models")
    config = replace(PRESETS["DiT-XL/2"], hidden_size=16, num_heads=2, length_conditioned=False)
    save_model(DiT(config), folder / "sit-xl")
    return folder


@pytest.mark.parametrize(("page", "command"), sorted(set(_commands())))
def test_a_documented_command_parses(
    page: str,
    command: str,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(models)
    try:
        _check(command)
    except SystemExit as stop:  # of --help too, with 0
        if stop.code:
            pytest.fail(f"{page}: {command}: {capsys.readouterr()}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link for link in links if not link.startswith("http")]
    missing = [link for link in local if not (page.parent / link.split("#")[0]).exists()]
    folders = r"(?:odelt_fast|kernels|train|csrc|benchmarks|tests|docs)"
    paths = [span for span in _texts(page) if re.fullmatch(rf"{folders}/[\w./-]+", span)]
    missing += [path for path in paths if not (ROOT / path).exists() and "NAME" not in path]
    assert not missing


def test_names_in_the_readme_can_be_imported() -> None:
    for page in PAGES:
        for module, names in re.findall(
            r"from (odelt_fast[\w.]*) import ([\w, ]+)", page.read_text()
        ):
            for name in names.replace(" ", "").split(","):
                home = importlib.import_module(module)
                assert hasattr(home, name) or name == "OdeltPipeline", f"{page.name}: {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900
