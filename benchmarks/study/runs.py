"""What the study trains: the paper's methods (Table 2), and its own over G and K (Tables 4, 5).

Every run of a set has the same network, batch and number of optimizer steps; methods of two phases
spend half of the steps on the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONVENTIONAL = "--model.no-length-conditioned"


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
_MAIN = Run(
    "odelt", "ODE_t(ODE_l)", "", depths=(12, 8, 4), steps=_CURVE, guided=True, adaptive=True
)
RUNS = (
    _MAIN,
    # The model of Table 3's adaptive rows: flow matching over continuous time, with length
    # consistency.
    Run(
        "odelt-flow",
        "ODE_t(ODE_l), RFM",
        "--objective flow --times continuous",
        depths=(12, 8, 4),
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
    # The ablations once more from another training seed: a difference that it does not repeat is
    # none.
    *(
        Run(
            f"{run.name}-again",
            f"{run.title}, seed 1",
            f"{run.options} --seed 1",
            depths=run.depths,
            repeats=run.name,
        )
        for run in (_MAIN, *_ABLATIONS)
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
