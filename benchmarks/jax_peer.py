"""The paper's reference implementation as a peer: its model.py, unchanged, jitted by JAX.

It runs in a process of its own that answers requests. With a checkout of github.com/gudovskiy/odelt
and a Python that has jax, flax and einops:

    python benchmarks/jax_peer.py --reference-dir CHECKOUT

One JSON line a request: {"op": "build", "config": {...}, "depth", "steps", "batch", "dtype"}
compiles Euler's method and answers {"setup_seconds"}; {"op": "time"} samples once and answers
{"seconds"}; {"op": "forget"} drops it. As in the reference, parameters are float32, the arithmetic
is in `dtype`, and each step is one call of a jitted function. The process outlives a configuration,
so that its samples can take turns with the others'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from odelt_fast.config import DiTConfig


Message = dict[str, Any]  # a request or its answer


class JaxPeer:
    """The other process, seen from here. Raises ValueError with its reason when it cannot do what
    is asked."""

    @staticmethod
    def check(reference: Path) -> None:
        """Raises ValueError unless the folder is such a checkout."""
        if not (reference / "model.py").is_file():
            raise ValueError(
                f"--reference-dir {reference}: there is no model.py; give a checkout of"
                " github.com/gudovskiy/odelt"
            )

    def __init__(self, reference: Path, python: str = sys.executable) -> None:
        self.check(reference)
        # Left to itself JAX takes three quarters of the card's memory at its start.
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
        # Not a pipe: one that nobody reads fills up and stops the process.
        self.messages = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--reference-dir", str(reference)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            text=True,
            env=os.environ | memory,
        )

    def ask(self, **request: Any) -> Message:
        """The answer to one request."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.messages.seek(0)
            reason = self.messages.read().strip() or f"exit code {code}"
            raise ValueError(f"the JAX reference stopped: {reason.splitlines()[-1]}")
        answer: Message = json.loads(line)
        if "error" in answer:
            raise ValueError(f"the JAX reference: {answer['error']}")
        return answer

    def build(
        self, config: DiTConfig, depth: int, steps: int, batch: int, dtype: torch.dtype
    ) -> float:
        """Seconds that compiling and the first run took."""
        name, sizes = str(dtype).removeprefix("torch."), dataclasses.asdict(config)
        work = {"depth": depth, "steps": steps, "batch": batch, "dtype": name, "config": sizes}
        return float(self.ask(op="build", **work)["setup_seconds"])

    def timed(self) -> float:
        """Seconds of one sample."""
        return float(self.ask(op="time")["seconds"])

    def forget(self) -> None:
        """Gives back the memory of what was built."""
        if self.process.poll() is None:
            self.ask(op="forget")

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout, self.messages):
            with suppress(BrokenPipeError):  # what a dead process was still to be told
                pipe.close()  # type: ignore[union-attr]
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def build(request: Message) -> Any:
    """A function that samples once with the reference's network and waits for the result."""
    import jax
    import jax.numpy as jnp
    from model import DiT  # type: ignore[import-not-found]  # the reference's

    config, steps, batch = request["config"], request["steps"], request["batch"]
    same = (
        *("patch_size", "hidden_size", "depth", "depth_min", "depth_group"),
        *("num_heads", "mlp_ratio", "num_classes"),
    )
    network = DiT(
        **{name: config[name] for name in same},
        depth_wise=request["depth"],
        out_channels=config["channels"],
        class_dropout_prob=0.1,
        dtype=getattr(jnp, request["dtype"]),
    )
    shape = (batch, config["image_size"], config["image_size"], config["channels"])
    noise = jax.random.normal(jax.random.key(1), shape)
    labels = jnp.arange(batch) % config["num_classes"]
    index = jnp.full((batch,), min(steps.bit_length() - 1, 7), jnp.float32)
    start = (jax.random.key(0), jnp.zeros((batch,)), noise, (index, labels))
    parameters = jax.jit(network.init)(*start)
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    # Zero-initialised tensors would give zeros, which multiply faster than other numbers do.
    leaves = [
        leaf if leaf.any() else 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves)
    ]
    parameters = jax.tree.unflatten(tree, leaves)

    @jax.jit  # type: ignore[untyped-decorator]
    def euler_step(parameters: Any, x: Any, t: Any) -> Any:
        velocity, _ = network.apply(parameters, t, x, (index, labels))
        return x + velocity.astype(x.dtype) / steps

    times = [jnp.full((batch,), i / steps) for i in range(steps)]

    def sample() -> Any:
        x = noise
        for t in times:
            x = euler_step(parameters, x, t)
        return jax.block_until_ready(x)

    if not bool(jnp.isfinite(sample()).all()):
        raise ValueError("samples are not finite")
    return sample


def serve() -> None:
    """Answers requests until the other side closes."""
    answers, sample = os.fdopen(os.dup(1), "w"), None
    os.dup2(2, 1)  # whatever a library prints must not stand between the answers
    for line in sys.stdin:
        request: Message = json.loads(line)
        answer: Message = {}
        start = time.perf_counter()
        try:
            if request["op"] == "build":
                sample = None
                sample = build(request)
                answer = {"setup_seconds": time.perf_counter() - start}
            elif request["op"] == "time" and sample is not None:
                sample()
                answer = {"seconds": time.perf_counter() - start}
            else:
                sample = None
        except Exception as error:  # told to the other side, which goes on without
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference-dir", type=Path, required=True)
    folder = parser.parse_args().reference_dir.resolve()
    # This file's folder must not lend its modules to the reference's imports.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != here)]
    serve()


if __name__ == "__main__":
    main()
