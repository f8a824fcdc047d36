"""Mean velocities: one network evaluation takes a state from t to s (t = 0 noise, t < s <= 1).

u(x_t, t, s) is the mean velocity of the flow from t to s, v(x, t) = u(x, t, t) the velocity. The
network is told the duration d = s - t by its real-valued step index -log2 d, and index log2 T where
d is at most 1/T of the finest steps. As s is fixed, (s - t) u = integral of v gives
u = v + d du/dt, with du/dt the derivative along the flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odelt_fast.train.draws import to_device
from odelt_fast.train.forward_mode import derivative
from odelt_fast.train.mean_velocity import MEAN_VELOCITY_DEFAULTS, MeanVelocityOptions
from odelt_fast.train.paths import as_rows

from .targets import Depths, Method, Model, Networks, StepBatch, Targets, grid_times

_STEEPNESS = 25.0  # of alpha's sigmoid over its fall, as in alpha-flow


@dataclass(frozen=True, kw_only=True)
class MeanVelocity(Method):
    """What both objectives share: rows of pairs (t, s), then rows that learn the velocity.

    Pairs: `options.grid_share` of them on the grids of 2^k equal steps, k uniform below log2 T, the
    others two sorted times. Velocity rows: t a multiple of 1/T, target v. v is x1 - x0, or with
    a guidance scale w, in rows with a label, u(null) + w (x1 - x0 - u(null)) with the teacher's
    u(x_t, t, t) of the null label (MeanFlow, equation 19 with kappa = 0): one step is then guided.

    guidance_max: the network is told a scale w from 1 to it, of density w^-cfg_beta, in each row,
    and v is x1 - x0 + (1 - 1/w) (u(label, w) - u(null)) (improved MeanFlow): the same in the mean,
    with the variance of x1 - x0 whatever the scale.
    """

    time_rows: int
    options: MeanVelocityOptions = MEAN_VELOCITY_DEFAULTS
    guidance_max: float | None = None

    @torch.no_grad()
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        n, finest = self.time_rows, 2**self.log2_steps
        rows = slice(0, n)
        t, noise = grid_times(batch.uniform(), finest), batch.noise().to(batch.images.dtype)
        s = t.clone()
        t[rows], s[rows] = self.drawn_pairs(batch)
        y = self.dropped(batch)
        x_t = torch.lerp(noise, batch.images, as_rows(t, noise).to(noise.dtype))
        v = batch.images - noise
        index = self.index_of(t, s)
        targets = Targets(x_t, t, index, y, v, guidance=self.drawn_guidance(batch))
        # bfloat16 would drown the derivative in rounding.
        with torch.autocast(v.device.type, enabled=False):
            if self.guidance_scale is not None or self.guidance_max is not None:
                v = self.guided_velocity(networks.target, targets, networks.depths)
            if n:
                told = targets.told(rows).get("guidance")
                pairs = Targets(x_t[rows], t[rows], index[rows], y[rows], v[rows], guidance=told)
                taught = self.taught(networks.target, pairs, s[rows], networks.depth(rows), batch)
                v = torch.cat([taught, v[n:]])
        return replace(targets, velocity=v, weight=self.weights(batch, n))

    def taught(
        self, teacher: Model, pairs: Targets, s: Tensor, depth: Depths, batch: StepBatch
    ) -> Tensor:
        """The mean velocities to learn; pairs.velocity is v."""
        raise NotImplementedError

    def weights(self, batch: StepBatch, rows: int) -> Tensor | None:
        """Of the rows (B,); None: all 1."""
        return None

    def index_of(self, t: Tensor, s: Tensor) -> Tensor:
        """Step index -log2(s - t), at most that of the finest steps."""
        return -torch.log2((s - t).clamp(min=2.0**-self.log2_steps))

    def drawn_pairs(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Times (time_rows,) t and s of the pairs, on the images' device."""
        rows, draws = slice(0, self.time_rows), batch.draws
        uniform = torch.stack([draws.uniform(name, rows) for name in ("time", "time2")])
        times = uniform
        if self.options.times == "logit-normal":
            times = torch.sigmoid(0.4 + torch.special.ndtri(uniform.double().clamp(min=1e-9)))
        first, last = times.float().sort(dim=0).values
        sections = torch.exp2(draws.integers("step_index", rows, self.log2_steps).float())
        start = grid_times(uniform[0], sections)
        on_grid = draws.bernoulli("pair_kind", rows, self.options.grid_share)
        t = torch.where(on_grid, start, first)
        s = torch.where(on_grid, start + 1 / sections, last)
        return to_device(t, batch.images.device), to_device(s, batch.images.device)

    def drawn_guidance(self, batch: StepBatch) -> Tensor | None:
        """The scales (B,) that the network is told; None where it is not."""
        if self.guidance_max is None:
            return None
        uniform = batch.draws.uniform("guidance", batch.rows).double()
        largest, power = math.log(self.guidance_max), 1 - self.options.cfg_beta
        if power:  # log(1 + u (max^power - 1)) / log(max^power), which is u as power falls to 0
            uniform = torch.log1p(uniform * math.expm1(power * largest)) / (power * largest)
        return to_device(torch.exp(uniform * largest).float(), batch.images.device)

    def guided_velocity(self, teacher: Model, rows: Targets, depth: Depths) -> Tensor:
        """v with guidance in rows with a label, v in the others."""
        null, index = torch.full_like(rows.y, self.num_classes), self._finest(rows.t)
        without = teacher(rows.x_t, rows.t, index, null, depth=depth, **rows.told())
        if rows.guidance is None:
            assert self.guidance_scale is not None
            mixed = torch.lerp(without, rows.velocity, self.guidance_scale)
        else:
            own = teacher(rows.x_t, rows.t, index, rows.y, depth=depth, **rows.told())
            share = as_rows(1 - 1 / rows.guidance, own)
            mixed = rows.velocity + share * (own - without)
        if self.guided_channels is not None:
            mixed[:, self.guided_channels :] = rows.velocity[:, self.guided_channels :]
        return torch.where(as_rows(rows.y == null, mixed), rows.velocity, mixed)

    def _finest(self, t: Tensor) -> Tensor:
        return torch.full_like(t, float(self.log2_steps))


