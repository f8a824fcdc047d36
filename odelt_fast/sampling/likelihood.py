"""log p of images under a model's flow (equation 3 of the paper): the instantaneous change of
variables, solved from data to noise."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from odelt_fast.checks import check_seed, one_of, whole
from odelt_fast.images import DigitsSource, EncodedImages, ImageSource
from odelt_fast.operation import step_index
from odelt_fast.solvers.dispatch import solve
from odelt_fast.solvers.solution import BatchResult, Field, Hook, Solution

from .batches import Batches, default_batch, evaluating
from .flow_map import Labels, labels_of_data, record
from .host import on_each_step
from .noise import image_noise, stack_noise
from .sampler import Sampler
from .velocity import VelocityField

PROBES = ("rademacher", "gaussian")


@dataclass(frozen=True)
class Likelihood:
    """log_prob (N,) float64: natural log of the density at each image, in the units of the images.
    error (N,) float64: its standard error over the probes (0 for the exact trace, NaN for a single
    probe). noise (N, C, H, W): the image's state at t = 0. evaluations (N,): of the network."""

    log_prob: Tensor
    error: Tensor
    noise: Tensor
    evaluations: Tensor

    @classmethod
    def of_flow(cls, solution: Solution, shape: Sequence[int], exact: bool) -> Likelihood:
        """From [x_0, a_1 .. a_K], where a field of `with_divergence` leads [x_1, 0 .. 0] from t = 1
        to 0; each x of `shape`."""
        size = math.prod(shape)
        noise, gains = solution.x[:, :size], solution.x[:, size:]
        prior = -0.5 * noise.square().sum(1) - 0.5 * size * math.log(2 * math.pi)
        error = torch.full_like(prior, 0.0 if exact else math.nan)
        if (probes := gains.shape[1]) > 1:
            error = gains.std(1) / math.sqrt(probes)
        return cls(
            prior + gains.mean(1), error, noise.unflatten(1, tuple(shape)), solution.evaluations
        )

    def bits_per_dimension(self, step: float | None = None) -> Tensor:
        """(N,) float64: -log2 p / D, for D numbers an image. step: the distance between
        neighbouring levels of quantised data (1/127.5 for 8 bits in [-1, 1]), which turns the
        density of dequantised images into a bound on the probability of the quantised ones."""
        dimensions = self.noise[0].numel()
        return -self.log_prob / (dimensions * math.log(2)) - math.log2(step or 1.0)


