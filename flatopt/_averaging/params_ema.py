"""Exponential mean of the weights (Polyak, Juditsky 1992), debiased as Adam's (arXiv:1412.6980)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging.running_mean import running_mean
from flatopt._core import checks, registry
from flatopt._core.timing import value_at


# In terms of c = 1 - d: a decay d within 1e-7 of 1 would be rounded to 1 in float32.
def warmed_up(c: jax.Array, number: jax.Array, warmup_steps: int) -> jax.Array:
    r""":math:`d = \min(d, (1 + n) / (k + n))` after n models, with k = `warmup_steps`."""
    return jnp.maximum(c, (warmup_steps - 1) / (warmup_steps + number))


def debiased_share(c: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The weights' sum :math:`s \leftarrow d s + 1 - d`, and the new model's share of it."""
    total = total + c * (1 - total)
    return total, c / total


def share_after_first(c: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The share :math:`1 - d`; that of the first model is 1."""
    return jnp.ones_like(total), jnp.where(total > 0, c, 1)


@registry.method("average")
def params_ema(
    decay: optax.ScalarOrSchedule,
    *,
    debias: bool = True,
    warmup_steps: int | None = None,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential moving average of the weights; `optax.ema` averages updates.

    .. math:: \bar w_n = d_n \bar w_{n-1} + (1 - d_n) w_t

    Args:
      decay: d, in [0, 1): a number, a traced array, or a schedule of the step count.
      debias: divide by the shares' sum, :math:`1 - d^n`; else begin at the first weights. Static.
      warmup_steps: k >= 1: decay :math:`\min(d, (1 + n) / (k + n))` after n models. Static.
      start, every, accumulator_dtype: when it acts, in what it adds up; see `swa`.

    Returns:
      A stage to be chained last, as `swa`; needs `params`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, zero = flatopt.params_ema(0.5), jnp.array(0.0)
      >>> _, state = stage.update(zero, stage.init(zero), jnp.array(1.0))
      >>> _, state = stage.update(zero, state, jnp.array(2.0))
      >>> print(f"{flatopt.eval_params(state, zero):.4f}")  # shares 1/3, 2/3
      1.6667

    References:
      Polyak, Juditsky. Acceleration of Stochastic Approximation by Averaging. SICON 30(4), 1992.

    Cost: 0 extra gradients; 1 copy.
    """
    checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)
    checks.check_count("warmup_steps", warmup_steps, 1)
    share = debiased_share if debias else share_after_first

    def weighting(
        total: jax.Array, number: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        c = jnp.asarray(1 - value_at(decay, step), total.dtype)
        if warmup_steps is not None:
            c = warmed_up(c, number, warmup_steps)
        return share(c, total)

    return running_mean(
        "params_ema", weighting, start=start, every=every, accumulator_dtype=accumulator_dtype
    )
