"""Every recorded training method: targets, times, step indices and labels are the reference's, for
its random draws."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odelt_fast.checkpoints.reference import rename_parameters
from odelt_fast.model import DiT
from odelt_fast.train.objectives.consistency import Consistency, ConsistencyDistillation
from odelt_fast.train.objectives.flow_matching import FlowMatching
from odelt_fast.train.objectives.live_reflow import LiveReflow
from odelt_fast.train.objectives.progressive import Progressive
from odelt_fast.train.objectives.shortcut import Shortcut
from odelt_fast.train.objectives.shortcut_models import ShortcutModels
from odelt_fast.train.objectives.targets import Networks, Objective, StepBatch, Targets
from odelt_fast.train.paths import FlowMatchingPath, IndependentCFM, Rectified
from tests.helpers.reference_cases import Case, load_case, relative_error, training_cases
from tests.train.test_parity import RecordedDraws


def recorded_methods() -> list[tuple[Path, str]]:
    found = []
    for path in training_cases():
        names = [
            name.removesuffix("/flags")
            for name in load_case(path).arrays
            if name.endswith("/flags")
        ]
        found += [(path, name) for name in sorted(names)]
    return found


def flags_of(case: Case, name: str) -> dict:
    return case.dictionary(f"{name}/flags")


def draws_of(case: Case, name: str) -> list[Tensor]:
    names = sorted(
        (key for key in case.arrays if key.startswith(f"{name}/draw")),
        key=lambda key: int(key.split("/draw")[1].split("_")[0]),
    )
    return [case.tensor(key) for key in names]


def recorded_objective(case: Case, name: str) -> tuple[Objective, RecordedDraws, int]:
    """The objective of a recorded method, the recorded draws under our names, and the number of
    rows that it uses.

    Times drawn as whole numbers i of n become the uniform number i/n, from which the same time
    follows exactly.
    """
    flags, draw = flags_of(case, name), draws_of(case, name)
    batch, classes, drop = flags["batch_size"], flags["num_classes"], flags["class_dropout_prob"]
    log2_steps, total = flags["denoise_timesteps"].bit_length() - 1, flags["max_steps"]
    rows = batch // flags["bootstrap_every"]
    finest, scale = (
        flags["denoise_timesteps"],
        flags["cfg_scale"] if flags["bootstrap_cfg"] else None,
    )
    common = {
        "num_classes": classes,
        "log2_steps": log2_steps,
        "label_dropout": drop,
        "compat": True,
    }
    kind = name.split("_step")[0].removesuffix("_continuous")
    if kind in ("fm", "icfm", "rfm", "naive"):
        path = (
            {"fm": FlowMatchingPath, "icfm": IndependentCFM}[kind](flags["sigma"])
            if kind in ("fm", "icfm")
            else None
        )
        path = path or {"rfm": Rectified(), "naive": FlowMatchingPath(1e-5)}[kind]
        uniform = draw[1] / finest if kind == "naive" else draw[1]
        values = {"label_drop": (0, draw[0]), "time": (0, uniform), "noise": (0, draw[2])}
        return (
            FlowMatching(path=path, times=flags["t_sampling"], **common),
            RecordedDraws(values),
            batch,
        )
    if kind in ("shortcut", "shortcut_cfg"):
        index, first_uniform, first_noise, dropped, uniform, noise = draw
        if scale is not None:  # each image is in two rows
            rows = 2 * len(index)
            index, first_uniform, first_noise = (
                torch.cat([value, value]) for value in (index, first_uniform, first_noise)
            )
        values = {
            "step_index": (0, index),
            "time": (0, torch.cat([first_uniform, uniform])),
            "noise": (0, torch.cat([first_noise, noise])),
            "label_drop": (rows, dropped),
        }
        return (
            Shortcut(time_rows=rows, guidance_scale=scale, **common),
            RecordedDraws(values),
            rows + len(uniform),
        )
    if kind in ("shortcut_models", "shortcut_models_cfg"):
        objective = ShortcutModels(time_rows=rows, guidance_scale=scale, **common)
        sections = 2.0 ** objective._fixed_levels()
        values = {
            "time": (0, torch.cat([draw[0] / sections, draw[3][: batch - rows] / finest])),
            "noise": (0, torch.cat([draw[1], draw[4][: batch - rows]])),
            "label_drop": (rows, draw[2][: batch - rows]),
        }
        return objective, RecordedDraws(values), batch
    if kind in ("livereflow", "livereflow_nocfg"):
        values = {
            "time": (0, torch.cat([draw[4], draw[1][: batch - rows]]) / finest),
            "noise": (0, torch.cat([draw[3][:rows], draw[2][: batch - rows]])),
            "label_drop": (rows, draw[0][: batch - rows]),
        }
        return (
            LiveReflow(reflow_rows=rows, guidance_scale=flags["cfg_scale"], **common),
            RecordedDraws(values),
            batch,
        )
    k = flags["step"] * log2_steps // total
    values = {"noise": (0, draw[1])}
    if kind == "consistency":
        return (
            Consistency(total_steps=total, **common),
            RecordedDraws(values | {"time": (0, draw[0] / 2**k)}),
            batch,
        )
    if kind == "progressive":
        values |= {"time": (0, draw[0] / 2 ** (log2_steps - 1 - k))}
        return (
            Progressive(total_steps=total, guidance_scale=scale, **common),
            RecordedDraws(values),
            batch,
        )
    if kind == "consistency_distillation":
        return (
            ConsistencyDistillation(**common),
            RecordedDraws(values | {"time": (0, draw[0] / finest)}),
            batch,
        )
    raise AssertionError(f"no objective for the recorded method {name}")


def recorded_network(case: Case, name: str, prefix: str) -> DiT:
    """The network with which the method was recorded: shortcut with an inner ODE, the others
    conventional, some without step sizes."""
    kind = name.split("_step")[0]
    parameters, config = case.parameters(prefix), case.config
    if kind not in ("shortcut", "shortcut_cfg"):
        parameters.pop("BlockEmbedder_0/Embed_0/embedding", None)
        with_steps = kind.startswith(("shortcut_models", "livereflow"))
        config = replace(
            config,
            length_conditioned=False,
            step_conditioned=with_steps and config.step_conditioned,
        )
    model = DiT(config)
    model.load_state_dict(rename_parameters(parameters, config))
    return model.train()


@cache
def recorded_targets(path: Path, name: str) -> Targets:
    case, flags = load_case(path), flags_of(load_case(path), name)
    live, ema = (
        recorded_network(case, name, "params"),
        recorded_network(case, name, "params_ema").eval(),
    )
    # The recorded teacher holds the two networks the other way round.
    networks = Networks(
        live=live,
        ema=ema if flags["bootstrap_ema"] else live,
        teacher=live if flags["bootstrap_ema"] else ema,
    )
    objective, draws, rows = recorded_objective(case, name)
    images, labels = case.tensor("images")[:rows], case.tensor("labels").long()[:rows]
    return objective(networks, StepBatch(images, labels, draws, flags["step"]))


every_recorded_method = pytest.mark.parametrize(
    ("path", "name"), recorded_methods(), ids=lambda value: getattr(value, "stem", value)
)


@pytest.mark.parametrize("quantity", ["x_t", "v_target"])
@every_recorded_method
def test_recorded_targets(path: Path, name: str, quantity: str) -> None:
    targets = recorded_targets(path, name)
    found = {"x_t": targets.x_t, "v_target": targets.velocity}[quantity]
    expected = load_case(path).tensor(f"{name}/{quantity}")
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("quantity", ["t", "dt_base", "labels"])
@every_recorded_method
def test_recorded_conditions(path: Path, name: str, quantity: str) -> None:
    """Exactly; consistency training was recorded with one step index for the whole batch."""
    targets = recorded_targets(path, name)
    found = {"t": targets.t, "dt_base": targets.log2_steps, "labels": targets.y}[quantity]
    expected = load_case(path).tensor(f"{name}/{quantity}").to(found.dtype)
    assert torch.equal(found, expected.expand_as(found))


def test_recorded_methods_are_all_known() -> None:
    names = {name for _, name in recorded_methods()}
    assert {
        "shortcut",
        "shortcut_cfg",
        "fm",
        "icfm",
        "rfm",
        "naive",
        "livereflow",
        "livereflow_nocfg",
        "shortcut_models",
    } <= names
