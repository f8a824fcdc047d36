"""The options of a training run: one frozen dataclass and the checks that need no data.

Loads no torch. `recipes` has its presets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from odelt_fast.checks import number, whole
from odelt_fast.config import PRESETS, DiTConfig

from .dial import DialOptions
from .mean_velocity import MEAN_VELOCITY, MEAN_VELOCITY_DEFAULTS, MeanVelocityOptions
from .methods import (
    SAMPLING,
    WITH_TIME_ROWS,
    ObjectiveName,
    PathName,
    Precision,
    RecipeName,
    check_guidance,
)


@dataclass(frozen=True)
class TrainConfig(DialOptions):
    """Options of a training run (Algorithm 1 and Table 7 of the paper). A combination that cannot
    work raises ValueError."""

    recipe: RecipeName = "digits"
    """Preset of every other option; options given beside it override it."""
    model: DiTConfig = PRESETS["digits"]
    """Shape of the network, by its parts."""
    dropout: float | None = None
    """Dropout probability of the network while it trains; None: that of --model.dropout."""
    data: str = "digits"
    """Images or latents: digits (scikit-learn's 1797 8x8 images), a folder of class folders,
    Parquet files, WebDataset shards (.tar, by URL too), the id of a Hugging Face data set, or a
    folder of latents (odelt-fast encode makes one)."""
    image_column: str | None = None
    """Column of images where --data is a table; None: looked for by type and name."""
    label_column: str | None = None
    """Column of labels, as --image-column (fine_label or coarse_label of CIFAR-100), or a key of
    shards' JSON; an empty name: one class."""
    check_images: Literal["auto", "all"] | int = "auto"
    """Images that are decoded before the first step, to leave out what cannot be; the others are as
    they come. auto: all of up to 500 000, 50 000 of more, evenly spread."""
    random_flip: bool = True
    """Mirror half of the images left to right, where the source allows it."""
    output_dir: Path = Path("runs/digits")
    """Folder of the run: checkpoint-N folders, tracker files, and at the end config.json +
    model.safetensors of the EMA weights."""

    objective: ObjectiveName = "shortcut"
    """Training method. shortcut: flow matching with time-consistency rows, as the ODE_t(ODE_l)
    reference. shortcut-models: the same as shortcut-models does it (guided at the finest step size
    only, targets clipped). mean-flow, alpha-flow: mean velocities over any duration
    (--mean-velocity). flow: plain flow matching on --path. live-reflow: Reflow on pairs that the
    live network makes. reflow: on --pairs that a teacher made. consistency: consistency
    training. From a teacher (--init-from): consistency-distillation, progressive. diffusion: noise
    prediction, variance preserving."""
    path: PathName = "rectified"
    """Probability path of objective flow (Table 1 of the paper); all start at unit noise
    (variance-exploding states are divided by sqrt(1 + sigma_t^2))."""
    path_sigma: float = 0.01
    """sigma of the paths flow-matching (at t = 1) and independent (at every t), in units of the
    data."""
    times: Literal["discrete", "continuous"] = "discrete"
    """Training times of flow, reflow and diffusion: multiples of 1/denoise_timesteps (ODE_T of the
    paper), or any in [0, 1] (ODE_t)."""
    guidance_scale: float | None = None
    """w in v_null + w (v_label - v_null) for the velocities that teach shortcuts (half of the
    time-consistency rows; shortcut-models: the finest step size), live and two-stage Reflow,
    progressive and consistency distillation. None: labels only."""
    target_network: Literal["ema", "live", "fast-ema"] | None = None
    """Network that makes the targets of shortcut, mean-flow, alpha-flow and of length consistency:
    the EMA, the live network itself (without gradient), or an EMA of decay fast_ema_decay. None:
    live for mean-flow and alpha-flow, as their papers (mean-flow falls apart behind a slow EMA),
    ema for the others."""
    fast_ema_decay: float = 0.99
    """Of --target-network fast-ema."""
    mean_velocity: MeanVelocityOptions = MEAN_VELOCITY_DEFAULTS
    """Of mean-flow and alpha-flow."""
    loss_weight_power: float | None = None
    """p of the adaptive weight (D/(e + loss_weight_eps))^p of a row with squared error e, summed
    over its D numbers; 0: every row alike, 1: as MeanFlow. None: 1 for alpha-flow, as its paper,
    0 for the others."""
    loss_weight_eps: float = 0.01
    """Added to the squared error there."""
    pairs: Path | None = None
    """Folder of noise and data pairs of objective reflow; made first by the model of --init-from if
    it is not there."""
    num_pairs: int = 50_000
    """Pairs to make, with denoise_timesteps Euler steps each."""
    time_consistency_every: int = 8
    """One row in this many is a time-consistency row (live-reflow: a Reflow row); 0: none."""
    length_consistency_every: int = 8
    """One row in this many is a length-consistency row: the paper's 1/K (0: none)."""
    denoise_timesteps: int = 128
    """Number of time steps T of the finest step size, a power of 2."""
    label_dropout: float = 0.1
    """Probability that a row's label becomes the null label, which guidance needs."""
    compat: Literal["none", "reference"] = "none"
    """reference: repeat the reference's shortcuts (flow rows reuse the consistency rows' images;
    only flow rows drop labels)."""

    steps: int = 100_000
    """Optimizer steps of the whole run."""
    train_batch_size: int = 128
    """Images of one process in one forward pass; the global batch is this times processes times
    accumulation steps."""
    gradient_accumulation_steps: int | None = None
    """Batches whose gradients are averaged before a step; None: the launcher's, else 1."""
    dataloader_num_workers: int | None = None
    """Processes, beside each that trains, that make its batches and draws ahead; 0: it makes them
    itself. None: 2 on a GPU, else 0. The numbers are the same."""
    prefetch: int = 2
    """Steps that each of these has ready at most."""
    depth_sampling: Literal["independent", "stratified"] = "independent"
    """Depths l of the rows of a batch: drawn independently, or as many rows of each depth in every
    kind of row (fixed shapes; in kinds whose rows the number of depths does not divide, depths take
    turns)."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW, in the first phase."""
    later_learning_rates: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT...")] = ()
    """Peak learning rates of further phases, if any. The phases of a run are equally long, and each
    has its own warm-up and decay."""
    warmup_steps: int = 5000
    """Steps of linear warm-up from 0, in each phase."""
    decay_fraction: float = 0.1
    """Share of a phase, at its end, in which the learning rate falls to 0 along a cosine."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW, on every parameter, per unit of learning rate."""
    adam_beta1: float = 0.9
    """Decay per step of AdamW's average of gradients."""
    adam_beta2: float = 0.999
    """Decay per step of AdamW's average of squared gradients."""
    ema_decay: float = 0.999
    """Share of itself that the EMA of the weights keeps in a step; it is the teacher, and the model
    that the run leaves."""
    ema_warmup: bool = False
    """Decay (1 + n)/(10 + n) at step n while that is below ema_decay, so that targets taken from
    the EMA start to move early."""
    ema_widths: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT...")] = ()
    """Widths sigma_rel of power-function averages to track besides, as shares of the run so far:
    0.05 0.10 lets `odelt-fast ema` make the average of any width in between, and beyond,
    afterwards. Empty: none."""
    ema_snapshot_steps: int = 5000
    """Steps between two stored snapshots of --ema-widths, in ema-snapshots/ of the folder."""
    mixed_precision: Precision | None = None
    """Arithmetic of the network (the rest is float32); None: the launcher's, else no."""
    gradient_checkpointing: bool = False
    """Keep of each block its inputs alone, and compute the rest again in the backward pass: the
    same gradients in less memory, for about a third more time."""
    compile: bool = False
    """torch.compile each block (one compilation serves all)."""
    seed: int = 0
    """Of every random number: initial weights, data order, noise, times, depths, dropout."""
    max_skipped_steps: int = 10
    """Steps without a finite loss are left out; after so many in a row the run stops."""

    logging_steps: int = 50
    """Steps between two logged losses; other steps never wait for the device."""
    sampling_steps: int = 0
    """Steps between two sample grids in the tracker (0: none)."""
    overwrite_output_dir: bool = False
    """Delete the checkpoints of a run before that the output folder holds."""
    checkpointing_steps: int = 1000
    """Optimizer steps between two checkpoints."""
    collective_timeout: float = 600
    """Seconds after which a process that waits for the others of its run has lost them."""
    checkpoints_total_limit: int | None = 2
    """Newest checkpoints kept (None: all)."""
    resume_from_checkpoint: str | None = None
    """latest, or a checkpoint-N folder."""
    log_with: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], tyro.conf.arg(metavar="TRACKER")
    ] = ("tensorboard",)
    """Trackers of losses and sample grids."""
    push_to_hub: bool = False
    """Upload the model to the Hugging Face Hub when the run is finished (log in first: hf auth
    login)."""
    hub_model_id: str | None = None
    """Repository to upload to, user/name; None: the output folder's name, of the account that is
    logged in."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "train_batch_size",
            "logging_steps",
            "checkpointing_steps",
            "ema_snapshot_steps",
            "num_pairs",
            "max_skipped_steps",
        ):
            whole(name, getattr(self, name))
        for name in (
            "time_consistency_every",
            "length_consistency_every",
            "warmup_steps",
            "sampling_steps",
            "seed",
        ):
            whole(name, getattr(self, name), 0)
        whole("prefetch", self.prefetch, 1, 1024)
        if self.dataloader_num_workers is not None:
            whole("dataloader_num_workers", self.dataloader_num_workers, 0, 256)
        for name in ("checkpoints_total_limit", "gradient_accumulation_steps"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        for name in ("learning_rate", "weight_decay", "loss_weight_eps"):
            number(name, getattr(self, name), 0)
        number("collective_timeout", self.collective_timeout, 1, 86_400)
        number("loss_weight_power", self.weight_power, 0)
        shares = ("label_dropout", "decay_fraction", "ema_decay", "fast_ema_decay", "path_sigma")
        for name in shares:
            number(name, getattr(self, name), 0, 1)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        for rate in self.later_learning_rates:
            number("each of later_learning_rates", rate, 0)
        for width in self.ema_widths:  # a uniform average has 0.289
            number("each of ema_widths", width, 0.001, 0.28)
        if len(set(self.ema_widths)) < len(self.ema_widths):
            raise ValueError(f"ema_widths must differ, not {self.ema_widths}")
        phases = 1 + len(self.later_learning_rates)
        if self.steps % phases:
            raise ValueError(
                f"steps {self.steps} are not divisible into {phases} phases (one for each learning"
                " rate)"
            )
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError("hub_model_id has no effect without --push-to-hub: set that too")
        if self.denoise_timesteps not in (2, 4, 8, 16, 32, 64, 128):
            raise ValueError(
                "denoise_timesteps must be a power of 2 from 2 to 128, not"
                f" {self.denoise_timesteps}"
            )
        object.__setattr__(self, "model", self.with_dial(self.model))
        self._check_objective()
        self._check_rows()

    def _check_rows(self) -> None:
        names = ["length_consistency_every"]
        if self.objective in WITH_TIME_ROWS:
            names.insert(0, "time_consistency_every")
        for name in names:
            every = getattr(self, name)
            if every and self.train_batch_size % every:
                raise ValueError(
                    f"train_batch_size {self.train_batch_size} is not divisible by {name} {every}"
                )
        sizes = self.row_sizes()
        if sizes["flow"] < 1:
            raise ValueError(
                f"consistency rows fill the whole batch of {self.train_batch_size}: raise"
                " time_/length_consistency_every"
            )
        if sizes["time"] != sizes.get("guided", sizes["time"]):
            raise ValueError(
                f"half of the {sizes['time'] + sizes['guided']} time-consistency rows are guided:"
                " change train_batch_size or time_consistency_every"
            )

    def _check_objective(self) -> None:
        name, model = self.objective, self.model_config()
        if name != "flow" and self.path != "rectified":
            raise ValueError(f"path {self.path} is of --objective flow alone: leave it out")
        if name not in ("flow", "reflow", "diffusion") and self.times != "discrete":
            raise ValueError(
                f"times {self.times} are not for objective {name}: use --times discrete"
            )
        if self.compat != "none" and name in ("reflow", "diffusion", *MEAN_VELOCITY):
            raise ValueError(
                f"the reference has no objective {name} to be compatible with: leave --compat at"
                " none"
            )
        if self.taught_by != "ema" and name not in ("shortcut", *MEAN_VELOCITY):
            raise ValueError(
                f"target_network {self.target_network} is for shortcut, mean-flow, alpha-flow:"
                f" leave it out with objective {name}"
            )
        if self.fast_ema_decay != 0.99 and self.taught_by != "fast-ema":
            raise ValueError("fast_ema_decay goes with --target-network fast-ema")
        self.mean_velocity.check(name, self.compile, model.guidance_max is not None)
        check_guidance(name, self.guidance_scale, model, self.label_dropout)
        if self.overwrite_output_dir and self.resume_from_checkpoint == "latest":
            raise ValueError(
                "overwrite_output_dir deletes what resume_from_checkpoint latest is to find"
            )
        if name in ("consistency", "progressive") and self.steps < self.log2_steps:
            raise ValueError(
                f"objective {name} has {self.log2_steps} stages: steps must be at least that, not"
                f" {self.steps}"
            )
        if name in ("consistency-distillation", "progressive") and self.init_from is None:
            raise ValueError(f"objective {name} distils a teacher: name it with --init-from FOLDER")
        if name == "reflow" and self.pairs is None:
            raise ValueError(
                "objective reflow needs --pairs FOLDER, where pairs are, or are made by the model"
                " of --init-from"
            )
        self.check_teacher(name, model.length_conditioned)

    @property
    def weight_power(self) -> float:
        """p of the adaptive weight."""
        if self.loss_weight_power is None:
            return 1.0 if self.objective == "alpha-flow" else 0.0
        return self.loss_weight_power

    @property
    def taught_by(self) -> Literal["ema", "live", "fast-ema"]:
        """The network that makes targets."""
        return self.target_network or ("live" if self.objective in MEAN_VELOCITY else "ema")

    @property
    def log2_steps(self) -> int:
        """log2 of denoise_timesteps."""
        return self.denoise_timesteps.bit_length() - 1

    def model_config(self) -> DiTConfig:
        """The network to train: `model`, with the sampling that the objective needs and step sizes
        only where it has them."""
        sampling, steps = SAMPLING[self.objective], self.objective in WITH_TIME_ROWS
        if self.model.sampling not in (DiTConfig.sampling, sampling):
            raise ValueError(
                f"objective {self.objective} is sampled as {sampling!r}: leave --model.sampling out"
            )
        if steps and not self.model.step_conditioned:
            raise ValueError(
                f"objective {self.objective} gives the network its step size: set"
                " --model.step-conditioned"
            )
        dropout = self.model.dropout if self.dropout is None else self.dropout
        return replace(self.model, sampling=sampling, step_conditioned=steps, dropout=dropout)

    def row_sizes(self) -> dict[str, int]:
        """Rows of each kind in the batch of one process, in their order: time consistency (or
        Reflow), the guided half of these where shortcuts are guided, flow matching (the method's
        own), length consistency."""
        batch = self.train_batch_size
        every = self.time_consistency_every if self.objective in WITH_TIME_ROWS else 0
        time = batch // every if every else 0
        if self.objective in MEAN_VELOCITY:
            time = round(batch * self.mean_velocity.time_share)
        every = self.length_consistency_every if self.model.length_conditioned else 0
        length = batch // every if every else 0
        rest = {"flow": batch - time - length, "length": length}
        if self.objective == "shortcut" and self.guidance_scale is not None:
            return {"time": time - time // 2, "guided": time // 2} | rest
        return {"time": time} | rest

    def learning_rate_at(self, step: int) -> float:
        """In each phase: linear warm-up from 0, constant, then a cosine to 0 over its last
        `decay_fraction` (0 beyond the run's end)."""
        rates = (self.learning_rate, *self.later_learning_rates)
        length = self.steps // len(rates)
        phase = min(step // length, len(rates) - 1)
        step, rate, decay = step - phase * length, rates[phase], int(length * self.decay_fraction)
        start = length - decay
        if step < start or not decay:
            return rate * min(1.0, step / self.warmup_steps if self.warmup_steps else 1.0)
        return rate * 0.5 * (1 + math.cos(math.pi * min(step - start, decay) / decay))

    def ema_decay_at(self, step: int) -> float:
        """Share of itself that the EMA keeps at this step."""
        return min(self.ema_decay, (1 + step) / (10 + step)) if self.ema_warmup else self.ema_decay


DEFAULT = TrainConfig()
