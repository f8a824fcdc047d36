"""Row kernels, modulation, ends of the network: a sample of `kernel_cases.py`, and what is refused.

The interpreter must be asked for before Triton is imported, and the compile gate needs a process
without it: the cases run in a child.
"""

from __future__ import annotations

import pytest
import torch

from odelt_fast.kernels.final_layer import final_euler, final_velocity
from odelt_fast.kernels.gated_residual import gated_residual
from odelt_fast.kernels.group_end import group_end, last_group_end
from odelt_fast.kernels.modulation import modulation
from odelt_fast.kernels.norm_modulate import norm_modulate
from odelt_fast.kernels.patch import patch_embed
from odelt_fast.kernels.rows import row_launch
from odelt_fast.kernels.solver_update import combine_stages
from tests.helpers.interpreted import child, printed_by

KERNELS = (
    *("norm_modulate", "gated_residual", "group_end", "row_float8", "modulation"),
    *("patch_embed", "final_layer"),
)
CASES = 6
# The matrix products and the solvers' kernels have their own registries and test files.
REGISTRIES = ("kernel_cases_rows", "kernel_cases_network", "kernel_faults")


@pytest.fixture(scope="module")
def sample() -> str:
    """Output of CASES random cases of every kernel here, and of the network made of them."""
    return printed_by(REGISTRIES, "--cases", str(CASES), "--seed", "0")


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_within_twice_pytorchs_error(sample: str, kernel: str) -> None:
    assert f"\n{kernel}: {CASES} of {CASES} cases right" in "\n" + sample, sample


def test_row_kernels_around_the_models_products_make_its_velocity(sample: str) -> None:
    assert f"row_kernels_as_network: {CASES} of {CASES} cases right" in sample, sample


def test_a_faulty_kernel_is_caught(sample: str) -> None:
    assert f"faults: {CASES} of {CASES} cases right" in sample, sample


def test_every_operator_passes_opcheck() -> None:
    run = child(
        "import sys; from tests.stress import kernel_cases; sys.exit(kernel_cases.main())",
        "--interpret",
        "--opcheck",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("opcheck passes") >= 17


def test_the_package_imports_no_kernel_and_works_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\nimport odelt_fast.sampling.sampler,"
        " odelt_fast.model, odelt_fast.cli, odelt_fast.train.loop\nassert not [name for name in"
        " sys.modules if name.startswith('odelt_fast.kernels.')]\ntry:\n    import"
        " odelt_fast.kernels.norm_modulate\nexcept ImportError:\n    print('no kernels')\n"
    )
    run = child(program)
    assert run.stdout == "no kernels\n", run.stdout + run.stderr


def test_a_tensor_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="norm_modulate: the kernel runs on CUDA tensors"):
        norm_modulate(torch.randn(2, 3, 8), torch.randn(2, 48), 0, 8)


X, TABLE = torch.zeros(2, 3, 8), torch.zeros(2, 48)
WEIGHT, BIAS, IMAGE = torch.zeros(16, 8), torch.zeros(16), torch.zeros(2, 4, 2, 6)
STATE, STAGES, ROW, STEP = torch.zeros(2, 5), torch.zeros(3, 2, 5), torch.zeros(3), torch.ones(1)


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        (norm_modulate, (X[0], TABLE, 0, 8), r"x must be \(B, N, D\)"),
        (norm_modulate, (X.double(), TABLE, 0, 8), "not .* in torch.float64"),
        (norm_modulate, (X, TABLE[:1].expand(3, 48), 0, 8), r"\(2 or 1, K\)"),
        (norm_modulate, (X, TABLE, 0, 41), "column 41 of modulation"),
        (norm_modulate, (X, TABLE, -1, 8), "column -1 of modulation"),
        (norm_modulate, (X, TABLE.int(), 0, 8), "torch.int32"),
        (gated_residual, (X, X[:, :2], TABLE, 16, TABLE, 24, 32), r"y must be \(2, 3, 8\)"),
        (gated_residual, (X, X.half(), TABLE, 16, TABLE, 24, 32), "y must be .* in torch.float32"),
        (gated_residual, (X, X, TABLE, 48, TABLE, 24, 32), "column 48 of gates"),
        (group_end, (X, X, X[:1], None, TABLE, 40, TABLE, 0, 8), "xr must be"),
        (group_end, (X, X, X, None, TABLE, 40, TABLE, 0, 8, torch.ones(3)), "steps must be"),
        (last_group_end, (X, X, X[:, :, :4], TABLE, 40, TABLE, 0, 8), "vr must be"),
        (modulation, (X, WEIGHT, BIAS), r"condition must be \(R, D\)"),
        (modulation, (X[0], WEIGHT, BIAS[:3]), r"bias must be \(K, 8\)"),
        (modulation, (X[0], WEIGHT.half(), BIAS), "in torch.float16"),
        (patch_embed, (IMAGE, WEIGHT.t(), BIAS[:8], torch.zeros(3, 8), 4), "multiples of 4"),
        (patch_embed, (IMAGE, WEIGHT.t(), BIAS[:8], torch.zeros(4, 8), 2), "positions must be"),
        (patch_embed, (IMAGE[:, :3], WEIGHT.t(), BIAS[:8], torch.zeros(3, 8), 2), r"\(D, 12\)"),
        (final_euler, (IMAGE, X[:, :2], WEIGHT, BIAS, 2, 0.5), r"h must be \(2, 3, D\)"),
        (final_euler, (IMAGE, X, WEIGHT, BIAS, 2, 0.5, 1.5), r"h must be \(4, 3, D\)"),
        (final_euler, (IMAGE, X, WEIGHT, BIAS[:4], 2, 0.5), r"\(16, 8\) and \(16,\)"),
        (final_velocity, (X, WEIGHT, BIAS, 3, 2, 6, torch.float32), "do not fit"),
        (final_velocity, (X, WEIGHT, BIAS, 2, 2, 6, torch.int64), "torch.int64"),
        (combine_stages, (STATE, STAGES, torch.zeros(4), STEP), "at least the number of"),
        (combine_stages, (STATE, STAGES, ROW.half(), STEP), "coefficients and step must be"),
        (combine_stages, (STATE, STAGES[:, :, :4], ROW, STEP), "stages must be"),
        (combine_stages, (STATE, STAGES, ROW, torch.ones(5)), r"step must be \(2 or 1,\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    operator: object, arguments: tuple[object, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        operator(*arguments)  # type: ignore[operator]


def test_a_row_too_wide_for_one_program_is_refused() -> None:
    assert row_launch(8192)[0]["BLOCK"] == 8192
    with pytest.raises(ValueError, match="at most 8192"):
        row_launch(8193)
