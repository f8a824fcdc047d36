"""The network with native operators on a CPU is the model."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odelt_fast import DiT, DiTConfig, Sampler
from odelt_fast.engine.cpu import CpuNetwork, choose, native_unavailable

SMALL = DiTConfig(
    image_size=8,
    channels=1,
    hidden_size=48,
    depth=6,
    depth_min=2,
    depth_group=2,
    num_heads=4,
    num_classes=10,
)
CONFIGS = {
    "groups": SMALL,
    "ragged": replace(SMALL, depth=7, depth_min=1, depth_group=2, mlp_ratio=2.0),
    "inverse_depth": replace(SMALL, inner_step="inverse_depth"),
    "residual": replace(SMALL, depth=7, depth_min=1, inner_step="residual"),
    "conventional": replace(SMALL, length_conditioned=False),
}


pytestmark = pytest.mark.usefixtures("native_cache")


def network(config: DiTConfig, dtype: torch.dtype = torch.float32) -> DiT:
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def inputs(batch: int = 3, side: int = 8) -> tuple[Tensor, Tensor, int, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 1, side, side), torch.rand(batch), 3, torch.arange(batch) % 11


def depths(config: DiTConfig) -> list[int | None]:
    return [*config.depths, None] if config.length_conditioned else [None]


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_model(name: str) -> None:
    model = network(CONFIGS[name])
    ours = CpuNetwork(model)
    with torch.no_grad():
        for depth in depths(CONFIGS[name]):
            for batch, side in ((3, 8), (1, 8), (2, 4)):
                arguments = inputs(batch, side)
                torch.testing.assert_close(
                    ours(*arguments, depth=depth),
                    model(*arguments, depth=depth),
                    rtol=1e-5,
                    atol=1e-5,
                )


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_nearer_to_the_truth_than_the_model(name: str, tiled: bool) -> None:
    config = (
        replace(CONFIGS[name], image_size=16, hidden_size=64, num_heads=2)
        if tiled
        else CONFIGS[name]
    )
    exact, model = network(config).double(), network(config, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    errors = []
    arguments = inputs(16, config.image_size)
    with torch.no_grad():
        truth = exact(*arguments, depth=None)
        for function in (CpuNetwork(model), model):
            errors.append(
                (function(*arguments, depth=None).double() - truth).square().mean().sqrt()
            )
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("side", [8, 16])
def test_positions_are_not_rounded_before_they_are_added(side: int) -> None:
    """Nearly all embedded patches are the model's to the bit: with a rounded table a third would
    not be."""
    model = network(replace(SMALL, image_size=16), torch.bfloat16)
    ours, (x, *_) = CpuNetwork(model), inputs(8, side)
    with torch.no_grad():
        work = ours._memory(x)
        ours._embed(x, work, torch.zeros(1, 2 * SMALL.hidden_size))
        assert (work.x != model.embed_patches(x)).float().mean() < 0.01


def test_results_are_not_overwritten_by_the_next_call() -> None:
    ours = CpuNetwork(network(SMALL))
    with torch.inference_mode():
        first = ours(*inputs(), depth=2)
        kept = first.clone()
        ours(*inputs(5), depth=6)
        again = ours(*inputs(), depth=2)
    assert torch.equal(first, kept)
    assert torch.equal(again, kept)
    with torch.no_grad():
        assert torch.equal(
            ours(*inputs(), depth=2), kept
        )  # memory from inference mode is written outside it


def test_gradients_and_depths_of_each_sample_go_to_the_model() -> None:
    model = network(SMALL)
    ours = CpuNetwork(model)
    ours(*inputs(), depth=4).sum().backward()
    assert model.blocks[0].qkv.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(ours(*inputs(), depth=[2, 6, 4]), model(*inputs(), depth=[2, 6, 4]))


def test_threads_do_not_mix_their_batches() -> None:
    ours = CpuNetwork(network(SMALL))
    with torch.no_grad():
        expected = [ours(*inputs(batch), depth=4) for batch in (1, 2)]
    wrong = []

    def work(index: int) -> None:
        with torch.no_grad():
            wrong.extend(
                1
                for _ in range(20)
                if not torch.equal(ours(*inputs_of[index], depth=4), expected[index])
            )

    inputs_of = [inputs(1), inputs(2)]
    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = network(SMALL, torch.float16)
    assert native_unavailable(half) == "its dtype is torch.float16"
    with pytest.raises(ValueError, match="native operators cannot run this model: its dtype"):
        CpuNetwork(half)
    assert choose(half) is half
    model = network(SMALL)
    assert isinstance(choose(model), CpuNetwork)
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path))
    assert choose(model) is model  # not built there, and nothing is built without being asked
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_auto_draws_the_models_pictures_with_it(guidance: float | None) -> None:
    model = network(SMALL)
    auto, eager = (
        Sampler(model, depth=4, steps=4, guidance_scale=guidance, backend=backend)
        for backend in ("auto", "eager")
    )
    torch.testing.assert_close(
        auto(num_images=3, seed=5), eager(num_images=3, seed=5), rtol=1e-5, atol=1e-5
    )
    assert [sampler.explain()["native_operators"] for sampler in (auto, eager)] == [True, False]
