"""Calls that replay: pictures, refusals and statistics are those of the way batch by batch, on
the fused backend's launches in plain PyTorch, with graphs that act as CUDA's do."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from odelt_fast.engine.graphs import GraphCache
from odelt_fast.model import DiT
from odelt_fast.sampling.sampler import Sampler
from tests.engine.test_graphs import CPU, NEEDS_CUDA, Replayed, cuda_model, replayed
from tests.helpers.engine_cases import random_model, run_fused_on_the_cpu


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine has graphs of its own."""
    run_fused_on_the_cpu(monkeypatch, lambda: GraphCache(CPU, capture=replayed))


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_model()


def draw_noise(count: int, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, height, width, generator=torch.Generator().manual_seed(seed))


def no_draw(*_: object) -> None:
    raise AssertionError("this call should have been a replay")


def warm(sampler: Sampler, **call: Any) -> Tensor:
    """The samples of the way batch by batch, whose second call captures; from then on there is no
    such way."""
    sampler(**call)
    images = sampler(**call)
    sampler.draw = no_draw  # type: ignore[method-assign]
    return images


OPTIONS: list[dict[str, Any]] = [
    {"steps": 1},
    {"steps": 3, "depth": 2},
    {"steps": 2, "guidance_scale": 0},
    {"steps": 2, "guidance_scale": 2.5},
    {"steps": 4, "guidance_scale": 2.5, "guidance_interval": (0.2, 0.6)},
    {"steps": 2, "solver": "heun2", "time_grid": "shift:3.0"},
    {"steps": 3, "depth_schedule": [(0, 2), (0.4, 6), (0.7, 4)], "guidance_scale": 1.5},
]
LABELS = [None, 4, 10, [3, 3, 3], np.array([1, 10, 5], np.uint8), torch.tensor([10, 10, 0])]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replays_draw_what_the_way_batch_by_batch_draws(
    model: DiT, options: dict[str, Any]
) -> None:
    whole, sampler = (Sampler(model, **options) for _ in range(2))
    prepared = Sampler(model, **options).prepare(3)
    for labels in LABELS:
        warm(sampler, noise=draw_noise(3), labels=labels)
        prepared(draw_noise(3), labels)
        del sampler.draw
    sampler.draw = prepared.sampler.draw = no_draw  # type: ignore[method-assign]
    for turn, labels in enumerate([*LABELS, *LABELS[::-1]]):
        noise, advanced = draw_noise(3, seed=turn), list[int]()
        call = {"labels": labels, "seed": 3, "first_image": 2}
        expected = whole.draw(noise.shape, noise, labels, 3, 2, None)
        before = noise.clone()
        images = sampler(noise=noise, progress=advanced.append, **call)
        assert torch.equal(images, expected)
        assert torch.equal(prepared(noise, **call), expected)
        assert torch.equal(images, expected), "the next replay has overwritten it"
        assert torch.equal(noise, before)
        assert sum(advanced) == 3 * sampler.operation.steps
        for told in (sampler.stats, prepared.sampler.stats):
            assert told | {"seconds": 0} == whole.stats | {"seconds": 0}
            assert told["seconds"] > 0
        assert not images.is_inference()
    drawn = whole.draw((3, 2, 8, 8), None, None, 9, 5, None)
    assert torch.equal(sampler(3, seed=9, first_image=5), drawn)
    assert torch.equal(prepared(seed=9, first_image=5), drawn)


@pytest.mark.parametrize("sampling", ["flow", "diffusion", "live_reflow", "mean_flow"])
@pytest.mark.parametrize("count", [1, 2])
def test_replays_of_every_kind_of_model(sampling: str, count: int) -> None:
    model = random_model(sampling=sampling)
    expected = warm(sampler := Sampler(model, guidance_scale=2.0), noise=draw_noise(count))
    assert torch.equal(sampler(noise=draw_noise(count)), expected)
    assert torch.equal(sampler.prepare(count)(draw_noise(count)), expected)


def test_images_of_another_size_have_replays_of_their_own(model: DiT) -> None:
    expected = warm(sampler := Sampler(model), noise=draw_noise(2, 4, 12), labels=1)
    assert torch.equal(sampler.prepare(2, size=(4, 12))(draw_noise(2, 4, 12), 1), expected)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.double(),
        lambda x: x.clone().requires_grad_(),
        lambda x: x.clone().requires_grad_() * 1,
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat(2, 1, 1, 1)[2:],
    ],
    ids=["double", "parameter", "in a graph", "strided", "view"],
)
def test_noise_may_have_any_form(model: DiT, form: Callable[[Tensor], Tensor]) -> None:
    sampler, noise = Sampler(model), draw_noise(2)
    expected = warm(sampler, noise=noise, labels=[0, 3])
    for call in (lambda x, y: sampler(noise=x, labels=y), sampler.prepare(2)):
        images = call(form(noise), [0, 3])
        assert torch.equal(images, expected)
        assert not images.requires_grad
        with torch.inference_mode():
            assert not call(form(noise), [0, 3]).is_inference()
    assert torch.equal(sampler(noise=noise.numpy(), labels=[0, 3]), expected)
    assert torch.equal(sampler(2, noise=noise, labels=[0, 3]), expected)


