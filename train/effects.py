"""Options of a run that have no effect in their combination: what the user said is what runs, or
is refused. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

from .config import TrainConfig
from .mean_velocity import MEAN_VELOCITY
from .methods import WITH_TIME_ROWS

_WITH_TEACHERS = ("consistency", "consistency-distillation", "progressive")
_WITH_SIGMA = ("flow-matching", "independent")
# Options that say "none" with these values, which then is what runs.
_OFF = (
    *("time_consistency_every", "length_consistency_every", "label_dropout", "random_flip"),
    "sampling_steps",
)


def check_effects(config: TrainConfig, default: TrainConfig) -> None:
    """ValueError for the first option that differs from the recipe's and has no effect."""

    def value(options: TrainConfig, name: str) -> Any:
        return reduce(getattr, name.split("."), options)

    for names, why in _without_effect(config):
        for name in names.split():
            given = value(config, name)
            if given != value(default, name) and (given or name not in _OFF):
                option = name.replace("_", "-")
                raise ValueError(f"--{option} has no effect {why}: leave it out")


def _without_effect(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Names of options, and why these have none."""
    name, rows = config.objective, config.row_sizes()
    time = rows["time"] + rows.get("guided", 0)
    lengths, by_name = config.model.length_conditioned, f"with objective {name}"
    if name == "reflow":
        data = "data image_column label_column check_images random_flip"
        yield data, f"{by_name}, which trains on --pairs"
    else:
        yield "pairs num_pairs", f"{by_name}: pairs are those of reflow"
    if name != "flow":
        yield "path_sigma", f"{by_name}: it is of flow's paths {' and '.join(_WITH_SIGMA)}"
    elif config.path not in _WITH_SIGMA:
        yield "path_sigma", f"on path {config.path}: it is of {' and '.join(_WITH_SIGMA)}"
    if config.times == "continuous":
        if name != "reflow":  # whose pairs are made in so many steps
            yield "denoise_timesteps", "with --times continuous"
        if config.path != "independent":
            yield "compat", "with --times continuous"
    if name in MEAN_VELOCITY:
        yield "time_consistency_every", f"{by_name}: --mean-velocity.time-share says how many rows"
    elif name not in WITH_TIME_ROWS:
        yield "time_consistency_every", f"{by_name}, which has no such rows"
    elif not time:
        yield "guidance_scale", "without time-consistency rows"
    if not lengths:
        conventional = "without an inner ODE (--model.no-length-conditioned)"
        yield "length_consistency_every depth_sampling teacher_depth", conventional
        yield "model.depth_min model.depth_group model.inner_step", conventional
    told = config.model.guidance_max is not None
    guided = name in MEAN_VELOCITY and (told or config.guidance_scale is not None)
    if not (time or guided or name in _WITH_TEACHERS):
        yield "teacher_depth", f"{by_name}, which has no teacher in the method itself"
    frozen = config.length_teacher == "init"
    if frozen:
        yield "length_consistency_every", "with --length-teacher init, which teaches flow rows too"
    if not (time or guided or (rows["length"] and not frozen)):
        yield "target_network", "without rows of time or length consistency"
    if config.model.num_classes == 1:
        yield "label_dropout", "on data of one class, which is the null label"
    if not config.weight_power:
        yield "loss_weight_eps", "while --loss-weight-power is 0"
    if config.dropout is not None:
        yield "model.dropout", "beside --dropout"
    if not config.ema_widths:
        yield "ema_snapshot_steps", "without --ema-widths"
    if not config.log_with:
        yield "sampling_steps", "without a tracker in --log-with"


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for the first tracker that is not installed: accelerate leaves it out silently."""
    from accelerate.tracking import get_available_trackers

    installed = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in installed:
            raise ValueError(
                f"--log-with {name}: it is not installed: pip install {name}, or leave it out of"
                " --log-with"
            )
