"""Wall-clock ratios that survive a noisy machine: variants take turns in one process."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

LONGEST_TURN = 2.0  # Seconds, about: slow variants take fewer steps.

Turn = Callable[[int], float]
Step = Callable[[Any, Any], Any]


def turn_of(step: Step, carry: Any, batch: Any) -> Turn:
    """Takes steps of a compiled function, and returns the seconds of one."""

    def turn(steps: int) -> float:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(steps):
            carry = step(carry, batch)
        jax.block_until_ready(carry)
        return (time.perf_counter() - start) / steps

    return turn


def interleaved_seconds(
    turns: Mapping[str, Turn],
    repeats: int,
    steps: int,
    on_turn: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per step of each variant, one number a repeat.

    Args:
      turns: name to a function from a number of steps to the seconds of one step.
      repeats: rounds; in each, every variant has one turn. The first moves to the end from round
        to round, so that none always follows the same one.
      steps: how many, in one turn; fewer where the warming round says that they take too
        long.
      on_turn: called after each turn, to show progress.

    Returns:
      For each name, `repeats` numbers. The first, warming round is not among them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    own_steps = {}
    for name in names:
        value = turns[name](1)
        own_steps[name] = max(1, min(steps, int(LONGEST_TURN / value)))
        if own_steps[name] > 1:  # The rest of a whole turn.
            turns[name](own_steps[name] - 1)
        on_turn()
    for _ in range(repeats):
        names = names[1:] + names[:1]
        for name in names:
            seconds[name].append(turns[name](own_steps[name]))
            on_turn()
    return seconds


def ratio(seconds: list[float], base: list[float]) -> dict[str, float]:
    """Median and range, over the rounds, of the ratio of two variants of the same round."""
    return summary([a / b for a, b in zip(seconds, base, strict=True)])


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