def log_likelihood(
    sampler: Sampler,
    images: Tensor,
    labels: Labels = None,
    *,
    probes: int | None = 1,
    probe: str = "rademacher",
    seed: int = 0,
    first_image: int = 0,
    progress: Hook | None = None,
) -> Likelihood:
    """log p(x | label) of images (N, C, H, W) at the sampler's depth, guidance and solver (dopri5
    at rtol = atol = 1e-5 does well).

    log p_1(x_1) = log N(x_0; 0, I) - integral over t from 0 to 1 of div v(t, x_t), with x_0 the
    state that x_1 flows back to. The integral is one more number of the solver's state for each
    probe, and counts in its error norm. The divergence is Hutchinson's mean of e^T (dv/dx) e over
    probes e with E[e e^T] = I. The probes of image i depend on (seed, first_image + i) alone and
    stay the same over the whole solve, so that its integrand is smooth. States are float64; the
    network runs in its own dtype (float32 is advised).

    Args:
        labels: one, or one each; None: the null label.
        probes: their number; None: the exact divergence (D backward passes an evaluation).
        probe: "rademacher" (+-1) or "gaussian".

    Raises:
        ValueError: for what cannot be, and naming the images that the solver could not finish.
    """
    one_of("probe", probe, PROBES)
    check_seed(seed)
    columns = 1 if probes is None else whole("probes", probes)
    model, shape = sampler.model, tuple(images.shape[1:])
    chosen = labels_of_data(sampler, labels, len(images)).to(model.device)
    states = images.detach().to(model.device, torch.float64)
    index = step_index(model.config.sampling, None)
    start = time.perf_counter()
    # A quarter of the usual batch: the backward pass keeps every activation.
    size = sampler.batch_size or max(1, default_batch(sampler, shape) // 4)
    batches = Batches(sampler, len(images), shape, size, end=0.0)
    with evaluating(model):
        for rows in batches:
            x, vectors = states[rows], None
            if probes is not None:
                drawn = [
                    [_probe(seed, first_image + i, shape, n, probe) for n in range(probes)]
                    for i in range(rows.start, rows.stop)
                ]
                # (probes, B, C, H, W)
                vectors = torch.from_numpy(np.array(drawn)).transpose(0, 1).to(x)
            with batches:
                field = VelocityField(model, sampler.operation, chosen[rows])
                augmented = with_divergence(field, shape, vectors)
                state = torch.cat([x.flatten(1), x.new_zeros(len(x), columns)], 1)
                on_step, how = on_each_step(progress, len(x)), sampler.operation
                solution = solve(augmented, state, index, how, t0=1.0, t1=0.0, on_step=on_step)
                batches.add(BatchResult.of(solution, field.evaluations))
    record(sampler, time.perf_counter() - start, batches.solution)
    return Likelihood.of_flow(batches.solution, shape, probes is None)


def with_divergence(field: Field, shape: Sequence[int], probes: Tensor | None) -> Field:
    """The field on (B, D + K) states [x, a_1 .. a_K] whose last K columns change at the rate of the
    divergence of `field` at x.

    x is of `shape`. probes (K, B, *shape): column k is e_k^T (dv/dx) e_k; None: one column, the
    exact trace. Backward through the network (vjp): PyTorch's attention kernels have no
    forward-mode derivative.
    """
    columns = 1 if probes is None else len(probes)

    def augmented(t: float | Tensor, state: Tensor, log2_steps: float) -> Tensor:
        with torch.enable_grad():
            x = state[:, :-columns].unflatten(1, tuple(shape)).detach().requires_grad_()
            v = field(t, x, log2_steps)
            if probes is None:
                rates = _trace(v, x)[:, None]
            else:
                rows = (
                    torch.autograd.grad(v, x, e, retain_graph=k < columns - 1)[0] * e
                    for k, e in enumerate(probes)
                )
                rates = torch.stack([row.flatten(1).sum(1) for row in rows], 1)
        return torch.cat([v.detach().flatten(1), rates], 1)

    return augmented


def _trace(v: Tensor, x: Tensor) -> Tensor:
    """Trace of dv/dx for each sample, (B,): one backward pass for each number of a sample."""
    total, numbers = x.new_zeros(len(x)), x[0].numel()
    for i in range(numbers):
        unit = torch.zeros_like(v).flatten(1)
        unit[:, i] = 1
        (row,) = torch.autograd.grad(v, x, unit.view_as(v), retain_graph=i < numbers - 1)
        total = total + row.flatten(1)[:, i]
    return total


def _probe(seed: int, index: int, shape: Sequence[int], number: int, kind: str) -> np.ndarray:
    normal = image_noise(seed, index, shape, "probe", number)
    return normal if kind == "gaussian" else np.where(normal < 0, np.float32(-1), np.float32(1))


def quantisation_step(source: ImageSource) -> float | None:
    """Distance between neighbouring levels of a source's pixels in [-1, 1]: 1/127.5 for 8 bits, 1/8
    for the digits; None for numbers that have no levels (latents, resized digits)."""
    if isinstance(source, DigitsSource):
        return 1 / 8 if source.image_size == 8 else None
    return 1 / 127.5 if isinstance(source, EncodedImages) else None


def dequantise(images: Tensor, step: float, seed: int = 0, first_image: int = 0) -> Tensor:
    """Images (N, ...) with uniform noise in (-step/2, step/2) on every number, float64; that of
    image i depends on (seed, first_image + i).

    With it -log2 p(x + u) + D log2(1/step) bounds the bits of quantised data from above (Theis et
    al. 2016); log2 127.5 for 8 bits.
    """
    indices = range(first_image, first_image + len(images))
    normal = stack_noise(seed, indices, images.shape[1:], "dequantise")
    # The distribution function of a normal number is uniform.
    uniform = torch.from_numpy(ndtr(normal.double().numpy()))
    return images.double() + step * (uniform - 0.5).to(images.device)
