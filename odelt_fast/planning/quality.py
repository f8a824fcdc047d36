"""Tables of quality: what each operation is worth, by the results of `odelt-fast evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from odelt_fast.checks import number, shown, text, whole
from odelt_fast.config import DiTConfig
from odelt_fast.evaluation.operation_fields import read_operation
from odelt_fast.evaluation.results import FORMAT
from odelt_fast.evaluation.results import number as shown_with_spread
from odelt_fast.files import one_line, read_object
from odelt_fast.operation import Operation, effective_guidance

FILE_NAME = "quality.json"  # in a model's folder: the results of its evaluation
_LIMIT = 16 << 20  # bytes


class Value(NamedTuple):
    """Mean over seeds, and standard deviation (None for one seed)."""

    mean: float
    std: float | None

    def __str__(self) -> str:
        return shown_with_spread(self._asdict())


@dataclass(frozen=True)
class Quality:
    """Measured quality: operation -> metric -> value.

    metrics: their names, the first the one that counts unless another is asked for. images: of each
    seed. config, weights: of the model that was measured (weights None: not recorded). dtype: what
    it was measured in. path: where it was read.
    """

    rows: Mapping[Operation, Mapping[str, Value]]
    metrics: tuple[str, ...]
    images: int
    seeds: int
    config: DiTConfig
    weights: str | None
    dtype: str
    path: Path

    def metric(self, name: str | None = None) -> str:
        """name, or the first metric; ValueError naming those there are."""
        if name is not None and name not in self.metrics:
            raise ValueError(
                f"metric must be one of {', '.join(self.metrics)}, which {self.path} holds, not"
                f" {name!r}"
            )
        return self.metrics[0] if name is None else name

    def of(self, operation: Operation, metric: str | None = None) -> Value | None:
        """What was measured of exactly this operation; None if nothing was."""
        scale = effective_guidance(operation.guidance_scale)
        row = self.rows.get(replace(operation, guidance_scale=scale))
        return None if row is None else row[self.metric(metric)]

    def operations(self, guidance_scale: float | None = None) -> tuple[Operation, ...]:
        """What was measured at this scale."""
        scale = effective_guidance(guidance_scale)
        return tuple(operation for operation in self.rows if operation.guidance_scale == scale)

    def check(self, config: DiTConfig, weights: str | None) -> None:
        """ValueError if it is the quality of another model.

        weights: SHA-256 of the model's files (`machine.model_hash`).
        """
        known = self.weights is not None and weights is not None
        if self.config != config or (known and self.weights != weights):
            raise ValueError(
                f"{self.path} is the quality of another model: measure this one's with odelt-fast"
                " evaluate"
            )


def read_quality(path: str | Path) -> Quality:
    """The table of quality that an evaluation is.

    Args:
        path: its folder, or its results.json.

    Raises:
        ValueError: of one line, for anything else.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        values = read_object(path, _LIMIT)
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is {shown(values.get('format'))}, not {FORMAT}")
        settings, config, environment = (
            _object(values, name) for name in ("settings", "model", "environment")
        )
        rows = values.get("rows")
        if not isinstance(rows, list) or not rows:
            raise ValueError("rows must be a list that is not empty")
        found = dict(_row(row, settings) for row in rows)
        metrics = tuple(next(iter(found.values())))
        if any(set(row) != set(metrics) for row in found.values()):
            raise ValueError("its rows have different metrics")
        weights = values.get("model_sha256")
        return Quality(
            found,
            metrics,
            whole("num_images", settings.get("num_images")),
            whole("seeds", settings.get("seeds")),
            DiTConfig.from_dict(config),
            None if weights is None else text("model_sha256", weights),
            text("dtype", environment.get("dtype")),
            path,
        )
    except FileNotFoundError:
        raise ValueError(
            f"there is no table of quality {path}: odelt-fast evaluate writes one"
        ) from None
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} holds no results of odelt-fast evaluate: {one_line(error, 200)}"
        ) from None


def _object(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be an object, not {shown(found)}")
    return found


def _row(row: Any, settings: Mapping[str, Any]) -> tuple[Operation, dict[str, Value]]:
    if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict) or not row["metrics"]:
        raise ValueError(f"a row must have metrics, not {shown(row)}")
    operation = read_operation(row)
    if (
        settings.get("paper_guidance") is True
        and operation.steps == 128
        and operation.guidance_scale not in (None, 0)
    ):
        operation = replace(operation, steps=64)  # counted as 128: each takes two evaluations
    metrics = row["metrics"].items()
    return operation, {text("metric", name): _value(name, spread) for name, spread in metrics}


def _value(name: str, spread: Any) -> Value:
    if not isinstance(spread, dict):
        raise ValueError(f"{shown(name)} must have a mean, not {shown(spread)}")
    mean, std = number(name, spread.get("mean")), spread.get("std")
    return Value(mean, None if std is None else number(f"std of {name}", std, 0))
