"""The three kernels of adaptive_step.py: error norms, the decision, and what follows for the state.

Norms are of each sample, the decision is over all of them. Control is float64, as on the host: a
time in float32 would leave a step of 1e-7 of the interval no bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .solver_update import stage_sum


@triton.jit
def _squares(b_error, b_scale, mask):
    """Squares of error over tolerance, float64.

    0 where the error is 0, whatever the tolerance, and outside the mask.
    """
    b_ratio = tl.where(mask & (b_error != 0.0), b_error / b_scale, 0.0).to(tl.float64)
    return b_ratio * b_ratio


@triton.jit
def _finite(b_value):
    return (b_value == b_value) & (tl.abs(b_value) != float("inf"))


@triton.jit
def norm_kernel(
    x, x_new, stages, error, error3, step, rules, squares, squares3, faults,
    count, last_stage, stage_stride,
    STAGES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Grid (B * chunks,): of each chunk of a sample the sum of squares, and its faults.

    Faults are bits: 1 x_new or error not finite, 2 velocity not finite.
    """
    chunks = tl.cdiv(count, CHUNK)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    b_h = tl.load(step + i_b).to(SUM)
    b_rtol = tl.load(rules + 2).to(SUM)
    b_atol = tl.load(rules + 3).to(SUM)
    b_squares = tl.zeros((BLOCK,), tl.float64)
    b_squares3 = tl.zeros((BLOCK,), tl.float64)
    b_faults = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tl.minimum(CHUNK, count - first), BLOCK):
        o_n = first + start + tl.arange(0, BLOCK)
        mask = o_n < count
        o_x = i_b * count + o_n
        b_error = b_h * stage_sum(stages, error, o_x, mask, stage_stride, STAGES, BLOCK, SUM)
        b_x = tl.abs(tl.load(x + o_x, mask=mask, other=0.0).to(SUM))
        b_new = tl.load(x_new + o_x, mask=mask, other=0.0).to(SUM)
        p_k = stages + last_stage.to(tl.int64) * stage_stride + o_x
        b_k = tl.load(p_k, mask=mask, other=0.0).to(SUM)
        b_faults |= tl.where(_finite(b_new) & _finite(b_error), 0, 1) | tl.where(_finite(b_k), 0, 2)
        b_new = tl.abs(b_new)
        b_largest = tl.where((b_x >= b_new) | (b_x != b_x), b_x, b_new)  # NaN must reach the norm
        b_scale = b_atol + b_rtol * b_largest
        b_squares += _squares(b_error, b_scale, mask)
        if error3 is not None:
            b_error = b_h * stage_sum(stages, error3, o_x, mask, stage_stride, STAGES, BLOCK, SUM)
            b_squares3 += _squares(b_error, b_scale, mask)
    tl.store(squares + tl.program_id(0), tl.sum(b_squares, axis=0))
    if error3 is not None:
        tl.store(squares3 + tl.program_id(0), tl.sum(b_squares3, axis=0))
    b_one = tl.max(b_faults & 1, axis=0)
    tl.store(faults + tl.program_id(0), b_one | tl.max(b_faults & 2, axis=0))


@triton.jit
def _first_attempt(t, h, t0, t1):
    """(step size, whether it is the last step) of the next attempt."""
    left = tl.abs(t1 - t)
    last = 1.01 * h >= left
    return tl.where(last, left, h), last


@triton.jit
def _power(b_x, exponent):
    """x^exponent for x > 0, float64: 0^0 does not occur."""
    return tl.exp(exponent * tl.log(b_x))


