"""Schedules of radii and learning rates."""

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks


def value_at(value: optax.ScalarOrSchedule, step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """The number `value`, or the value of the schedule `value` at `step`."""
    return value(step) if callable(value) else value


def proportional_rho_schedule(
    learning_rate: optax.Schedule,
    rho_max: float,
    rho_min: float,
    learning_rate_max: float,
    learning_rate_min: float,
) -> optax.Schedule:
    r"""A radius that rises and falls with the learning rate, as in GSAM.

    .. math::
      \rho_t = \rho_{min} + (\rho_{max} - \rho_{min})
        \frac{\eta_t - \eta_{min}}{\eta_{max} - \eta_{min}}

    Args:
      learning_rate: the schedule :math:`\eta_t` that the optimiser uses.
      rho_max: radius at the highest learning rate, >= 0.
      rho_min: radius at the lowest, >= 0.
      learning_rate_max: the highest learning rate.
      learning_rate_min: the lowest learning rate; if both are equal the radius is `rho_max`.

    Returns:
      A schedule of the step count. It never falls below 0: during a warm-up that starts below
      `learning_rate_min` the formula alone would turn the ascent into a descent.

    Raises:
      ValueError: if a radius is negative, or the highest learning rate is below the lowest.

    Examples:
      >>> import optax
      >>> import flatopt
      >>> learning_rate = optax.linear_schedule(0.1, 0.0, 10)
      >>> rho = flatopt.proportional_rho_schedule(learning_rate, 0.6, 0.1, 0.1, 0.0)
      >>> print(f"{rho(0):.2f} {rho(5):.2f} {rho(10):.2f}")
      0.60 0.35 0.10

    References:
      Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. arXiv:2203.08065

    Notes:
      To be passed as `rho` to `gsam` or any other method.
    """
    _checks.check_number("rho_max", rho_max, low=0.0)
    _checks.check_number("rho_min", rho_min, low=0.0)
    _checks.check_number("learning_rate_max", learning_rate_max, low=learning_rate_min)
    span = learning_rate_max - learning_rate_min
    if span == 0:
        return optax.constant_schedule(rho_max)

    def schedule(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        share = (learning_rate(step) - learning_rate_min) / span
        return jnp.maximum(rho_min + (rho_max - rho_min) * share, 0.0)

    return schedule
