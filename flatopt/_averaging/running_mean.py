"""The stage behind every running mean of the weights: `mean += share * (params - mean)`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import means, stage
from flatopt._core.timing import Every

# (total weight so far, number of models so far, step) -> (new total weight, share of the new model)
Weighting = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


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
        return means.evaluated(self.mean, params, self.total_weight > 0)


def running_mean(
    name: str,
    weighting: Weighting,
    *,
    start: int | None,
    every: int | None,
    accumulator_dtype: Any,
    initial: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The stage that the factory `name` returns; `weighting` gives the share of each model.

    With `initial`, the weights at the beginning of the first period are a model too, the first one.
    """
    when = Every.after_update(start, every)
    at_init = initial and when.begin <= 0
    if initial and not at_init:
        when = Every(when.begin, when.every, always=False)

    def init_fn(params: optax.Params) -> AverageState:
        state = AverageState(
            step=jnp.zeros([], jnp.int32),
            total_weight=jnp.zeros([], jnp.result_type(float)),
            mean=means.zeros(params, accumulator_dtype),
        )
        return enter(state, params, jnp.zeros_like(state.step)) if at_init else state

    def enter(state: AverageState, params: optax.Params, number: jax.Array) -> AverageState:
        total_weight, share = weighting(state.total_weight, number, state.step)
        mean = means.towards(state.mean, params, share)
        return AverageState(state.step, total_weight, mean)

    def collect(state: AverageState, params: optax.Params) -> AverageState:
        number = when.turns_before(optax.safe_increment(state.step))
        return enter(state, params, number + 1 if at_init else number)

    return stage.observer(name, init_fn, collect, when)