def test_a_prepared_call_captures_at_once_and_a_call_when_it_comes_again(model: DiT) -> None:
    before = Replayed.captures
    Sampler(model).prepare(2)(draw_noise(2), 0)
    assert Replayed.captures == before + 1
    sampler = Sampler(model)
    sampler(noise=draw_noise(3), labels=0)
    assert Replayed.captures == before + 1
    sampler(noise=draw_noise(3), labels=0)
    assert Replayed.captures == before + 2


@pytest.mark.parametrize(
    "call",
    [
        {"seed": -1},
        {"seed": True},
        {"first_image": 0.0},
        {"labels": 11},
        {"labels": True},
        {"labels": [0, 11]},
        {"labels": [0, -1]},
        {"labels": [1.0, 0.0]},
        {"labels": [1, 2, 3]},
        {"labels": [[1, 2]]},
        {"labels": "cat"},
        {"labels": torch.tensor([True, False])},
        {"noise": torch.full((2, 2, 8, 8), math.nan)},
        {"noise": torch.full((2, 2, 8, 8), math.inf)},
    ],
    ids=str,
)
def test_mistakes_are_refused_in_the_same_words(model: DiT, call: dict[str, Any]) -> None:
    good = {"noise": draw_noise(2), "labels": [1, 0]}
    with pytest.raises(ValueError, match=r"\w") as expected:
        Sampler(model, backend="eager")(**{**good, **call})
    sampler = Sampler(model)
    prepared = sampler.prepare(2)
    images = [sampler(**good) for _ in range(3)][-1]
    for function in (sampler, prepared):
        with pytest.raises(ValueError, match=r"\w") as error:
            function(**{**good, **call})
        assert str(error.value) == str(expected.value)
        assert torch.equal(function(**good), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images must be a whole number of at least 1, not 0"),
        ({"num_images": True}, "not True"),
        ({"num_images": 2, "size": 8}, r"size must be a height and a width, multiples of 2, not 8"),
        ({"num_images": 2, "size": (8, 9)}, r"multiples of 2, not \(8, 9\)"),
        ({"num_images": 2, "size": (8, 0)}, "each of size must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    model: DiT, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(model).prepare(**arguments)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_prepared_call_takes_its_own_shape_alone(model: DiT, backend: str) -> None:
    prepared = Sampler(model, backend=backend).prepare(2)
    wanted = r"prepared for noise \(2, 2, 8, 8\), not "
    for noise, told in (
        (draw_noise(3), r"\(3, 2, 8, 8\)"),
        (draw_noise(2, 4, 12), r"\(2, 2, 4, 12\)"),
        (draw_noise(2).numpy(), "ndarray"),
    ):
        with pytest.raises(ValueError, match=wanted + told):
            prepared(noise)


def twice(latents: Tensor) -> Tensor:
    """A decoder: images of twice the size."""
    return latents.repeat(1, 1, 2, 2)


@pytest.mark.filterwarnings("ignore:the GPU cannot repeat")
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"backend": "eager"}, {}),
        ({"batch_size": 2}, {}),
        ({"solver": "bosh3", "rtol": 1e-1, "atol": 1e-1}, {}),
        ({"solver": "torchdiffeq:rk4"}, {}),
        ({"decoder": twice}, {}),
        ({"steps": 3}, {"sampling": "consistency"}),
        ({"steps": 1}, {"sampling": "consistency"}),
    ],
    ids=lambda given: " ".join(f"{k} {getattr(v, '__name__', v)}" for k, v in given.items()),
)
def test_what_is_no_single_replay_is_the_samplers_own_call(
    options: dict[str, Any], changes: dict[str, Any]
) -> None:
    model = random_model(**changes)
    sampler = Sampler(model, **options)
    prepared = sampler.prepare(3)
    for seed in (0, 1, 1):
        noise = draw_noise(3, seed=seed)
        expected = sampler.draw(noise.shape, noise, [1, 2, 10], seed, 4, None)
        told = sampler.stats
        for function in (sampler, prepared):
            images = function(noise=noise, labels=[1, 2, 10], seed=seed, first_image=4)
            assert torch.equal(images, expected)
            assert sampler.stats | {"seconds": 0} == told | {"seconds": 0}


