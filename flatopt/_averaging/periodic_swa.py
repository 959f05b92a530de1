"""Periodic SWA (Guo et al., arXiv:2201.00519): training that starts again from its average."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import checks, means, momenta, registry, tree_math
from flatopt._core.timing import LAST, Every


class PeriodicSwaState(NamedTuple):
    """State of `periodic_swa`.

    Attributes:
      step: int32 scalar, number of updates so far.
      number: int32 scalar, number of models averaged so far in this period.
      restarts: int32 scalar, number of restarts so far.
      inner_state: state of the wrapped optimiser.
      mean: tree like the parameters: the mean of this period's models, in the accumulator's dtype;
        until the first of them, that of the last period.
    """

    step: jax.Array
    number: jax.Array
    restarts: jax.Array
    inner_state: optax.OptState
    mean: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the mean in the dtypes of `params`, or `params` before the first model."""
        return means.evaluated(self.mean, params, (self.number > 0) | (self.restarts > 0))


def take_in(mean: optax.Params, params: optax.Params, number: jax.Array) -> optax.Params:
    r""":math:`\bar w + (w - \bar w) / n` for model n of a period; the first is written over it."""
    moved = means.towards(mean, params, 1.0 / jnp.maximum(number, 1))
    return optax.tree.where(number == 1, tree_math.cast_like(params, mean), moved)


def ends_period(step: jax.Array, begin: int, period: int | Sequence[int]) -> jax.Array:
    """Whether a period ends with `step` updates made, where the first began with `begin`."""
    lengths = [int(length) for length in _lengths(period)]
    if np.ndim(period) == 0 and lengths[0] <= LAST:
        return (step - begin % lengths[0]) % lengths[0] == 0
    ends = [begin + end for end in itertools.accumulate(lengths) if begin + end <= LAST]
    return jnp.isin(step, jnp.array(ends, jnp.int32))


@registry.method("wrapper")
def periodic_swa(
    optimizer: optax.GradientTransformation,
    period: int | Sequence[int],
    *,
    start: int | None = None,
    every: int | None = None,
    stop: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the weights over a period, starts again from the average, and so on.

    .. math:: \bar w \leftarrow \bar w + (w_t - \bar w) / n, \; \text{then } w_t \leftarrow \bar w

    Args:
      optimizer: any optax transformation; its momenta start anew at a restart, schedules go on.
      period: its length in updates, a multiple of `every`; or the lengths of all periods. Static.
      start, every: when a model enters; see `swa`. The first period begins after `start - every`.
      stop: updates made when the last restart may come, >= 0; None: restarts go on. Static.
      accumulator_dtype: of the mean; see `swa`.

    Returns:
      A wrapper to be outermost; needs `params`. Evaluate at `eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.periodic_swa(optax.sgd(1.0), period=2), jnp.array(0.0)
      >>> updates, opt_state = tx.update(jnp.array(-1.0), tx.init(w), w)  # to 1
      >>> print(tx.update(jnp.array(-1.0), opt_state, w + updates)[0])  # to 2, and back to 1.5
      0.5

    References:
      Guo, Jin, Liu. Stochastic Weight Averaging Revisited. arXiv:2201.00519

    Cost: 0 extra gradients; 1 copy.
    """
    when = Every.after_update(start, every)
    checks.check_count("stop", stop, 0)
    _check_periods(period, when.every)
    optimizer = checks.as_transformation("optimizer", optimizer)

    def init_fn(params: optax.Params) -> PeriodicSwaState:
        step, number, restarts = (jnp.zeros([], jnp.int32) for _ in range(3))
        mean = means.zeros(params, accumulator_dtype)
        return PeriodicSwaState(step, number, restarts, optimizer.init(params), mean)

    def update_fn(
        updates: Any, state: PeriodicSwaState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, PeriodicSwaState]:
        checks.require_params("periodic_swa", params)
        step = optax.safe_increment(state.step)
        updates, inner_state = optimizer.update(updates, state.inner_state, params, **extra_args)

        due = when.is_due(step)
        last = LAST if stop is None else min(stop, LAST)
        again = due & ends_period(step, when.begin, period) & (step <= last)
        number = jnp.where(due, optax.safe_increment(state.number), state.number)
        mean = take_in(state.mean, optax.apply_updates(params, updates), number)
        mean = optax.tree.where(due, mean, state.mean)
        updates = optax.tree.where(again, means.moves(mean, params, updates), updates)

        inner_state = momenta.reset_if(again, inner_state, optimizer.init, mean, params)
        number = jnp.where(again, 0, number)
        restarts = jnp.where(again, optax.safe_increment(state.restarts), state.restarts)
        return updates, PeriodicSwaState(step, number, restarts, inner_state, mean)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _lengths(period: Any) -> list[Any]:
    """The lengths that are named: a single one, or those of a sequence."""
    is_sequence = isinstance(period, Sequence) or (
        isinstance(period, np.ndarray) and period.ndim == 1
    )
    if not is_sequence and period is None:
        raise TypeError("period=None must be a number of updates, or a sequence of such numbers.")
    return list(period) if is_sequence else [period]


def _check_periods(period: int | Sequence[int], every: int) -> None:
    lengths = _lengths(period)
    for length in lengths:
        checks.check_count("period", length, 1)
        if length % every:
            raise ValueError(
                f"period={length} must be a multiple of every={every}, so that each period "
                "ends with a model."
            )
    if not lengths:
        raise ValueError("period=[] is empty: it must name at least one number of updates.")
