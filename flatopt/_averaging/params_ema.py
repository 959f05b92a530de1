"""Exponential moving average of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging.running_mean import running_mean
from flatopt._core import checks


def params_ema(
    decay: optax.ScalarOrSchedule,
    *,
    debias: bool = True,
    warmup_steps: int | None = None,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential moving average of the weights.

    .. math:: \bar w_n = d_n \bar w_{n-1} + (1 - d_n) w_t

    Args:
      decay: d, in [0, 1): a number, a traced array, or a schedule of the step count.
      debias: True: start from zero and divide by the weights' sum, :math:`1 - d^n` for constant d,
        so that the first weights carry no extra weight. False: start from the first weights, as
        PyTorch's EMA does; they then keep the weight :math:`d^{n-1}`. Static.
      warmup_steps: use :math:`\min(d, (1 + n) / (k + n))` with k = `warmup_steps` >= 1 for the
        model after n others, so that early weights are forgotten sooner; None means no warm-up.
        Static.
      start: number of the first update, counted from 1, whose weights enter, >= 0; None means the
        first. Static.
      every: one in `every` updates from there on, >= 1; None means each. Static.
      accumulator_dtype: dtype of the average; None means float32 or the parameters' dtype,
        whichever is wider: in bfloat16 an average with decay .999 would never move. Static.

    Returns:
      A stage to be chained last. It passes updates through unchanged, and needs `params`. Get the
      average with `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.params_ema(0.5))
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):  # the weights are 1, 2; their shares 1/3, 2/3
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{flatopt.eval_params(opt_state, params):.4f}")
      1.6667

    References:
      Polyak, Juditsky. Acceleration of Stochastic Approximation by Averaging. SIAM Journal on
      Control and Optimization 30(4), 1992. Debiasing as in Kingma, Ba. Adam: A Method for
      Stochastic Optimization. arXiv:1412.6980

    Notes:
      Unlike `optax.ema`, which averages updates, this averages parameters. Place, integer leaves,
      NaN: as for `swa`. Gradient evaluations: none. State: one copy of the parameters, two scalars.
    """
    checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)
    checks.check_count("warmup_steps", warmup_steps, 1)

    def weighting(
        total: jax.Array, number: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        d = jnp.asarray(decay(step) if callable(decay) else decay, total.dtype)
        if warmup_steps is not None:
            d = jnp.minimum(d, (1 + number) / (warmup_steps + number))
        if debias:
            total = d * total + (1 - d)
            return total, (1 - d) / total
        return jnp.ones_like(total), jnp.where(total > 0, 1 - d, 1)

    return running_mean(
        "params_ema", weighting, start=start, every=every, accumulator_dtype=accumulator_dtype
    )
