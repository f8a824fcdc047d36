"""Trains the small feature networks that come with the package.

A classifier of the real images with a fixed budget: one-cycle SGD with Nesterov momentum, label
smoothing, shifts (and flips, where a mirrored image is one of its class). Accuracy is measured on
images that were not trained on: the test file, or every tenth image. What was trained, on what, and
how well it knows the held-out images stands in the header of the file that it writes.

    python -m benchmarks.reproduce.train_features digits
    python -m benchmarks.reproduce.train_features mnist --data mnist-10k.parquet
    python -m benchmarks.reproduce.train_features cifar10 --data cifar10-train.parquet
        --test cifar10-test.parquet
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from benchmarks.measure import ROOT, Record
from odelt_fast.evaluation.small_features import SmallConfig, SmallNetwork, save_features
from odelt_fast.images import open_source

CONFIGS = {
    "digits": SmallConfig("digits-features", 8, 1, (32, 64), 10),
    "mnist": SmallConfig("mnist-features", 28, 1, (16, 32, 64), 10),
    "cifar10": SmallConfig("cifar10-features", 32, 3, (64, 128, 192), 10, stride=2),
}
EPOCHS = {"digits": 60, "mnist": 12, "cifar10": 8}
FOLDER = ROOT / "odelt_fast" / "models" / "features"


@dataclass(frozen=True)
class Options:
    name: tyro.conf.Positional[Literal["digits", "mnist", "cifar10"]]
    data: str = "digits"
    """Images with labels, as `odelt-fast train --data`."""
    test: str | None = None
    """Held-out images; every tenth image of --data by default."""
    out: Path = FOLDER
    """Folder for NAME.safetensors."""
    epochs: int | None = None
    batch_size: int = 128
    learning_rate: float = 0.2
    seed: int = 0


def load(data: str, config: SmallConfig) -> tuple[torch.Tensor, torch.Tensor, bool]:
    source = open_source(data, image_size=config.image_size, channels=config.channels)
    images, labels = source.read_many(np.arange(len(source)))
    flips = source.flippable and config.channels == 3
    return torch.from_numpy(images), torch.from_numpy(labels), flips


def accuracy(network: SmallNetwork, images: torch.Tensor, labels: torch.Tensor) -> float:
    network.eval()
    with torch.inference_mode():
        found = torch.cat([network(x)[1].argmax(1) for x in images.split(500)])
    return (found == labels).double().mean().item()


def augmented(images: torch.Tensor, flips: bool, shift: int) -> torch.Tensor:
    """Each image moved by up to `shift` pixels (the border repeats), and half of them mirrored."""
    size = images.shape[-1]
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    rows, columns = torch.randint(0, 2 * shift + 1, (2, len(images), 1))
    if flips:
        padded = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, padded.flip(3), padded)
    at = torch.arange(size)
    image = torch.arange(len(images))[:, None, None]
    moved = padded[image, :, (rows + at)[:, :, None], (columns + at)[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.manual_seed(options.seed)
    config, epochs = CONFIGS[options.name], options.epochs or EPOCHS[options.name]
    images, labels, flips = load(options.data, config)
    if options.test:
        held_images, held_labels, _ = load(options.test, config)
    else:
        held = torch.arange(len(labels)) % 10 == 9
        held_images, held_labels = images[held], labels[held]
        images, labels = images[~held], labels[~held]
    network = SmallNetwork(config)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decayed, kept = (
        [p for p in network.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)
    )
    groups: list[Record] = [{"params": decayed, "weight_decay": 5e-4}, {"params": kept}]
    optimizer = torch.optim.SGD(groups, lr=options.learning_rate, momentum=0.9, nesterov=True)
    steps = epochs * (len(labels) // options.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=steps, pct_start=0.25
    )
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    start = time.perf_counter()
    for epoch in range(epochs):
        network.train()
        order = torch.randperm(len(labels))[: steps // epochs * options.batch_size]
        for rows in order.split(options.batch_size):
            x = augmented(images[rows], flips, max(1, config.image_size // 10))
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=native and config.channels == 3):
                logits = network(x)[1]
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        hits, seconds = accuracy(network, held_images, held_labels), time.perf_counter() - start
        print(f"epoch {epoch + 1}: held-out accuracy {hits:.4f}, {seconds:.0f} s", flush=True)
    # What is measured is what is shipped: the weights rounded to half precision.
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half())
    hits = accuracy(network, held_images, held_labels)
    notes = {
        "trained_on": f"{options.name}, {len(labels)} images",
        "epochs": str(epochs),
        "seconds": f"{seconds:.0f}",
        "seed": str(options.seed),
        "held_out_accuracy": f"{hits:.4f}",
        "held_out": f"{len(held_labels)} images",
        "made_by": "benchmarks/reproduce/train_features.py",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.safetensors"
    save_features(network, path, notes)
    print(f"{path}: {path.stat().st_size} bytes, held-out accuracy {hits:.4f}")


if __name__ == "__main__":
    main()
