"""The scoping of Entropy-SGD (Chaudhari et al., arXiv:1611.01838): a stiffness that grows."""

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks


def exponential_scoping(
    init_value: float, rate: float, *, every: int | None = None, max_value: float | None = None
) -> optax.Schedule:
    r"""A stiffness that grows exponentially: Entropy-SGD's scoping, Parle's and rSGD's focusing.

    .. math:: \gamma_t = \min\{ \gamma_0 (1 + r)^{\lfloor t / k \rfloor}, \gamma_{max} \}

    Args:
      init_value: :math:`\gamma_0` >= 0, the value at step 0.
      rate: r >= 0, relative growth in one period; by a factor f in n periods: `f ** (1 / n) - 1`.
      every: k >= 1, steps in a period; None is 1. Static.
      max_value: :math:`\gamma_{max}` >= 0; None means no limit.

    Returns:
      A schedule: a function of the step count.

    Examples:
      >>> import flatopt
      >>> gamma = flatopt.exponential_scoping(0.5, rate=0.1, every=10)
      >>> print(gamma(0), gamma(9), gamma(20))
      0.5 0.5 0.605

    References:
      Chaudhari et al. Entropy-SGD: Biasing Gradient Descent Into Wide Valleys. arXiv:1611.01838

    Cost: 0 extra gradients; 0 copies.
    """
    checks.check_number("init_value", init_value, low=0.0)
    checks.check_number("rate", rate, low=0.0)
    checks.check_count("every", every, 1)
    if max_value is not None:
        checks.check_number("max_value", max_value, low=0.0)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        periods = jnp.asarray(jnp.asarray(count) // (every or 1), jnp.result_type(float))
        value = init_value * (1 + rate) ** periods
        return value if max_value is None else jnp.minimum(value, max_value)

    return schedule
