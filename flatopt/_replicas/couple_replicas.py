"""The springs between replicas and their barycentre (Baldassi et al., arXiv:1605.06444)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, tree_math
from flatopt._core.timing import Every, value_at
from flatopt._replicas.replicas import (
    AxisName,
    agreed,
    along_replicas,
    mean_over,
    own_axis,
)


class CoupleReplicasState(NamedTuple):
    """State of `couple_replicas`; with a leading replica axis each entry has it too.

    Attributes:
      step: int32 scalar, number of updates so far.
      unit: float scalar, unit of the strength: 1 unless `automatic`.
    """

    step: jax.Array
    unit: jax.Array


def pull(grads: Any, params: optax.Params, centre: optax.Params, gamma: Any) -> optax.Updates:
    r"""The gradient with that of the springs, :math:`g_a + \gamma \, (w_a - \bar w)`.

    Integer and bool leaves have no centre, and no spring.
    """
    return tree_math.on_inexact(lambda g, w, mean: g + gamma * (w - mean), grads, params, centre)


def balancing_strength(value: Any, params: optax.Params, axis_name: AxisName) -> jax.Array:
    r"""The strength at which the springs weigh as much as the loss does.

    .. math:: \gamma = \sum_a L(w_a) \Big/ \sum_a \tfrac12 \|w_a - \bar w\|^2

    Zero when the replicas coincide: they then need no spring.
    """
    mean = mean_over(params, axis_name)
    away = tree_math.on_inexact(lambda mean, w: w - mean, mean, params)
    value, energy = mean_over((value, 0.5 * tree_math.vdot(away, away)), axis_name)
    return tree_math.ratio_or_zero(value, energy).astype(jnp.result_type(float))


@registry.method("stage")
def couple_replicas(
    strength: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName | None = None,
    every: int | None = None,
    automatic: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds to each replica's gradient the pull of a spring to the barycentre.

    .. math:: g_a \leftarrow g_a + \gamma \, (w_a - \bar w)

    Args:
      strength: :math:`\gamma` >= 0: a number, a traced array, or a schedule of the step count.
      axis_name: None where a leading axis counts the replicas; inside `jax.vmap` or
        `jax.shard_map` the name of the axis that does, or several. Static.
      every: pull in the last of so many updates only, so many times as strongly; >= 1. Static.
      automatic: first updates without a pull, that measure a unit for `strength`. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params`, and with `automatic`
      `value=loss`, of one replica or of each. Evaluate at `barycentre(params)`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, w = flatopt.couple_replicas(0.5), jnp.array([[1.0], [3.0]])  # two replicas
      >>> print(stage.update(jnp.zeros([2, 1]), stage.init(w), w)[0].ravel())
      [-0.5 0.5]

    References:
      Baldassi et al., arXiv:1605.06444; Pittorino et al., arXiv:2006.07897

    Cost: 0 extra gradients; 0 copies; 1 mean over the replicas.
    """
    checks.check_number("strength", strength, low=0.0)
    checks.check_count("automatic", automatic, 1)
    off = checks.is_number(strength, 0) and automatic is None
    when, axes = Every.after_update(None, every), own_axis(axis_name)

    def update_one(
        updates: optax.Updates,
        state: CoupleReplicasState,
        params: optax.Params,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CoupleReplicasState]:
        del extra_args
        step, unit = optax.safe_increment(state.step), state.unit
        _require_loss(automatic, value)
        if off or jax.lax.axis_size(axes) == 1:
            return updates, CoupleReplicasState(step, unit)
        made = agreed(step, axes)

        def pulled(grads: optax.Updates) -> optax.Updates:
            gamma = value_at(strength, state.step) * unit * float(when.every)
            return pull(grads, params, mean_over(params, axes), gamma)

        if automatic is None:
            return when.run(made, pulled, updates), CoupleReplicasState(step, unit)
        unit = _measure(made <= automatic, unit, value, params, axes)
        due = (made > automatic) & when.is_due(made)
        return tree_math.apply_if(due, pulled, updates), CoupleReplicasState(step, unit)

    return along_replicas("couple_replicas", _init_one, update_one, axis_name)


def _init_one(params: optax.Params) -> CoupleReplicasState:
    del params
    return CoupleReplicasState(jnp.zeros([], jnp.int32), jnp.ones([], jnp.result_type(float)))


def _measure(
    measuring: jax.Array, unit: jax.Array, value: Any, params: optax.Params, axis_name: AxisName
) -> jax.Array:
    """The unit of the strength, renewed while `measuring`."""

    def renew(unit: jax.Array) -> jax.Array:
        balancing = balancing_strength(jnp.mean(value), params, axis_name)
        # Always the first; to `jax.shard_map` it then differs between devices as the state may.
        return jnp.where(measuring, balancing, unit)

    return tree_math.apply_if(measuring, renew, unit)


def _require_loss(automatic: int | None, value: Any) -> None:
    if automatic is not None and value is None:
        raise ValueError(
            "flatopt.couple_replicas(automatic=...) measures the strength in units of the "
            "loss. Call `tx.update(grads, opt_state, params, value=loss)`."
        )
