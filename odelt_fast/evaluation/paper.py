"""The paper's own measurements (Tables 2 to 5), to draw ours against; arXiv 2506.21714.

FID-50K under the reference's protocol; latency: seconds to sample a batch of 128 on one A6000
(Table 3), without the autoencoder.
"""

from __future__ import annotations

SOURCE = "arXiv 2506.21714"
STEPS = (128, 4, 1)

# Table 2, DiT-B on CelebA-HQ-256: method -> FID at T = 128, 4, 1. "reference" rows are those that
# the paper takes from Frans et al.
TABLE_2: dict[str, tuple[float, float, float]] = {
    "reference: diffusion": (23.0, 123, 132),
    "reference: RFM": (7.3, 63.3, 281),
    "reference: progressive distillation": (303, 251, 14.8),
    "reference: Reflow": (16.1, 18.4, 23.2),
    "reference: consistency training": (53.7, 19.0, 33.2),
    "reference: live Reflow": (6.3, 27.2, 43.3),
    "reference: shortcut": (6.9, 13.8, 20.5),
    "l = 12": (5.9, 19.6, 25.3),
    "l = 8": (7.9, 19.4, 24.3),
    "l = 4": (14.2, 19.5, 31.0),
}

# Table 3, CelebA-HQ-256: (depth, solver, T or tolerance) -> FID, seconds per batch of 128, memory
# relative to l = 12.
TABLE_3: dict[tuple[int, str, float], tuple[float, float, float]] = {
    (12, "euler", 128): (5.9, 13.0, 1.0),
    (12, "euler", 4): (19.6, 0.41, 1.0),
    (12, "dopri5", 1e-4): (5.9, 7.3, 1.0),
    (12, "dopri5", 1e-2): (6.1, 3.49, 1.0),
    (8, "euler", 128): (7.9, 8.7, 0.67),
    (8, "euler", 4): (19.4, 0.27, 0.67),
    (8, "dopri5", 1e-4): (7.1, 4.9, 0.67),
    (8, "dopri5", 1e-2): (7.3, 2.25, 0.67),
    (4, "euler", 128): (14.2, 4.3, 0.33),
    (4, "euler", 4): (19.5, 0.14, 0.33),
    (4, "dopri5", 1e-4): (13.8, 2.4, 0.33),
    (4, "dopri5", 1e-2): (14.5, 1.14, 0.33),
}

# Figure 2: depth -> seconds per batch of 128 with one step.
ONE_STEP_LATENCY = {12: 0.13, 8: 0.096, 4: 0.064}

# Tables 4 and 5, CelebA-HQ-256: (depth, value) -> FID at T = 128, 4, 1. G: blocks of a group. K:
# share of length-consistency rows.
TABLE_4 = {
    (8, 1): (7.4, 20.3, 26.2),
    (8, 2): (7.8, 19.3, 26.1),
    (8, 4): (7.9, 19.4, 24.3),
    (4, 1): (18.1, 21.5, 36.9),
    (4, 2): (16.2, 20.9, 35.4),
    (4, 4): (14.2, 19.5, 31.0),
}
TABLE_5 = {
    (8, 0): (7.6, 19.5, 24.4),
    (8, 1 / 8): (7.9, 19.4, 24.3),
    (8, 1 / 4): (8.2, 19.1, 23.7),
    (4, 0): (14.8, 19.5, 31.6),
    (4, 1 / 8): (14.2, 19.5, 31.0),
    (4, 1 / 4): (14.0, 19.5, 30.1),
}
