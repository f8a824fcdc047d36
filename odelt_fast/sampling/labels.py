"""Labels that people mean, by number or by the name of a class; those of a data set's classes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from odelt_fast.checks import shown
from odelt_fast.config import TrainedOn, are_numbers, describe_classes, plain


def labels_from_text(known: TrainedOn, texts: Sequence[str], num_classes: int) -> list[int]:
    """The labels that people mean: whole numbers, or names of classes; several in a text are
    separated by commas, or numbers by blanks.

    Raises:
        ValueError: for a name that no class has, or several have, and a number above
            num_classes, which is the null label.
    """
    found: list[int] = []
    for given in texts:
        each = given.strip()
        parts = [each] if known.find(each) else [part.strip() for part in each.split(",")]
        for part in filter(None, parts):
            words = part.split()
            if not all(word.isascii() and word.isdigit() for word in words):
                words = [part]
            found += [label_from_text(known, word, num_classes) for word in words]
    if texts and not found:
        raise ValueError("there is no label: give numbers, or names of classes")
    return found


def label_from_text(known: TrainedOn, name: str, num_classes: int) -> int:
    """The label of one class, given by number or name; ValueError as of `labels_from_text`."""
    numbers = f"labels go from 0 to {num_classes - 1}, {num_classes} is the null label"
    if name.isascii() and name.isdigit():
        if len(name) > 9 or int(name) > num_classes:
            raise ValueError(f"label {shown(name)} is not allowed: {numbers}")
        return int(name)
    labels = known.find(name)
    if len(labels) == 1:
        return labels[0]
    if labels:
        several = " and ".join(map(str, labels[:5]))
        raise ValueError(f"{shown(name)} names the classes {several}: give the number")
    if not known.class_names:
        raise ValueError(
            f"label {shown(name)} is not allowed: {numbers}; this model does not know the names"
            " of its classes"
        )
    near = difflib.get_close_matches(name, known.class_names[:2000], 3)
    some = ", ".join(map(plain, near or known.class_names[:10]))
    more = ", ..." if not near and len(known.class_names) > 10 else ""
    told = f"perhaps {some}" if near else f"they are {some}{more}"
    raise ValueError(f"{shown(name)} names no class of the model ({told}); {numbers}")


def labels_of_classes(known: TrainedOn, class_names: Sequence[str], num_classes: int) -> list[int]:
    """The model's label of each class of a data set, by name; by number where one of them knows
    no names.

    Raises:
        ValueError: the data have classes that the model does not have.
    """
    found = [known.find(name) for name in class_names]
    if all(len(labels) == 1 for labels in found):
        return [labels[0] for labels in found]
    count, numbered = len(class_names), are_numbers(class_names)
    if count <= num_classes and numbered:
        return list(range(count))
    if count == num_classes and not known.class_names:
        return list(range(count))
    if not known.class_names or are_numbers(known.class_names) or numbered:
        has = f"the model has {num_classes} whose names are not known"
        raise ValueError(f"{describe_classes(class_names)}: {has}")
    unknown = next(name for name, labels in zip(class_names, found) if len(labels) != 1)
    raise ValueError(
        f"{shown(unknown)} of its {describe_classes(class_names)} is no class of the model,"
        f" which has {describe_classes(known.class_names)}"
    )


def ids_of_names(id2label: Any, num_classes: int) -> dict[str, int]:
    """Name -> class of a pipeline's id2label, whose synonyms are separated by commas, sorted."""
    try:
        pairs = [(int(label), text.split(",")) for label, text in id2label.items()]
    except (AttributeError, TypeError, ValueError):
        given = f"such as {{0: 'cat', 1: 'dog'}}, not {shown(id2label)}"
        raise ValueError(f"id2label must map classes to their names, {given}") from None
    for label, _ in pairs:
        if label not in range(num_classes):
            raise ValueError(f"id2label has class {label}: this model's are 0 to {num_classes - 1}")
    return dict(sorted((name.strip(), label) for label, names in pairs for name in names))


def whole_labels(class_labels: Any) -> Tensor:
    """Labels (N,), one or several, as whole numbers; the Sampler says which are allowed."""
    try:
        labels = torch.as_tensor(class_labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        labels = torch.empty(0)
    kind = labels.dtype
    if not len(labels) or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise ValueError(
            "class_labels must be at least one whole number (get_label_ids gives those of names),"
            f" not {class_labels!r}"
        )
    return labels
