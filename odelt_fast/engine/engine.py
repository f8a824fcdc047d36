"""The network prepared for sampling: weights as the kernels want them, and one evaluation as a
fixed sequence of launches.

A block is seven launches: [qkv] [attention on packed qkv] [output projection] [gate*y + residual +
LayerNorm + modulate] [MLP in + GELU] [MLP out] and, across the border to the next block, [gate*y +
residual, the group-end Euler update of xr and vr, the next LayerNorm + modulate]. Patch embedding,
the first LayerNorm and the final layer (with unpatchify, guidance and the Euler update in time) are
three more. The modulation of all blocks comes from outside (`modulations`), where it is made for
many steps at once (trajectory.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from odelt_fast.engine import availability, operators, tuning
from odelt_fast.engine.weights import LAYERS, Layer, PreparedWeights
from odelt_fast.model import DiT, position_table

ROW_LAUNCHES, ENDS_LAUNCHES = 7, 3


class Engine:
    """Evaluates a DiT with fused kernels: `engine(x, t, log2_steps, y, depth)` is `model(x, t,
    log2_steps, y, depth)` for one depth.

    attention: "auto" or one of `operators.ATTENTIONS`. precision "fp8": three of a block's four
    products run on row-wise float8 (e4m3), with an error of at most 4e-2 on one evaluation. kind:
    "kernels" (CUDA, or the CPU under TRITON_INTERPRET=1) or "reference": the same launch sequence
    in plain PyTorch, on any device. The model's modulation weights become views of one stacked
    tensor: no weight is held twice. Raises ValueError with the reason for what cannot run.
    """

    def __init__(
        self,
        model: DiT,
        attention: str = "auto",
        precision: str | None = None,
        kind: str = "kernels",
    ) -> None:
        reason = availability.model_unsupported(model) or availability.kernels_unavailable()
        if reason:
            raise ValueError(f"the engine cannot run this model: {reason}")
        if attention not in operators.ATTENTIONS:
            raise ValueError(
                f"attention must be one of {', '.join(operators.ATTENTIONS)}, not {attention!r}"
            )
        if precision not in operators.PRECISIONS:
            raise ValueError(f"precision must be None or fp8, not {precision!r}")
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.max_depth, self.precision, self.kind = model.max_depth, precision, kind
        self.ops = operators.load_operators(kind)
        self.measured = tuning.read_tuning(self.device)
        self.native = kind == "kernels" and self.device.type == "cuda"
        self.capability = torch.cuda.get_device_capability(self.device) if self.native else (9, 0)
        if precision == "fp8" and self.capability < (8, 9):
            raise ValueError(
                "precision 'fp8' needs a GPU of compute capability 8.9 or newer, not"
                f" {'.'.join(map(str, self.capability))}"
            )
        self._choices: dict[tuple[object, ...], str] = {}
        with torch.inference_mode(False), torch.no_grad():
            self.weights = PreparedWeights(
                model, self.ops.quantize_rows if precision == "fp8" else None
            )
            self._positions = {(model.config.image_size, model.config.image_size): model.positions}
            self.workspace = self._make_workspace()
        self.attention = self._check_attention(attention)

    def _make_workspace(self) -> Tensor | None:
        """What split-K launches need: they keep twice the processors busy with tiles of 64 x 64 at
        most (kernels/linear.py)."""
        if self.kind != "kernels":
            return None
        from odelt_fast.kernels.device import architecture

        processors = architecture(self.device)[1]
        return torch.zeros(
            2 * processors * (64 * 64 + 1) + 4, dtype=torch.int32, device=self.device
        )

    def _check_attention(self, name: str) -> str:
        if name == "auto" or self.kind == "reference":
            return name
        size, heads = self.config.hidden_size, self.config.num_heads
        reason = availability.attention_unavailable(name, self.device, self.dtype, size // heads)
        if not reason:
            tokens = (self.config.image_size // self.config.patch_size) ** 2
            reason = self._try_attention(
                name, torch.zeros(1, tokens, 3 * size, dtype=self.dtype, device=self.device)
            )
        if reason:
            raise ValueError(f"attention {name!r} cannot run here: {reason}")
        return name

    def _try_attention(self, name: str, qkv: Tensor) -> str | None:
        return availability.try_attention(
            name, operators.attention_function(name, self.ops), qkv, self.config.num_heads
        )

    def positions(self, height: int, width: int) -> Tensor:
        if (height, width) not in self._positions:
            patch = self.config.patch_size
            self._positions[height, width] = position_table(
                height // patch, width // patch, self.config.hidden_size
            ).to(self.device)
        return self._positions[height, width]

    def condition(self, t: Tensor, log2_steps: Tensor | int) -> Tensor:
        """Time + step-size embedding (S, D), in float32 at least; t (S,) float32. The label's row
        is added to it."""
        index = log2_steps if self.config.step_conditioned else 0
        if not isinstance(index, Tensor):
            index = torch.full((1,), float(index), device=self.device)
        return self.weights.time_embed(t).to(
            torch.promote_types(self.dtype, torch.float32)
        ) + self.weights.step_embed(index)

    def length_rows(self, depths: int | Sequence[int]) -> Tensor | float:
        """Length embedding of a depth (D,) or of each depth (len, D), which only the blocks see; 0
        for the conventional DiT."""
        if self.weights.length_embed is None:
            return 0.0
        if isinstance(depths, int):
            return self.weights.length_embed[
                depths
            ]  # a view: nothing is copied from the host, which a capture would forbid
        return self.weights.length_embed[torch.tensor(depths, device=self.device)]

    def modulations(self, blocks: Tensor, final: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Modulation of all blocks live at `depth` (R, live*6*D) and of the final layer (R, 2*D),
        from their conditions (R, D)."""
        columns = 6 * self.config.hidden_size * self.config.live_blocks(depth)
        stacked = self.weights.modulation
        table = (
            self.ops.modulation(blocks, stacked.weight[:columns], stacked.bias[:columns])
            if columns
            else blocks
        )
        return table, self.ops.modulation(
            final, self.weights.final_modulation.weight, self.weights.final_modulation.bias
        )

    def __call__(
        self,
        x: Tensor,
        t: float | Tensor,
        log2_steps: int | Tensor,
        y: Tensor,
        depth: int | None = None,
    ) -> Tensor:
        """Velocity (B, C, H, W) in x's dtype; the arguments are those of `DiT.forward`, with one
        depth for all samples."""
        depth = self.max_depth if depth is None else depth
        time = (
            t.reshape(-1).float()
            if isinstance(t, Tensor)
            else torch.full((1,), float(t), device=self.device)
        )
        step = log2_steps.reshape(-1).float() if isinstance(log2_steps, Tensor) else log2_steps
        final = self.condition(time, step) + self.weights.label_embed(y)
        return self.velocity(
            x, *self.modulations(final + self.length_rows(depth), final, depth), depth
        )

    def velocity(
        self,
        x: Tensor,
        modulation: Tensor,
        final_modulation: Tensor,
        depth: int,
        guidance: float | None = None,
    ) -> Tensor:
        """v (B, C, H, W) in x's dtype, from modulations of B rows or 1; with guidance from 2B rows,
        labels first, or 1."""
        h = self.hidden(
            x if guidance is None else torch.cat([x, x]), modulation, final_modulation, depth
        )
        return self.ops.final_velocity(
            h,
            self.weights.final.weight,
            self.weights.final.bias,
            self.config.patch_size,
            x.shape[2],
            x.shape[3],
            x.dtype,
            guidance,
        )

    def euler_step(
        self,
        x: Tensor,
        modulation: Tensor,
        final_modulation: Tensor,
        depth: int,
        step: float,
        guidance: float | None = None,
    ) -> Tensor:
        """x + step*v in x's dtype; for the rest see `velocity`."""
        h = self.hidden(
            x if guidance is None else torch.cat([x, x]), modulation, final_modulation, depth
        )
        return self.ops.final_euler(
            x,
            h,
            self.weights.final.weight,
            self.weights.final.bias,
            self.config.patch_size,
            step,
            guidance,
        )

    def hidden(
        self, state: Tensor, modulation: Tensor, final_modulation: Tensor, depth: int
    ) -> Tensor:
        """What the final projection sees: (B, N, D), the inner ODE's vr after the final layer's
        LayerNorm + modulate."""
        config, ops, size = self.config, self.ops, self.config.hidden_size
        live = config.live_blocks(depth)
        positions, vr = self.positions(state.shape[2], state.shape[3]), None
        x = ops.patch_embed(
            state, self.weights.patch.weight, self.weights.patch.bias, positions, config.patch_size
        )
        if not live:  # no whole group: the inner ODE has not moved from 0
            return ops.norm_modulate(torch.zeros_like(x), final_modulation, 0, size)
        h = self._norm(x, modulation, 0, size)
        for index, block in enumerate(self.weights.blocks[:live]):
            first = 6 * size * index
            before = x
            attended = self._attend(self._linear(h, block.qkv))
            residual = self._linear(attended, block.attention_out)
            x, h = self._residual(
                x,
                residual,
                modulation,
                first + 2 * size,
                modulation,
                first + 3 * size,
                first + 4 * size,
            )
            mlp = self._linear(
                self._quantize(self._linear(h, block.mlp_in, "gelu"), block.mlp_out), block.mlp_out
            )
            last, gate = index + 1 == live, first + 5 * size
            following = (
                (final_modulation, 0, size)
                if last
                else (modulation, first + 6 * size, first + 7 * size)
            )
            if not config.length_conditioned or (index + 1) % config.depth_group:
                if last:
                    x, h = ops.gated_residual(x, mlp, modulation, gate, *following)
                else:
                    x, h = self._residual(x, mlp, modulation, gate, *following)
            elif last:
                _, h = ops.last_group_end(
                    x, mlp, vr, modulation, gate, *following, self.weights.group_steps[depth]
                )
            else:
                x, vr, h = self._group_end(
                    x,
                    mlp,
                    before,
                    vr,
                    modulation,
                    gate,
                    *following,
                    self.weights.group_steps[depth],
                )
        return h

    # h is a tensor, or with fp8 a pair (q, scales): the row operators quantise what they make for
    # the next product.
    def _norm(self, *arguments: Any) -> Any:
        return (
            self.ops.norm_modulate(*arguments)
            if self.precision is None
            else self.ops.norm_modulate_float8(*arguments)
        )

    def _residual(self, *arguments: Any) -> tuple[Tensor, Any]:
        if self.precision is None:
            return self.ops.gated_residual(*arguments)
        x, *h = self.ops.gated_residual_float8(*arguments)
        return x, tuple(h)

    def _group_end(self, *arguments: Any) -> tuple[Tensor, Tensor, Any]:
        if self.precision is None:
            return self.ops.group_end(*arguments)
        x, vr, *h = self.ops.group_end_float8(*arguments)
        return x, vr, tuple(h)

    def _quantize(self, h: Tensor, layer: Layer) -> Any:
        return h if layer.scale is None else self.ops.quantize_rows(h)

    def _linear(self, h: Any, layer: Layer, activation: str = "none") -> Tensor:
        x, x_scale = h if layer.scale is not None else (h, None)
        if self.linear_choice(x.shape[0] * x.shape[1], layer, activation) == "triton":
            scales = {"x_scale": x_scale, "weight_scale": layer.scale, "out_dtype": self.dtype}
            return self.ops.linear(
                x, layer.weight, layer.bias, activation, **scales, workspace=self.workspace
            )
        if x_scale is None or layer.scale is None:
            return operators.cublas_linear(x, layer.weight, layer.bias, activation)
        return operators.cublas_float8(x, x_scale, layer.weight, layer.scale, layer.bias)

    def linear_choice(self, rows: int, layer: Layer, activation: str = "none") -> str:
        """Which matrix product runs on `rows` rows: "cublas", or "triton" (also where the operators
        are the plain ones)."""
        if not self.native:
            return "triton"
        columns, inner = layer.weight.shape
        key = ("linear", rows, columns, inner, activation, layer.weight.dtype)
        if key not in self._choices:
            allowed, default = ["cublas", "triton"], "cublas"
            if layer.scale is not None:
                # cuBLAS's row-wise float8 product makes bfloat16, wants multiples of 16 and Hopper,
                # and has no GELU.
                fits = (
                    self.dtype == torch.bfloat16
                    and activation == "none"
                    and not columns % 16
                    and not inner % 16
                )
                if not fits or self.capability < (9, 0):
                    allowed, default = ["triton"], "triton"
            shape = {
                "dtype": _name(layer.weight.dtype),
                "activation": activation,
                "columns": columns,
                "inner": inner,
            }
            self._choices[key] = (
                tuning.fastest(self.measured, allowed, rows, operator="linear", **shape) or default
            )
        return self._choices[key]

    def _attend(self, qkv: Tensor) -> Tensor:
        return operators.attention_function(self.attention_choice(*qkv.shape[:2]), self.ops)(
            qkv, self.config.num_heads
        )

    def attention_choice(self, samples: int, tokens: int) -> str:
        """Which attention runs on that many samples of that many tokens."""
        if not self.native and (self.attention == "auto" or self.kind == "reference"):
            return "triton"
        if self.attention != "auto":
            return self.attention
        key = ("attention", samples, tokens)
        if key not in self._choices:
            size, heads = self.config.hidden_size, self.config.num_heads
            names = operators.ATTENTIONS[1:]
            allowed = [
                name
                for name in names
                if not availability.attention_unavailable(
                    name, self.device, self.dtype, size // heads
                )
            ]
            shape = {
                "dtype": _name(self.dtype),
                "heads": heads,
                "head_dim": size // heads,
                "tokens": tokens,
            }
            choice = (
                tuning.fastest(self.measured, allowed, samples, operator="attention", **shape)
                or "sdpa"
            )
            trial = torch.zeros(1, tokens, 3 * size, dtype=self.dtype, device=self.device)
            self._choices[key] = "sdpa" if self._try_attention(choice, trial) else choice
        return self._choices[key]

    def describe(self, samples: int, tokens: int, depth: int) -> dict[str, Any]:
        """What an evaluation of `samples` rows launches: products, attention, number of launches;
        and the bytes of the weights."""
        live, rows = self.config.live_blocks(depth), samples * tokens
        told: dict[str, Any] = {
            "attention": self.attention_choice(samples, tokens),
            "precision": self.precision or _name(self.dtype),
        }
        if self.weights.blocks:
            layers = {name: getattr(self.weights.blocks[0], name) for name in LAYERS}
            chosen = {
                name: self.linear_choice(rows, layer, "gelu" if name == "mlp_in" else "none")
                for name, layer in layers.items()
            }
            told["matrix_products"] = {
                n: f"{chosen[n]} {_name(layer.weight.dtype)}" for n, layer in layers.items()
            }
        per_block = ROW_LAUNCHES + (self.precision is not None)
        told["launches_per_evaluation"] = per_block * live + ENDS_LAUNCHES
        told["weight_bytes"] = self.weights.nbytes | {"live_blocks": live}
        return told


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
