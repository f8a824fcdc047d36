"""Power functions: the weights of averages over a run, and the mixture of stored ones that is
nearest to a wanted one. Loads no torch.

Post-hoc EMA of Karras et al. 2023 (arXiv 2312.02696, section 3 and appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class PowerFunction(NamedTuple):
    """Weighs the time tau in [0, end] with p(tau) = (g+1) tau^g / end^(g+1)."""

    width: float  # sigma_rel: the standard deviation of p is width * end
    end: float  # in updates


@lru_cache(maxsize=64)
def exponent(width: float) -> float:
    """g >= 0 with (g+1)^(1/2) (g+2)^-1 (g+3)^-1/2 = width.

    Raises:
        ValueError: the width is beyond that of the uniform average, 12^-1/2.
    """
    if not 0 < width <= 12**-0.5:
        raise ValueError(
            f"width must be above 0 and at most {12**-0.5:.4f} (the uniform average), not {width:g}"
        )
    # (g+1) = width^2 (g+2)^2 (g+3), as a polynomial in g; its largest root
    square = width**-2
    return max(0.0, float(np.roots([1, 7, 16 - square, 12 - square]).real.max()))


def inner_product(a: PowerFunction, b: PowerFunction) -> float:
    """Integral of p_a p_b over the times that both have."""
    (ga, ta), (gb, tb) = ((exponent(width), end) for width, end in (a, b))
    power = ga + gb + 1
    logarithm = power * math.log(min(ta, tb)) - (ga + 1) * math.log(ta) - (gb + 1) * math.log(tb)
    return (ga + 1) * (gb + 1) / power * math.exp(logarithm)


def mixture(stored: Sequence[PowerFunction], wanted: PowerFunction) -> tuple[np.ndarray, float]:
    """The mixture of stored power functions that is nearest to the wanted one in least squares.

    Returns:
        Its coefficients, with sum 1, so that weights that do not change stay as they are; and its
        relative error |mixture - wanted| / |wanted|.
    """
    n = len(stored)
    sizes = np.array([inner_product(p, p) ** 0.5 for p in stored])
    gram = np.array([[inner_product(a, b) for b in stored] for a in stored])
    gram /= np.outer(sizes, sizes)
    right = np.array([inner_product(a, wanted) for a in stored]) / sizes
    # The smallest value of the quadratic form on the plane of sum 1, with one multiplier; unit
    # functions keep it well conditioned.
    system = np.block([[gram, 1 / sizes[:, None]], [1 / sizes[None], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(right, 1.0), rcond=1e-14)[0][:n]
    norm = inner_product(wanted, wanted)
    error = max(0.0, norm - 2 * solution @ right + solution @ gram @ solution)
    return solution / sizes, math.sqrt(error / norm)
