"""Power-law average of the weights (Karras et al., arXiv:2312.02696)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging.running_mean import running_mean
from flatopt._core import checks, registry
from flatopt._core.timing import value_at


def power_share(exponent: Any, number: jax.Array) -> jax.Array:
    r""":math:`1 - (1 - 1/n)^{\gamma + 1}`, without the cancellation that it suffers at large n."""
    # The first share is 1; its logarithm is infinite, which `jax_debug_infs` would stop at.
    share = -jnp.expm1((exponent + 1) * jnp.log1p(-1 / jnp.maximum(number, 2)))
    return jnp.where(number > 1, share, 1)


@registry.method("average")
def power_ema(
    exponent: optax.ScalarOrSchedule,
    *,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Average of the weights whose memory grows with the run: the shares follow a power law.

    .. math:: \bar w_n = d_n \bar w_{n-1} + (1 - d_n) w_t, \qquad d_n = (1 - 1/n)^{\gamma + 1}

    Args:
      exponent: :math:`\gamma`, >= 0: a number, a traced array, or a schedule. 0 is `swa`; with 6.94
        the shares spread over about a tenth of the run, with 16.97 over a twentieth.
      start, every, accumulator_dtype: when it acts, in what it adds up; see `swa`.

    Returns:
      A stage to be chained last, as `swa`; needs `params`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, zero = flatopt.power_ema(1.0), jnp.array(0.0)
      >>> _, state = stage.update(zero, stage.init(zero), jnp.array(1.0))
      >>> _, state = stage.update(zero, state, jnp.array(2.0))
      >>> print(flatopt.eval_params(state, zero))  # shares 1/4, 3/4
      1.75

    References:
      Karras, Aittala, Lehtinen, Hellsten, Aila, Laine. Analyzing and Improving the Training
      Dynamics of Diffusion Models. arXiv:2312.02696

    Cost: 0 extra gradients; 1 copy.
    """
    checks.check_number("exponent", exponent, low=0.0)

    def weighting(
        total: jax.Array, number: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del number
        share = power_share(value_at(exponent, step), total + 1)
        return total + 1, share.astype(total.dtype)

    return running_mean(
        "power_ema", weighting, start=start, every=every, accumulator_dtype=accumulator_dtype
    )
