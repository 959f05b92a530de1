"""Stages that watch: they pass updates through and keep a number about them in their state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, momenta, tree_math
from flatopt._core.eval_params import eval_params


class GradientNormState(NamedTuple):
    """State of `record_gradient_norm`.

    Attributes:
      gradient_norm: norm of the last gradient, 0 before the first.
    """

    gradient_norm: jax.Array


class DistanceState(NamedTuple):
    """State of `record_distance`.

    Attributes:
      distance: of the last weights from the average, 0 before there is one.
      average_state: state of the averaging stage.
    """

    distance: jax.Array
    average_state: optax.OptState


class CosineState(NamedTuple):
    """State of `record_cosine`.

    Attributes:
      cosine: of the angle between the last gradient and the momentum before it, 0 before the first.
      inner_state: state of the optimiser.
    """

    cosine: jax.Array
    inner_state: optax.OptState


def record_gradient_norm() -> optax.GradientTransformationExtraArgs:
    r"""Keeps the norm of what passes: of the gradient, or of what the chain has made of it so far.

    .. math:: \|g\|

    Returns:
      A stage that passes updates through: first in a chain, for the clean gradient; after `sam`,
      for the perturbed one. Read `optax.tree.get(opt_state, "gradient_norm")`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, params = flatopt.record_gradient_norm(), jnp.zeros(2)
      >>> _, opt_state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
      >>> print(optax.tree.get(opt_state, "gradient_norm"))
      5.0

    References:
      Zhao, Zhang, Hu. Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning. arXiv:2202.03599

    Cost: 0 extra gradients; 0 copies.
    """

    def init_fn(params: optax.Params) -> GradientNormState:
        return GradientNormState(jnp.zeros([], tree_math.scalar_dtype(params)))

    def update_fn(
        updates: Any, state: GradientNormState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, GradientNormState]:
        del params, extra_args
        return updates, GradientNormState(tree_math.norm(updates).astype(state.gradient_norm.dtype))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def record_distance(
    average: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the distance of the weights from their average.

    .. math:: \|w_t - \bar w_t\|

    Args:
      average: an averaging stage: `swa(...)`, `params_ema(...)`.

    Returns:
      A stage that does what `average` does, to be chained last; `eval_params` finds the average in
      it. Read `optax.tree.get(opt_state, "distance")`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> stage, zero = flatopt.record_distance(flatopt.swa()), jnp.array(0.0)
      >>> state = stage.init(zero)
      >>> for w in jnp.array([1.0, 2.0, 3.0]):  # their mean is 2
      ...     _, state = stage.update(zero, state, w)
      >>> print(optax.tree.get(state, "distance"))
      1.0

    References:
      As for `swa`.

    Cost: 0 extra gradients; 0 copies (+1 temporary) beside those of `average`.
    """
    average = checks.as_transformation("average", average)

    def init_fn(params: optax.Params) -> DistanceState:
        return DistanceState(jnp.zeros([], tree_math.scalar_dtype(params)), average.init(params))

    def update_fn(
        updates: Any, state: DistanceState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, DistanceState]:
        checks.require_params("record_distance", params)
        updates, average_state = average.update(updates, state.average_state, params, **extra_args)
        reached = means.reached(params, updates)
        average_point = eval_params(average_state, reached)
        apart = tree_math.on_inexact(lambda w, mean: w - mean, reached, average_point)
        return updates, DistanceState(
            tree_math.norm(apart).astype(state.distance.dtype), average_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def record_cosine(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the cosine of the angle between the gradient and the momentum that meets it.

    .. math:: \cos \angle (m_{t-1}, g_t) = \frac{m_{t-1} \cdot g_t}{\|m_{t-1}\| \, \|g_t\|}

    Args:
      optimizer: an optimiser whose state holds one momentum; see `msam`.

    Returns:
      A wrapper that does what `optimizer` does, inside a chain or outermost. Read
      `optax.tree.get(opt_state, "cosine")`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = flatopt.record_cosine(optax.sgd(0.1, momentum=0.9))
      >>> _, opt_state = tx.update(jnp.array([1.0, 0.0]), tx.init(jnp.zeros(2)))
      >>> _, opt_state = tx.update(jnp.array([3.0, 4.0]), opt_state)
      >>> print(f"{optax.tree.get(opt_state, 'cosine'):.1f}")
      0.6

    References:
      As for `msam`, which takes the momentum for a gradient.

    Cost: 0 extra gradients; 0 copies.
    """
    optimizer = checks.as_transformation("optimizer", optimizer)

    def init_fn(params: optax.Params) -> CosineState:
        inner_state = optimizer.init(params)
        momenta.find_first(inner_state, params, "record_cosine")
        return CosineState(jnp.zeros([], tree_math.scalar_dtype(params)), inner_state)

    def update_fn(
        updates: Any, state: CosineState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, CosineState]:
        momentum = momenta.find_first(state.inner_state, updates, "record_cosine")
        met = tree_math.cosine(momentum, updates).astype(state.cosine.dtype)
        updates, inner_state = optimizer.update(updates, state.inner_state, params, **extra_args)
        return updates, CosineState(met, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
