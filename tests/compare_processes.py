"""Trains with one process and with two of half the batch each: `python tests/compare_processes.py`. The losses must be the same.

Draws belong to rows of the global batch, so only the order of sums differs: losses agree to 1e-6, weights to 1e-5.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from kill_training import MODEL, Witness, start, wait
from safetensors.torch import load_file

from odelt_fast.train.config import RECIPES

STEPS = 20


def main() -> None:
    torch.set_num_threads(1)
    # No dropout: its masks belong to a process's batch, not to rows.
    config = replace(RECIPES["digits"], model=replace(MODEL, dropout=0.0), steps=STEPS, warmup_steps=2, sampling_steps=0, log_with=())
    losses, weights = {}, {}
    with tempfile.TemporaryDirectory() as name:
        for processes, accumulation in ((1, 1), (2, 1), (1, 2)):
            kind = f"{processes} processes, {accumulation} parts"
            witness, run = Witness(Path(name) / "witness" / kind), Path(name) / kind
            batch = 32 // (processes * accumulation)
            parts = replace(config, output_dir=run, train_batch_size=batch, gradient_accumulation_steps=accumulation)
            assert wait(start(parts, witness, processes), time.monotonic() + 300, witness.log), "training takes too long"
            found = witness.all_losses()
            per_rank = [[float.fromhex(found[rank, step]) for rank in {rank for rank, _ in found}] for step in range(STEPS)]
            assert all(len(set(ranks)) == processes for ranks in per_rank), "the ranks draw the same rows"
            losses[kind], weights[kind] = [sum(ranks) / 32 for ranks in per_rank], load_file(run / "model.safetensors")
    (first, expected), *others = losses.items()
    for kind, values in others:
        worst = max(abs(a - b) / b for a, b in zip(values, expected))
        # Of all weights together: AdamW enlarges what rounding leaves of gradients that are zero (biases of keys) to whole steps.
        ours, theirs = (torch.cat([tensor.flatten() for _, tensor in sorted(weights[name].items())]) for name in (kind, first))
        apart = (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()
        print(f"{kind} against {first}: losses within {worst:.1e}, EMA weights within {apart:.1e}")
        assert worst < 1e-6
        assert apart < 1e-5


if __name__ == "__main__":
    main()
