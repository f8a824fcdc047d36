"""The engine computes what the model does: every recorded case, every kind of network and
trajectory. It says why it cannot run."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from odelt_fast.checkpoints.folder import load_model, save_model
from odelt_fast.engine import availability, operators, trajectory, tuning
from odelt_fast.engine.engine import Engine
from odelt_fast.engine.fused import shared_engine
from odelt_fast.engine.plans import PLANS
from odelt_fast.kernels.linear import linear_reference
from odelt_fast.kernels.quantize import quantize_rows_reference
from odelt_fast.model import Block, DiT
from odelt_fast.sampling.sampler import Sampler
from tests.helpers.engine_cases import random_model, run_fused_on_the_cpu, run_python
from tests.helpers.reference_cases import (
    depth_of,
    inputs,
    load_case,
    model_cases,
    quantities,
    relative_error,
)

FP8_BOUND = 4e-2  # of one evaluation
FLOAT8_PLANS = tuple(name for name in PLANS if name != "whole")


def test_recorded_cases_are_there() -> None:
    assert model_cases()


@pytest.mark.parametrize(("path", "name"), quantities(r"velocity_depth\d+"))
def test_recorded_velocity(path: Path, name: str) -> None:
    case = load_case(path)
    model, depth = case.model(), depth_of(name)
    with torch.no_grad():
        eager = model(*inputs(case), depth=depth)
        for plan in PLANS:
            velocity = Engine(model, kind="reference", plans=(plan,))(*inputs(case), depth)
            assert relative_error(velocity, case.tensor(name)) < 2e-6, plan
            assert relative_error(velocity, eager) < 1e-6, plan


@pytest.mark.parametrize(("path", "name"), quantities(r"velocity_bf16_depth\d+"))
def test_bfloat16_is_no_worse_than_the_models_or_the_references(path: Path, name: str) -> None:
    case = load_case(path)
    exact, model = case.tensor(name.replace("_bf16", "")), case.model().to(torch.bfloat16)
    with torch.no_grad():
        eager = model(*inputs(case), depth=depth_of(name))
        velocity = Engine(model, kind="reference")(*inputs(case), depth_of(name))
    bound = min(relative_error(eager, exact), relative_error(case.tensor(name), exact))
    assert relative_error(velocity, exact) <= 1.05 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("path", "name"), quantities(r"velocity_depth\d+"))
def test_float8_stays_within_its_bound(path: Path, name: str, dtype: torch.dtype) -> None:
    case = load_case(path)
    for plan in FLOAT8_PLANS:
        with torch.no_grad():
            engine = Engine(case.model().to(dtype), "auto", "fp8", "reference", (plan,))
            error = relative_error(engine(*inputs(case), depth_of(name)), case.tensor(name))
        # Below a thousandth nothing would have been rounded to the three bits of e4m3.
        assert 1e-3 < error < FP8_BOUND, plan


def test_float8_stays_within_its_bound_on_the_trained_model() -> None:
    model = load_model("digits")
    generator = torch.Generator().manual_seed(0)
    x, t, y = (
        torch.randn(64, 1, 8, 8, generator=generator),
        torch.rand(64, generator=generator),
        torch.arange(64) % 11,
    )
    with torch.no_grad():
        for depth in model.config.depths:
            exact = model(x, t, 7, y, depth=depth)
            assert (
                1e-3
                < relative_error(
                    Engine(model, precision="fp8", kind="reference")(x, t, 7, y, depth), exact
                )
                < FP8_BOUND
            )


@pytest.mark.parametrize(("path", "name"), quantities(r"sample_depth\d+_T\d+_cfg[\d.]+"))
def test_recorded_euler_sample(monkeypatch: pytest.MonkeyPatch, path: Path, name: str) -> None:
    run_fused_on_the_cpu(monkeypatch)
    case = load_case(path)
    steps, scale = re.search(r"_T(\d+)_cfg([\d.]+)", name).groups()
    sampler = Sampler(
        case.model(), depth_of(name), int(steps), guidance_scale=float(scale), backend="fused"
    )
    assert (
        relative_error(
            sampler(noise=case.tensor("noise"), labels=case.tensor("y")), case.tensor(name)
        )
        < 1e-5
    )
    assert sampler.explain()["backend"] == "fused"


@pytest.mark.parametrize(
    "changes",
    [
        {"inner_step": "inverse_depth"},
        {"inner_step": "residual", "depth": 7, "depth_min": 3},
        {"time_scale": 1000.0, "time_period": 10752.0},
        {"length_conditioned": False},
        {"step_conditioned": False},
        {"depth": 7, "depth_min": 4, "depth_group": 3},  # depth 4 runs 3 blocks, depth 7 runs 6
        {"depth": 7, "depth_min": 3, "depth_group": 4},  # depth 3 runs none
        {"depth_group": 1, "depth_min": 1},
        {"num_classes": 1},
        {"patch_size": 4, "channels": 3, "mlp_ratio": 2.5},
    ],
    ids=str,
)
def test_every_kind_of_network(changes: dict[str, object]) -> None:
    model = random_model(**changes)
    engine = Engine(model, kind="reference")
    for batch, depth in ((1, None), (5, None), *((2, depth) for depth in model.config.depths)):
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, 8, 8, model.config.channels, generator=generator).permute(0, 3, 1, 2)
        t, y = (
            torch.rand(batch, generator=generator),
            torch.arange(batch) % (model.config.num_classes + 1),
        )
        with torch.no_grad():
            assert relative_error(engine(x, t, 3, y, depth), model(x, t, 3, y, depth=depth)) < 2e-6
            wide = torch.randn(batch, model.config.channels, 4, 16, generator=generator)
            assert (
                relative_error(engine(wide, 0.5, 7, y, depth), model(wide, 0.5, 7, y, depth=depth))
                < 2e-6
            )


@pytest.mark.parametrize(
    ("plan", "precision"),
    [*((plan, None) for plan in PLANS), *((plan, "fp8") for plan in FLOAT8_PLANS)],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"length_conditioned": False},
        {"depth": 7, "depth_min": 4, "depth_group": 3, "inner_step": "inverse_depth"},
        {"depth": 5, "depth_min": 3, "inner_step": "residual"},
    ],
    ids=str,
)
def test_what_is_explained_is_what_is_launched(
    changes: dict[str, object], precision: str | None, plan: str
) -> None:
    model = random_model(**changes)
    engine = Engine(model, "auto", precision, "reference", (plan,))
    launched: list[str] = []

    def counted(name: str, operator: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            launched.append(name)
            return operator(*args, **kwargs)  # type: ignore[operator]

        return call

    for name, operator in vars(engine.ops).items():
        setattr(engine.ops, name, counted(name, operator))
    for depth in model.config.depths:
        with torch.no_grad():
            modulations = engine.modulations(torch.zeros(1, 32), torch.zeros(1, 32), depth)
            launched.clear()
            engine.velocity(torch.zeros(2, 2, 8, 8), modulations, depth)
        assert len(launched) == engine.describe(2, 16, depth)["launches_per_evaluation"]
        blocks = "whole" if plan == "whole" else "attention"
        live = model.config.live_blocks(depth)
        assert launched.count(blocks) == (live if blocks == "attention" else live > 0)


SAMPLERS = [
    {},
    {"steps": 1, "depth": 2},
    {"steps": 128, "depth": 2},
    {"guidance_scale": 2.5},
    {"guidance_scale": 0},
    {"time_grid": "shift:3"},
    {"solver": "heun2", "guidance_scale": -1.0},
    {"solver": "rk4", "steps": 2},
    {"solver": "fixed:dopri5", "steps": 2},
    {"depth_schedule": [(0, 2), (0.4, 6), (0.7, 4)]},
    {"depth_schedule": [(0, 6), (0.4, 4)], "solver": "midpoint"},
    {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3, "guidance_scale": 2.0},
    {"solver": "bosh3", "error_norm": "batch", "depth_schedule": [(0, 2), (0.5, 6)]},
    {"solver": "tsit5", "error_norm": "batch", "guidance_scale": 1.5, "depth": 4},
    {"solver": "dop853", "rtol": 1e-4, "atol": 1e-4},
    {"solver": "torchdiffeq:rk4"},
]


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
@pytest.mark.parametrize("labels", [None, 3, 10, [10, 10, 0, 10, 5]], ids=str)
def test_samples_are_the_models(
    monkeypatch: pytest.MonkeyPatch, options: dict, labels: object
) -> None:
    if options.get("solver", "").startswith("torchdiffeq"):
        pytest.importorskip("torchdiffeq", reason="a machine that is lent may not have it")
    model = random_model()
    advanced: list[int] = []
    eager = Sampler(model, backend="eager", batch_size=3, **options)
    expected = eager(5, labels=labels, seed=3)
    run_fused_on_the_cpu(monkeypatch)
    sampler = Sampler(model, backend="fused", batch_size=3, **options)
    images = sampler(5, labels=labels, seed=3, progress=advanced.append)
    torch.testing.assert_close(images, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))
    if sampler.fused.trajectory:
        for name in ("accepted", "rejected", "evaluations_needed", "status"):
            assert sampler.stats[name] == eager.stats[name], name
        # Without FSAL the host's loop leaves out the velocity at t = 1, which no step needs.
        more = sampler.stats["evaluations_per_image"] - eager.stats["evaluations_per_image"]
        assert more == 0 or (sampler.operation.solver == "dop853" and more == 1)
        if sampler.operation.adaptive:  # as many steps as the slowest image of each batch tried
            tried = [a + r for a, r in zip(sampler.stats["accepted"], sampler.stats["rejected"])]
            assert sum(advanced) == 3 * max(tried[:3]) + 2 * max(tried[3:])
        else:
            assert sum(advanced) == 5 * sampler.operation.steps


@pytest.mark.parametrize("sampling", ["flow", "consistency", "live_reflow", "diffusion"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("guidance", [None, 1.5])
def test_samples_of_every_kind_of_model(
    monkeypatch: pytest.MonkeyPatch, sampling: str, steps: int, guidance: float | None
) -> None:
    model = random_model(sampling=sampling)
    expected = Sampler(model, steps=steps, guidance_scale=guidance, backend="eager")(4, seed=1)
    run_fused_on_the_cpu(monkeypatch)
    images = Sampler(model, steps=steps, guidance_scale=guidance, backend="fused")(4, seed=1)
    torch.testing.assert_close(images, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3},
        {"depth_schedule": [(0, 2), (0.4, 6)], "guidance_scale": 2.0},
        {"solver": "dopri5", "guidance_scale": 2.0, "rtol": 1e-3, "atol": 1e-3},
    ],
    ids=str,
)
@pytest.mark.parametrize("sampling", ["flow", "diffusion"])
def test_samples_of_converted_models(
    monkeypatch: pytest.MonkeyPatch, sampling: str, options: dict
) -> None:
    model = random_model(
        sampling=sampling, inner_step="residual", guided_channels=1, time_scale=100.0
    )
    expected = Sampler(model, backend="eager", **options)(4, seed=1)
    run_fused_on_the_cpu(monkeypatch)
    images = Sampler(model, backend="fused", **options)(4, seed=1)
    torch.testing.assert_close(images, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


def test_the_size_of_the_modulation_table_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run_fused_on_the_cpu(monkeypatch)
    model = random_model()
    for labels in (None, 10):
        expected = Sampler(model, steps=7, backend="fused")(4, labels=labels)
        monkeypatch.setattr(
            trajectory, "TABLE_BYTES", 3 * 4 * 6 * 6 * 32 * 4
        )  # three steps of four rows
        torch.testing.assert_close(
            Sampler(model, steps=7, backend="fused")(4, labels=labels), expected, rtol=0, atol=1e-5
        )


def test_one_label_for_all_and_the_null_label_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    run_fused_on_the_cpu(monkeypatch)
    sampler, rows = Sampler(random_model(), steps=3, backend="fused"), []
    modulation = sampler.fused.engine.ops.modulation

    def counted(condition: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows.append(len(condition))
        return modulation(condition, weight, bias)

    sampler.fused.engine.ops.modulation = counted
    for labels, expected in ((10, []), (4, [3, 3]), ([1, 2, 1, 2], [12, 12])):
        rows.clear()
        sampler(4, labels=labels)
        assert rows == expected


def test_samples_can_be_used_in_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    run_fused_on_the_cpu(monkeypatch)
    weight = torch.ones((), requires_grad=True)
    (Sampler(random_model(), backend="fused")(2) * weight).sum().backward()
    assert weight.grad is not None


def test_no_weight_is_held_twice_and_the_model_can_still_be_saved(tmp_path: Path) -> None:
    model, untouched = random_model(), random_model()
    engine = Engine(model, kind="reference")
    assert (
        engine.weights.modulation.weight.untyped_storage().data_ptr()
        == model.blocks[3].modulation.weight.untyped_storage().data_ptr()
    )
    assert (
        Engine(model, kind="reference").weights.modulation.weight.data_ptr()
        == engine.weights.modulation.weight.data_ptr()
    )
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    for (name, weight), expected in zip(loaded.named_parameters(), untouched.parameters()):
        assert torch.equal(weight, expected), name
    moved, y = copy.deepcopy(model).double().float(), torch.tensor([1, 2])
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (
            relative_error(Engine(moved, kind="reference")(x, 0.5, 2, y), model(x, 0.5, 2, y))
            < 1e-6
        )


def test_weights_are_in_proportion_to_the_live_blocks() -> None:
    whole = random_model()
    for depth in (2, 4, 6):
        model = copy.deepcopy(whole).truncate(depth)
        told = Engine(model, kind="reference").describe(1, 16, depth)["weight_bytes"]
        held = sum(parameter.nbytes for parameter in model.parameters())
        assert told["ends"] + told["live_blocks"] * told["per_block"] == held
        assert told["live_blocks"] == depth


def test_changed_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = random_model(), random_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    expected = Sampler(other, backend="eager")(2)
    run_fused_on_the_cpu(monkeypatch)
    sampler = Sampler(model, backend="fused")
    sampler(2)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(sampler(2), expected, rtol=0, atol=1e-4)
    model.double().float()
    torch.testing.assert_close(sampler(2), expected, rtol=0, atol=1e-4)


def test_dead_blocks_never_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model itself, on the CPU: whole groups up to the depth, whether the others are loaded or
    not."""
    # Without native operators: on a GPU another test may have built them for its while nodes.
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path))
    model, ran = random_model(depth=7, depth_min=4, depth_group=3), []
    forward = Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda block, *inputs: ran.append(block) or forward(block, *inputs)
    )
    expected = Sampler(model, depth=4, steps=2)(3)
    assert ran == 2 * list(model.blocks[:3])
    ran.clear()
    assert torch.equal(Sampler(model.truncate(4), steps=2)(3), expected)
    assert ran == 2 * list(model.blocks)


