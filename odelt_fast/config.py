"""The configuration of a network, its presets, the lengths at which it can run, and what is known
of the data that it was trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from odelt_fast.checks import Size, check_size, number, one_of, shown, sides, whole

INNER_STEPS = ("unit", "inverse_depth", "residual")
LAYER_NORM_EPS = 1e-6
NUM_STEP_INDICES = 8  # log2 of the number of steps: 0 (one) .. 7 (128, and flow matching)
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width, of the published sizes S, B, L, XL
SD_SCALE, SD_CHANNELS = 0.18215, 4  # of the latents of Stable Diffusion's autoencoder
# How the velocity of a trained model is to be integrated: shortcut (step index log2 T), flow (the
# index of 128 steps at any T), consistency (predict the data, re-noise), live_reflow (index 0 below
# 128 steps), diffusion (probability-flow ODE of the variance-preserving path).
SAMPLING_KINDS = ("shortcut", "flow", "consistency", "live_reflow", "diffusion", "mean_flow")
# Far above any published DiT (XL: width 1152, 28 blocks): a configuration read from a file must not
# be able to ask for absurd tables.
_LIMITS = {
    "image_size": 4096,
    "channels": 4096,
    "patch_size": 256,
    "hidden_size": 65536,
    "depth": 1024,
    "num_heads": 4096,
    "num_classes": 10_000_000,
}


@dataclass(frozen=True)
class DiTConfig:
    """Shape of an ODE_t(ODE_l) diffusion transformer. Validates itself: a value that cannot work
    raises ValueError.

    `depth_group` (G) consecutive blocks are one Euler step of the inner ODE; the network may run at
    the lengths `depths`. `length_conditioned=False` is the conventional DiT (no inner ODE, no
    length table: one depth). `step_conditioned=False` keeps the step-size embedder and feeds it
    index 0, as flow-matching checkpoints of the reference want. `inner_step="inverse_depth"` scales
    every group's addition by G/l (equation 7 of the paper; the reference uses 1, "unit");
    "residual" is the wiring in which pretrained transformers get the dial unchanged: no sum of
    increments, the velocity is read from the tokens after l blocks, and the final layer sees the
    length embedding too. `time_scale`, `time_period` and `guided_channels` are those of other
    projects' transformers. `guidance_max`: the network is told a guidance scale, with which one
    evaluation is guided.
    `sampling` records how the training objective wants the model to be sampled (SAMPLING_KINDS).
    """

    image_size: Size = 32
    """Side, in pixels or latent values, of what the network sees (latents of 256 pixels: 32); two
    numbers: height and width."""
    channels: int = 4
    """Channels of what the network sees: 1 grey, 3 colour, 4 latents."""
    patch_size: int = 2
    """Side of a patch, in pixels or latent values; a patch is a token."""
    hidden_size: int = 768
    """Width of a token."""
    depth: int = 12
    """Number of blocks, and the greatest length l."""
    depth_min: int = 4
    """Smallest length l, in blocks."""
    depth_group: int = 4
    """Blocks in a group, G: one Euler step of the inner ODE."""
    num_heads: int = 12
    """Heads of attention, among which hidden_size is divided."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer as a multiple of hidden_size."""
    num_classes: int = 1000
    """Classes of the data; 1: unconditional."""
    length_conditioned: bool = True
    """An inner ODE with a table of lengths; off: the conventional DiT, of one depth."""
    step_conditioned: bool = True
    """Whether the network is told log2 of the number of time steps; off: it is always told 0."""
    inner_step: str = "unit"
    """Size of a step of the inner ODE: unit (as the reference), inverse_depth, G/l (equation 7), or
    residual: no inner ODE, the final layer reads the tokens after l blocks."""
    dropout: float = 0.0
    """Probability of dropout in the MLPs while training."""
    sampling: str = "shortcut"
    """How the trained model is to be sampled; training sets it for its objective."""
    time_scale: float = 1.0
    """What times are multiplied by before their features are made (DiT: 1000)."""
    time_period: float = 10000.0
    """Longest period of the time features, whose k-th of 128 frequencies is time_period^(-k/128)
    (diffusers: 10000^(128/127))."""
    guided_channels: int | None = None
    """Guidance acts on so many first channels, the others keep the label's velocity (SiT and DiT:
    3); unset: on all."""
    guidance_max: float | None = None
    """Largest guidance scale that the network is told, from 1 on: it is then guided in one
    evaluation (mean-flow and alpha-flow train it so); unset: it is told none."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                value = whole(field.name, value, 1, _LIMITS.get(field.name))
                object.__setattr__(self, field.name, value)  # numpy's become Python's
            elif field.type == "float":
                number(field.name, value)
            elif field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false, not {shown(value)}")
        if not (self.time_scale > 0 and self.time_period > 1):
            raise ValueError(
                f"time_scale must be above 0 and time_period above 1, not {self.time_scale} and"
                f" {self.time_period}"
            )
        if self.guided_channels is not None:
            channels = whole("guided_channels", self.guided_channels, 1, self.channels)
            object.__setattr__(self, "guided_channels", channels)
        if self.guidance_max is not None:
            largest = number("guidance_max", self.guidance_max, 1, 1000)
            object.__setattr__(self, "guidance_max", largest)
            if largest == 1 or self.num_classes == 1:
                raise ValueError(
                    "guidance_max must be above 1, the scale of the labels alone, for a model of"
                    f" several classes, not {largest:g} for {self.num_classes}"
                )
        one_of("inner_step", self.inner_step, INNER_STEPS)
        one_of("sampling", self.sampling, SAMPLING_KINDS)
        size = check_size("image_size", self.image_size, _LIMITS["image_size"])
        object.__setattr__(self, "image_size", size)
        if any(side % self.patch_size for side in sides(size)):
            raise ValueError(f"image_size {size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 4 (sine and cosine of two"
                " coordinates)"
            )
        if not 0 < self.mlp_ratio <= 64 or self.mlp_size < 1:
            raise ValueError(f"mlp_ratio must be above 0 and at most 64, not {self.mlp_ratio}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if not self.length_conditioned:
            return
        if self.depth_min > self.depth:
            raise ValueError(f"depth_min {self.depth_min} is above depth {self.depth}")
        if (self.depth - self.depth_min) % self.depth_group:
            raise ValueError(
                f"depth {self.depth} is not depth_min + k*depth_group ({self.depth_min} +"
                f" k*{self.depth_group})"
            )

    @property
    def depths(self) -> tuple[int, ...]:
        """Lengths l at which the network may run, ascending; the conventional DiT has one."""
        if not self.length_conditioned:
            return (self.depth,)
        return tuple(range(self.depth_min, self.depth + 1, self.depth_group))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees."""
        return self.channels, *sides(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = sides(self.image_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    def check_depth(self, depth: int | None) -> int:
        """The length l that `depth` asks for (None: all of it); ValueError for what is none."""
        if depth is None:
            return self.depth
        if isinstance(depth, bool) or not isinstance(depth, int) or depth not in self.depths:
            raise ValueError(
                f"depth {depth} is not allowed: this model runs at depth"
                f" {', '.join(map(str, self.depths))}"
            )
        return depth

    def live_blocks(self, depth: int | None = None) -> int:
        """Number of leading blocks whose output reaches the velocity at length `depth`.

        Of the inner ODE whole groups only (XL, G = 8: 8 at l = 12).
        """
        length = self.check_depth(depth)
        return length - length % self.depth_group if self.has_inner_ode else length

    @property
    def has_inner_ode(self) -> bool:
        """Whether groups of blocks are Euler steps, whose increments add up to the velocity."""
        return self.length_conditioned and self.inner_step != "residual"

    def ends_group(self, block: int) -> bool:
        """Whether block number `block`, from 0, ends an Euler step of the inner ODE."""
        return self.has_inner_ode and (block + 1) % self.depth_group == 0

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> DiTConfig:
        """Builds a configuration from a mapping of field names; unknown names raise ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(
                f"unknown configuration key {unknown[0]!r}; allowed: {', '.join(sorted(known))}"
            )
        return cls(**values)  # type: ignore[arg-type]


PRESETS: dict[str, DiTConfig] = {
    "DiT-S/2": DiTConfig(hidden_size=384, num_heads=6),
    "DiT-B/2": DiTConfig(hidden_size=768, num_heads=12),
    "DiT-L/2": DiTConfig(hidden_size=1024, depth=24, depth_min=8, depth_group=8, num_heads=16),
    "DiT-XL/2": DiTConfig(hidden_size=1152, depth=28, depth_min=12, depth_group=8, num_heads=16),
    "digits": DiTConfig(
        image_size=8, channels=1, patch_size=2, hidden_size=96, num_heads=4, num_classes=10
    ),
    "mnist": DiTConfig(
        image_size=28, channels=1, patch_size=7, hidden_size=128, num_heads=8, num_classes=10
    ),
    # 15.6 MB in float16
    "cifar10": DiTConfig(channels=3, hidden_size=192, num_heads=3, mlp_ratio=3.5, num_classes=10),
    # A quarter of its tokens: for a CPU. The model in the package.
    "cifar10-small": DiTConfig(
        channels=3, patch_size=4, hidden_size=128, num_heads=4, num_classes=10
    ),
}


@dataclass(frozen=True)
class Latents:
    """What latents are: scale * (z - shift) of the values z that an autoencoder's encoder makes.

    encoder: the autoencoder's name, a folder or Hub id; encoder_sha256: of its encoder's weights,
    which tells copies from others. Empty where it is not known.
    """

    scale: float
    shift: float = 0.0
    encoder: str = ""
    encoder_sha256: str = ""

    def __post_init__(self) -> None:
        number("the latents' scale", self.scale, 1e-30, 1e6)
        number("the latents' shift", self.shift, -1e6, 1e6)
        for name in ("encoder", "encoder_sha256"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"the latents' {name} must be text")

    def __str__(self) -> str:
        shift = f", shift {self.shift:g}" if self.shift else ""
        return f"{plain(self.encoder) or 'an unknown encoder'} (scale {self.scale:g}{shift})"

    def fits(self, other: Latents) -> bool:
        """Whether both can be latents of one autoencoder, by all that is known of both. The same
        encoder under another name is the same."""
        if not (
            math.isclose(self.scale, other.scale, rel_tol=1e-6)
            and math.isclose(self.shift, other.shift, rel_tol=1e-6, abs_tol=1e-9)
        ):
            return False
        for name in ("encoder_sha256", "encoder"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours and theirs:
                return ours == theirs
        return True


@dataclass(frozen=True)
class TrainedOn:
    """What is known of a model's data: the names of its classes in the order of their labels
    (empty: unknown), and what its latents are (None: unknown, or pixels).

    In config.json beside the shape of the network: `id2label`, as Hugging Face has it, where
    synonyms are separated by commas, and `latents`.
    """

    class_names: tuple[str, ...] = ()
    latents: Latents | None = None

    def to_dict(self) -> dict[str, object]:
        """What is known, as config.json has it."""
        names = {str(label): name for label, name in enumerate(self.class_names)}
        latents = None if self.latents is None else dataclasses.asdict(self.latents)
        known = {"id2label": names, "latents": latents}
        return {name: value for name, value in known.items() if value}

    @classmethod
    def taken_from(cls, values: dict[str, object], num_classes: object) -> TrainedOn:
        """Takes the entries of `to_dict` out of a configuration. ValueError for damaged ones."""
        names, latents = values.pop("id2label", None), values.pop("latents", None)
        fields = {field.name for field in dataclasses.fields(Latents)}
        if latents is not None and not (
            isinstance(latents, dict) and "scale" in latents and latents.keys() <= fields
        ):
            raise ValueError(f"latents must have scale and may have {', '.join(sorted(fields))}")
        known = None if latents is None else Latents(**latents)
        if names is None:
            return cls(latents=known)
        known_names = names if isinstance(names, dict) else {}
        found = (known_names.get(str(label)) for label in range(len(known_names)))
        ordered = [name for name in found if isinstance(name, str)]
        if len(ordered) != len(known_names) or len(ordered) != num_classes:
            raise ValueError("id2label must map every label, from 0 on, to the name of its class")
        return cls(tuple(ordered), known)

    @cached_property
    def _exact(self) -> dict[str, list[int]]:
        return _index((name, label) for label, name in enumerate(self.class_names))

    @cached_property
    def _synonyms(self) -> dict[str, list[int]]:
        names = enumerate(self.class_names)
        return _index((part.strip(), label) for label, name in names for part in name.split(","))

    def find(self, name: str) -> list[int]:
        """Labels of the classes of this name; those that have it among their synonyms, if none."""
        return self._exact.get(name) or self._synonyms.get(name, [])

    def conflict(self, other: TrainedOn) -> str | None:
        """What tells this and another one apart, in words; None: nothing, as far as known."""
        ours, theirs = self.class_names, other.class_names
        named = all(names and not are_numbers(names) for names in (ours, theirs))
        if named and ours != theirs:
            return f"{describe_classes(ours)}, not {describe_classes(theirs)}"
        if self.latents and other.latents and not self.latents.fits(other.latents):
            return f"latents of {self.latents}, not {other.latents}"
        return None


def _index(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, label in pairs:
        found.setdefault(name, []).append(label)
    return found


def plain(name: str) -> str:
    """A name from a file or folder for a message: printable, of at most 58 characters."""
    return " ".join(shown(name)[1:-1].split())


def are_numbers(class_names: Sequence[str]) -> bool:
    """Whether classes have no names but their labels, "0", "1", ..."""
    return all(name == str(label) for label, name in enumerate(class_names))


def describe_classes(class_names: Sequence[str]) -> str:
    """Classes and their labels in one line: 3 classes (0 ant, 1 bee, 2 cat)."""
    count = len(class_names)
    chosen = range(count) if count <= 20 else (*range(10), count - 1)
    listed = [f"{label} {plain(class_names[label])}" for label in chosen]
    if count > 20:
        listed.insert(10, "...")
    return f"{count} class{'' if count == 1 else 'es'} ({', '.join(listed)})"
