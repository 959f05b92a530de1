"""Averaging stages: they stand last in their chain and keep a mean of the weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _mean, _tree

# (total weight so far, number of models so far, step) -> (new total weight, share of the new model)
_Weighting = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class AverageState(NamedTuple):
    """State of a running average of the parameters.

    Attributes:
      step: int32 scalar, number of updates so far.
      total_weight: float scalar, sum of the weights of the models averaged so far; 0 before the
        first.
      mean: tree like the parameters, their weighted mean, in the accumulator's dtype; zeros before
        the first model.
    """

    step: jax.Array
    total_weight: jax.Array
    mean: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the mean in the dtypes of `params`, or `params` before the first model."""
        return _mean.evaluated(self.mean, params, self.total_weight > 0)


def swa(
    start: int | None = None, every: int | None = None, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic weight averaging: the equal-weight mean of the weights along the run.

    .. math:: \bar w_n = \bar w_{n-1} + (w_t - \bar w_{n-1}) / n
       \quad \text{after updates } t = start, start + every, \dots

    Args:
      start: number of the first update, counted from 1, whose weights enter the mean; >= 0. None
        means with the first. Static.
      every: one in `every` updates from there on, >= 1; None means each. Static.
      accumulator_dtype: dtype of the mean; None means float32 or the parameters' dtype, whichever
        is wider. Static.

    Returns:
      A stage to be chained last. It passes updates through unchanged, and needs `params`. Get the
      mean with `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if `start` or `every` is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.swa(start=2))
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):  # the weights are 1, 2, 3
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(flatopt.eval_params(opt_state, params))
      2.5

    References:
      Izmailov, Podoprikhin, Garipov, Vetrov, Wilson. Averaging Weights Leads to Wider Optima and
      Better Generalization. arXiv:1803.05407

    Notes:
      Place: last in its chain, since it averages `params + updates` as it sees them; inside
      `msam(...)`, not after it; inside `optax.MultiSteps`, where it counts whole steps. Needs a
      learning rate that stays high while it averages: the mean of a run that has decayed to zero is
      its last point. BatchNorm statistics belong to the last weights, not to the mean: recompute
      them. Gradient evaluations: none. State: one copy of the parameters and two scalars. Integer
      leaves are copied, not averaged. A NaN in the weights stays in the mean, as it does in the
      weights: `optax.apply_if_finite(chain, n)` skips such a step whole.
    """

    def weighting(
        total: jax.Array, number: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del number, step
        return total + 1, 1 / (total + 1)

    return _average("swa", weighting, start, every, accumulator_dtype)


def params_ema(
    decay: optax.ScalarOrSchedule,
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
    _checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)
    _checks.check_count("warmup_steps", warmup_steps, 1)

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

    return _average("params_ema", weighting, start, every, accumulator_dtype)


def power_ema(
    exponent: optax.ScalarOrSchedule,
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
    _checks.check_number("exponent", exponent, low=0.0)

    def weighting(
        total: jax.Array, number: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del number
        power = (exponent(step) if callable(exponent) else exponent) + 1
        # 1 - (1 - 1/n)^power, without the cancellation that it would suffer at large n.
        share = -jnp.expm1(power * jnp.log1p(-1 / (total + 1)))
        return total + 1, share.astype(total.dtype)

    return _average("power_ema", weighting, start, every, accumulator_dtype)


def _average(
    name: str,
    weighting: _Weighting,
    start: int | None,
    every: int | None,
    accumulator_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    """Every running mean is `mean += share * (params - mean)`; `weighting` gives the share."""
    first, period = _mean.timing(start, every)

    def init_fn(params: optax.Params) -> AverageState:
        return AverageState(
            step=jnp.zeros([], jnp.int32),
            total_weight=jnp.zeros([], jnp.result_type(float)),
            mean=_mean.zeros(params, accumulator_dtype),
        )

    def update_fn(
        updates: optax.Updates,
        state: AverageState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageState]:
        del extra_args
        _checks.require_params(name, params)
        step = optax.safe_increment(state.step)

        def collect(carry: tuple[jax.Array, optax.Params]) -> tuple[jax.Array, optax.Params]:
            total_weight, mean = carry
            number = (step - first) // period
            total_weight, share = weighting(total_weight, number, state.step)
            return total_weight, _mean.towards(mean, optax.apply_updates(params, updates), share)

        carry = (state.total_weight, state.mean)
        if first == period == 1:
            total_weight, mean = collect(carry)
        else:
            due = _mean.is_due(step, first, period)
            total_weight, mean = _tree.apply_if(due, collect, carry)
        return updates, AverageState(step, total_weight, mean)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
