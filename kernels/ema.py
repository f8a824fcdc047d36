"""EMA of every parameter in one launch: ema <- ema + (1 - decay)*(live - ema), in float32 whatever
the dtypes.

ema, live: lists of tensors of equal shapes; each list has one dtype, which may differ (float32
averages of bfloat16 weights). A table on the device says where each chunk of 8192 values lies, as
offsets from the lists' first tensors. Bytes: ema and live read once, ema written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from odelt_fast.kernels.compile_case import CompileCase
from odelt_fast.kernels.device import require_device
from odelt_fast.kernels.rows import DTYPES

_CHUNK, _BLOCK, _WARPS = 8192, 2048, 8
# elements: an offset from an allocation's start that is a multiple of this keeps accesses of 16
# bytes
_ALIGNMENT = 16


def ema_update_reference(
    ema: Sequence[Tensor], live: Sequence[Tensor], decay: float
) -> list[Tensor]:
    """The new averages in plain PyTorch, in the dtype of ema."""
    return [
        torch.lerp(average, value.to(average.dtype), 1 - decay) for average, value in zip(ema, live)
    ]


@triton.jit
def _mix(b_ema, b_live, decay, weight):
    """decay*ema + weight*live, weight = 1 - decay, from the end that is nearer: exact at decay 0
    and 1."""
    difference = b_live - b_ema
    return tl.where(weight < 0.5, b_ema + weight * difference, b_live - decay * difference)


@triton.jit
def _kernel(ema, live, table, decay, weight, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    p_row = table + tl.program_id(0) * 3
    o_ema = tl.load(p_row)
    o_live = tl.load(p_row + 1)
    count = tl.load(p_row + 2).to(tl.int32)
    if ALIGNED:
        o_ema = tl.multiple_of(o_ema, 16)
        o_live = tl.multiple_of(o_live, 16)
    for start in range(0, count, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        if ALIGNED:
            # A count that is no multiple of 16 would make every access scalar: whole groups first,
            # the few values left over after the loop.
            mask = o_n // 16 < count // 16
        else:
            mask = o_n < count
        b_ema = tl.load(ema + o_ema + o_n, mask=mask, other=0.0).to(tl.float32)
        b_live = tl.load(live + o_live + o_n, mask=mask, other=0.0).to(tl.float32)
        b_ema = _mix(b_ema, b_live, decay, weight)
        tl.store(ema + o_ema + o_n, b_ema.to(ema.dtype.element_ty), mask=mask)
    if ALIGNED:
        o_n = count // 16 * 16 + tl.arange(0, 16)
        mask = o_n < count
        b_ema = tl.load(ema + o_ema + o_n, mask=mask, other=0.0).to(tl.float32)
        b_live = tl.load(live + o_live + o_n, mask=mask, other=0.0).to(tl.float32)
        b_ema = _mix(b_ema, b_live, decay, weight)
        tl.store(ema + o_ema + o_n, b_ema.to(ema.dtype.element_ty), mask=mask)


def chunk_table(ema: Sequence[Tensor], live: Sequence[Tensor]) -> Tensor:
    """(chunks, 3) int64 on the host: offset from ema[0], offset from live[0] (elements), number of
    values; at most 8192 a chunk."""
    sizes = torch.tensor([tensor.numel() for tensor in ema])
    first = torch.tensor(
        [[tensors[i].data_ptr() for tensors in (ema, live)] for i in range(len(ema))]
    )
    sizes_of_values = torch.tensor([ema[0].element_size(), live[0].element_size()])
    offsets = (first - first[0]) // sizes_of_values
    if bool(((first - first[0]) % sizes_of_values).any()):
        raise ValueError(
            "the tensors of a list must lie a whole number of values apart: one is a view that"
            " starts inside a value"
        )
    chunks = (sizes + _CHUNK - 1) // _CHUNK
    tensor = torch.repeat_interleave(torch.arange(len(ema)), chunks)
    start = (torch.arange(len(tensor)) - (chunks.cumsum(0) - chunks)[tensor]) * _CHUNK
    counts = (sizes[tensor] - start).clamp(max=_CHUNK)
    return torch.cat([offsets[tensor] + start[:, None], counts[:, None]], dim=1)


class EmaUpdate:
    """ema[i] <- decay*ema[i] + (1 - decay)*live[i] of the same tensors again and again, as
    ema_update does it.

    The table of addresses is made here, so that a call only launches one kernel and a CUDA graph
    can hold it. It is made anew when a tensor has moved (`model.to`, `parameter.data = ...`), but
    not in a capture; a graph keeps the addresses that it was captured with. Raises ValueError for
    lists, shapes, dtypes, layouts and devices that do not fit.
    """

    def __init__(self, ema: Sequence[Tensor], live: Sequence[Tensor]) -> None:
        self.ema, self.live = list(ema), list(live)
        self._make_table()

    def __call__(self, decay: float) -> None:
        if self._addresses != self._current_addresses():
            self._make_table()
        if not self._ema:
            return
        # 1 - decay is taken before it is rounded to float32: at decay 0.9999 it would lose three
        # digits afterwards.
        with torch.cuda.device_of(self._ema[0]):
            _kernel[(len(self._table),)](
                self._ema[0],
                self._live[0],
                self._table,
                decay,
                1.0 - decay,
                BLOCK=_BLOCK,
                ALIGNED=self._aligned,
                num_warps=_WARPS,
            )

    def _make_table(self) -> None:
        _check(self.ema, self.live)
        filled = [i for i, tensor in enumerate(self.ema) if tensor.numel()]
        self._ema, self._live = [self.ema[i] for i in filled], [self.live[i] for i in filled]
        self._addresses = self._current_addresses()
        if not filled:
            return
        if self._ema[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "ema_update: the tensors' addresses are not known yet, and cannot be copied to the"
                " device in a capture"
            )
        table = chunk_table(self._ema, self._live)
        starts = all(tensors[0].data_ptr() % 16 == 0 for tensors in (self._ema, self._live))
        self._aligned = starts and not bool((table[:, :2] % _ALIGNMENT).any())
        self._table = table.to(self._ema[0].device)

    def _current_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensors in (self.ema, self.live) for tensor in tensors]


def _check(ema: Sequence[Tensor], live: Sequence[Tensor]) -> None:
    if len(ema) != len(live):
        raise ValueError(f"ema has {len(ema)} tensors, live {len(live)}")
    for index, (average, value) in enumerate(zip(ema, live)):
        if average.shape != value.shape or not (average.is_contiguous() and value.is_contiguous()):
            raise ValueError(
                f"tensor {index}: ema and live must be contiguous and of one shape, not"
                f" {tuple(average.shape)} with strides {average.stride()} and {tuple(value.shape)}"
                f" with strides {value.stride()}"
            )
        if (
            average.dtype != ema[0].dtype
            or value.dtype != live[0].dtype
            or not {average.dtype, value.dtype} <= set(DTYPES)
        ):
            raise ValueError(
                f"tensor {index}: each list must be all float16, bfloat16 or float32, not"
                f" {average.dtype} in ema and {value.dtype} in live"
            )
    if ema:
        require_device("ema_update", *ema, *live)


@torch.library.custom_op("odelt_fast::ema_update", mutates_args={"ema"})
def ema_update(ema: Sequence[Tensor], live: Sequence[Tensor], decay: float) -> None:
    """ema[i] <- decay*ema[i] + (1 - decay)*live[i], in place; float16, bfloat16 or float32, one
    dtype in each list, contiguous tensors.

    The tensors of a list may lie in any allocations of one device. Makes and copies the table of
    addresses each time: for a loop or a graph take EmaUpdate. Raises ValueError for lists, shapes,
    dtypes, layouts and devices that do not fit.
    """
    EmaUpdate(ema, live)(decay)


@ema_update.register_fake
def _(ema: Sequence[Tensor], live: Sequence[Tensor], decay: float) -> None:
    return None


def compile_cases() -> Iterator[CompileCase]:
    """Every pair of dtypes, aligned."""
    for ema in DTYPES.values():
        for live in DTYPES.values():
            constants: dict[str, object] = {"BLOCK": _BLOCK, "ALIGNED": True}
            signature = {
                "ema": f"*{ema}",
                "live": f"*{live}",
                "table": "*i64",
                "decay": "fp32",
                "weight": "fp32",
                **dict.fromkeys(constants, "constexpr"),
            }
            yield CompileCase(f"ema/{ema}/{live}", _kernel, signature, constants, (0, 1, 2), _WARPS)
