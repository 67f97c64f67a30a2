"""Arguments of RepaePipeline: labels, ranges and choices, each wrong one said in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

from models.checks.errors import UserError, shown
from utils.samplers import SOLVERS, least_steps
from utils.sampling.labels import label_among

# name => kind of number, smallest and largest value
NUMBERS = {
    "guidance_scale": (Real, 0, 1000),
    "num_inference_steps": (Integral, 1, 10**6),
    "timestep_shift": (Real, 1e-3, 1000),
    "batch_size": (Integral, 1, 10**6),
    "guidance_interval": (Real, 0, 1),
}


def classes_of(given: Any, id2label: Mapping[Any, str] | None, num_classes: int) -> list[int]:
    """`class_labels` of a call, one or several labels or names => labels."""
    given = given.tolist() if hasattr(given, "tolist") else given  # of a tensor or an array
    several = [given] if isinstance(given, str | Integral) else given
    # a set has no order, and bytes would be numbers
    if not isinstance(several, Iterable) or isinstance(several, Mapping | Set | bytes | bytearray):
        raise UserError(f"class_labels={shown(given)}: expected labels or names of classes")
    names = names_of(id2label, num_classes)
    labels = [_label_of(one, names) for one in several]
    if not labels:
        raise UserError("class_labels is empty: give one for each image, e.g. [0, 1]")
    return labels


def names_of(id2label: Mapping[Any, str] | None, num_classes: int) -> list[str]:
    """The names of all classes; "" where none is known."""
    known = {int(label): name for label, name in (id2label or {}).items()}
    return [known.get(label, "") for label in range(num_classes)]


def _label_of(given: Any, names: Sequence[str]) -> int:
    given = given.item() if hasattr(given, "item") else given  # of a tensor or an array
    if isinstance(given, bool) or not isinstance(given, str | Integral):
        raise UserError(f"class_labels: {shown(given)} is neither a label nor the name of a class")
    try:
        return label_among(given if isinstance(given, str) else int(given), names, names)
    except UserError as error:
        raise UserError(f"class_labels: {error}") from None


def check_names(id2label: Any) -> None:
    """`UserError` unless this is what `names_of` takes."""
    found = id2label.items() if isinstance(id2label, Mapping) else [(id2label, id2label)]
    right = (str(label).isdecimal() and isinstance(name, str) for label, name in found)
    if id2label is not None and not all(right):
        text = "expected the names of classes by their labels, e.g. {'0': 'cat'}"
        raise UserError(f"id2label={shown(id2label)}: {text}")


def one_of(name: str, value: Any, choices: Iterable) -> None:
    """`UserError` unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise UserError(f"{name}={shown(value)}: expected one of {', '.join(map(str, choices))}")


def check_call(solver: Any, guidance_interval: Any, numbers: Mapping[str, Any]) -> None:
    """`UserError` for a number outside of its range, and for what does not go together."""
    one_of("solver", solver, SOLVERS)
    for name, value in numbers.items():
        _check_number(name, value)
    if not isinstance(guidance_interval, list | tuple) or len(guidance_interval) != 2:
        text = "expected two times, 0 = data, 1 = noise, e.g. (0, 0.7)"
        raise UserError(f"guidance_interval={shown(guidance_interval)}: {text}")
    for side in guidance_interval:
        _check_number("guidance_interval", side)
    low, high = guidance_interval
    if low > high:
        raise UserError(f"guidance_interval={guidance_interval}: the smaller time comes first")
    steps, least = numbers["num_inference_steps"], least_steps(solver)
    if steps < least:
        raise UserError(f"num_inference_steps={steps}: solver {solver} needs {least} or more")


def _check_number(name: str, value: Any) -> None:
    kind, low, high = NUMBERS[name]
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        words = "a whole number" if kind is Integral else "a number"
        raise UserError(f"{name}={shown(value)}: expected {words} from {low} to {high}")
