"""VaSSO (Li and Giannakis, arXiv:2309.15639): the ascent follows the mean of past gradients."""

from typing import Any

import optax

from flatopt._core import checks, registry, tree_math
from flatopt._core.timing import value_at
from flatopt._sam.ascent import (
    GradientEmaState,
    follow_mean,
    gradient_ema_direction,
    scale_to_norm,
)
from flatopt._sam.gradient_at import ascent_stage


def smooth_gradient(
    decay: optax.ScalarOrSchedule, *, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by its exponential moving average: VaSSO's steadier direction.

    .. math:: d_t = (1 - \theta) d_{t-1} + \theta g_t, \quad d_0 = 0

    Args:
      decay: :math:`1 - \theta`, in [0, 1): a number, a traced array, or a schedule.
      accumulator_dtype: dtype of the mean; None is float32, or wider parameters' own. Static.

    Returns:
      A transformation to be chained before `scale_to_norm`, which makes the missing debiasing
      immaterial; inf and NaN never enter the mean.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> direction = flatopt.smooth_gradient(0.5)
      >>> _, state = direction.update(jnp.array([1.0, 2.0]), direction.init(jnp.zeros(2)))
      >>> print(direction.update(jnp.array([1.0, 0.0]), state)[0])
      [0.75 0.5 ]

    References:
      Li, Giannakis. Enhancing Sharpness-Aware Optimization Through Variance Suppression.
      arXiv:2309.15639

    Cost: 0 extra gradients; 1 copy.
    """
    checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)

    def direction(grads: Any, state: GradientEmaState, step: Any) -> tuple[Any, Any]:
        mean = follow_mean(1 - value_at(decay, step), state.ema, grads)
        return tree_math.cast_like(mean, grads), mean

    return gradient_ema_direction(direction, accumulator_dtype)


@registry.method("stage", needs=("grad_fn",))
def vasso(
    rho: optax.ScalarOrSchedule,
    *,
    decay: optax.ScalarOrSchedule = 0.6,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""VaSSO: the ascent follows the mean of past gradients, to suppress the noise of the batch.

    .. math:: g_t \leftarrow \nabla L(w + \rho \, d_t / \|d_t\|), \qquad
      d_t = (1 - \theta) \, d_{t-1} + \theta \, g_t

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule; see `sam`.
      decay: :math:`1 - \theta`, in [0, 1); 0 is `sam`, 0.6 to 0.9 are usual. Likewise.
      start, every: when it acts; see `gradient_at`. Other gradients do not enter the mean.
      accumulator_dtype: dtype of the mean; None is float32, or wider parameters' own. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.vasso(rho=0.5), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [3.3 4.4]

    References:
      Li, Giannakis. Enhancing Sharpness-Aware Optimization Through Variance Suppression.
      arXiv:2309.15639

    Cost: 1 extra gradient; 1 copy (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    direction = smooth_gradient(decay, accumulator_dtype=accumulator_dtype)
    perturbation = optax.chain(direction, scale_to_norm(rho))
    return ascent_stage(rho, perturbation, start=start, every=every)
