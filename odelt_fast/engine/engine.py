"""The network prepared for sampling: weights as the kernels want them, and one evaluation as a
fixed sequence of launches, which a plan makes (plans.py).

The modulation of all blocks comes from outside (`modulations`), where it is made for many steps at
once (trajectory.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from odelt_fast.checks import one_of
from odelt_fast.model import DiT, guidance_share, position_table

from .availability import (
    attention_unavailable,
    kernels_unavailable,
    model_unsupported,
    try_attention,
)
from .operators import (
    ATTENTIONS,
    PRECISIONS,
    attention_function,
    chosen_by_pytorch,
    cublas_float8,
    cublas_linear,
    load_operators,
)
from .plans import DEFAULT, PLANS, Setting, capability_of, require_plan
from .tuning import fastest, read_tuning
from .weights import Layer, PreparedWeights

Tables = tuple[Tensor, Tensor]  # modulations: of the blocks (R, live*6*D), the final layer (R, 2*D)

logger = logging.getLogger(__name__)


class Engine:
    """A DiT evaluated with fused kernels: `engine(x, t, log2_steps, y, depth)` is `model(x, t,
    log2_steps, y, depth)` for one depth.

    The model's modulation weights become views of one stacked tensor: no weight is held twice.

    Args:
        model: of float32, bfloat16 or float16.
        attention: "auto" or one of `operators.ATTENTIONS`.
        precision: None, the model's, or "fp8": three of a block's four products run on row-wise
            float8 (e4m3), with an error of a few percent on one evaluation, as in plain PyTorch.
        kind: "kernels" (CUDA, or the CPU under TRITON_INTERPRET=1) or "reference": the same launch
            sequence in plain PyTorch, on any device.
        plans: names of those that may run: of several the one that is fastest at a shape by this
            card's tuning, the first where that has not been measured. Where none of them serves a
            batch the default one runs.

    Raises:
        ValueError: it cannot run, with the reason.
    """

    def __init__(
        self,
        model: DiT,
        attention: str = "auto",
        precision: str | None = None,
        kind: str = "kernels",
        plans: Sequence[str] = (DEFAULT,),
    ) -> None:
        reason = model_unsupported(model) or kernels_unavailable()
        if reason:
            raise ValueError(f"the engine cannot run this model: {reason}")
        one_of("attention", attention, ATTENTIONS)
        self.precision = one_of("precision", precision, PRECISIONS)
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.max_depth, self.kind = model.max_depth, kind
        self.head_dim = model.config.hidden_size // model.config.num_heads
        self.ops, self.measured = load_operators(kind), read_tuning(self.device)
        self.on_gpu = kind == "kernels" and self.device.type == "cuda"
        self.capability = capability_of(self.device, kind)
        if precision == "fp8" and self.capability < (8, 9):
            raise ValueError(
                "precision 'fp8' needs a GPU of compute capability 8.9 or newer, not"
                f" {'.'.join(map(str, self.capability))}"
            )
        self._choices: dict[tuple[object, ...], str] = {}
        with torch.inference_mode(False), torch.no_grad():
            quantize = None if precision is None else self.ops.quantize_rows
            self.weights = PreparedWeights(model, quantize)
            self._positions = {model.config.image_shape[1:]: model.positions}
        self._workspaces: dict[int, Tensor] = {}
        self.attention = self._check_attention(attention)
        self.plans = tuple(one_of("plan", name, tuple(PLANS)) for name in plans)
        given = self.config, self.dtype, precision, attention, self.capability
        self.setting, self.kept = Setting(*given), dict[str, Any]()
        for name in self.plans:
            require_plan(name, self.setting)
            self.kept[name] = PLANS[name].prepare(self)

    def workspace(self) -> Tensor | None:
        """What split-K launches on the current stream need, kept for each stream: they keep twice
        the processors busy with tiles of 64 x 64 at most (kernels/linear.py)."""
        if self.kind != "kernels":
            return None
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.on_gpu else 0
        if stream not in self._workspaces:
            from odelt_fast.kernels.device import architecture
            from odelt_fast.kernels.tiles import COUNTERS

            size = COUNTERS + 2 * architecture(self.device)[1] * 64 * 64
            with torch.inference_mode(False):
                made = torch.zeros(size, dtype=torch.int32, device=self.device)
            self._workspaces[stream] = made
        return self._workspaces[stream]

    def _check_attention(self, name: str) -> str:
        if name != "auto" and self.kind == "kernels":
            reason = attention_unavailable(name, self.device, self.dtype, self.head_dim)
            tokens = math.prod(self.config.grid)
            reason = reason or self._try_attention(name, tokens)
            if reason:
                raise ValueError(f"attention {name!r} cannot run here: {reason}")
        return name

    def _try_attention(self, name: str, tokens: int) -> str | None:
        shape = 1, tokens, 3 * self.config.hidden_size
        qkv = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return try_attention(name, attention_function(name, self.ops), qkv, self.config.num_heads)

    def positions(self, height: int, width: int) -> Tensor:
        """The position table (N, D) of images of that size."""
        if (height, width) not in self._positions:
            patch = self.config.patch_size
            table = position_table(height // patch, width // patch, self.config.hidden_size)
            self._positions[height, width] = table.to(self.device)
        return self._positions[height, width]

    def condition(self, t: Tensor, log2_steps: Tensor | float) -> Tensor:
        """Time + step-size embedding (S, D), in float32 at least; t (S,) float32. That of the label
        (`labels`) is added to it."""
        index = log2_steps if self.config.step_conditioned else 0
        if not isinstance(index, Tensor):
            index = torch.full((1,), float(index), device=self.device)
        time = self.weights.time_embed(t).to(torch.promote_types(self.dtype, torch.float32))
        return time + self.weights.step_embed(index)

    def labels(self, y: Tensor, guidance: float | Tensor | None = None) -> Tensor:
        """Label embedding (..., D) of y; with that of the guidance scale, of any shape that
        broadcasts with y, where the network is told it."""
        label, embed = self.weights.label_embed(y), self.weights.guidance_embed
        if embed is None:
            return label
        share = guidance_share(guidance, y == self.config.num_classes)
        return label + embed(share.flatten()).unflatten(0, share.shape)

    def length_rows(self, depths: int | Sequence[int]) -> Tensor | float:
        """Length embedding of a depth (D,) or of each depth (len, D), which the blocks see; 0 for
        the conventional DiT."""
        if self.weights.length_embed is None:
            return 0.0
        # Of one depth a view: nothing is copied from the host, which a capture would forbid.
        index = depths if isinstance(depths, int) else torch.tensor(depths, device=self.device)
        return self.weights.length_embed[index]

    def modulations(self, blocks: Tensor, final: Tensor, depth: int) -> Tables:
        """Modulation of all blocks live at `depth` (R, live*6*D) and of the final layer (R, 2*D),
        from their conditions (R, D). In residual wiring the final layer's is the blocks'."""
        final = final if self.config.has_inner_ode else blocks
        columns = 6 * self.config.hidden_size * self.config.live_blocks(depth)
        stacked, last = self.weights.modulation, self.weights.final_modulation
        with self._launching(*self.plans):
            if columns:
                weight, bias = stacked.weight[:columns], stacked.bias[:columns]
                blocks = self.ops.modulation(blocks, weight, bias)
            return blocks, self.ops.modulation(final, last.weight, last.bias)

    def _launching(self, *plans: str) -> AbstractContextManager[None]:
        """Overlapped launches, if one of the plans has them: they change no result."""
        from odelt_fast.kernels.device import overlapped_launches

        overlapped = any(PLANS[name].overlapped for name in plans)
        return overlapped_launches() if overlapped else nullcontext()

    def __call__(
        self,
        x: Tensor,
        t: float | Tensor,
        log2_steps: float | Tensor,
        y: Tensor,
        depth: int | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, C, H, W) in x's dtype; the arguments are those of `DiT.forward`, with one
        depth for all samples."""
        depth = self.max_depth if depth is None else depth
        if not isinstance(t, Tensor):
            t = torch.full((1,), float(t), device=self.device)
        if isinstance(log2_steps, Tensor):
            log2_steps = log2_steps.reshape(-1).float()
        final = self.condition(t.reshape(-1).float(), log2_steps) + self.labels(y, guidance)
        tables = self.modulations(final + self.length_rows(depth), final, depth)
        return self.velocity(x, tables, depth)

    def velocity(
        self, x: Tensor, tables: Tables, depth: int, guidance: float | None = None
    ) -> Tensor:
        """v (B, C, H, W) in x's dtype, from modulations of B rows or 1; with guidance of 2B rows,
        labels first, or 1."""
        with self._launching(self._plan_of(x, guidance)):
            h = self._hidden(x, tables, depth, guidance)
            return self.ops.final_velocity(
                h, *self._projection, *x.shape[2:], x.dtype, guidance, self.config.guided_channels
            )

    def euler_step(
        self, x: Tensor, tables: Tables, depth: int, step: float, guidance: float | None = None
    ) -> Tensor:
        """x + step*v in x's dtype; for the rest see `velocity`."""
        with self._launching(self._plan_of(x, guidance)):
            h = self._hidden(x, tables, depth, guidance)
            return self.ops.final_euler(
                x, h, *self._projection, step, guidance, self.config.guided_channels
            )

    def _plan_of(self, x: Tensor, guidance: float | None) -> str:
        tokens = math.prod(x.shape[2:]) // self.config.patch_size**2
        return self.plan_choice(len(x) * (1 if guidance is None else 2), tokens)

    @property
    def _projection(self) -> tuple[Tensor, Tensor, int]:
        final = self.weights.final
        return final.weight, final.bias, self.config.patch_size

    def _hidden(self, state: Tensor, tables: Tables, depth: int, guidance: float | None) -> Tensor:
        """What the final projection sees: (B or 2B, N, D), the inner ODE's vr after the final
        layer's LayerNorm + modulate."""
        plan = PLANS[self._plan_of(state, guidance)]
        if guidance is not None:
            state = torch.cat([state, state])
        if not self.config.live_blocks(depth):  # no whole group: the inner ODE stays at 0
            x = torch.zeros_like(self.ops.patch_embed(*self.patches(state)))
            return self.ops.norm_modulate(x, tables[1], 0, self.config.hidden_size)
        return plan.hidden(self, state, tables, depth)

    def plan_choice(self, samples: int, tokens: int) -> str:
        """Which of the engine's plans runs on that many samples of that many tokens; the default
        one where none serves them."""
        key = ("plan", samples, tokens)
        if key not in self._choices:
            refused = self._refused(samples, tokens)
            able = [name for name in self.plans if name not in refused] or [DEFAULT]
            choice = fastest(
                self.measured, able, samples, operator="plan", heads=self.config.num_heads,
                dtype=self.precision or _name(self.dtype), head_dim=self.head_dim, tokens=tokens,
            )  # fmt: skip
            self._choices[key] = choice or able[0]
        return self._choices[key]

    def _refused(self, samples: int, tokens: int) -> dict[str, str]:
        """Those of the engine's plans that do not serve such a batch, with the reasons."""
        reasons = {name: PLANS[name].refuses(self.setting, samples, tokens) for name in self.plans}
        return {name: reason for name, reason in reasons.items() if reason}

    def patches(self, state: Tensor) -> tuple[Any, ...]:
        """What `patch_embed` makes tokens (B, N, D) of."""
        patch, positions = self.weights.patch, self.positions(*state.shape[2:])
        return state, patch.weight, patch.bias, positions, self.config.patch_size

    def product(
        self,
        h: Any,
        layer: Layer,
        activation: str = "none",
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """act(h W^T + b) of h (B, N, inner), or residual + gate * that; where the layer's weight is
        float8, h is a pair (q, scales)."""
        x, x_scale = h if layer.scale is not None else (h, None)
        weights = layer.weight, layer.bias
        after = activation if residual is None else "gated"
        choice = self.linear_choice(x.shape[0] * x.shape[1], layer, after)
        if choice != "cublas":
            return self.ops.linear(
                x, *weights, activation, gate, residual, x_scale, layer.scale, self.dtype,
                workspace=self.workspace(), configuration=None if choice == "triton" else choice,
            )  # fmt: skip
        if x_scale is None or layer.scale is None:
            return cublas_linear(x, *weights, activation)
        return cublas_float8(x, x_scale, layer.weight, layer.scale, layer.bias)

    def linear_choice(self, rows: int, layer: Layer, activation: str = "none") -> str:
        """Which matrix product runs on `rows` rows: "cublas", "triton" (also where the operators
        are the plain ones), or a configuration of ours that was measured to be faster than both
        (`kernels.tiles.specialized_tiles`). activation: "gated" with a residual and a gate."""
        if not self.on_gpu:
            return "triton"
        columns, inner = layer.weight.shape
        key = ("linear", rows, columns, inner, activation, layer.weight.dtype)
        if key not in self._choices:
            from odelt_fast.kernels.tiles import specialized_tiles

            (major, minor), gated = self.capability, activation == "gated"
            own = ["triton", *specialized_tiles(10 * major + minor, layer.weight.dtype, gated)]
            # cuBLAS's row-wise float8 product makes bfloat16, wants multiples of 16 and Hopper, and
            # has no GELU.
            fits = self.dtype == torch.bfloat16 and not (columns % 16 or inner % 16)
            fits &= activation == "none" and self.capability >= (9, 0)
            alone = gated or (layer.scale is not None and not fits)
            allowed = own if alone else ["cublas", *own]
            choice = fastest(
                self.measured, allowed, rows, operator="linear", dtype=_name(layer.weight.dtype),
                activation=activation, columns=columns, inner=inner,
            )  # fmt: skip
            self._choices[key] = choice or allowed[0]
        return self._choices[key]

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention on packed qkv (B, N, 3*D): (B, N, D)."""
        attention = attention_function(self.attention_choice(*qkv.shape[:2]), self.ops)
        return attention(qkv, self.config.num_heads)

    def attention_choice(self, samples: int, tokens: int) -> str:
        """Which attention runs on that many samples of that many tokens."""
        if not self.on_gpu and (self.attention == "auto" or self.kind == "reference"):
            return "triton"
        if self.attention != "auto":
            return self.attention
        key = ("attention", samples, tokens)
        if key not in self._choices:
            each = self.device, self.dtype, self.head_dim
            allowed = [name for name in ATTENTIONS[1:] if not attention_unavailable(name, *each)]
            choice = fastest(
                self.measured, allowed, samples, operator="attention", dtype=_name(self.dtype),
                head_dim=self.head_dim, heads=self.config.num_heads, tokens=tokens,
            ) or "sdpa"  # fmt: skip
            reason = self._try_attention(choice, tokens)
            if reason:
                logger.info("attention %s is fastest here and cannot run: %s", choice, reason)
            self._choices[key] = "sdpa" if reason else choice
        return self._choices[key]

    def _attention_told(self, samples: int, tokens: int) -> str:
        """The attention's name, with the kernel that PyTorch chooses where the choice is its
        own."""
        choice = self.attention_choice(samples, tokens)
        if choice != "sdpa" or not self.on_gpu:
            return choice
        shape = 1, tokens, 3 * self.config.hidden_size
        qkv = torch.empty(shape, dtype=self.dtype, device=self.device)
        return f"sdpa ({chosen_by_pytorch(qkv, self.config.num_heads)})"

    def describe(self, samples: int, tokens: int, depth: int) -> dict[str, Any]:
        """What an evaluation of `samples` rows launches: products, attention, number of launches;
        and the bytes of the weights."""
        live, rows = self.config.live_blocks(depth), samples * tokens
        name = self.plan_choice(samples, tokens)
        plan = PLANS[name]
        own = "attention" in plan.own
        facts: dict[str, Any] = {
            "attention": "triton" if own else self._attention_told(samples, tokens),
            "precision": self.precision or _name(self.dtype),
            "plan": name,
        }
        if refused := self._refused(samples, tokens):
            facts["plans_not_taken"] = refused
        if self.weights.blocks:
            facts["matrix_products"] = products = {}
            for name, layer in self.weights.blocks[0].items():
                after = "gated" if name in plan.gated else "none"
                choice = self.linear_choice(rows, layer, "gelu" if name == "mlp_in" else after)
                choice = "triton" if name in plan.own else choice
                products[name] = f"{choice} {_name(layer.weight.dtype)}"
        facts["launches_per_evaluation"] = plan.launches(live, self.precision is not None)
        facts["weight_bytes"] = self.weights.nbytes | {"live_blocks": live}
        return facts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
