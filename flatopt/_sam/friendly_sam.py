"""Friendly-SAM (Li et al., arXiv:2403.12350): the ascent follows the noise of the batch."""

from typing import Any

import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, tree_math
from flatopt._core.timing import value_at
from flatopt._sam.ascent import (
    GradientEmaState,
    follow_mean,
    gradient_ema_direction,
    scale_to_adaptive_norm,
    scale_to_norm,
)
from flatopt._sam.gradient_at import ascent_stage


def subtract_mean(grads: Any, mean: Any, sigma: Any) -> Any:
    r""":math:`g - \sigma m`: what is left is the noise of the batch."""
    return tree_math.on_inexact(lambda g, m: g - sigma * m, grads, mean)


def subtract_gradient_ema(
    sigma: optax.ScalarOrSchedule, decay: optax.ScalarOrSchedule, *, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Subtracts the mean of past gradients, which leaves the noise of the batch: Friendly-SAM.

    .. math:: d_t = g_t - \sigma m_{t-1}, \qquad
      m_t = \lambda m_{t-1} + (1 - \lambda) g_t, \quad m_0 = 0, \quad m_1 = g_1

    Args:
      sigma: share of the mean to subtract, >= 0: a number, a traced array, or a schedule.
      decay: :math:`\lambda`, in [0, 1): likewise.
      accumulator_dtype: dtype of the mean; None is float32, or wider parameters' own. Static.

    Returns:
      A transformation to be chained before `scale_to_norm`; inf and NaN never enter the mean.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> direction = flatopt.subtract_gradient_ema(sigma=1.0, decay=0.9)
      >>> _, state = direction.update(jnp.array([1.0, 2.0]), direction.init(jnp.zeros(2)))
      >>> print(direction.update(jnp.array([1.5, 1.0]), state)[0])
      [ 0.5 -1. ]

    References:
      Li, Zhou, He, Cheng, Huang. Friendly Sharpness-Aware Minimization. arXiv:2403.12350

    Cost: 0 extra gradients; 1 copy.
    """
    checks.check_number("sigma", sigma, low=0.0)
    checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)

    def direction(grads: Any, state: GradientEmaState, step: Any) -> tuple[Any, Any]:
        # The mean starts at the first gradient.
        share = jnp.where(state.step == 0, 1, 1 - value_at(decay, step))
        noise = subtract_mean(grads, state.ema, value_at(sigma, step))
        return noise, follow_mean(share, state.ema, grads)

    return gradient_ema_direction(direction, accumulator_dtype)


@registry.method("stage", needs=("grad_fn",))
def friendly_sam(
    rho: optax.ScalarOrSchedule,
    *,
    sigma: optax.ScalarOrSchedule = 1.0,
    decay: optax.ScalarOrSchedule = 0.9,
    adaptive: bool = False,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly-SAM: the ascent follows the noise of the batch, not its mean gradient.

    .. math:: g_t \leftarrow \nabla L(w + \rho \, d_t / \|d_t\|), \qquad
      d_t = g_t - \sigma m_{t-1}, \qquad m_t = \lambda m_{t-1} + (1 - \lambda) g_t

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule; see `sam`.
      sigma, decay: share of the mean to subtract, >= 0 (0 is `sam`); :math:`\lambda`, in [0, 1).
      adaptive: True: the ascent step is `scale_to_adaptive_norm(rho)`. Static.
      start, every: when it acts; see `gradient_at`. Other gradients do not enter the mean.
      accumulator_dtype: dtype of the mean; None is float32, or wider parameters' own. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.friendly_sam(rho=0.5), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [3.3 4.4]

    References:
      Li, Zhou, He, Cheng, Huang. Friendly Sharpness-Aware Minimization. arXiv:2403.12350

    Cost: 1 extra gradient; 1 copy (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    direction = subtract_gradient_ema(sigma, decay, accumulator_dtype=accumulator_dtype)
    climb = scale_to_adaptive_norm(rho) if adaptive else scale_to_norm(rho)
    return ascent_stage(rho, optax.chain(direction, climb), start=start, every=every)
