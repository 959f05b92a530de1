"""Exponential mean of the weights (Polyak, Juditsky 1992), debiased as Adam's (arXiv:1412.6980)."""

import functools
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


def ema_decay_schedule(
    decay: float, *, gamma: float = 1.0, power: float = 2 / 3, min_decay: float = 0.0
) -> optax.Schedule:
    r"""A decay that rises with the number of updates, for `params_ema(decay)`; timm's warm-up.

    .. math:: d_t = \max\big(\min(1 - (1 + t / \gamma)^{-p}, d), d_{min}\big), \qquad d_0 = 0

    Args:
      decay, min_decay: d and :math:`d_{min}`, the highest and the lowest one, in [0, 1).
      gamma: updates > 0 before the decay begins to rise.
      power: p >= 0; 2/3 reaches 0.999 after 31600 updates, 3/4 after 10000. 1 is the plain mean.

    Returns:
      A schedule of the number of updates made.

    Examples:
      >>> import flatopt
      >>> decay = flatopt.ema_decay_schedule(0.9999, power=0.75)
      >>> print(f"{decay(0):.4f} {decay(15):.4f} {decay(9999):.4f} {decay(10**6):.4f}")
      0.0000 0.8750 0.9990 0.9999

    Cost: 0 extra gradients; 0 copies.
    """
    check_number = functools.partial(checks.check_number, low=0.0, schedule_allowed=False)
    for name, value in (("decay", decay), ("min_decay", min_decay)):
        check_number(name, value, high=1.0, high_allowed=False)
    check_number("gamma", gamma, low_allowed=False)
    check_number("power", power)

    def schedule(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        time = jnp.asarray(step, jnp.result_type(float)) / gamma
        risen = 1 - (1 + time) ** -power
        return jnp.where(time > 0, jnp.maximum(jnp.minimum(risen, decay), min_decay), 0.0)

    return schedule


@registry.method("average")
def params_ema(
    decay: optax.ScalarOrSchedule,
    *,
    debias: bool = True,
    initial: bool = False,
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
      initial: whether the first weights are those with `start - every` updates made. Static.
      warmup_steps: k >= 1: decay :math:`\min(d, (1 + n) / (k + n))` after n models. Static.
      start, every, accumulator_dtype: when it acts, in what it adds up; see `swa`.

    Returns:
      A stage to be chained last, as `swa`; needs `params`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, zero = flatopt.params_ema(0.5, initial=True), jnp.array(0.0)
      >>> _, state = stage.update(zero, stage.init(zero), jnp.array(1.0))
      >>> print(f"{flatopt.eval_params(state, zero):.4f}")  # shares 1/3 of 0, 2/3 of 1
      0.6667

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
        "params_ema",
        weighting,
        start=start,
        every=every,
        accumulator_dtype=accumulator_dtype,
        initial=initial,
    )
