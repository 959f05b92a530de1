"""The stage behind every running mean of the weights."""

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
) -> optax.GradientTransformationExtraArgs:
    """Every running mean is `mean += share * (params - mean)`; `weighting` gives the share."""
    when = Every.after_update(start, every)

    def init_fn(params: optax.Params) -> AverageState:
        return AverageState(
            step=jnp.zeros([], jnp.int32),
            total_weight=jnp.zeros([], jnp.result_type(float)),
            mean=means.zeros(params, accumulator_dtype),
        )

    def collect(state: AverageState, params: optax.Params) -> AverageState:
        number = (state.step + 1 - when.start) // when.every
        total_weight, share = weighting(state.total_weight, number, state.step)
        mean = means.towards(state.mean, params, share)
        return AverageState(state.step, total_weight, mean)

    return stage.observer(name, init_fn, collect, when)
