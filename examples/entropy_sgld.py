"""Entropy-SGLD: Langevin noise in the outer loop samples the local entropy, not the loss.

A loss with a wide and a narrow minimum of equal depth. SGLD samples `exp(-loss / T)`; with the
gradient of the local entropy in its place, the samples follow that law blurred by a Gaussian of
variance `T / gamma`, the width of the spring. Both are compared with what integration gives.
`python -m examples.entropy_sgld` runs it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flatopt

PLACES = (-0.5, 0.5)
CURVATURES = (2.0, 20.0)
TEMPERATURE = 0.25
GAMMA = 4.0
GRID = np.linspace(-6, 6, 4001)
MIDDLE = 0.3  # Between the two minima, where the wells cross.


class Law(NamedTuple):
    """What is compared of a distribution."""

    mean: float
    std: float
    narrow: float  # Share near the narrow minimum.


def loss(w: jax.Array) -> jax.Array:
    """The smooth minimum of two parabolas, for each walker."""
    wells = [0.5 * c * (w - at) ** 2 for at, c in zip(PLACES, CURVATURES, strict=True)]
    return -TEMPERATURE * jax.nn.logsumexp(-jnp.stack(wells) / TEMPERATURE, axis=0)


def gradient(w: jax.Array, i: jax.typing.ArrayLike = 0) -> jax.Array:
    """Of the sum over the walkers, which do not know of one another."""
    del i
    return jax.grad(lambda w: jnp.sum(loss(w)))(w)


def walk(tx: optax.GradientTransformation, walkers: int, steps: int) -> Law:
    """Runs many walkers; what they visit in the last three quarters of the time."""
    tx = optax.with_extra_args_support(tx)

    def step(carry: tuple, _: None) -> tuple[tuple, tuple]:
        w, opt_state = carry
        updates, opt_state = tx.update(gradient(w), opt_state, w, grad_fn=gradient)
        w = optax.apply_updates(w, updates)
        return (w, opt_state), (jnp.mean(w), jnp.mean(w**2), jnp.mean(w > MIDDLE))

    start = jnp.tile(jnp.array(PLACES), walkers // 2)
    carry = start, tx.init(start)
    _, moments = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(carry)
    mean, square, narrow = (float(jnp.mean(x[steps // 4 :])) for x in moments)
    return Law(mean, (square - mean**2) ** 0.5, narrow)


def exact(potential: Callable[[np.ndarray], np.ndarray]) -> Law:
    """Of `exp(-potential / T)`, by integration."""
    density = np.exp(-potential(GRID) / TEMPERATURE)
    density /= density.sum()
    mean = float(density @ GRID)
    std = float(np.sqrt(density @ (GRID - mean) ** 2))
    return Law(mean, std, float(density[GRID > MIDDLE].sum()))


def plain_potential(grid: np.ndarray) -> np.ndarray:
    """The loss."""
    return np.asarray(loss(jnp.asarray(grid)))


def entropic_potential(grid: np.ndarray) -> np.ndarray:
    """Minus T times the local entropy, by integration over the end of the spring."""
    energy = plain_potential(GRID)[None] + 0.5 * GAMMA * (GRID[None] - grid[:, None]) ** 2
    return -TEMPERATURE * np.log(np.exp(-energy / TEMPERATURE).sum(1))


def samplers() -> dict[str, tuple[optax.GradientTransformation, Callable]]:
    """The two samplers, at one temperature, and the potential that each should sample."""
    inner = flatopt.local_entropy(
        50,
        GAMMA,
        inner_learning_rate=0.03,
        noise=TEMPERATURE**0.5,
        averaging=0.9,
        scale_by_gamma=True,
        key=1,
    )
    return {
        "sgld": (flatopt.langevin(0.01, TEMPERATURE), plain_potential),
        "entropy_sgld": (
            optax.chain(inner, flatopt.langevin(0.05, TEMPERATURE)),
            entropic_potential,
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.entropy_sgld", description=__doc__)
    parser.add_argument("--walkers", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args(argv)
    print(f"{'':24}{'mean':>8}{'std':>8}{'near the narrow minimum':>26}")
    for name, (tx, potential) in samplers().items():
        for kind, law in (
            ("sampled", walk(tx, args.walkers, args.steps)),
            ("by integration", exact(potential)),
        ):
            print(f"{name + ', ' + kind:28}{law.mean:.3f}{law.std:8.3f}{law.narrow:26.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
