"""Critical sharpness (Kalra et al., arXiv:2601.16979): from the step at which the loss rises."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks
from flatopt.measures import _variables
from flatopt.measures._variables import Mask, Variables, Vector

MOST_STEPS = 100  # Doublings, halvings and bisections, at most.


class _Bracket(NamedTuple):
    """The longest step tried that keeps the loss from rising, the shortest that does not."""

    low: jax.Array
    high: jax.Array
    tried: jax.Array

    def next(self, start: jax.Array) -> jax.Array:
        """The step to try: doubled, halved, or between the two."""
        longer = jnp.where(self.low == 0, start, 2 * self.low)
        return jnp.where(jnp.isinf(self.high), longer, (self.low + self.high) / 2)


@dataclasses.dataclass(frozen=True)
class _CriticalSharpness:
    """2 over the shortest step found that raises the loss."""

    loss_fn: _batches.LossFn
    variables: Variables
    tolerance: float

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        start: jax.Array,
        direction: Vector | None,
    ) -> jax.Array:
        point = self.variables.take(params)

        def loss_at(vector: Vector) -> jax.Array:
            return mean(_batches.Call(self.loss_fn), self.variables.put(params, vector))

        if direction is None:
            gradient = _variables.Gradient(self.loss_fn, self.variables)
            _, direction = mean(gradient, params, point)
        loss = loss_at(point)

        def is_wide(bracket: _Bracket) -> jax.Array:
            wide = bracket.high - bracket.low > self.tolerance * bracket.high
            return (jnp.isinf(bracket.high) | wide) & (bracket.tried < MOST_STEPS)

        def narrow(bracket: _Bracket) -> _Bracket:
            step = bracket.next(start)
            moved = jax.tree.map(lambda w, d: w - step.astype(w.dtype) * d, point, direction)
            rises = ~(loss_at(moved) <= loss)  # True for a loss of NaN.
            low, high = jnp.where(rises, bracket.low, step), jnp.where(rises, step, bracket.high)
            return _Bracket(low, high, bracket.tried + 1)

        nowhere = _Bracket(jnp.zeros_like(start), jnp.full_like(start, jnp.inf), jnp.int32(0))
        found = loops.run_while(is_wide, narrow, nowhere)
        return jnp.where(jnp.isfinite(loss), 2 / found.high, jnp.nan)


def critical_sharpness(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    direction: optax.Updates | None = None,
    weights: _batches.Weights = None,
    learning_rate: float = 1.0,
    tolerance: float = 1e-3,
    mask: Mask = None,
) -> jax.Array:
    r"""Two over the smallest learning rate at which a step along a direction raises the loss.

    .. math:: \lambda_c = 2 / \eta_c, \quad \eta_c = \min \{ \eta > 0 : L(w - \eta d) > L(w) \}

    Args:
      loss_fn, params, batches, weights, mask: see `hessian_vector_product`.
      direction: d, like `params`, such as an update over minus its learning rate; None: gradient.
      learning_rate: where the search begins, > 0: it doubles or halves, then bisects.
      tolerance: width of the last interval over its upper end, in (0, 1). Static.

    Returns:
      A scalar: of a quadratic :math:`d^\top H d / d^\top g`, for the gradient never above the top
      eigenvalue; 0 where no step raises the loss.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> loss_fn, w = lambda w: w[0] ** 2 + 2.0 * w[1] ** 2, jnp.array([0.0, 1.0])
      >>> print(f"{measures.critical_sharpness(loss_fn, w):.2f}")
      4.00

    References:
      Kalra et al. A Scalable Measure of Loss Landscape Curvature. arXiv:2601.16979

    Cost: some 15 forward passes over the data, and 1 gradient without `direction`.
    """
    data = _batches.weigh(batches, weights)
    check_number = functools.partial(
        checks.check_number, low=0.0, low_allowed=False, schedule_allowed=False
    )
    check_number("learning_rate", learning_rate)
    check_number("tolerance", tolerance, high=1.0, high_allowed=False)
    variables = _variables.prepare(loss_fn, params, data, mask)
    vector = None
    if direction is not None:
        _variables.check_alike("direction", direction, params)
        vector = variables.take(direction)
    start = jnp.asarray(learning_rate, float)
    return _batches.run(
        _CriticalSharpness(loss_fn, variables, float(tolerance)), params, data, start, vector
    )
