"""Power-law average of the weights (Karras et al., arXiv:2312.02696)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging.running_mean import running_mean
from flatopt._core import checks


def power_ema(
    exponent: optax.ScalarOrSchedule,
    *,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Average of the weights whose memory grows with the run: the shares follow a power law.

    .. math::
      \bar w_n = d_n \bar w_{n-1} + (1 - d_n) w_t, \qquad d_n = (1 - 1/n)^{\gamma + 1}

    so that model i of n has a share of about :math:`(\gamma + 1) \, i^\gamma / n^{\gamma + 1}`,
    whatever n is: no decay has to be matched to the length of the run.

    Args:
      exponent: :math:`\gamma`, >= 0: a number, a traced array, or a schedule of the step count. 0
        is the equal-weight mean, `swa`; with 6.94 the shares spread over about a tenth of the run,
        with 16.97 over a twentieth.
      start: number of the first update, counted from 1, whose weights enter, >= 0; None means the
        first. Static.
      every: one in `every` updates from there on, >= 1; None means each. Static.
      accumulator_dtype: as for `swa`. Static.

    Returns:
      A stage to be chained last. It passes updates through unchanged, and needs `params`.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.power_ema(1.0))
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):  # the weights are 1, 2; their shares 1/4, 3/4
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(flatopt.eval_params(opt_state, params))
      1.75

    References:
      Karras, Aittala, Lehtinen, Hellsten, Aila, Laine. Analyzing and Improving the Training
      Dynamics of Diffusion Models. arXiv:2312.02696

    Notes:
      Place, integer leaves, NaN: as for `swa`. Gradient evaluations: none. State: one copy of the
      parameters, two scalars.
    """
    checks.check_number("exponent", exponent, low=0.0)

    def weighting(
        total: jax.Array, number: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del number
        power = (exponent(step) if callable(exponent) else exponent) + 1
        # 1 - (1 - 1/n)^power, without the cancellation that it would suffer at large n.
        share = -jnp.expm1(power * jnp.log1p(-1 / (total + 1)))
        return total + 1, share.astype(total.dtype)

    return running_mean(
        "power_ema", weighting, start=start, every=every, accumulator_dtype=accumulator_dtype
    )
