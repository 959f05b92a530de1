"""Ascent directions: transformations of the gradient that stand before `scale_to_norm`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _mean, _quantile, _tree
from flatopt._schedules import value_at


class GradientEmaState(NamedTuple):
    """State of a direction that remembers gradients.

    Attributes:
      step: int32 scalar, number of gradients in the average.
      ema: tree like the parameters, their exponential moving average, in float32 or wider unless
        another dtype was asked for.
    """

    step: jax.Array
    ema: optax.Updates


def subtract_gradient_ema(
    sigma: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Subtracts the mean of past gradients, which leaves the noise of the batch: Friendly-SAM.

    .. math::
      d_t = g_t - \sigma m_{t-1}, \qquad
      m_t = \lambda m_{t-1} + (1 - \lambda) g_t, \quad m_0 = 0, \quad m_1 = g_1

    Args:
      sigma: share of the mean to subtract, >= 0; 1 is usual, 0 is the gradient itself. A number, a
        traced array, or a schedule of the step count.
      decay: :math:`\lambda`, in [0, 1); 0.6 to 0.9 are usual. Likewise.
      accumulator_dtype: dtype of the mean; None means float32 or that of the parameters, the wider.
        `jnp.bfloat16` halves the state. Static.

    Returns:
      A transformation to be chained before `scale_to_norm`. A gradient with inf or NaN is handed on
      but does not enter the mean.

    Raises:
      ValueError: if `sigma` or `decay` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> direction = flatopt.subtract_gradient_ema(sigma=1.0, decay=0.9)
      >>> state = direction.init(jnp.zeros(2))
      >>> for grads in (jnp.array([1.0, 2.0]), jnp.array([1.5, 1.0])):
      ...     updates, state = direction.update(grads, state)
      >>> print(updates, state.ema)
      [ 0.5 -1. ] [1.05 1.9 ]

    References:
      Li, Zhou, He, Cheng, Huang. Friendly Sharpness-Aware Minimization. arXiv:2403.12350

    Notes:
      The mean starts at the first gradient and is not debiased, as in the authors' code. With
      batches of the whole data set the difference is that of two iterates, and points anywhere.
      State: one copy of the parameters, one integer.
    """
    _checks.check_number("sigma", sigma, low=0.0)
    _checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)

    def direction(grads: Any, ema: Any, step: Any) -> tuple[Any, Any]:
        weight, keep = value_at(sigma, step), value_at(decay, step)
        d = jax.tree.map(lambda g, m: (g - weight * m).astype(g.dtype), grads, ema.ema)
        keep = jnp.where(ema.step == 0, 0, keep)
        return d, _moved(keep, ema.ema, grads)

    return _with_gradient_ema(direction, accumulator_dtype)


def smooth_gradient(
    decay: optax.ScalarOrSchedule, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by its exponential moving average: VaSSO's steadier direction.

    .. math:: d_t = (1 - \theta) d_{t-1} + \theta g_t, \quad d_0 = 0

    Args:
      decay: :math:`1 - \theta`, in [0, 1): 0 is the gradient itself, 0.6 to 0.9 are usual. A
        number, a traced array, or a schedule of the step count.
      accumulator_dtype: dtype of the mean; None means float32 or that of the parameters, the wider.
        `jnp.bfloat16` halves the state. Static.

    Returns:
      A transformation to be chained before `scale_to_norm`, which makes the missing debiasing
      immaterial. A gradient with inf or NaN is handed on but does not enter the mean.

    Raises:
      ValueError: if `decay` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> direction = flatopt.smooth_gradient(0.5)
      >>> state = direction.init(jnp.zeros(2))
      >>> for grads in (jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])):
      ...     updates, state = direction.update(grads, state)
      >>> print(updates)
      [0.75 0.5 ]

    References:
      Li, Giannakis. Enhancing Sharpness-Aware Optimization Through Variance Suppression.
      arXiv:2309.15639

    Notes:
      State: one copy of the parameters, one integer.
    """
    _checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)

    def direction(grads: Any, ema: Any, step: Any) -> tuple[Any, Any]:
        mean = _moved(value_at(decay, step), ema.ema, grads)
        return optax.tree.cast_like(mean, grads), mean

    return _with_gradient_ema(direction, accumulator_dtype)


def keep_large_zscores(quantile: float) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the entries of the gradient that stand out in their leaf: ZSharp's filter.

    .. math::
      z = (g - \mathrm{mean}(g)) / \mathrm{std}(g), \qquad
      d_i = g_i \, [\,|z_i| \ge Q_q(|z|)\,]

    Args:
      quantile: q, in [0, 1): the share of each leaf's entries to drop; 0.95 is the paper's. A
        number or a traced array.

    Returns:
      A transformation to be chained before `scale_to_norm`. Mean, deviation and quantile are those
      of one leaf at a time, so that every leaf keeps its own largest entries.

    Raises:
      ValueError: if `quantile` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> direction = flatopt.keep_large_zscores(0.5)
      >>> grads = jnp.array([0.1, 4.0, -0.1, -4.0])
      >>> print(direction.update(grads, direction.init(grads))[0])
      [ 0.  4.  0. -4.]

    References:
      Yun. Sharpness-Aware Minimization with Z-Score Gradient Filtering for Neural Networks.
      arXiv:2505.02369

    Notes:
      Within a leaf the deviation divides both sides and drops out, so it is not computed. State:
      none. Its cost: some 35 sweeps over each leaf, which on large layers with little arithmetic is
      more than a gradient.
    """
    _checks.check_number("quantile", quantile, low=0.0, high=1.0, high_allowed=False)

    def leaf(g: jax.Array) -> jax.Array:
        if g.size == 0:
            return g
        wide = g.astype(_tree.accumulator_dtype(g.dtype))
        distance = jnp.abs(wide - jnp.mean(wide))
        # The slack keeps ties together: the two entries of a pair are equally far from their mean.
        threshold = (1 - 1e-5) * _quantile.quantile(distance, quantile)
        return jnp.where(distance >= threshold, g, jnp.zeros_like(g))

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        return jax.tree.map(leaf, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _with_gradient_ema(
    direction: Any, accumulator_dtype: Any
) -> optax.GradientTransformationExtraArgs:
    """The transformation around `direction(grads, state, step) -> (direction, new mean)`."""

    def init_fn(params: optax.Params) -> GradientEmaState:
        ema = _mean.zeros(params, accumulator_dtype)
        return GradientEmaState(step=jnp.zeros([], jnp.int32), ema=ema)

    def update_fn(
        updates: optax.Updates,
        state: GradientEmaState,
        params: optax.Params | None = None,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientEmaState]:
        del params, extra_args
        d, mean = direction(updates, state, state.step if step is None else step)
        new = GradientEmaState(optax.safe_increment(state.step), mean)
        # The stage stands outside `apply_if_finite`, so it must not keep what that will reject.
        finite = jnp.isfinite(_tree.norm(updates))
        return d, optax.tree.where(finite, new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moved(decay: Any, mean: Any, grads: Any) -> Any:
    return optax.tree.cast_like(optax.tree.update_moment(grads, mean, decay, 1), mean)
