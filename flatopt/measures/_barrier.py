"""The barrier of the loss on the way from one network to another."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks
from flatopt.measures import _variables
from flatopt.measures._variables import Variables


class Barrier(NamedTuple):
    """Result of `linear_barrier`, `geodesic_barrier` and `flip_barrier`.

    Attributes:
      height: the largest rise of the loss above the straight line between its ends' values; 0 if
        there is none.
      positions: [num_points], from 0 to 1.
      losses: [num_points].
    """

    height: jax.Array
    positions: jax.Array
    losses: jax.Array


def barrier_height(positions: jax.Array, losses: jax.Array) -> jax.Array:
    r"""The largest rise of a profile of losses above the line between its ends.

    .. math:: \max_t \, L(t) - (1 - t) L(0) - t L(1)

    Args:
      positions: [n], rising from the first end to the second.
      losses: [n], such as those of `flatopt.curves.evaluate`.

    Returns:
      A scalar >= 0; NaN if a loss is NaN.

    Raises:
      ValueError: if the two differ in shape or have fewer than two entries.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.barrier_height(jnp.linspace(0.0, 1.0, 3), jnp.array([1.0, 4.0, 2.0])))
      2.5

    References:
      Frankle, Dziugaite, Roy, Carbin. Linear Mode Connectivity and the Lottery Ticket Hypothesis.
      arXiv:1912.05671

    Cost: nothing.
    """
    positions, losses = jnp.asarray(positions), jnp.asarray(losses)
    if positions.shape != losses.shape or positions.ndim != 1 or len(positions) < 2:
        raise ValueError(
            f"positions and losses have shapes {positions.shape} and {losses.shape}: both need the "
            "same one axis of at least two points."
        )
    share = (positions - positions[0]) / (positions[-1] - positions[0])
    return jnp.max(losses - (1 - share) * losses[0] - share * losses[-1])


def mode_connectivity(losses: jax.typing.ArrayLike) -> jax.Array:
    r"""How a way between two networks compares with its ends, as one number with a sign.

    .. math:: mc = \tfrac12 (L_1 + L_n) - L_{i^*}, \quad
       i^* = \arg\max_i \, |\tfrac12 (L_1 + L_n) - L_i|

    Args:
      losses: [n], losses or errors from one end to the other: those of a `Barrier`, or of
        `flatopt.curves.evaluate`.

    Returns:
      A scalar: < 0 with a barrier, about 0 where the two are connected, > 0 where the way is
      better than its ends, which then are not minima; NaN if a loss is NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.mode_connectivity(jnp.array([1.0, 4.0, 2.0])))
      -2.5

    References:
      Yang and others. Taxonomizing local versus global structure in neural network loss landscapes.
      arXiv:2107.11228

    Cost: nothing.
    """
    losses = jnp.asarray(losses)
    if losses.ndim != 1 or len(losses) < 2:
        raise ValueError(
            f"losses has shape {losses.shape}: it needs one axis of two points or more."
        )
    rises = (losses[0] + losses[-1]) / 2 - losses
    return rises[jnp.argmax(jnp.abs(rises))]


@dataclasses.dataclass(frozen=True)
class Profile:
    """Losses along a path from `params` to `other`.

    Attributes:
      loss_fn: the loss.
      variables: all leaves.
      path: function of both trees and a position, as a hashable object.
    """

    loss_fn: _batches.LossFn
    variables: Variables
    path: Any

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        other: Any,
        positions: jax.Array,
    ) -> jax.Array:
        """Returns the loss at each position."""

        def at(position: jax.Array) -> jax.Array:
            place = self.path(params, other, position)
            place = self.variables.put(place, self.variables.take(place))
            return mean(_batches.Call(self.loss_fn), place)

        return loops.map(at, positions)


def straight(params: Any, other: Any, position: jax.Array) -> Any:
    """The point of the line between two trees; leaves that are no floats are those of `params`."""

    def leaf(a: Any, b: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(a), jnp.inexact):
            return a
        return ((1 - position) * a + position * b).astype(a.dtype)

    return jax.tree.map(leaf, params, other)


def profile(
    loss_fn: _batches.LossFn,
    params: Any,
    other_params: Any,
    data: _batches.Data,
    num_points: int,
    path: Any,
) -> Barrier:
    """Checks the arguments, and takes the losses along `path` and their barrier."""
    checks.check_count("num_points", num_points, 2)
    _variables.check_alike("other_params", other_params, params)
    variables = _variables.prepare(loss_fn, params, data, None)
    _variables.prepare(loss_fn, other_params, data, None)
    positions = jnp.linspace(0.0, 1.0, num_points)
    algorithm = Profile(loss_fn, variables, path)
    losses = _batches.run(algorithm, params, data, other_params, positions)
    return Barrier(barrier_height(positions, losses), positions, losses)


def linear_barrier(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    other_params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    num_points: int = 25,
) -> Barrier:
    r"""The rise of the loss, or of the error, on the straight line between two networks.

    .. math:: \max_{t \in [0, 1]} \, L((1 - t) w + t w') - (1 - t) L(w) - t L(w')

    Args:
      loss_fn, batches, weights: a loss or an error, and the data; see `hessian_vector_product`.
      params, other_params: the first network and the second, of the same shapes.
      num_points: equally spaced points of the line, >= 2, ends included. Static.

    Returns:
      `Barrier`: height, positions and losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> w = jnp.ones(2)  # Minima at 1 and -1, a barrier between them.
      >>> print(measures.linear_barrier(lambda w: jnp.sum((w**2 - 1) ** 2), w, -w).height)
      2.0

    References:
      Frankle, Dziugaite, Roy, Carbin. Linear Mode Connectivity and the Lottery Ticket Hypothesis.
      arXiv:1912.05671

    Cost: `num_points` losses over the data.
    """
    data = _batches.weigh(batches, weights)
    return profile(loss_fn, params, other_params, data, num_points, straight)
