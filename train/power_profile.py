"""Power-function profiles of averages over a run, and the mixture of stored ones that is nearest to
a wanted one. Loads no torch.

Post-hoc EMA of Karras et al. 2023 (arXiv 2312.02696, section 3 and appendix C). A profile (width,
t) weighs the time tau in [0, t] with p(tau) = (g+1) tau^g / t^(g+1); its standard deviation is
width * t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Profile = tuple[float, float]  # width sigma_rel; t, in updates


@lru_cache(maxsize=64)
def exponent(width: float) -> float:
    """g >= 0 with (g+1)^(1/2) (g+2)^-1 (g+3)^-1/2 = width. ValueError for a width beyond that of
    the uniform average, 12^-1/2."""
    if not 0 < width <= 12**-0.5:
        raise ValueError(
            f"width must be above 0 and at most {12**-0.5:.4f} (the uniform average), not {width:g}"
        )
    # (g+1) = width^2 (g+2)^2 (g+3), as a polynomial in g; its largest root
    square = width**-2
    return max(0.0, float(np.roots([1, 7, 16 - square, 12 - square]).real.max()))


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of p_a p_b over the times that both have."""
    (ga, ta), (gb, tb) = ((exponent(width), t) for width, t in (a, b))
    power = ga + gb + 1
    logarithm = power * math.log(min(ta, tb)) - (ga + 1) * math.log(ta) - (gb + 1) * math.log(tb)
    return (ga + 1) * (gb + 1) / power * math.exp(logarithm)


def mixture(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Coefficients, with sum 1, of the stored profiles whose mixture is nearest to the wanted one
    in least squares; and its relative error |mixture - wanted| / |wanted|. The sum keeps weights
    that do not change as they are."""
    n = len(stored)
    sizes = np.array([inner_product(profile, profile) ** 0.5 for profile in stored])
    gram = np.array([[inner_product(a, b) for b in stored] for a in stored]) / np.outer(
        sizes, sizes
    )
    right = np.array([inner_product(a, wanted) for a in stored]) / sizes
    # The smallest value of the quadratic form on the plane of sum 1, with one multiplier; unit
    # profiles keep it well conditioned.
    system = np.block([[gram, 1 / sizes[:, None]], [1 / sizes[None], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(right, 1.0), rcond=1e-14)[0][:n]
    norm = inner_product(wanted, wanted)
    error = max(0.0, norm - 2 * solution @ right + solution @ gram @ solution)
    return solution / sizes, math.sqrt(error / norm)
