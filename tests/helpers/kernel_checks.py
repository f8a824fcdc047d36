"""Instruments of the kernel cases: guarded tensors, poisoned outputs, orders of summation, bounds.

A case is a function(rng, device, dtype): it draws sizes and inputs from `rng` (random.Random), runs
a kernel inside `watched(...)`, compares it with float64 and returns what must be equal at every
repeat. `kernel_cases_rows` and `kernel_cases_gemm` hold lists `CASES` of (name, case);
`kernel_cases` runs them.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.stress.kernel_audit import audited, exact_fma

GUARD = 64  # elements before and after each tensor
ORDERS = 31  # of summation, beside the given one, in which PyTorch's error is measured
ENOUGH = 32  # elements, times results, without which an error is luck


def batch_size(rng: random.Random, most: int = 257) -> int:
    """Mostly small, sometimes up to `most`."""
    some = rng.randint(1, min(most, 17))
    return rng.choice([1, 1, 2, 3, 5, some, rng.randint(1, most) if rng.random() < 0.1 else 2])


def enough_tokens(tokens: int, others: int) -> int:
    """`tokens`, or as many as make 256 elements with `others` a token.

    The largest error of fewer is luck (`check_error`).
    """
    return max(tokens, -(-256 // others))


def guarded(
    rng: random.Random,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    scale: float = 1.0,
    layout: str = "",
) -> Tensor:
    """Normal values times `scale` in a buffer that is NaN elsewhere: a read from outside shows.

    layout: "contiguous", "strided" (rows further apart), "misaligned" (starts off a 16-byte
    border), "transposed" (last dimension not contiguous), "expanded" (first dimension of stride 0);
    "" draws one.
    """
    layout = layout or rng.choice(
        ["contiguous", "contiguous", "strided", "misaligned", "transposed", "expanded"]
    )
    if layout == "expanded" and len(shape) > 1:
        return guarded(rng, (1, *shape[1:]), dtype, device, scale, "contiguous").expand(shape)
    sizes = list(shape)
    if layout == "transposed" and len(sizes) > 1:
        sizes[-1], sizes[-2] = sizes[-2], sizes[-1]
    padding = rng.choice([1, 3, 8]) if layout == "strided" else 0
    offset = GUARD + (rng.randint(1, 7) if layout == "misaligned" else 0)
    padded = [*sizes[:-1], sizes[-1] + padding] if sizes else []
    count = math.prod(padded)
    buffer = torch.full((offset + count + GUARD,), math.nan, dtype=dtype, device=device)
    view = buffer[offset : offset + count].view(padded)
    view = view[..., : sizes[-1]] if sizes else view
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    view.copy_((torch.randn(sizes, generator=generator) * scale).to(dtype))
    return view.transpose(-1, -2) if layout == "transposed" and len(sizes) > 1 else view


@contextlib.contextmanager
def watched(*inputs: Tensor | None, reachable: Sequence[Tensor] = ()) -> Iterator[None]:
    """Runs kernels under guard: AssertionError for what they do to memory that is not theirs.

    Every torch.empty and torch.empty_like inside gives a NaN-filled tensor (largest value for
    integers) with guards on both sides; at the end the guards and all `inputs`, with what surrounds
    them, must hold the bits they held before. In the interpreter every address must belong to an
    argument of its launch or to a tensor in `reachable`, and programs of a launch must not race
    (`kernel_audit`).
    """
    before = [(_bits(tensor), _bits(tensor).clone()) for tensor in inputs if tensor is not None]
    guards: list[Tensor] = []
    empty = torch.empty

    def guarded_empty(*size: int | Sequence[int], **options: object) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = math.prod(shape)  # type: ignore[arg-type]
        buffer = empty((count + 2 * GUARD,), **options)  # type: ignore[call-overload]
        buffer.fill_(math.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max)
        guards.extend([buffer[:GUARD], buffer[GUARD + count :]])
        return buffer[GUARD : GUARD + count].view(shape)  # type: ignore[arg-type]

    def guarded_empty_like(tensor: Tensor, **options: object) -> Tensor:
        options = {"dtype": tensor.dtype, "device": tensor.device, **options}
        return guarded_empty(tuple(tensor.shape), **options)

    empty_like = torch.empty_like
    torch.empty, torch.empty_like = guarded_empty, guarded_empty_like  # type: ignore[assignment]
    try:
        with contextlib.ExitStack() as stack:
            if _interpreting():
                stack.enter_context(exact_fma())
                stack.enter_context(audited(reachable))
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    for guard in guards:
        untouched = (
            guard.isnan() if guard.is_floating_point() else guard == torch.iinfo(guard.dtype).max
        )
        assert bool(untouched.all()), "a kernel wrote outside its output"
    for now, then in before:
        assert torch.equal(now, then), "a kernel wrote into an input or beside it"


@dataclass(frozen=True)
class Axes:
    """Names of the dimensions of a function's tensors, to run it over them in any order.

    arguments, outputs: a string for each with one letter a dimension, e.g. "bnd" for (B, N, D),
    None for what is no tensor. A dimension of size 1 stays as it is, and so does one whose letter
    has no order. sizes: letter -> size of the dimensions that are permuted. derived: letter ->
    function that makes its order from those of `sizes`, for dimensions that hold several others.
    """

    arguments: Sequence[str | None]
    outputs: Sequence[str]
    sizes: Mapping[str, int]
    derived: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = field(default_factory=dict)

    def orders(self, rng: random.Random, count: int = ORDERS) -> Iterator[dict[str, Tensor]]:
        """`count` random orders of all dimensions: letter -> permutation."""
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        for _ in range(count):
            order = {
                letter: torch.randperm(size, generator=generator)
                for letter, size in self.sizes.items()
            }
            yield order | {letter: make(order) for letter, make in self.derived.items()}

    def plain(
        self, rng: random.Random, function: Callable[..., Tensor], *arguments: Any
    ) -> list[Tensor]:
        """`results` of a function that has one."""
        return [result for (result,) in self.results(rng, function, *arguments)]

    def results(
        self, rng: random.Random, function: Callable[..., Any], *arguments: Any
    ) -> list[tuple[Tensor, ...]]:
        """function(*arguments), and the same over permuted dimensions, permuted back."""
        arguments = tuple(map(dense, arguments))
        results = [as_tuple(function(*arguments))]
        for order in self.orders(rng):
            pairs = zip(arguments, self.arguments)
            made = as_tuple(function(*(permuted(value, name, order) for value, name in pairs)))
            back, outputs = inverse(order), zip(made, self.outputs, strict=True)
            results.append(tuple(permuted(value, name, back) for value, name in outputs))
        return results


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def dense(value: Any) -> Any:
    """A contiguous copy of a tensor.

    PyTorch's float16 products on a CPU take in what lies between the rows of a strided operand.
    """
    return (
        value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
    )


def inverse(order: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {letter: permutation.argsort() for letter, permutation in order.items()}


def permuted(value: Any, name: str | None, order: Mapping[str, Tensor]) -> Any:
    """A tensor with its named dimensions in another order; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    for dimension, letter in enumerate(name or ""):
        if letter in order and value.shape[dimension] == len(order[letter]) > 1:
            value = value.index_select(dimension, order[letter].to(value.device))
    return value