KERNELS = """
from tests.helpers.interpreter import interpret
interpret()
import torch
from tests.helpers.engine_cases import random_model
from odelt_fast.engine.engine import Engine
from tests.helpers.reference_cases import relative_error
small = {"image_size": 4, "channels": 1, "hidden_size": 24, "depth": 5, "depth_min": 3}
short = {"length_conditioned": False, "depth": 2, "depth_min": 2}
for changes in ({"inner_step": "inverse_depth"}, {"inner_step": "residual"}, short):
    model = random_model(**small | changes)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0.1, 0.8]), torch.tensor([3, 10])
    with torch.inference_mode():
        engine = Engine(model)
        for depth in model.config.depths:
            print(depth, relative_error(engine(x, t, 3, y, depth), model(x, t, 3, y, depth=depth)))
        both = torch.cat([x[:1], x[:1]])
        shared = torch.tensor([3, 10])
        label = engine.condition(t[:1], 3) + engine.weights.label_embed(shared)
        tables = engine.modulations(label + engine.length_rows(depth), label, depth)
        said, null = model(both, t[:1].expand(2), 3, shared, depth=depth).chunk(2)
        step = engine.euler_step(x[:1], tables, depth, 0.25, 1.5)
        print(depth, relative_error(step, x[:1] + 0.25 * (null + 1.5 * (said - null))))
"""


