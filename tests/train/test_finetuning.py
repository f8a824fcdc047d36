"""Pretrained networks get lengths: where they start, who teaches them, and what cannot be asked."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from odelt_fast import convert_checkpoint
from odelt_fast.checkpoints.folder import load_model, read_metadata, save_model
from odelt_fast.config import DiTConfig
from odelt_fast.images.shards import LatentWriter
from odelt_fast.model import DiT
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.draws import StepDraws, global_rows
from odelt_fast.train.loop import Trainer
from odelt_fast.train.main import main, parse
from odelt_fast.train.objectives.build import build_objective
from odelt_fast.train.objectives.targets import Networks, StepBatch, Targets
from odelt_fast.train.objectives.teacher import load_start
from tests.checkpoints.test_peers import FILES, case_of, write
from tests.helpers.reference_cases import relative_error

CONVENTIONAL = DiTConfig(
    image_size=8,
    channels=1,
    patch_size=4,
    hidden_size=32,
    depth=4,
    num_heads=2,
    num_classes=10,
    length_conditioned=False,
    step_conditioned=False,
    sampling="flow",
)
OPTIONS = ["--steps=6", "--train-batch-size=16", "--warmup-steps=0", "--sampling-steps=0"]


def pretrained(config: DiTConfig = CONVENTIONAL) -> DiT:
    """A network of random weights, none of which are zero: its blocks do much."""
    model = DiT(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(pretrained(), tmp_path_factory.mktemp("start")))


def options(start: str, *more: str) -> TrainConfig:
    return parse(["--init-from", start, *OPTIONS, *more])


def started(config: TrainConfig) -> tuple[DiT, DiT | None, str]:
    """The network before the first step, its frozen teacher, what is said of it."""
    model = DiT(config.model_config()).eval()
    teacher, remark = load_start(config, model)
    return model, teacher, remark or ""


def inputs(config: DiTConfig, rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last row has the null label."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, *config.image_shape, generator=generator)
    y = torch.cat([torch.arange(rows - 1), torch.tensor([config.num_classes])])
    return x, torch.rand(rows, generator=generator), y


@pytest.mark.parametrize("length_teacher", ["ema", "init"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_peer_with_a_residual_dial_starts_as_itself(
    path: Path, length_teacher: str, tmp_path: Path
) -> None:
    case = case_of(path)
    model, _ = convert_checkpoint(write(case, "pt", tmp_path), **case.options)
    folder = str(save_model(model, tmp_path / "model"))
    depth = model.config.depth
    objective = "diffusion" if model.config.sampling == "diffusion" else "flow"
    config = options(
        folder,
        "--depths",
        *map(str, range(1, depth + 1)),
        f"--objective={objective}",
        f"--length-teacher={length_teacher}",
    )
    assert config.model.inner_step == "residual"
    dialled, teacher, said = started(config)
    assert "exactly" in said
    assert dialled.config.depths == tuple(range(1, depth + 1))
    x, t, y = inputs(model.config)
    with torch.no_grad():
        expected = model(x, t, 7, y)
        assert relative_error(dialled(x, t, 7, y), expected) < 1e-6
        assert relative_error(dialled(x, t, 0, y, depth=[depth] * len(x)), expected) < 1e-6
        assert relative_error(dialled(x, t, 7, y, depth=1), expected) > 1e-3
        if length_teacher == "init":
            assert teacher is not None
            assert torch.equal(teacher(x, t, 7, y), expected)
        else:
            assert teacher is None


def test_shapes_are_those_of_the_model_unless_given(start: str, tmp_path: Path) -> None:
    config = options(start, "--depths", "2", "4")
    shape = {name: getattr(CONVENTIONAL, name) for name in ("image_size", "hidden_size", "depth")}
    assert {name: getattr(config.model, name) for name in shape} == shape
    assert (config.model.depths, config.wiring, config.model.inner_step) == (
        (2, 4),
        "residual",
        "residual",
    )
    assert options(start).model.depths == (4,)  # those of the recipe, which fit
    unfolded = options(start, "--depths", "2", "4", "--model.inner-step", "unit")
    assert (unfolded.wiring, unfolded.model.inner_step) == (None, "unit")
    plain = options(start, "--model.no-length-conditioned", "--objective", "flow")
    assert (plain.wiring, plain.model.depths) == (None, (4,))
    assert replace(config, steps=8).model == config.model  # the options stay what they are
    # a model that has lengths keeps its own, and its wiring, too
    saved = save_model(DiT(config.model_config()), tmp_path / "dial")
    again = options(str(saved))
    assert (again.wiring, again.model.inner_step, again.model.depths) == (None, "residual", (2, 4))
    model, _, said = started(again)
    assert said == ""
    assert all(
        torch.equal(tensor, load_model(saved).state_dict()[name])
        for name, tensor in model.state_dict().items()
    )
    assert options(str(saved), "--depths", "1", "2", "3", "4").model.depths == (1, 2, 3, 4)


def test_the_model_itself_teaches_unless_it_cannot(start: str, tmp_path: Path) -> None:
    lengths = ["--depths", "2", "4"]

    def teacher(*more: str, model: str = start) -> str:
        return options(model, *more).length_teacher

    for objective in ("flow", "shortcut"):
        assert teacher(*lengths, f"--objective={objective}") == "init"
    diffusion = str(save_model(pretrained(replace(CONVENTIONAL, sampling="diffusion")), tmp_path))
    assert teacher(*lengths, "--objective=diffusion", model=diffusion) == "init"
    for given in (
        [*lengths, "--objective=flow", "--length-teacher=ema"],
        [*lengths, "--objective=flow", "--wiring=paper"],
        [*lengths, "--objective=flow", "--length-consistency-every=4"],
        [*lengths, "--objective=flow", "--model.num-classes=7"],
        [*lengths, "--objective=mean-flow"],
        [*lengths, "--objective=diffusion"],
        ["--objective=flow", "--model.no-length-conditioned"],
    ):
        assert teacher(*given) == "ema", given
    assert teacher(*lengths, "--objective=flow", model=diffusion) == "ema"


@pytest.mark.parametrize("objective", ["shortcut", "mean-flow"])
def test_peer_meanflow_with_a_dial_starts_as_itself_at_every_step_size(
    objective: str, tmp_path: Path
) -> None:
    case = case_of(next(path for path in FILES if path.stem.startswith("meanflow")))
    model, _ = convert_checkpoint(write(case, "pt", tmp_path), **case.options)
    folder = str(save_model(model, tmp_path / "model"))
    by = ["--depths", "2", "4", f"--objective={objective}", "--log-with"]
    config = options(folder, *by)
    dialled, _, said = started(config)
    assert "exactly" in said
    x, t, y = inputs(model.config)
    with torch.no_grad():
        for index in range(8):
            expected = model(x, t, index, y)
            assert relative_error(dialled(x, t, index, y), expected) < 1e-6
            assert relative_error(dialled(x, t, index, y, depth=2), expected) > 1e-3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_peer_fine_tuned_resumes_bitwise(path: Path, tmp_path: Path) -> None:
    case = case_of(path)
    model, _ = convert_checkpoint(write(case, "pt", tmp_path), **case.options)
    data, config = tmp_path / "latents", model.config
    values = np.random.default_rng(0).normal(size=(32, 1, 2, *config.image_shape))
    writer = LatentWriter(
        data,
        config.channels,
        config.image_size,
        [f"c{i}" for i in range(config.num_classes)],
        copies=1,
    )
    writer.append(np.abs(values).astype(np.float32), np.arange(32) % config.num_classes)
    writer.finish()
    folder = str(save_model(model, tmp_path / "model"))
    objective = "diffusion" if config.sampling == "diffusion" else "flow"
    by = ["--depths", *map(str, range(1, config.depth + 1)), f"--objective={objective}"]
    run = options(folder, *by, f"--data={data}", "--log-with")
    assert run.length_teacher == "init"
    run = replace(run, output_dir=tmp_path / "run")
    first = Trainer(run)
    first.step()
    first.save()
    lost = [first.step() for _ in range(2)]
    again = Trainer(run)
    assert again.resume("latest")
    assert all(torch.equal(a, b) for a, b in zip(lost, [again.step() for _ in range(2)]))
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def stream(model: DiT) -> list[Tensor]:
    """What each block reads, normalised."""
    read: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda block, arguments: read.append(
                torch.nn.functional.layer_norm(arguments[0], arguments[0].shape[-1:])
            )
        )
        for block in model.blocks
    ]
    with torch.no_grad():
        x, t, y = inputs(model.config)
        model(x, t, 7, y)
    for hook in hooks:
        hook.remove()
    return read


@pytest.mark.parametrize("depths", [(4,), (2, 4), (1, 2, 3, 4)])
def test_folded_gates_start_near_the_model(start: str, depths: tuple[int, ...]) -> None:
    given = ["--depths", *map(str, depths), "--objective=flow"]
    source = pretrained()
    folded, _, said = started(options(start, *given, "--wiring=paper"))
    plain, _, unchanged = started(options(start, *given, "--model.inner-step=unit"))
    assert "rescaled" in said
    assert "unchanged" in unchanged
    read, group = [stream(model) for model in (folded, plain, source)], folded.config.depth_group
    for block, (ours, unfolded, theirs) in enumerate(zip(*read, strict=True)):
        if block < group:
            assert torch.equal(ours, theirs)
        else:  # the MLP of a block that ends a group has read its attention twice
            assert relative_error(ours, theirs) < 0.7 * relative_error(unfolded, theirs)
    x, t, y = inputs(source.config)
    with torch.no_grad():
        expected = source(x, t, 7, y)
        near, far = (relative_error(model(x, t, 7, y), expected) for model in (folded, plain))
    if len(depths) == 1:
        assert max(near, far) < 1e-5  # a single group: nothing to fold
    else:
        assert near < 0.6 * far


def test_blocks_that_no_group_takes_are_said(tmp_path: Path) -> None:
    start = str(save_model(pretrained(replace(CONVENTIONAL, depth=5)), tmp_path))
    _, _, said = started(options(start, "--depths", "3", "5", "--wiring=paper"))
    assert "last 1 blocks" in said


@pytest.mark.parametrize("told", [False, True])
def test_step_embedder_starts_silent_and_learns(told: bool, tmp_path: Path) -> None:
    """Of a flow that becomes a shortcut model, and the other way round."""
    config = replace(CONVENTIONAL, step_conditioned=told, sampling="shortcut" if told else "flow")
    source = pretrained(config)
    start = str(save_model(source, tmp_path / "start"))
    objective = "flow" if told else "shortcut"
    run = options(start, "--depths", "2", "4", f"--objective={objective}", "--log-with")
    model, _, _ = started(run)
    x, t, y = inputs(config)
    with torch.no_grad():
        expected = source(x, t, 7, y)
        for index in (0, 3, 7):
            assert relative_error(model(x, t, index, y), expected) < 1e-6
    trainer = Trainer(replace(run, output_dir=tmp_path / "run"))
    for _ in range(3):
        trainer.step()
    before, after = model.step_embed.linear_out.weight, trainer.model.step_embed.linear_out.weight
    assert not before.any()
    if not told:
        assert after.any()
        first = trainer.model.step_embed.linear_in.weight
        assert not torch.equal(first, model.step_embed.linear_in.weight)


def batch(rows: np.ndarray, shape: tuple[int, ...], step: int = 0) -> StepBatch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(64, *shape, generator=generator)[torch.from_numpy(rows)]
    labels = torch.randint(10, (64,), generator=generator)[torch.from_numpy(rows)]
    return StepBatch(images, labels, StepDraws(5, step, rows), step)


@pytest.mark.parametrize("objective", ["flow", "shortcut", "diffusion"])
def test_frozen_model_teaches_every_row_but_those_of_shortcuts(
    objective: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sampling = "diffusion" if objective == "diffusion" else "flow"
    source = pretrained(replace(CONVENTIONAL, sampling=sampling))
    start = str(save_model(source, tmp_path))
    by = [f"--objective={objective}", "--depths", "2", "4", "--length-teacher"]
    config, usual = options(start, *by, "init"), options(start, *by, "ema")
    live, teacher, _ = started(config)
    ema = pretrained(live.config)
    rows = np.arange(16)
    given = batch(rows, source.config.image_shape)
    networks = Networks(live, ema, teacher)
    targets = build_objective(config)(networks, given)
    others = build_objective(usual)(Networks(live, ema), given)
    for name in ("x_t", "t", "log2_steps", "y"):
        assert torch.equal(getattr(targets, name), getattr(others, name))
    assert targets.depth == others.depth
    assert len(set(targets.depth or ())) == 2
    time = config.row_sizes()["time"]
    assert (time > 0) == (objective == "shortcut")
    assert torch.equal(targets.velocity[:time], others.velocity[:time])
    with torch.no_grad():
        for row in range(time, 16):
            one = slice(row, row + 1)
            taught = source(targets.x_t[one], targets.t[one], 0, targets.y[one])
            assert relative_error(targets.velocity[one], taught) < 1e-5
            assert relative_error(others.velocity[one], taught) > 1e-2
    # Two processes have the same targets: in float32 to rounding, which threads would add to.
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    targets = build_objective(config)(networks, given)
    sizes = [size // 2 for size in config.row_sizes().values()]
    half = replace(config, train_batch_size=8)
    for part in range(2):
        mine = global_rows(sizes, part, 2)
        found = build_objective(half)(networks, batch(mine, source.config.image_shape))
        for field in dataclasses.fields(Targets)[:5]:
            torch.testing.assert_close(
                getattr(found, field.name),
                getattr(targets, field.name)[torch.from_numpy(mine)],
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.parametrize("objective", ["flow", "shortcut"])
def test_fine_tuning_resumes_bitwise(objective: str, start: str, tmp_path: Path) -> None:
    by = [f"--objective={objective}", "--depths", "2", "4", "--length-teacher=init", "--log-with"]
    config = replace(options(start, *by), output_dir=tmp_path / "run")
    first = Trainer(config)
    frozen = {name: tensor.clone() for name, tensor in first.teacher.state_dict().items()}
    for _ in range(2):
        first.step()
    first.save()
    lost = [first.step() for _ in range(3)]
    again = Trainer(config)
    assert again.resume("latest")
    assert all(torch.equal(a, b) for a, b in zip(lost, [again.step() for _ in range(3)]))
    for network in ("model", "ema"):
        theirs = getattr(again, network).state_dict()
        for name, tensor in getattr(first, network).state_dict().items():
            assert torch.equal(tensor, theirs[name]), name
    assert all(torch.equal(frozen[name], t) for name, t in first.teacher.state_dict().items())
    assert not torch.equal(first.ema.final_layer.out.weight, first.teacher.final_layer.out.weight)


def test_command_says_how_it_starts(
    start: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    by = ["--init-from", start, *OPTIONS, "--depths", "2", "4", "--objective=flow", "--log-with"]
    assert main([*by, "--length-teacher=init", "--output-dir", str(tmp_path / "run")]) == 0
    assert "lengths 2, 4 in residual wiring" in capfd.readouterr().out
    assert load_model(tmp_path / "run").config.depths == (2, 4)


def test_card_and_metadata_say_where_a_dial_came_from(tmp_path: Path) -> None:
    known = {"converted_from": "SiT", "converted_file": "SiT-tiny.pt", "weights": "ema"}
    start = str(save_model(pretrained(), tmp_path / "sit-tiny", metadata=known))
    by = ["--init-from", start, *OPTIONS, "--depths", "2", "4", "--log-with", "--warmup-steps=0"]
    assert main([*by, "--output-dir", str(tmp_path / "run")]) == 0  # a shortcut model
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Started from `sit-tiny`, converted from `SiT-tiny.pt` of SiT" in card
    assert "lengths 2, 4 in residual wiring, taught by the frozen model" in card
    assert "step embedder started silent" in card
    made = read_metadata(tmp_path / "run")
    assert (made["objective"], made["length_teacher"], made["step"]) == ("shortcut", "init", "6")
    assert made["converted_file"] == "SiT-tiny.pt"
    # a run that starts from it keeps whose it was
    more = ["--init-from", str(tmp_path / "run"), *OPTIONS, "--log-with"]
    assert main([*more, "--output-dir", str(tmp_path / "more")]) == 0
    assert read_metadata(tmp_path / "more")["converted_from"] == "SiT"
    assert "lengths" not in (tmp_path / "more" / "README.md").read_text().split("Started")[1][:60]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--depths", "2", "3"], "end at the model's 4 blocks"),
        (["--depths", "1", "2", "4"], "rise evenly"),
        (["--depths", "0", "4"], "rise evenly"),
        (["--depths", "4", "2"], "rise evenly"),
        (["--depths", "2", "4", "--model.depth-min", "2"], "--model.depth-min"),
        (["--wiring", "paper", "--model.inner-step", "unit"], "leave one out"),
        (["--depths", "1", "4", "--wiring", "paper"], "less than a group"),
        (["--depths", "2", "4", "--model.hidden-size", "64"], "--model.hidden-size 32"),
        (["--depths", "2", "4", "--model.time-scale", "10"], "--model.time-scale 1.0"),
        (["--depths", "2", "4", "--length-teacher", "init", "--objective", "diffusion"], "teach"),
        (["--depths", "2", "4", "--length-teacher", "init", "--objective", "reflow"], "flow, sho"),
        (["--model.no-length-conditioned", "--length-teacher", "init"], "several lengths"),
        (["--model.no-length-conditioned", "--wiring", "paper"], "leave one out"),
    ],
)
def test_what_cannot_be_is_said(
    given: list[str], says: str, start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = ["--pairs", str(tmp_path / "none")] if "reflow" in given else []
    out = ["--output-dir", str(tmp_path / "run")]
    try:
        code = main(["--init-from", start, *OPTIONS, *pairs, *out, *given])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_options_without_a_model_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--init-from"):
        TrainConfig(wiring="residual")
    with pytest.raises(ValueError, match="--init-from"):
        TrainConfig(length_teacher="init")
    assert parse(["--depths", "6", "12"]).model.depths == (6, 12)
    dial = replace(CONVENTIONAL, length_conditioned=True, depth_min=2, depth_group=2)
    folder = str(save_model(pretrained(dial), tmp_path / "dial"))
    with pytest.raises(ValueError, match="lengths 2, 4 already"):
        started(options(folder, "--wiring", "paper"))
    deep = str(save_model(pretrained(replace(CONVENTIONAL, depth=6)), tmp_path / "deep"))
    with pytest.raises(ValueError, match="--depths 2 4 6"):
        options(deep)
