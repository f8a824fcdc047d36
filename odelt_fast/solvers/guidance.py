"""Classifier-free guidance of two velocities."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(
    both: Tensor,
    scale: float,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    t: float | Tensor = 0.0,
) -> Tensor:
    """v_null + scale (v_label - v_null), (B, C, H, W), of both (2B, C, H, W), labels first.

    Args:
        channels: the first so many are guided (None: all), the others are v_label's.
        interval: rows at a time t, a number or (B,), outside it are v_label.
    """
    label, null = both.chunk(2)
    mixed = null + scale * (label - null)
    if channels is not None:
        mixed[:, channels:] = label[:, channels:]
    if interval is None or not isinstance(t, Tensor):
        return mixed
    inside = ((t >= interval[0]) & (t <= interval[1])).reshape(-1, *[1] * (label.dim() - 1))
    return torch.where(inside.to(label.device), mixed, label)
