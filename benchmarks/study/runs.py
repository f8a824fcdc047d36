"""What the study trains: the paper's methods (Table 2), its own over G and K (Tables 4, 5), and
newer objectives under the same length dial.

Every run of a set has the same network, batch and number of optimizer steps; methods of two phases
spend half of the steps on the teacher, and runs of equal time take fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_CONVENTIONAL = "--model.no-length-conditioned"
_LENGTHS = (12, 8, 4)


@dataclass(frozen=True)
class Run:
    """One training.

    options: of `odelt-fast train`, beside the set's. share: of the set's steps. teacher: run that
    it starts from. depths: to evaluate; a teacher has none. steps: T of Euler's solver. guided,
    adaptive: whether T = 128 with guidance and Dopri5 are evaluated, too. repeats: run of which
    this one is another training seed.
    """

    name: str
    title: str
    options: str
    share: float = 1.0
    teacher: str | None = None
    depths: tuple[int, ...] = (12,)
    steps: tuple[int, ...] = (128, 4, 1)
    guided: bool = False
    adaptive: bool = False
    repeats: str | None = None

    @property
    def conventional(self) -> bool:
        """A network of one depth."""
        return _CONVENTIONAL in self.options

    @property
    def cheaper(self) -> bool:
        """It takes fewer steps than the others in all: as many as the time of `odelt` allows."""
        return self.share < 1 and self.teacher is None and bool(self.depths)

    @property
    def needs_pairs(self) -> bool:
        """Its teacher first makes pairs of noise and data."""
        return "--objective reflow" in self.options


_ABLATIONS = (
    Run("k0", "K = 0", "--length-consistency-every 0", depths=(8, 4)),
    Run("k4", "K = 1/4", "--length-consistency-every 4", depths=(8, 4)),
    Run("g1", "G = 1", "--model.depth-group 1", depths=(8, 4)),
    Run("g2", "G = 2", "--model.depth-group 2", depths=(8, 4)),
)
# For the Pareto plot, and for adaptive solvers to compare with.
_CURVE = (128, 64, 32, 16, 8, 4, 2, 1)
_MAIN = Run("odelt", "ODE_t(ODE_l)", "", depths=_LENGTHS, steps=_CURVE, guided=True, adaptive=True)
_LIVE = "--target-network live"
_WEIGHTED = "--loss-weight-power 0.5 --loss-weight-eps 1"
_WEIGHTED_1 = _WEIGHTED.replace("power 0.5", "power 1")
_MEAN_FLOW = f"--objective mean-flow {_LIVE} {_WEIGHTED}"
_FEW = (128, 4, 2, 1)


def _dial(name: str, title: str, options: str, **changes: Any) -> Run:
    return Run(name, title, options, depths=_LENGTHS, steps=_FEW, **changes)


# One change of mean-flow each.
_OF_MEAN_FLOW = (
    _dial("mf-data", "tangent x1 - x0", f"{_MEAN_FLOW} --mean-velocity.tangent data"),
    _dial("mf-jvp", "derivative by JVP", f"{_MEAN_FLOW} --mean-velocity.derivative jvp"),
    _dial("mf-p0", "p = 0", f"--objective mean-flow {_LIVE}"),
    _dial("mf-p1", "p = 1", f"--objective mean-flow {_LIVE} {_WEIGHTED_1}"),
    _dial("mf-share", "1/4 of the rows time rows", f"{_MEAN_FLOW} --mean-velocity.time-share 0.25"),
    _dial("mf-pairs", "no pairs on grids", f"{_MEAN_FLOW} --mean-velocity.grid-share 0"),
    _dial("mf-guided", "guidance 1.4 in the target", f"{_MEAN_FLOW} --guidance-scale 1.4"),
    _dial("mf-k0", "K = 0", f"{_MEAN_FLOW} --length-consistency-every 0"),
    _dial("mf-ema", "EMA teacher", f"--objective mean-flow --target-network ema {_WEIGHTED}"),
)
_ALPHA_FLOW = f"--objective alpha-flow {_LIVE} {_WEIGHTED}"
# Its schedule: by default alpha falls from 1 to 0.05 over the first 0.7 of the run.
_OF_ALPHA_FLOW = (
    _dial("af-early", "falling by 0.35", f"{_ALPHA_FLOW} --mean-velocity.alpha-fall 0 0.35"),
    _dial("af-late", "falling by the end", f"{_ALPHA_FLOW} --mean-velocity.alpha-fall 0 1"),
    _dial("af-high", "down to 0.2", f"{_ALPHA_FLOW} --mean-velocity.alpha-min 0.2"),
    _dial("af-low", "down to 0.0125", f"{_ALPHA_FLOW} --mean-velocity.alpha-min 0.0125"),
)
RUNS = (
    _MAIN,
    # The model of Table 3's adaptive rows: flow matching over continuous time, with length
    # consistency.
    Run(
        "odelt-flow",
        "ODE_t(ODE_l), RFM",
        "--objective flow --times continuous",
        depths=_LENGTHS,
        steps=_CURVE,
        adaptive=True,
    ),
    Run("shortcut", "shortcut (SM)", _CONVENTIONAL, adaptive=True),
    Run("flow", "RFM", f"--objective flow {_CONVENTIONAL}"),
    *_ABLATIONS,
    Run("diffusion", "diffusion", f"--objective diffusion {_CONVENTIONAL}"),
    Run(
        "teacher",
        "RFM, half of the steps",
        f"--objective flow {_CONVENTIONAL}",
        share=0.5,
        depths=(),
    ),
    Run(
        "progressive",
        "progressive distillation",
        f"--objective progressive {_CONVENTIONAL}",
        share=0.5,
        teacher="teacher",
    ),
    Run("reflow", "Reflow", f"--objective reflow {_CONVENTIONAL}", share=0.5, teacher="teacher"),
    Run("consistency", "consistency training", f"--objective consistency {_CONVENTIONAL}"),
    Run("live-reflow", "live Reflow", f"--objective live-reflow {_CONVENTIONAL}"),
    _dial("odelt-live", "ODE_t(ODE_l), live teacher", _LIVE),
    _dial("mean-flow", "mean-flow", _MEAN_FLOW),
    # A step of mean-flow costs 1.1 to 1.2 of odelt's processor time, by the network and machine.
    _dial("mean-flow-time", "mean-flow, 0.8 of the steps", _MEAN_FLOW, share=0.8),
    _dial("alpha-flow", "alpha-flow", _ALPHA_FLOW),
    *_OF_MEAN_FLOW,
    *_OF_ALPHA_FLOW,
    # The ablations once more from another training seed: a difference that it does not repeat is
    # none.
    *(
        Run(
            f"{run.name}-again",
            f"{run.title}, seed 1",
            f"{run.options} --seed 1",
            depths=run.depths,
            steps=_FEW if run is _MAIN else run.steps,
            repeats=run.name,
        )
        for run in (_MAIN, *_ABLATIONS)
    ),
    *(
        _dial(f"{name}-{seed}", f"{name}, seed {seed}", f"{options} --seed {seed}", repeats=name)
        for name, options, seeds in (("odelt", "", (2,)), ("mean-flow", _MEAN_FLOW, (1, 2)))
        for seed in seeds
    ),
)
BY_NAME = {run.name: run for run in RUNS}


@dataclass(frozen=True)
class DataSet:
    """A data set with the budget of its runs.

    file: that holds it in a data folder. options: of every training. pairs: of Reflow. num_images:
    of a seed in evaluations, in batches of batch_size.
    """

    data: str
    options: str
    steps: int
    pairs: int
    num_images: int
    seeds: int
    batch_size: int
    device: str
    file: str | None = None


_SMALL_NETWORK = "--model.hidden-size 64 --model.patch-size 4 --model.num-heads 2"
DATA_SETS = {
    # At most 10 minutes a run on one CPU core.
    "digits": DataSet(
        data="digits",
        options=(
            f"--recipe digits {_SMALL_NETWORK} --train-batch-size 64 --learning-rate 4e-3"
            " --warmup-steps 200 --sampling-steps 0 --checkpointing-steps 200"
        ),
        steps=3600,
        pairs=4000,
        num_images=1797,
        seeds=3,
        batch_size=128,
        device="cpu",
    ),
    # At most 20 minutes a run on one CPU core.
    "mnist": DataSet(
        data="ylecun/mnist",
        options=(
            "--recipe mnist --model.hidden-size 64 --model.num-heads 2 --learning-rate 2e-3"
            " --warmup-steps 200 --sampling-steps 0 --checkpointing-steps 200"
        ),
        steps=3600,
        pairs=4000,
        num_images=1024,
        seeds=2,
        batch_size=128,
        device="cpu",
        file="mnist-10k.parquet",
    ),
    # 10 to 15 minutes a run on one H200.
    "cifar10": DataSet(
        data="uoft-cs/cifar10",
        options="--recipe cifar10 --sampling-steps 0 --checkpointing-steps 1000",
        steps=20_000,
        pairs=50_000,
        num_images=50_000,
        seeds=3,
        batch_size=1000,
        device="auto",
        file="cifar10-train.parquet",
    ),
}
