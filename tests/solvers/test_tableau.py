"""Butcher tableaus: their numbers, what they refuse, and their names."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import DOP853 as scipy_dop853
from scipy.integrate import RK23, RK45

from odelt_fast.solvers.tableau import ALIASES, TABLEAUS, Tableau, find_tableau


@pytest.mark.parametrize(
    ("name", "method"), [("bosh3", RK23), ("dopri5", RK45), ("dop853", scipy_dop853)]
)
def test_numbers_are_those_of_scipy(name: str, method: type) -> None:
    tableau = TABLEAUS[name]
    stages = len(
        method.B
    )  # scipy leaves out the stage that a FSAL method shares with the next step
    a = np.array([[*row, *[0] * (tableau.stages - len(row))] for row in tableau.a])
    rows, columns = (min(size, stages) for size in np.shape(method.A))
    np.testing.assert_allclose(
        a[:rows, :columns], np.asarray(method.A)[:rows, :columns], rtol=0, atol=1e-14
    )
    np.testing.assert_allclose(tableau.b[:stages], method.B, rtol=0, atol=1e-14)
    np.testing.assert_allclose(tableau.c[:stages], method.C[:stages], rtol=0, atol=1e-15)
    estimates = (
        [(tableau.error, method.E5), (tableau.error3, method.E3)]
        if name == "dop853"
        else [(tableau.error, method.E)]
    )
    for ours, theirs in estimates:
        theirs = np.asarray(theirs)[: tableau.stages]
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=0, atol=1e-14)
        assert np.dot(ours, theirs) ** 2 == pytest.approx(
            np.dot(theirs, theirs) ** 2
        )  # up to the sign, which no norm sees


def test_first_same_as_last_is_derived() -> None:
    assert {name for name, tableau in TABLEAUS.items() if tableau.fsal} == {
        "bosh3",
        "dopri5",
        "tsit5",
    }


@pytest.mark.parametrize("name", TABLEAUS)
def test_a_wrong_digit_is_found(name: str) -> None:
    tableau = TABLEAUS[name]
    with pytest.raises(ValueError, match=f"tableau {name}: b c.0 sums to"):
        replace(tableau, b=(tableau.b[0] + 1e-9, *tableau.b[1:]))
    if tableau.stages > 1:
        with pytest.raises(ValueError, match="row 1 of a sums to"):
            replace(tableau, a=((), (tableau.a[1][0] - 1e-9,), *tableau.a[2:]))
    if tableau.error:
        with pytest.raises(ValueError, match="error weights"):
            replace(tableau, error=(tableau.error[0] + 1e-9, *tableau.error[1:]))


def test_an_order_that_a_method_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tableau midpoint: b c\^2 sums to 0.25"):
        replace(TABLEAUS["midpoint"], order=3)
    # The row sums and quadrature conditions of order 3 hold, but b a c = 1/6 does not.
    with pytest.raises(ValueError, match="b a c sums to"):
        Tableau("no order 3", 3, (0, 1 / 2, 1), ((), (1 / 2,), (1, 0)), (1 / 6, 2 / 3, 1 / 6))
    with pytest.raises(ValueError, match="3 stages need rows of 0 to 2"):
        replace(TABLEAUS["kutta3"], a=((), (1 / 2,)))
    with pytest.raises(ValueError, match="come together"):
        replace(TABLEAUS["heun2"], error=(-1 / 2, 1 / 2))


def test_names_and_aliases() -> None:
    assert find_tableau("dopri5") == (TABLEAUS["dopri5"], True)
    assert find_tableau("rk4") == find_tableau("fixed:rk4") == (TABLEAUS["rk4"], False)
    assert find_tableau("fixed:rk45") == (TABLEAUS["dopri5"], False)
    assert all(find_tableau(alias)[0] is TABLEAUS[name] for alias, name in ALIASES.items())
    for name in ("dopri6", "", "fixed:", "fixed:fixed:rk4", "RK4", None, 5):
        with pytest.raises(ValueError, match="solver must be one of euler, midpoint"):
            find_tableau(name)  # type: ignore[arg-type]


def test_tableaus_need_no_torch() -> None:
    code = (
        "import sys, odelt_fast.solvers.tableau; sys.exit('torch' in sys.modules or 'scipy' in"
        " sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
