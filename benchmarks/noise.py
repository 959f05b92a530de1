"""Time to add normal noise to an array in place, by the generator of the key.

    python -m benchmarks.noise --json benchmarks/results/noise.json

Beside the plain addition of a number and `jax.random.normal`, whose draws are an array first.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import record, timing
from flatopt._core import rng

SIZE = 2560 * 2560
GENERATORS = ("threefry2x32", "rbg", "unsafe_rbg")
PLAIN = "no draw"


def additions() -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """What is added, by name, each a function of the array and of a number of the draw."""

    def ours(key: jax.Array, w: jax.Array, number: jax.Array) -> jax.Array:
        return (w + rng.normal_like(jax.random.fold_in(key, number), w)).astype(w.dtype)

    def theirs(key: jax.Array, w: jax.Array, number: jax.Array) -> jax.Array:
        return w + jax.random.normal(jax.random.fold_in(key, number), w.shape, w.dtype)

    rows: dict[str, Any] = {PLAIN: lambda w, number: w + number.astype(w.dtype)}
    for generator in GENERATORS:
        key = jax.random.key(0, impl=generator)
        rows[f"flatopt, {generator}"] = functools.partial(ours, key)
        rows[f"jax.random.normal, {generator}"] = functools.partial(theirs, key)
    return rows


def measure(dtype: str, size: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one dtype, from turns in one another's time."""
    turns, rows = {}, {}
    for name, add in additions().items():
        w = jnp.zeros([size], dtype)
        number = jnp.zeros([], jnp.int32)
        compiled = jax.jit(add, donate_argnums=0).lower(w, number).compile()
        turns[name] = timing.turn_of(compiled, w, number)
        memory: Any = compiled.memory_analysis()
        temporary = memory.temp_size_in_bytes / w.nbytes
        rows[name] = {"variant": name, "temporary_copies": temporary}
    seconds = timing.interleaved_seconds(turns, repeats, steps=5)
    for name, row in rows.items():
        row["milliseconds"] = timing.summary([1e3 * s for s in seconds[name]])
        row["over_plain"] = timing.ratio(seconds[name], seconds[PLAIN])
    return list(rows.values())


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    text = []
    for dtype, rows in results["dtypes"].items():
        text += [
            f"{results['settings']['size']:,} entries of {dtype}:",
            "",
            "| what is added | ms | over no draw | temporary copies |",
            "| --- | ---: | ---: | ---: |",
        ]
        for row in rows:
            over = row["over_plain"]
            text.append(
                f"| {row['variant']} | {row['milliseconds']['median']:.1f} "
                f"| {over['median']:.1f} [{over['min']:.1f}, {over['max']:.1f}] "
                f"| {row['temporary_copies']:.1f} |"
            )
        text.append("")
    return text[:-1]


def main() -> None:
    """Measures, prints tables and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=SIZE, help="entries (%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    if args.repeats < 1 or args.size < 8:
        parser.error("--repeats must be >= 1, --size at least 8.")
    dtypes = {d: measure(d, args.size, args.repeats) for d in ("float32", "bfloat16")}
    results = {"settings": {"size": args.size, "repeats": args.repeats}, "dtypes": dtypes}
    print("\n".join(lines(results)))
    if args.json:
        record.write(args.json, results)


if __name__ == "__main__":
    main()