def check_error(name: str, got: Tensor, plain: Tensor | Sequence[Tensor], exact: Tensor) -> None:
    """AssertionError unless `got` is within twice PyTorch's own error in the same dtype.

    Errors are distances from `exact` (float64): the largest, and the root of the mean square, over
    all elements. plain: PyTorch's result, or several that are equally right, made over permuted
    dimensions (`Axes.plain`); the farthest counts. On few elements, or where few are
    ill-conditioned (a row of little variance), a single result lies near or far by luck, and twice
    its distance would say nothing; over many elements all lie equally far. Cases therefore have at
    least ENOUGH elements, or sums whose order can be drawn.
    """
    plain = [plain] if isinstance(plain, Tensor) else list(plain)
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.dtype == plain[0].dtype, f"{name}: {got.dtype}, not {plain[0].dtype}"
    if not exact.numel():
        return
    assert exact.numel() * len(plain) >= ENOUGH, (
        f"{name}: {exact.numel()} elements in {len(plain)} results prove nothing"
    )
    assert bool(torch.isfinite(got).all()), f"{name}: not finite"
    (largest, square), *others = (
        (error.max().item(), error.square().mean().sqrt().item())
        for error in _distances(exact, got, *plain)
    )
    for kind, mine, other in (
        ("largest", largest, max(error for error, _ in others)),
        ("mean square", square, max(error for _, error in others)),
    ):
        assert mine <= 2 * other, (
            f"{name}: {kind} error {mine:.3e} is above 2 x {other:.3e}, PyTorch's"
        )


def _distances(exact: Tensor, *results: Tensor) -> Iterator[Tensor]:
    return ((result.double() - exact).abs() for result in results)


def _bits(tensor: Tensor) -> Tensor:
    """The whole storage behind a tensor, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())  # type: ignore[call-overload]


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
