"""A DiT's weights as the engine wants them: no dead blocks, the modulation of all blocks in one
matrix, float8 where asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odelt_fast.model import DiT

LAYERS = ("qkv", "attention_out", "mlp_in", "mlp_out")
# The output projection is too small to repay the quantisation of its input.
FLOAT8_LAYERS = ("qkv", "mlp_in", "mlp_out")


class Layer(NamedTuple):
    """Weights of a matrix product: weight (columns, inner), bias (columns,); with `scale`
    (columns,) float32 the weight is float8."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self if each is not None)


class ParameterVersions:
    """Tells whether parameters have been written to, or moved (not: changes through `.data`, and
    parameters that replace them)."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self._versioned = [each for each in self.parameters if not each.is_inference()]
        self.update()

    def _now(self) -> tuple[int, int]:
        return sum(map(attrgetter("_version"), self._versioned)), self.parameters[0].data_ptr()

    def update(self) -> None:
        """From now on they count as unchanged."""
        self._state = self._now()

    def unchanged(self) -> bool:
        return self._now() == self._state


class PreparedWeights:
    """Prepared from `model`, whose modulation weights become views of one stacked tensor: no weight
    is held twice, but by float8 copies.

    quantize: (columns, inner) -> (float8, scale of each row) for FLOAT8_LAYERS; None: all layers
    stay in the model's dtype. It does not hold the model, so that what belongs to a model can be
    kept beside it and goes with it.
    """

    def __init__(
        self, given: DiT, quantize: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> None:
        model: Any = given
        config = given.config
        blocks = model.blocks[: config.live_blocks(given.max_depth)]
        self._parameters = list(given.parameters())
        self._versions = ParameterVersions(_copied(model, blocks, quantize is not None))
        self.blocks = [
            {name: _layer(name, getattr(block, name), quantize) for name in LAYERS}
            for block in blocks
        ]
        patch = _layer("", model.patch_embed, None)
        self.patch = Layer(patch.weight.flatten(1), patch.bias)
        self.final = _layer("", model.final_layer.out, None)
        self.final_modulation = _layer("", model.final_layer.modulation, None)
        self.modulation = stack_modulations(blocks, self.final_modulation)
        self.time_embed, self.step_embed = model.time_embed, model.step_embed
        self.label_embed = model.label_embed
        self.guidance_embed = None if config.guidance_max is None else model.guidance_embed
        self.length_embed: Tensor | None = None
        if config.length_conditioned:
            self.length_embed = model.length_embed.weight.detach()
        # By depth: (1,) float32, rounded to the model's dtype as the model does; None: 1.
        self.group_steps: dict[int, Tensor | None] = dict.fromkeys(config.depths)
        if config.inner_step == "inverse_depth":
            for depth in config.depths:
                step = config.depth_group / torch.tensor([depth], dtype=given.dtype)
                self.group_steps[depth] = step.float().to(given.device)
        self._versions.update()

    def is_current(self) -> bool:
        """Whether what was made from the weights is still what they would give, as far as
        `ParameterVersions` tells. Those that are read where they lie may change."""
        return self._versions.unchanged()

    def are_of(self, model: DiT) -> bool:
        """Whether they were prepared from just this model's parameters as they are now."""
        own, ours = (list(map(id, each)) for each in (model.parameters(), self._parameters))
        return own == ours and self.is_current()

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the weights in memory: of one live block (its modulation included), and of the
        ends."""
        each = sum(layer.nbytes for block in self.blocks[:1] for layer in block.values())
        ends = [
            *self.time_embed.parameters(), *self.step_embed.parameters(), self.label_embed.weight,
            *(self.guidance_embed.parameters() if self.guidance_embed else ()),
            self.length_embed, self.patch, self.final, self.final_modulation,
        ]  # fmt: skip
        return {
            "per_block": each + self.modulation.nbytes // max(1, len(self.blocks)),
            "ends": sum(part.nbytes for part in ends if part is not None),
        }


def _copied(model: Any, blocks: Sequence[Any], quantized: bool) -> Iterator[Tensor]:
    """The parameters of which something is kept: embeddings and modulations of times and labels
    that are known beforehand (`Trajectory`), and float8 copies. A launch reads all others where
    they lie. To look at each of the network's takes as long as the rest of a call."""
    names = ("time_embed", "step_embed", "label_embed", "guidance_embed", "length_embed")
    embeds = [getattr(model, name, None) for name in names]
    modulations = [each.modulation for each in (*blocks, model.final_layer)]
    for module in (*embeds, *modulations):
        if module is not None:
            yield from module.parameters()
    for block in blocks if quantized else ():
        yield from (getattr(block, name).weight for name in FLOAT8_LAYERS)


def stack_modulations(blocks: Sequence[Any], empty: Layer) -> Layer:
    """The blocks' modulation weights one below the other, (blocks*6*D, D), and biases; the model's
    own become views of them. Without blocks: none of the rows of `empty`."""
    if not blocks:
        return Layer(empty.weight[:0], empty.bias[:0])
    stacks = []
    for name in ("weight", "bias"):
        parts = [getattr(block.modulation, name) for block in blocks]
        stack = _adjoining(parts)
        if stack is None:
            stack = torch.cat([part.detach() for part in parts])
            for part, view in zip(parts, stack.chunk(len(parts))):
                part.data = view
        stacks.append(stack)
    return Layer(*stacks)


def _layer(
    name: str, linear: Any, quantize: Callable[[Tensor], tuple[Tensor, Tensor]] | None
) -> Layer:
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if quantize is None or name not in FLOAT8_LAYERS:
        return Layer(weight, bias)
    quantized, scale = quantize(weight)
    return Layer(quantized, bias, scale)


def _adjoining(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor that contiguous parts of one shape lie in, one after the other; None if they do
    not."""
    first = parts[0].detach()
    storage = first.untyped_storage().data_ptr()
    if not all(
        part.untyped_storage().data_ptr() == storage
        and part.data_ptr() == first.data_ptr() + index * first.nbytes
        and part.is_contiguous()
        for index, part in enumerate(parts)
    ):
        return None
    return first.as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride())
