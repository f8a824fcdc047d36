"""The variance-preserving diffusion process, and the ODE that samples a network trained to predict
its noise."""

from __future__ import annotations

import torch
from torch import Tensor

# The linear schedule of DDPM and DiT (1e-4 to 0.02 over 1000 steps) in continuous time: beta(s)
# rises from 0.1 to 20.
BETA_MIN, BETA_MAX = 0.1, 20.0
# sigma is 0 at t = 1 and its derivative unbounded: rates are held beyond this time (Song et al.
# 2021 stop there too).
LAST_TIME = 1 - 1e-3


def vp_schedule(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signal level, noise level and noise rate of x_t = alpha x_1 + sigma eps at times t (t = 0
    noise, 1 data), each of the shape of t.

    With s = 1 - t: alpha = exp(-B(s)/2), sigma = sqrt(1 - alpha^2), B(s) = integral of beta; the
    rate is beta(s), so that d alpha/dt = alpha beta/2 and d sigma/dt = -alpha^2 beta/(2 sigma).
    """
    s = 1 - t
    integral = BETA_MIN * s + 0.5 * (BETA_MAX - BETA_MIN) * s.square()
    return (
        torch.exp(-0.5 * integral),
        torch.sqrt(-torch.expm1(-integral)),
        BETA_MIN + (BETA_MAX - BETA_MIN) * s,
    )


def probability_flow_velocity(noise: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
    """dx/dt of the probability-flow ODE, beta/2 (x - noise/sigma), from the noise that a network
    sees in x at time t (Song et al. 2021).

    noise, x (B, C, H, W); t in [0, 1], a number or (B,), held at LAST_TIME beyond it. Computed in
    float32 at least; the dtype of x comes back. Affine in the noise, so guiding the noise or
    guiding the velocity is the same.
    """
    time = torch.as_tensor(
        t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device
    ).clamp(max=LAST_TIME)
    time = time.reshape(-1, *[1] * (x.dim() - 1))
    _, sigma, beta = vp_schedule(time)
    return (0.5 * beta * (x - noise / sigma)).to(x.dtype)
