"""The loss along a curve, with batch statistics of every point's own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt.curves._bases import Basis, bezier
from flatopt.curves._points import point


@dataclasses.dataclass(frozen=True)
class _Evaluate:
    loss_fn: _batches.LossFn
    basis: Basis
    statistics_fn: Callable[..., Any] | None

    def __call__(
        self, mean: _batches.Mean, loops: _batches.Loops, params: Any, positions: jax.Array
    ) -> jax.Array:
        def at(position: jax.Array) -> jax.Array:
            network = point(params, position, self.basis)
            if self.statistics_fn is None:
                return mean(_batches.Call(self.loss_fn), network)
            statistics = mean(_batches.Call(self.statistics_fn), network)
            return mean(_batches.Call(self.loss_fn), network, statistics)

        return loops.map(at, positions)


def evaluate(
    loss_fn: _batches.LossFn,
    controls: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    positions: jax.typing.ArrayLike | None = None,
    basis: Basis = bezier,
    statistics_fn: Callable[..., Any] | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""The loss, or the error, along a curve.

    .. math:: t \mapsto L(w(t))

    Args:
      loss_fn: loss or error of `(params, batch)`, or of `(params, statistics, batch)`. Static.
      controls, basis: the curve; see `point`.
      batches, weights: the data; see `flatopt.measures.hessian_vector_product`.
      positions: [n] in [0, 1]; None: 25 from 0 to 1.
      statistics_fn: of `(params, batch)`, a tree of means over the batch, such as BatchNorm needs:
        averaged over the batches anew at every position. None: `loss_fn` takes none. Static.

    Returns:
      Positions and losses, as `flatopt.measures.barrier_height` takes them.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> controls = jnp.array([-1.0, 0.0, 1.0])
      >>> print(flatopt.curves.evaluate(jnp.square, controls, positions=[0.0, 0.5, 1.0])[1])
      [1. 0. 1.]

    References:
      As for `bezier`.

    Cost: 1 loss over the data a position, 2 with `statistics_fn`.
    """
    data = _batches.weigh(batches, weights)
    places = jnp.linspace(0.0, 1.0, 25) if positions is None else jnp.asarray(positions, float)
    if places.ndim != 1 or not places.size:
        raise ValueError(f"positions has shape {places.shape}: it must be a list of numbers.")
    _batches.first_batch(data)
    algorithm = _Evaluate(loss_fn, basis, statistics_fn)
    return places, _batches.run(algorithm, controls, data, places)