def test_compiled_kernels_make_the_models_velocity() -> None:
    """In Triton's interpreter, float32, every operator of the engine's sequence."""
    lines = run_python(KERNELS).splitlines()
    errors = [float(line.split()[1]) for line in lines]
    assert len(errors) == 8
    assert max(errors) < 2e-6


NO_TRITON = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("triton is blocked")
sys.meta_path.insert(0, Blocked())
import torch
from tests.helpers.engine_cases import random_model
from odelt_fast import Sampler
from odelt_fast.engine import availability
from odelt_fast.engine.availability import kernels_unavailable, model_unsupported
model = random_model()
print(kernels_unavailable())
expected = Sampler(model, backend="eager")(2)
assert torch.equal(Sampler(model)(2), expected)
# As on a GPU.
availability.fused_unavailable = lambda model: kernels_unavailable() or model_unsupported(model)
try:
    Sampler(model, backend="fused")
except ValueError as error:
    print(error)
assert torch.equal(Sampler(model)(2), expected)
"""


def test_without_triton_auto_runs_the_model_and_fused_says_why() -> None:
    first, second = run_python(NO_TRITON).splitlines()
    assert (
        first
        == "it needs Triton 3.6 or newer (pip install 'odelt-fast[cuda]'), which cannot be loaded:"
        " triton is blocked"
    )
    assert second == f"backend 'fused' cannot run here: {first}"


class Adapted(nn.Linear):
    """As adapters (LoRA) and quantisation put them in a block."""


def hooked(model: DiT) -> DiT:
    model.blocks[1].register_forward_hook(lambda *_: None)
    return model


def adapted(model: DiT) -> DiT:
    model.blocks[0].qkv = Adapted(32, 96)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            random_model().double(),
            "computes in float32, bfloat16 or float16, and the model is in float64",
        ),
        (hooked(random_model()), "module blocks.1 has a forward hook"),
        (adapted(random_model()), r"no Adapted \(module blocks.0.qkv\)"),
        (
            random_model(hidden_size=520, num_heads=2, depth=2),
            "head dimension 256, and the model has 520 and 260",
        ),
    ],
)
def test_a_model_that_the_engine_does_not_know_is_refused(model: DiT, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Engine(model, kind="reference")


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        ("flash", "flash-attn cannot be loaded|needs an NVIDIA GPU"),
        ("xformers", "xformers cannot be loaded|needs an NVIDIA GPU"),
        ("cudnn", "it needs an NVIDIA GPU, not cpu"),
        ("sdpa_flash", "it needs an NVIDIA GPU, not cpu"),
        ("fast", f"attention must be one of {', '.join(operators.ATTENTIONS)}, not 'fast'"),
    ],
)
def test_an_attention_that_cannot_run_is_refused_with_the_reason(
    attention: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Engine(random_model(), attention=attention)


def test_attention_constraints() -> None:
    gpu, half = torch.device("cuda"), torch.bfloat16
    assert availability.attention_unavailable("sdpa", gpu, torch.float32, 70) is None
    assert availability.attention_unavailable("triton", gpu, torch.float32, 70) is None
    assert availability.attention_unavailable("sdpa_efficient", gpu, torch.float32, 72) is None
    for name in ("cudnn", "sdpa_flash"):
        assert "not float32" in availability.attention_unavailable(name, gpu, torch.float32, 64)
    if torch.backends.cudnn.is_available():
        assert availability.attention_unavailable("cudnn", gpu, half, 72) is None
        assert "multiples of 8 and at most 128, not 136" in availability.attention_unavailable(
            "cudnn", gpu, half, 136
        )
    told = availability.describe_attentions(torch.device("cpu"), torch.float32, 64)
    assert set(told) == set(operators.ATTENTIONS) - {"auto"}
    assert "untested here" in told["flash"]
    assert "untested here" in told["xformers"]


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, refused in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, capability=capability: capability
        )
        reason = availability.device_unavailable(torch.device("cuda", 0))
        assert reason == (
            "it needs a GPU of compute capability 8.0 (Ampere) or newer, and Tesla T4 has 7.5"
            if refused
            else None
        )


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_products_of_pytorch_are_the_kernels(activation: str) -> None:
    """Layout, transposition, scales; on a CPU, whose fused GELU is the exact form (1e-3 from the
    tanh form that CUDA's is)."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator) / 5 for shape in ((2, 16, 32), (48, 32), (48,))
    )
    plain = linear_reference(x, weight, bias, activation)
    assert relative_error(operators.cublas_linear(x, weight, bias, activation), plain) < (
        1e-6 if activation == "none" else 2e-3
    )
    if activation == "none":
        (q, q_scale), (w, w_scale) = quantize_rows_reference(x), quantize_rows_reference(weight)
        expected = linear_reference(q, w, bias, x_scale=q_scale, weight_scale=w_scale)
        try:
            product = operators.cublas_float8(q, q_scale, w, w_scale, bias.bfloat16())
        except RuntimeError as error:  # torch 2.11's on a CPU
            if "per-tensor scaling for CPU" not in str(error):
                raise
            pytest.skip("this torch has no row-wise float8 product for a CPU")
        assert relative_error(product, expected) < 4e-3


