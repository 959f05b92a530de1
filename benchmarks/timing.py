"""Wall-clock ratios that survive a noisy machine: variants take turns in one process."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Step = Callable[[Any], Any]


def interleaved_seconds(
    variants: Mapping[str, tuple[Step, Any]], repeats: int, steps: int
) -> dict[str, list[float]]:
    """Seconds per step of each variant, one number a repeat.

    Args:
      variants: name to `(step, carry)`; `step` maps a carry to the next one and is compiled.
      repeats: rounds; in each, every variant runs once, one after the other.
      steps: calls of `step` in one run.

    Returns:
      For each name, `repeats` numbers. The first, warming round is not among them.
    """
    carries = {name: carry for name, (_, carry) in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, (step, _) in variants.items():
            carry = carries[name]
            start = time.perf_counter()
            for _ in range(steps):
                carry = step(carry)
            jax.block_until_ready(carry)
            seconds[name].append((time.perf_counter() - start) / steps)
            carries[name] = carry
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: list[float], base: list[float]) -> dict[str, float]:
    """Median and range, over the rounds, of the ratio of two variants of the same round."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
