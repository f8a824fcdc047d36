"""Forward mode: the kernel in attention's place, and where it is not taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from odelt_fast.train.forward_mode import (
    AttentionTangent,
    attention_with_tangent,
    derivative,
)
from tests.helpers.engine_cases import run_python
from tests.helpers.reference_cases import relative_error

# In a process of its own: the interpreter must be asked for before Triton is imported.
KERNEL = """
from tests.helpers.interpreter import interpret
interpret()
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from odelt_fast.train import forward_mode
from odelt_fast.train.forward_mode import derivative
from tests.helpers.engine_cases import random_model
from tests.helpers.reference_cases import relative_error
for changes in ({}, {"hidden_size": 36, "num_heads": 2}, {"inner_step": "inverse_depth"}):
    model = random_model(image_size=4, **changes)
    generator = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 3, 2, 4, 4, generator=generator)
    t, y = torch.tensor([0.1, 0.8, 0.5]), torch.tensor([3, 10, 0])
    def u(x, t):
        return model(x, t, 3 - t, y, depth=[2, 6, 4])
    inputs, tangents = (x, t), (dx, torch.ones(3))
    with torch.no_grad():
        plain = derivative(u, inputs, tangents)
        chosen = forward_mode.attention_with_tangent
        forward_mode.attention_with_tangent = lambda device: forward_mode.AttentionTangent()
        ours = derivative(u, inputs, tangents)
        forward_mode.attention_with_tangent = chosen
    with sdpa_kernel(SDPBackend.MATH):
        _, truth = torch.func.jvp(u, inputs, tangents)
    print(relative_error(plain, truth.detach()), relative_error(ours, truth.detach()))
    print(float(not torch.equal(ours, plain)))
"""


def test_the_kernel_gives_a_networks_derivative() -> None:
    """In Triton's interpreter, float32, at depths of each row; not by the math form: other bits."""
    lines = run_python(KERNEL).splitlines()
    assert len(lines) == 6
    for errors, other in zip(lines[::2], lines[1::2], strict=True):
        assert max(map(float, errors.split())) < 1e-5
        assert float(other) == 1


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0 / q.shape[-1])


@pytest.mark.parametrize("case", ["float64", "wide", "scale", "constant"])
def test_what_the_kernel_does_not_take_goes_to_the_math_form(case: str) -> None:
    dtype, width = (torch.float64, 8) if case == "float64" else (torch.float32, 8)
    width = 264 if case == "wide" else width
    q, k, v, dq, dk, dv = torch.randn(6, 1, 2, 5, width, dtype=dtype)
    inputs, tangents = (q, k, v), (dq, dk, dv)

    def function(*given: torch.Tensor) -> torch.Tensor:
        if case == "scale":
            return F.scaled_dot_product_attention(*given)
        return attended(*given[:2], v) if case == "constant" else attended(*given)

    with AttentionTangent(), forward_ad.dual_level():
        found = function(*map(forward_ad.make_dual, inputs, tangents))
        _, tangent = forward_ad.unpack_dual(found)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.func.jvp(function, inputs, tangents)
    assert tangent is not None
    assert relative_error(tangent, expected) < 1e-6


def test_what_does_not_move_has_no_derivative() -> None:
    x = torch.randn(3)
    assert torch.equal(derivative(lambda _: torch.ones(3), (x,), (x,)), torch.zeros(3))


def test_the_form_is_chosen_by_the_device() -> None:
    assert isinstance(attention_with_tangent(torch.device("cuda")), AttentionTangent)
    assert not isinstance(attention_with_tangent(torch.device("cpu")), AttentionTangent)
