"""What the comparison measures of flatness, each a call of `flatopt.measures` or `landscape`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import landscape, measures

Loss = Callable[..., jax.Array]

PRODUCTS = 40  # Most Hessian-vector products for the top eigenvalue; it usually takes 15 to 30.
TRACE_PRODUCTS = 24
ENERGY_SIGMA, ENERGY_SAMPLES = 0.5, 24
BARRIER_POINTS = 13
DENSITY_PROBES, DENSITY_STEPS = 4, 48
PLANE_POINTS, PLANE_MARGIN = 25, 0.35


class Flatness(NamedTuple):
    """Flatness of one network.

    Attributes:
      top_eigenvalue: largest Hessian eigenvalue of the training loss.
      trace: of that Hessian, Hutchinson's estimate.
      local_energy: rise of the training error under multiplicative noise of size `ENERGY_SIGMA`.
      barrier: rise of the training loss on the straight line to the network of the next seed, above
        the line between the losses at its ends; NaN if there is only one seed.
    """

    top_eigenvalue: jax.Array
    trace: jax.Array
    local_energy: jax.Array
    barrier: jax.Array


def measure(loss_fn: Loss, error_fn: Loss, params: Any, other: Any, key: jax.Array) -> Flatness:
    """Measures one network.

    Args:
      loss_fn: training loss, a function of the parameters alone.
      error_fn: training error, likewise.
      params: the network.
      other: the network of the next seed, or None.
      key: for start vectors, probes and noise.
    """
    keys = jax.random.split(key, 3)
    eigenvalues = measures.top_eigenvalues(loss_fn, params, key=keys[0], num_steps=PRODUCTS)
    trace = measures.trace(loss_fn, params, key=keys[1], num_products=TRACE_PRODUCTS)
    energy = measures.local_energy(
        error_fn, params, key=keys[2], sigmas=[ENERGY_SIGMA], num_samples=ENERGY_SAMPLES
    )
    barrier = jnp.full_like(trace.value, jnp.nan)
    if other is not None:
        barrier = measures.linear_barrier(loss_fn, params, other, num_points=BARRIER_POINTS).height
    return Flatness(eigenvalues.values[0], trace.value, energy.energy[0], barrier)


def loss_along_lines(
    loss_fn: Loss, params: Any, key: jax.Array, positions: jax.Array, directions: int
) -> jax.Array:
    """The loss along random filter-normalised directions, averaged over them.

    The same key gives the same noise for every method; only the lengths follow the parameters.

    Returns:
      An array like `positions`.
    """

    def one_direction(key: jax.Array) -> jax.Array:
        direction = landscape.random_direction(key, params)
        return landscape.line(loss_fn, params, direction, positions=positions)[1]

    return jnp.mean(jax.lax.map(one_direction, jax.random.split(key, directions)), axis=0)


def density(loss_fn: Loss, params: Any, batches: Any) -> measures.SpectralDensity:
    """The density of the Hessian's eigenvalues."""
    return measures.spectral_density(
        loss_fn, params, batches, num_probes=DENSITY_PROBES, num_steps=DENSITY_STEPS
    )


class Surface(NamedTuple):
    """The loss in the plane through three networks.

    Attributes:
      xs: coordinates in the first direction.
      ys: coordinates in the second.
      losses: [ys, xs].
      corners: coordinates of the three networks, by name.
    """

    xs: np.ndarray
    ys: np.ndarray
    losses: np.ndarray
    corners: dict[str, tuple[float, float]]


def surface(loss_fn: Loss, networks: dict[str, Any], batches: Any) -> Surface:
    """The loss around three networks, in the plane through them."""
    where = landscape.plane_through(*networks.values())
    corners = np.asarray(where.coordinates)
    low, high = corners.min(axis=0), corners.max(axis=0)
    margin = PLANE_MARGIN * (high - low)
    xs, ys = (np.linspace(low[i] - margin[i], high[i] + margin[i], PLANE_POINTS) for i in range(2))
    losses = landscape.plane(loss_fn, where, batches, xs=xs, ys=ys)
    named = {n: (float(x), float(y)) for n, (x, y) in zip(networks, corners, strict=True)}
    return Surface(xs, ys, np.asarray(losses), named)
