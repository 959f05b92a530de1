"""Results as numbers, as a table, as plain sentences and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CLEAR = 2.0  # A difference counts when it exceeds so many standard errors.


@dataclass(frozen=True)
class Arm:
    """One method at one length, with what was measured for each seed.

    Attributes:
      method: name of the method.
      equal_gradients: whether the run was shortened to as many gradient evaluations as the baseline
        takes.
      steps: number of updates.
      gradient_evaluations: of one seed, counted.
      accuracy: test accuracy, [seeds].
      train_loss: final training loss, [seeds].
      top_eigenvalue: of the Hessian of the training loss, [seeds].
      trace: of the Hessian of the training loss, [seeds].
      local_energy: rise of the training error under noise on the weights, [seeds].
      barrier: rise of the training loss between two seeds' networks, [seeds].
      line: training loss along random directions, [seeds, positions].
      seconds: training time of all seeds together, without compilation.
      compile_seconds: compilation time.
    """

    method: str
    equal_gradients: bool
    steps: int
    gradient_evaluations: int
    accuracy: np.ndarray
    train_loss: np.ndarray
    top_eigenvalue: np.ndarray
    trace: np.ndarray
    local_energy: np.ndarray
    barrier: np.ndarray
    line: np.ndarray
    seconds: float
    compile_seconds: float

    @property
    def label(self) -> str:
        """The method, with a star if the run was shortened."""
        return f"{self.method}*" if self.equal_gradients else self.method


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error; the latter is None for a single seed."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        """The estimate from one value a seed."""
        values = np.asarray(values, float)
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        return cls(float(np.mean(values)), error)

    def show(self, digits: int, sign: str = "") -> str:
        """Mean and error as text."""
        error = "n/a" if self.error is None else f"{self.error:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f} ± {error}"


def difference(arm: Arm, baseline: Arm) -> Estimate:
    """Accuracy of `arm` minus that of `baseline` in percentage points, paired by seed."""
    return Estimate.of(100 * (arm.accuracy - baseline.accuracy))


def table(arms: Sequence[Arm], baseline: Arm) -> str:
    """The results, one line an arm."""
    header = [
        "method",
        "steps",
        "gradients",
        "test accuracy %",
        f"minus {baseline.method} (points)",
        "top eigenvalue",
        "trace",
        "local energy %",
        "barrier",
        "train loss",
        "run s",
        "compile s",
    ]
    rows = [
        [
            arm.label,
            f"{arm.steps}",
            f"{arm.gradient_evaluations}",
            Estimate.of(100 * arm.accuracy).show(2),
            "" if arm is baseline else difference(arm, baseline).show(2, "+"),
            f"{np.mean(arm.top_eigenvalue):.3g}",
            f"{np.mean(arm.trace):.3g}",
            f"{100 * np.mean(arm.local_energy):.2f}",
            f"{np.mean(arm.barrier):.3g}",
            f"{np.mean(arm.train_loss):.3g}",
            f"{arm.seconds:.2f}",
            f"{arm.compile_seconds:.2f}",
        ]
        for arm in arms
    ]
    return align(header, rows)


def align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def verdict(arms: Sequence[Arm], baseline: Arm) -> str:
    """Which differences are clear: one sentence a line, made from the numbers alone."""
    others = [arm for arm in arms if arm is not baseline]
    if not others:
        return f"Only {baseline.method} ran: there is nothing to compare."
    if len(baseline.accuracy) < 2:
        return "One seed gives no standard error, so no difference can be judged."
    groups: dict[str, list[str]] = {"more": [], "less": [], "none": [], "diverged": []}
    for arm in others:
        groups[_judge(arm, baseline)].append(arm.label)
    sentences = []
    for key, word in (("more", "more"), ("less", "less")):
        if groups[key]:
            sentences.append(
                f"{word.capitalize()} accurate than {baseline.method} by more than {CLEAR:g} "
                f"standard errors: {_list(groups[key])}."
            )
    if groups["none"]:
        sentences.append(
            f"No difference from {baseline.method} beyond {CLEAR:g} standard errors: "
            f"{_list(groups['none'])}."
        )
    if groups["diverged"]:
        sentences.append(f"Diverged, not judged: {_list(groups['diverged'])}.")
    return "\n".join(sentences)


def _judge(arm: Arm, baseline: Arm) -> str:
    if not (is_finite(arm) and is_finite(baseline)):
        return "diverged"
    estimate = difference(arm, baseline)
    if estimate.error is None or abs(estimate.mean) <= CLEAR * estimate.error:
        return "none"
    return "more" if estimate.mean > 0 else "less"


def is_finite(arm: Arm) -> bool:
    """Whether no seed diverged."""
    return bool(np.all(np.isfinite(arm.train_loss)))


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def to_json(arms: Sequence[Arm], baseline: Arm) -> list[dict[str, Any]]:
    """The results as plain numbers, in the units of the fields: accuracies are shares, not %."""

    def one(arm: Arm) -> dict[str, Any]:
        paired = difference(arm, baseline)
        accuracy, eigenvalue = Estimate.of(arm.accuracy), Estimate.of(arm.top_eigenvalue)
        return {
            "method": arm.method,
            "equal_gradients": arm.equal_gradients,
            "steps": arm.steps,
            "gradient_evaluations_per_seed": arm.gradient_evaluations,
            "test_accuracy": _numbers(arm.accuracy),
            "test_accuracy_mean": _number(accuracy.mean),
            "test_accuracy_standard_error": _number(accuracy.error),
            "difference_points_mean": _number(paired.mean),
            "difference_points_standard_error": _number(paired.error),
            "top_eigenvalue": _numbers(arm.top_eigenvalue),
            "top_eigenvalue_mean": _number(eigenvalue.mean),
            "top_eigenvalue_standard_error": _number(eigenvalue.error),
            "trace": _numbers(arm.trace),
            "local_energy": _numbers(arm.local_energy),
            "barrier": _numbers(arm.barrier),
            "train_loss": _numbers(arm.train_loss),
            "line_loss_mean": _numbers(np.mean(arm.line, axis=0)),
            "seconds": arm.seconds,
            "compile_seconds": arm.compile_seconds,
        }

    return [one(arm) for arm in arms]


def from_json(entries: Sequence[dict[str, Any]]) -> list[Arm]:
    """The arms of a results file; of the lines it has the means alone."""

    def one(entry: dict[str, Any]) -> Arm:
        fields = ("train_loss", "top_eigenvalue", "trace", "local_energy", "barrier")
        return Arm(
            method=entry["method"],
            equal_gradients=entry["equal_gradients"],
            steps=entry["steps"],
            gradient_evaluations=entry["gradient_evaluations_per_seed"],
            accuracy=np.asarray(entry["test_accuracy"], float),
            line=np.asarray(entry["line_loss_mean"], float)[None],
            seconds=entry["seconds"],
            compile_seconds=entry["compile_seconds"],
            **{name: np.asarray(entry[name], float) for name in fields},
        )

    return [one(entry) for entry in entries]


def _number(value: float | None) -> float | None:
    """JSON has no NaN: what is not finite becomes null."""
    return None if value is None or not math.isfinite(value) else float(value)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values.tolist()]
