"""Moments of rows in parts: what a LayerNorm needs of rows that no program has as a whole.

Rows x (rows, columns) in parts of WIDTH columns, a power of two; moments (2, rows, parts) float32:
the mean of each part, and the sum of squares about it. Whole rows' are added up from them without
cancellation (Chan, Golub, LeVeque 1983). The last part may be short.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def moments_reference(x: Tensor) -> Tensor:
    """Moments of x (B, N, D) with one part, (2, B*N, 1) float32."""
    values = x.float().flatten(0, 1)
    mean = values.mean(1, keepdim=True)
    return torch.stack([mean, (values - mean).square().sum(1, keepdim=True)])


def part_width(columns: int, parts: int) -> int:
    """Columns of a part of a row: a power of two, of which one alone makes so many parts."""
    return next(2**n for n in range(32) if triton.cdiv(columns, 2**n) <= parts)


@triton.jit
def store_moments(moments, b_x, o_row, m_row, rows, o_d, i_part, columns):
    """Mean and sum of squares about it of the columns o_d (BLOCK,) of a tile b_x (ROWS, BLOCK).

    Into moments (2, rows, parts) float32, in which part i holds the columns from i * BLOCK on.
    """
    m_d = (o_d < columns)[None, :]
    count = tl.minimum(columns - i_part * o_d.shape[0], o_d.shape[0])
    b_x = b_x.to(tl.float32)
    b_mean = tl.sum(tl.where(m_d, b_x, 0.0), axis=1) / count
    b_centered = tl.where(m_d, b_x - b_mean[:, None], 0.0)
    p_part = moments + o_row * tl.cdiv(columns, o_d.shape[0]) + i_part
    tl.store(p_part, b_mean, mask=m_row)
    squares = tl.sum(b_centered * b_centered, axis=1)
    tl.store(p_part + rows * tl.cdiv(columns, o_d.shape[0]), squares, mask=m_row)


@triton.jit
def load_moments(
    moments, o_row, m_row, rows, columns, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    """(mean, 1 / standard deviation) of whole rows, each (ROWS,), from `store_moments` by parts of
    WIDTH columns, of which there are at most PARTS."""
    parts = tl.cdiv(columns, WIDTH)
    o_part = tl.arange(0, PARTS)
    count = tl.minimum(tl.maximum(columns - o_part * WIDTH, 0), WIDTH).to(tl.float32)[None, :]
    p_part = moments + o_row[:, None] * parts + o_part[None, :]
    mask = m_row[:, None] & (o_part < parts)[None, :]
    b_means = tl.load(p_part, mask=mask, other=0.0)
    b_squares = tl.load(p_part + rows * parts, mask=mask, other=0.0)
    b_mean = tl.sum(b_means * count, axis=1) / columns
    b_away = b_means - b_mean[:, None]
    b_variance = tl.sum(b_squares + b_away * b_away * count, axis=1) / columns
    return b_mean, tl.rsqrt(b_variance + eps)