@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("told", [False, True])
def test_each_weight_that_changes_is_seen_by_the_next_call(
    precision: str | None, told: bool
) -> None:
    model = random_model(**({"sampling": "mean_flow", "guidance_max": 4.0} if told else {}))
    options = {"steps": 2, "precision": precision, "guidance_scale": 2.0 if told else None}
    sampler = Sampler(model, **options)
    prepared, noise = sampler.prepare(3), draw_noise(3)
    for labels in ([10, 10, 10], [1, 2, 3]):
        last = [sampler(noise=noise, labels=labels) for _ in range(3)][-1]
        for name, weight in model.named_parameters():
            with torch.no_grad():
                weight.mul_(1.5)
            changed = prepared(noise, labels)
            assert torch.equal(sampler(noise=noise, labels=labels), changed), name
            fresh = Sampler(model, **options)
            assert torch.equal(fresh.draw(noise.shape, noise, labels, 0, 0, None), changed), name
            null = labels[0] == 10 and name.startswith("guidance_embed")  # which is told none
            assert null or not torch.equal(changed, last), name
            last = changed


def test_graphs_that_are_gone_are_made_again(monkeypatch: pytest.MonkeyPatch, model: DiT) -> None:
    cache = GraphCache(CPU, capture=replayed)
    run_fused_on_the_cpu(monkeypatch, lambda: cache)
    sampler, noise = Sampler(model), draw_noise(2)
    prepared = sampler.prepare(2)
    expected = [prepared(noise, 3) for _ in range(3)][-1]
    sampler.fused.release()
    assert torch.equal(prepared(noise, 3), expected)
    cache.limit = 1
    for function in (sampler, prepared):
        Sampler(model, steps=2).prepare(2)(noise, 3)  # which drops the other's
        assert len(cache.graphs) == 1
        assert torch.equal(function(noise=noise, labels=3), expected)


def test_a_replay_that_fails_is_the_samplers_own_call(
    monkeypatch: pytest.MonkeyPatch, model: DiT
) -> None:
    sampler, noise = Sampler(model), draw_noise(2)
    prepared = sampler.prepare(2)
    expected, failures, replay = prepared(noise, 3), 0, Replayed.replay

    def out_of_memory(self: Replayed) -> None:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        replay(self)

    monkeypatch.setattr(Replayed, "replay", out_of_memory)
    with pytest.warns(RuntimeWarning, match="out of memory with 2 images at a time"):
        images = prepared(noise, 3)
    assert failures >= 2  # one of a replay, one of the call that followed it
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_samples_that_are_not_finite_are_named_and_the_next_are_drawn(model: DiT) -> None:
    sampler, noise = Sampler(random_model()), draw_noise(3)
    prepared = sampler.prepare(3)
    expected = [prepared(noise, [1, 2, 3]) for _ in range(2)][1]
    with torch.no_grad():
        row = sampler.model.label_embed.weight[2].clone()
        sampler.model.label_embed.weight[2] = math.nan
    for function in (sampler, prepared):
        with pytest.raises(ValueError, match=r"samples are not finite \(images 1 of 3\)"):
            function(noise=noise, labels=[1, 2, 3])
    with torch.no_grad():
        sampler.model.label_embed.weight[2] = row
    assert torch.equal(prepared(noise, [1, 2, 3]), expected)


def test_threads_share_a_sampler_and_a_prepared_call(model: DiT) -> None:
    sampler = Sampler(model)
    prepared, wrong = sampler.prepare(2), list[object]()
    calls = [(draw_noise(2, seed=turn), [turn, 10 - turn]) for turn in range(4)]
    expected = [prepared(*call) for call in calls]

    def work(turn: int) -> None:
        noise, labels = calls[turn]
        for round in range(30):
            images = prepared(noise, labels) if round % 2 else sampler(noise=noise, labels=labels)
            if not torch.equal(images, expected[turn]):
                wrong.append((turn, round))

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_kept_of_a_call_nor_of_a_sampler() -> None:
    model = random_model()
    sampler = Sampler(model)
    images = weakref.ref([sampler(noise=draw_noise(2), labels=1) for _ in range(3)][-1])
    assert images() is None
    assert sampler.stats["images"] == 2
    dead = weakref.ref(sampler)
    gc.disable()
    try:
        del sampler
        assert dead() is None, "a cycle keeps the model until the collector comes"
    finally:
        gc.enable()


def test_many_shapes_are_forgotten(model: DiT) -> None:
    sampler = Sampler(model)
    for count in range(1, 40):
        sampler.prepare(count)
    assert len(sampler._known) <= 32


@NEEDS_CUDA
@pytest.mark.parametrize("count", [1, 4])
def test_cuda_replays_draw_what_a_call_draws(count: int) -> None:
    sampler = Sampler(cuda_model(), steps=2, guidance_scale=1.5, backend="fused")
    prepared = sampler.prepare(count)
    noise = torch.randn(count, 4, 32, 32, device="cuda")
    expected = sampler.draw(noise.shape, noise, 3, 0, 0, None)
    for x in (noise, noise.cpu(), noise.cpu().pin_memory()):
        for labels in (3, 5, 3):
            images = sampler(noise=x, labels=labels)
            assert torch.equal(images, prepared(x, labels))
            assert torch.equal(images, expected) == (labels == 3)
