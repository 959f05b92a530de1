"""Periodic SWA: training starts again and again from the average of its last period."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, means, momenta, tree_math
from flatopt._core.timing import Every


class PeriodicSwaState(NamedTuple):
    """State of `periodic_swa`.

    Attributes:
      step: int32 scalar, number of updates so far.
      number: int32 scalar, number of models averaged so far in this period.
      restarts: int32 scalar, number of restarts so far.
      inner_state: state of the wrapped optimiser.
      mean: tree like the parameters: the mean of this period's models, in float32 at least; until
        the first of them, that of the last period.
    """

    step: jax.Array
    number: jax.Array
    restarts: jax.Array
    inner_state: optax.OptState
    mean: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the mean in the dtypes of `params`, or `params` before the first model."""
        return means.evaluated(self.mean, params, (self.number > 0) | (self.restarts > 0))


def periodic_swa(
    optimizer: optax.GradientTransformation,
    period: int | Sequence[int],
    *,
    start: int | None = None,
    every: int | None = None,
    stop: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the weights over a period, starts again from the average, and so on.

    .. math::
      \bar w \leftarrow \bar w + (w_t - \bar w) / n \quad (n = 1, 2, \dots \text{ in a period}),
      \qquad w_t \leftarrow \bar w \quad \text{at the end of a period}

    At a restart the optimiser's momenta start anew; its schedules go on.

    Args:
      optimizer: any optax transformation.
      period: number of updates in a period, >= 1, a multiple of `every`; or one number for each
        period, with no restart after the last of them. Static.
      start: number of updates after which the first weights enter the mean, >= 0; None and 0 are
        `every`. The first period begins with `start - every` updates made. Static.
      every: one model in so many updates from there on, >= 1; None is 1. The authors average once
        an epoch. Static.
      stop: number of the last update, counted from 1, that may end in a restart, >= 0: from there
        on the running mean goes on undisturbed. None means restarts until the end. Static.

    Returns:
      A wrapper to be outermost; extra arguments reach `optimizer`. `update` needs `params`.
      Evaluate at the mean: `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if an argument is out of range, `every` does not divide `period`, or `params` is
        missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.periodic_swa(optax.sgd(1.0), period=3)
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):  # the weights are 1, 2, 3, and start again from their mean
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params)
      2.0

    References:
      Guo, Jin, Liu. Stochastic Weight Averaging Revisited. arXiv:2201.00519

    Notes:
      The paper's recipes, with `n` updates an epoch: PSWA, plain for 40 epochs, then restarts every
      20 until epoch 160: `periodic_swa(optimizer, 20 * n, start=41 * n, every=n, stop=160 * n)`.
      DSWA, one restart: `period=[20 * n]`; TSWA, two: `period=[20 * n, 20 * n]`. Place: outermost.
      Gradient evaluations: those of `optimizer`. State: that of `optimizer`, one copy of the
      parameters and three integers.
    """
    lengths = [period] if isinstance(period, int) else list(period)
    checks.check_count("stop", stop, 0)
    when = Every.after_update(start, every)
    begin = when.start - when.every
    for length in lengths:
        checks.check_count("period", length, 1)
        if length % when.every:
            raise ValueError(
                f"period={length} must be a multiple of every={when.every}, so that each period "
                "ends with a model."
            )
    if not lengths:
        raise ValueError("period=[] is empty: it must name at least one number of updates.")
    optimizer = optax.with_extra_args_support(optimizer)

    def ends_period(step: jax.Array) -> jax.Array:
        if isinstance(period, int):
            ends = (step - begin) % period == 0
        else:
            ends = jnp.isin(step - begin, jnp.array(list(itertools.accumulate(lengths))))
        return ends if stop is None else ends & (step <= stop)

    def init_fn(params: optax.Params) -> PeriodicSwaState:
        return PeriodicSwaState(
            step=jnp.zeros([], jnp.int32),
            number=jnp.zeros([], jnp.int32),
            restarts=jnp.zeros([], jnp.int32),
            inner_state=optimizer.init(params),
            mean=means.zeros(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: PeriodicSwaState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PeriodicSwaState]:
        checks.require_params("periodic_swa", params)
        step = optax.safe_increment(state.step)
        updates, inner_state = optimizer.update(updates, state.inner_state, params, **extra_args)

        due = when.is_due(step)
        again = due & ends_period(step)
        fast = optax.apply_updates(params, updates)
        number = state.number + due
        # The last period's mean is written over, not averaged with.
        mean = means.towards(state.mean, fast, 1.0 / jnp.maximum(number, 1))
        mean = optax.tree.where(number == 1, optax.tree.cast_like(fast, mean), mean)
        mean = optax.tree.where(due, mean, state.mean)
        updates = optax.tree.where(again, means.moves(mean, params, updates), updates)

        def restart(inner_state: optax.OptState) -> optax.OptState:
            return momenta.reset(inner_state, optimizer.init(optax.tree.cast_like(mean, params)))

        inner_state = tree_math.apply_if(again, restart, inner_state)
        return updates, PeriodicSwaState(
            step, jnp.where(again, 0, number), state.restarts + again, inner_state, mean
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