def test_the_measured_table_decides() -> None:
    shape = {
        "operator": "linear",
        "dtype": "bfloat16",
        "activation": "none",
        "columns": 2304,
        "inner": 768,
    }
    table = [
        {**shape, "amount": 256, "microseconds": {"cublas": 9.0, "triton": 7.0}},
        {**shape, "amount": 4096, "microseconds": {"cublas": 20.0, "triton": 30.0, "other": 1.0}},
        {**shape, "columns": 768, "amount": 512, "microseconds": {"triton": 1.0}},
    ]
    both = ("cublas", "triton")
    assert tuning.fastest(table, both, 300, **shape) == "triton"
    assert tuning.fastest(table, both, 8192, **shape) == "cublas"
    assert tuning.fastest(table, both, 8193, **shape) is None
    assert tuning.fastest(table, both, 1024, **shape) is None
    assert tuning.fastest(table, ("other",), 256, **shape) is None
    assert tuning.fastest(table, both, 256, **{**shape, "dtype": "float16"}) is None
    assert tuning.tuning_path("NVIDIA H200").name == "nvidia-h200.json"


def test_a_specialised_product_runs_where_it_was_measured_to_be_fastest() -> None:
    shape = {"operator": "linear", "dtype": "bfloat16", "inner": 32, "amount": 64}
    times = {"cublas": 3.0, "triton": 2.0, "ping_pong": 1.0}
    engine = Engine(random_model().bfloat16(), kind="reference")
    engine.on_gpu, engine.measured = True, [
        {**shape, "activation": "none", "columns": 96, "microseconds": times},
        {**shape, "activation": "gated", "columns": 32, "microseconds": times},
    ]  # fmt: skip
    asked: list[object] = []

    def linear(x: torch.Tensor, *given: object, configuration: str | None, **_: object) -> None:
        asked.append(configuration)

    engine.ops.linear = linear
    h, residual = torch.zeros(4, 16, 32).bfloat16(), torch.zeros(4, 16, 32).bfloat16()
    qkv, out = (engine.weights.blocks[0][name] for name in ("qkv", "attention_out"))
    engine.product(h, qkv)
    engine.product(h, out, residual=residual, gate=torch.zeros(4, 32).bfloat16())
    assert asked == ["ping_pong"] * 2
    assert engine.linear_choice(512, qkv) == engine.linear_choice(64, out) == "cublas"
    assert engine.linear_choice(512, out, "gated") == "triton"
    older = Engine(random_model().bfloat16(), kind="reference")
    older.on_gpu, older.measured, older.capability = True, engine.measured, (8, 0)
    assert older.linear_choice(64, qkv) == "triton"