@dataclass(frozen=True, kw_only=True)
class MeanFlow(MeanVelocity):
    """MeanFlow (Geng et al. 2025, arXiv 2505.13447) and its improvement (arXiv 2512.02012): target
    v + d D, D the teacher's derivative d/dt u(x + t tangent, t, s).

    options.tangent: "data", v itself, or "network", the teacher's u(x_t, t, t).
    """

    def taught(
        self, teacher: Model, pairs: Targets, s: Tensor, depth: Depths, batch: StepBatch
    ) -> Tensor:
        x, t, y, tangent = pairs.x_t, pairs.t, pairs.y, pairs.velocity
        if self.options.tangent == "network":
            tangent = teacher(x, t, self._finest(t), y, depth=depth, **pairs.told())
        along = self.difference if self.options.derivative == "difference" else self.jvp
        d = as_rows(s - t, x)
        return pairs.velocity + d * along(teacher, pairs, s, tangent, depth)

    def jvp(
        self, teacher: Model, pairs: Targets, s: Tensor, tangent: Tensor, depth: Depths
    ) -> Tensor:
        """Forward-mode: exact, without a graph."""

        def u(x: Tensor, t: Tensor) -> Tensor:
            return teacher(x, t, self.index_of(t, s), pairs.y, depth=depth, **pairs.told())

        return derivative(u, (pairs.x_t, pairs.t), (tangent, torch.ones_like(pairs.t)))

    def difference(
        self, teacher: Model, pairs: Targets, s: Tensor, tangent: Tensor, depth: Depths
    ) -> Tensor:
        """A central difference of u along (tangent, 1), both sides in one batch."""
        e = self.options.difference_step
        sides = [(pairs.x_t + sign * e * tangent, pairs.t + sign * e) for sign in (1.0, -1.0)]
        x, t = (torch.cat(values) for values in zip(*sides, strict=True))
        index = self.index_of(t, torch.cat([s, s]))
        y = torch.cat([pairs.y, pairs.y])
        told = {name: torch.cat([value, value]) for name, value in pairs.told().items()}
        both = teacher(x, t, index, y, depth=depth and depth * 2, **told)
        after, before = both.chunk(2)
        return (after - before) / (2 * e)


@dataclass(frozen=True, kw_only=True)
class AlphaFlow(MeanVelocity):
    """alpha-flow (arXiv 2510.20771; SoFlow, arXiv 2512.15657): target alpha v + (1 - alpha)
    u(x + alpha d v, t + alpha d, s), without a derivative. alpha = 1 is flow matching on the pairs,
    alpha -> 0 MeanFlow; it falls along a sigmoid over `options.alpha_fall` of the run.

    Rows of pairs weigh alpha^(2p - 1), with p the power of the adaptive weight: their errors are
    alpha times those of MeanFlow, so that gradients keep MeanFlow's size while alpha falls; alpha
    with p = 1 (the paper's adaptive weight), 1/alpha without it. That holds for errors above eps:
    below it these rows count less the smaller alpha is.
    """

    total_steps: int
    weight_power: float = 1.0

    def alpha(self, step: int) -> float:
        """At an optimizer step, counted from 0."""
        first, last = self.options.alpha_fall
        place = (step / self.total_steps - (first + last) / 2) / (last - first)
        value = 1 / (1 + math.exp(min(_STEEPNESS * place, 700)))
        low = self.options.alpha_min
        return 1.0 if value > 1 - low else max(value, low)

    def taught(
        self, teacher: Model, pairs: Targets, s: Tensor, depth: Depths, batch: StepBatch
    ) -> Tensor:
        alpha, v = self.alpha(batch.step), pairs.velocity
        if alpha == 1:
            return v
        leap = alpha * (s - pairs.t)
        x, t = pairs.x_t + as_rows(leap, v) * v, pairs.t + leap
        later = teacher(x, t, self.index_of(t, s), pairs.y, depth=depth, **pairs.told())
        return torch.lerp(later, v, alpha)

    def weights(self, batch: StepBatch, rows: int) -> Tensor | None:
        weight = torch.ones(len(batch), device=batch.images.device)
        weight[:rows] = self.alpha(batch.step) ** (2 * self.weight_power - 1)
        return weight