@triton.jit
def decide_kernel(
    squares, squares3, faults, control, counters, step, times, nodes, rules, taken, running,
    batch, chunks, values,
    EVALUATIONS: tl.constexpr, NODES: tl.constexpr, SHARED: tl.constexpr, FSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (1,): acceptance, control and statistics of all samples, times of the next attempt.

    taken (B,) int32: whether the step of a sample is.
    """
    o_b = tl.arange(0, BLOCK)
    m_b = o_b < batch
    t0, t1 = tl.load(rules), tl.load(rules + 1)
    smallest, most_steps = tl.load(rules + 4), tl.load(rules + 5)
    exponent, beta = tl.load(rules + 6), tl.load(rules + 7)
    safety, shrink, most_growth = tl.load(rules + 8), tl.load(rules + 9), tl.load(rules + 10)
    p_control = control + o_b
    p_counters = counters + o_b
    t = tl.load(p_control, mask=m_b, other=0.0)
    h = tl.load(p_control + batch, mask=m_b, other=1.0)
    h_good = tl.load(p_control + 2 * batch, mask=m_b, other=1.0)
    previous = tl.load(p_control + 3 * batch, mask=m_b, other=1.0)
    growth = tl.load(p_control + 4 * batch, mask=m_b, other=1.0)
    status = tl.load(p_counters, mask=m_b, other=0)
    accepted = tl.load(p_counters + batch, mask=m_b, other=0)
    rejected = tl.load(p_counters + 2 * batch, mask=m_b, other=0)
    evaluations = tl.load(p_counters + 3 * batch, mask=m_b, other=0)
    zero = tl.zeros((BLOCK,), tl.float64)
    floor = zero + 1.0
    b_sum = zero
    b_sum3 = zero
    b_faults = tl.zeros((BLOCK,), tl.int32)
    for chunk in range(chunks):
        b_sum += tl.load(squares + o_b * chunks + chunk, mask=m_b, other=0.0)
        if squares3 is not None:
            b_sum3 += tl.load(squares3 + o_b * chunks + chunk, mask=m_b, other=0.0)
        b_faults |= tl.load(faults + o_b * chunks + chunk, mask=m_b, other=0)
    is_running = m_b & (status == -1)
    mean = b_sum / values
    mean3 = b_sum3 / values
    if SHARED:
        # A sample that has ended may hold anything: it has no part in the others' norm.
        count = tl.sum(is_running.to(tl.float64), axis=0)
        mean = zero + tl.sum(tl.where(is_running, mean, 0.0), axis=0) / count
        mean3 = zero + tl.sum(tl.where(is_running, mean3, 0.0), axis=0) / count
    if squares3 is not None:
        mean = tl.where(mean == 0.0, 0.0, mean * mean / (mean + mean3 * 0.01))
    norm = tl.sqrt(mean)
    size, last = _first_attempt(t, h, t0, t1)
    t_new = tl.where(last, t1, t + tl.load(step + o_b, mask=m_b, other=0.0))

    passed = norm <= 1.0  # not where it is NaN
    b_taken = passed & is_running
    refused = is_running & (norm != norm) | is_running & (norm > 1.0)
    finite = (b_faults & 1) == 0
    bounded = tl.where(norm != norm, float("inf"), norm)
    factor = safety * _power(tl.where(bounded < floor * 1e-10, floor * 1e-10, bounded), -exponent)
    factor = tl.where(passed, factor * _power(previous, beta), factor)
    limit = tl.where(passed, growth, floor)
    factor = tl.where(factor < limit, factor, limit)
    factor = tl.where(factor > shrink, factor, shrink)
    moving = m_b
    if not SHARED:
        moving = is_running
    advanced = passed & moving
    accepted += b_taken.to(tl.int64)
    rejected += refused.to(tl.int64)
    evaluations += is_running.to(tl.int64) * EVALUATIONS
    if not FSAL:
        evaluations += (b_taken & (last == 0)).to(tl.int64)
    t = tl.where(advanced, t_new, t)
    h = tl.where(moving, size * factor, h)
    h_good = tl.where(advanced, h, h_good)
    previous = tl.where(advanced, tl.where(norm < floor * 1e-4, floor * 1e-4, norm), previous)
    growth = tl.where(passed, most_growth, floor)

    ended = b_taken & last
    tiny = refused & (h < smallest)
    broken = is_running & ((tiny & (finite == 0)) | (b_taken & (last == 0) & ((b_faults & 2) != 0)))
    if SHARED:
        some = tl.max(broken.to(tl.int32), axis=0) > 0
        h = tl.where(some & (passed == 0), h_good, h)
        tiny = tiny & (broken | (some == 0))
    status = tl.where(ended, 0, status)
    used_up = (accepted + rejected).to(tl.float64) >= most_steps
    status = tl.where(is_running & (ended == 0) & used_up, 1, status)
    status = tl.where(tiny & finite, 2, tl.where(broken, 3, status))

    tl.store(p_control, t, mask=m_b)
    tl.store(p_control + batch, h, mask=m_b)
    tl.store(p_control + 2 * batch, h_good, mask=m_b)
    tl.store(p_control + 3 * batch, previous, mask=m_b)
    tl.store(p_control + 4 * batch, growth, mask=m_b)
    tl.store(p_counters, status, mask=m_b)
    tl.store(p_counters + batch, accepted, mask=m_b)
    tl.store(p_counters + 2 * batch, rejected, mask=m_b)
    tl.store(p_counters + 3 * batch, evaluations, mask=m_b)
    tl.store(taken + o_b, b_taken.to(tl.int32), mask=m_b)
    tl.store(running, tl.max((m_b & (status == -1)).to(tl.int32), axis=0))

    size, last = _first_attempt(t, h, t0, t1)
    size = tl.where(t1 < t0, -size, size)
    tl.store(step + o_b, size, mask=m_b)
    for i_node in tl.static_range(NODES):
        node = tl.load(nodes + i_node)
        time = tl.where(node == 1.0, tl.where(last, t1, t + size), t + node * size)
        low, high = tl.minimum(t0, t1), tl.maximum(t0, t1)
        time = tl.where(time < low, low, tl.where(time > high, high, time))
        tl.store(times + i_node * batch + o_b, time, mask=m_b)


@triton.jit
def commit_kernel(x, x_new, stages, taken, count, last_stage, stage_stride, BLOCK: tl.constexpr):
    """Grid (B * blocks,): the state and first stage of the samples whose step is taken."""
    blocks = tl.cdiv(count, BLOCK)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = (o_n < count) & (tl.load(taken + i_b) != 0)
    o_x = i_b * count + o_n
    tl.store(x + o_x, tl.load(x_new + o_x, mask=mask), mask=mask)
    p_last = stages + last_stage.to(tl.int64) * stage_stride + o_x
    tl.store(stages + o_x, tl.load(p_last, mask=mask), mask=mask)
