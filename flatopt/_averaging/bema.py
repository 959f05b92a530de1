"""BEMA (Block, Zhang, arXiv:2508.00180): an exponential mean that does not lag behind."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, registry, stage, tree_math
from flatopt._core.timing import Every, value_at


class BemaState(NamedTuple):
    """State of `bema`.

    Attributes:
      step: int32 scalar, number of updates so far.
      number: int32 scalar, number of models that have entered.
      initial: tree like the parameters, the weights that the correction is measured from, in the
        accumulator's dtype.
      ema: likewise, the exponential mean.
      mean: likewise, the corrected mean.
    """

    step: jax.Array
    number: jax.Array
    initial: optax.Params
    ema: optax.Params
    mean: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the corrected mean in the dtypes of `params`, or `params` before there is one."""
        return means.evaluated(self.mean, params, self.number > 0)


def power_of_time(t: jax.Array, power: Any, *, lag: Any, multiplier: Any) -> jax.Array:
    r""":math:`(\rho + \gamma t)^{-p}`, at most 1, with the lag rho and the multiplier gamma."""
    return jnp.maximum(lag + multiplier * t, 1) ** -jnp.asarray(power, jnp.result_type(float))


def correct(ema: optax.Params, params: optax.Params, initial: optax.Params, alpha: Any) -> Any:
    r"""The mean without its lag, :math:`\bar w + \alpha (w - w_0)`; integer leaves are copied."""

    def leaf(ema: jax.Array, param: jax.Array, initial: jax.Array) -> jax.Array:
        if not jnp.issubdtype(ema.dtype, jnp.inexact):
            return param
        return (ema + alpha * (param - initial)).astype(ema.dtype)

    return jax.tree.map(leaf, ema, params, initial)


@registry.method("average")
def bema(
    kappa: optax.ScalarOrSchedule = 0.5,
    eta: optax.ScalarOrSchedule = 0.2,
    *,
    lag: jax.typing.ArrayLike = 10.0,
    multiplier: jax.typing.ArrayLike = 1.0,
    min_share: jax.typing.ArrayLike = 0.0,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential mean of the weights, moved on along the way that they have come.

    .. math:: e \leftarrow e + \beta_t (w_t - e), \; \bar w = e + \alpha_t (w_t - w_0), \;
      \beta_t = (\rho + \gamma t)^{-\kappa}, \; \alpha_t = (\rho + \gamma t)^{-\eta}

    Args:
      kappa, eta: powers >= 0 of share and correction: numbers, traced arrays, or schedules.
      lag, multiplier, min_share: :math:`\rho, \gamma \ge 0`; the least :math:`\beta_t`, in [0, 1].
      start, every, accumulator_dtype: see `swa`. t counts updates; :math:`w_0` and the first e are
        the weights with `start - every` updates made. The authors act every 400.

    Returns:
      A stage to be chained last, as `swa`; needs `params`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, zero = flatopt.bema(lag=3.0), jnp.array(0.0)
      >>> _, state = stage.update(zero, stage.init(zero), jnp.array(1.0))
      >>> print(f"{flatopt.eval_params(state, zero):.4f}")  # 4 ** -0.5 + 4 ** -0.2
      1.2579

    References:
      Block, Zhang. EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes. arXiv:2508.00180

    Cost: 0 extra gradients; 3 copies.
    """
    checks.check_number("kappa", kappa, low=0.0)
    checks.check_number("eta", eta, low=0.0)
    for name, value in (("lag", lag), ("multiplier", multiplier)):
        checks.check_number(name, value, low=0.0, schedule_allowed=False)
    checks.check_number("min_share", min_share, low=0.0, high=1.0, schedule_allowed=False)
    when = Every.after_update(start, every)
    begin = max(when.begin, 0)
    if begin > 0:  # It looks at the weights once more, to begin with them.
        when = Every(begin, when.every, always=False)

    def init_fn(params: optax.Params) -> BemaState:
        step, number = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        initial, ema, mean = (means.copy(params, accumulator_dtype) for _ in range(3))
        return BemaState(step, number, initial, ema, mean)

    def collect(state: BemaState, params: optax.Params) -> BemaState:
        t, begins = optax.safe_increment(state.step), optax.safe_increment(state.step) == begin
        beta = power_of_time(t, value_at(kappa, state.step), lag=lag, multiplier=multiplier)
        alpha = power_of_time(t, value_at(eta, state.step), lag=lag, multiplier=multiplier)
        beta = jnp.where(begins, 1, jnp.maximum(beta, min_share))
        own = tree_math.cast_like(params, state.initial)
        initial = optax.tree.where(begins, own, state.initial)
        ema = means.towards(state.ema, params, beta)
        mean = correct(ema, params, initial, alpha)
        number = jnp.where(t > begin, optax.safe_increment(state.number), state.number)
        return BemaState(state.step, number, initial, ema, mean)

    return stage.observer("bema", init_fn, collect, when)
