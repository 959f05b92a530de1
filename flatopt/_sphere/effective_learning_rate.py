"""The effective learning rate of scale-invariant weights, watched."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks
from flatopt._core.timing import value_at
from flatopt._sphere.groups import Groups, Values


class EffectiveLearningRateState(NamedTuple):
    """State of `record_effective_learning_rate`.

    Attributes:
      step: int32 scalar, number of updates so far.
      effective_learning_rate: one array a group, 0 before the first update.
    """

    step: jax.Array
    effective_learning_rate: Values


def effective(rate: Any, norm: jax.Array) -> jax.Array:
    r""":math:`\eta / \|w\|^2`; infinite where the weights are zero."""
    rate = jnp.asarray(rate, norm.dtype)
    return jnp.where(norm == 0, jnp.inf, rate / jnp.where(norm == 0, 1, norm) / norm)


def record_effective_learning_rate(
    learning_rate: optax.ScalarOrSchedule, groups: Any = "all", *, filter_axis: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps SGD's learning rate over the squared norm of the weights, group by group.

    .. math:: \eta / \|w\|^2

    Args:
      learning_rate: :math:`\eta` >= 0, that of the optimiser: a number, a traced array, or a
        schedule.
      groups, filter_axis: see `project_to_sphere`.

    Returns:
      A stage that passes updates through; needs `params`. Read
      `optax.tree.get(opt_state, "effective_learning_rate")`: of the weights before the update.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.record_effective_learning_rate(0.5), jnp.array([3.0, 4.0])
      >>> _, opt_state = tx.update(w, tx.init(w), w)
      >>> print(*optax.tree.get(opt_state, "effective_learning_rate"))
      0.02

    References:
      As for `fixed_elr`.

    Cost: 0 extra gradients; 0 copies.
    """
    checks.check_number("learning_rate", learning_rate, low=0.0)
    division = Groups(groups, filter_axis)

    def init_fn(params: optax.Params) -> EffectiveLearningRateState:
        none = tuple(map(jnp.zeros_like, division.norms(params, params)))
        return EffectiveLearningRateState(jnp.zeros([], jnp.int32), none)

    def update_fn(
        updates: optax.Updates,
        state: EffectiveLearningRateState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EffectiveLearningRateState]:
        del extra_args
        checks.require_params("record_effective_learning_rate", params)
        rate = value_at(learning_rate, state.step)
        found = tuple(effective(rate, norm) for norm in division.norms(params, params))
        return updates, EffectiveLearningRateState(optax.safe_increment(state.step), found)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