def test_samplers_of_one_model_share_its_engine() -> None:
    model = random_model()
    engine, graphs = shared_engine(model)
    assert shared_engine(model) == (engine, graphs)
    assert shared_engine(model, "sdpa")[0] is not engine
    model.patch_embed.weight = nn.Parameter(model.patch_embed.weight * 2)
    assert shared_engine(model)[0] is not engine
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None


def test_the_plan_that_was_measured_to_be_fastest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the shapes where it was; elsewhere the first of the engine's, or the one asked for."""
    shape = {"operator": "plan", "dtype": "float32", "heads": 2, "head_dim": 16, "tokens": 16}
    times = {"seven": 3.0, "five": 2.0, "gated": 1.0}
    table = [shape | {"amount": 1, "microseconds": times}]
    monkeypatch.setattr("odelt_fast.engine.engine.read_tuning", lambda device: table)
    engine = Engine(random_model(), kind="reference", plans=("seven", "five"))
    assert engine.plan_choice(1, 16) == "five"
    assert engine.describe(1, 16, 6)["plan"] == "five"
    assert engine.plan_choice(8, 16) == engine.plan_choice(1, 64) == "seven"
    only = Engine(random_model(), kind="reference", plans=("seven",))
    assert only.plan_choice(1, 16) == "seven"
    table[0]["microseconds"] = times | {"whole": 0.5}
    engine = Engine(random_model(), kind="reference", plans=("seven", "whole"))
    assert engine.plan_choice(1, 16) == "whole"


def test_a_plan_is_taken_by_name_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    with pytest.raises(ValueError, match="plan must be one of auto, seven"):
        Sampler(model, plan="six")
    with pytest.raises(ValueError, match="plan 'five' is for the fused backend"):
        Sampler(model, plan="five")
    expected = Sampler(model, backend="eager")(3)
    run_fused_on_the_cpu(monkeypatch)
    sampler = Sampler(model, plan="five")
    torch.testing.assert_close(sampler(3), expected, rtol=0, atol=1e-4)
    assert sampler.explain()["plan"] == "five"
    assert set(sampler.explain()["matrix_products"].values()) == {"triton float32"}
