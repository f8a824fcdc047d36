"""The forward and backward row kernels of gated_residual.py and, with GROUP_END, of group_end.py,
whose equations they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from odelt_fast.kernels.device import wait_for_inputs
from odelt_fast.kernels.rows import modulate, normalize, normalize_backward, store_rows


@triton.jit
def forward_kernel(
    x, y, xr, vr, gates, modulation, steps, out_x, out_vr, out, scales, tokens,
    x_batch, x_token, y_batch, y_token, xr_batch, xr_token, vr_batch, vr_token, gate_row, modulation_row, step_row,
    gate_column, shift_column, scale_column, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUP_END: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * chunks of ROWS tokens,). out_x is x', or xr' with GROUP_END; out is h."""
    wait_for_inputs(PDL)
    chunks = tl.cdiv(tokens, ROWS)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    o_n = ((tl.program_id(0) % chunks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    mask = (o_n < tokens) & m_d[None, :]
    o_row = i_b * tokens + o_n
    o_out = o_row * D + o_d[None, :]
    b_x = tl.load(x + i_b * x_batch + o_n * x_token + o_d[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    b_y = tl.load(y + i_b * y_batch + o_n * y_token + o_d[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    b_gate = tl.load(gates + i_b * gate_row + gate_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_base = tl.fma(b_gate[None, :], b_y, b_x)
    if GROUP_END:
        b_velocity = b_base
        if steps is not None:
            b_velocity *= tl.load(steps + i_b * step_row)
        b_vr = b_velocity
        if vr is not None:
            b_vr += tl.load(
                vr + i_b * vr_batch + o_n * vr_token + o_d[None, :], mask=mask, other=0.0
            ).to(tl.float32)
        tl.store(out_vr + o_out, b_vr.to(out_vr.dtype.element_ty), mask=mask)
        b_base = b_vr
        if xr is not None:
            b_xr = tl.load(
                xr + i_b * xr_batch + o_n * xr_token + o_d[None, :], mask=mask, other=0.0
            )
            b_base = b_xr.to(tl.float32) + b_velocity
    if out_x is not None:
        tl.store(out_x + o_out, b_base.to(out_x.dtype.element_ty), mask=mask)
    p_row = modulation + i_b * modulation_row
    b_shift = tl.load(p_row + shift_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = tl.load(p_row + scale_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_normalized, _ = normalize(b_base, m_d, eps, D)
    store_rows(out, scales, modulate(b_normalized, b_shift, b_scale), o_row, o_d, mask, D)


@triton.jit
def backward_kernel(
    grad_base, grad_vr, grad_h, base, y, gates, modulation, steps, out_base, out_x, out_y, sums, tokens,
    grad_base_batch, grad_base_token, grad_vr_batch, grad_vr_token, grad_h_batch, grad_h_token, base_batch, base_token, y_batch, y_token,
    gate_row, modulation_row, step_row, gate_column, scale_column, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, GROUP_END: tl.constexpr,
):  # fmt: skip
    """Grid (B * chunks of TOKENS tokens,). base is what was normalised; sums (programs, 3, D):
    gate, shift and scale."""
    chunks = tl.cdiv(tokens, TOKENS)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * TOKENS
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_scale = tl.load(
        modulation + i_b * modulation_row + scale_column + o_d, mask=m_d, other=0.0
    ).to(tl.float32)
    b_gate = tl.load(gates + i_b * gate_row + gate_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    step = 1.0
    if steps is not None:
        step = tl.load(steps + i_b * step_row)
    b_gate_sum = tl.zeros((BLOCK,), tl.float32)
    b_shift_sum = tl.zeros((BLOCK,), tl.float32)
    b_scale_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.minimum(TOKENS, tokens - first), ROWS):
        o_n = (first + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (o_n < tokens) & m_d[None, :]
        o_out = (i_b * tokens + o_n) * D + o_d[None, :]
        b_h = tl.load(
            grad_h + i_b * grad_h_batch + o_n * grad_h_token + o_d[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        b_base = tl.load(
            base + i_b * base_batch + o_n * base_token + o_d[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        b_normalized, rstd = normalize(b_base, m_d, eps, D)
        b_shift_sum += tl.sum(b_h, axis=0)
        b_scale_sum += tl.sum(b_h * b_normalized, axis=0)
        b_total = tl.load(
            grad_base + i_b * grad_base_batch + o_n * grad_base_token + o_d[None, :],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        b_total += normalize_backward(b_h * (1.0 + b_scale)[None, :], b_normalized, rstd, D)
        tl.store(out_base + o_out, b_total.to(out_base.dtype.element_ty), mask=mask)
        if GROUP_END:
            if grad_vr is not None:
                o_vr = i_b * grad_vr_batch + o_n * grad_vr_token + o_d[None, :]
                b_total += tl.load(grad_vr + o_vr, mask=mask, other=0.0).to(tl.float32)
            b_total *= step
            tl.store(out_x + o_out, b_total.to(out_x.dtype.element_ty), mask=mask)
        tl.store(out_y + o_out, (b_total * b_gate[None, :]).to(out_y.dtype.element_ty), mask=mask)
        b_y = tl.load(y + i_b * y_batch + o_n * y_token + o_d[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        b_gate_sum += tl.sum(b_total * b_y, axis=0)
    p_sums = sums + tl.program_id(0).to(tl.int64) * 3 * D + o_d
    tl.store(p_sums, b_gate_sum, mask=m_d)
    tl.store(p_sums + D, b_shift_sum, mask=m_d)
    tl.store(p_sums + 2 * D, b_scale_sum, mask=m_d)
