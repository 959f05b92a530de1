"""The springs between replicas and their barycentre (Baldassi et al., arXiv:1605.06444)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, tree_math
from flatopt._core.timing import value_at
from flatopt._replicas.replicas import LEADING_AXIS, AxisName, _mean, over_leading_axis


class CoupleReplicasState(NamedTuple):
    """State of `couple_replicas`; with a leading replica axis each entry has it too.

    Attributes:
      step: int32 scalar, number of updates so far.
      unit: float scalar, unit of the strength: 1 unless `automatic`.
    """

    step: jax.Array
    unit: jax.Array


def couple_replicas(
    strength: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName | None = None,
    every: int | None = None,
    automatic: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds to each replica's gradient the pull of a spring to the barycentre.

    .. math:: g_a \leftarrow g_a + \gamma \, (w_a - \bar w)

    the gradient of :math:`\sum_a [L(w_a) + \frac{\gamma}{2} \|w_a - \bar w\|^2]`.

    Args:
      strength: :math:`\gamma` >= 0, in units of curvature: a number, a traced array, or a schedule
        of the step count, such as `exponential_scoping` or `strength_schedule`. With the number 0
        the replicas train independently, bit for bit.
      axis_name: None when updates and parameters have a leading replica axis; inside `jax.vmap` or
        `jax.shard_map`, the name of the axis that counts the replicas. A tuple when they are spread
        over several, such as devices and replicas on a device. Static.
      every: pull in the last of every so many updates only, so many times as strongly, >= 1: that
        saves communication. None means each. Static.
      automatic: number >= 1 of first updates without a pull that measure the unit of `strength`:
        the mean loss `value` over the mean of :math:`\frac12 \|w_a - \bar w\|^2`. From then on
        strength is a multiple of the unit found last, and `update` needs `value=loss`, of one
        replica or of each. None: the unit is 1. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `value` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.couple_replicas(0.5), optax.sgd(0.1))
      >>> params = jnp.array([[1.0], [3.0]])  # two replicas of one weight
      >>> grads = jnp.zeros([2, 1])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(updates.ravel())
      [ 0.05 -0.05]

    References:
      Baldassi et al. Unreasonable Effectiveness of Learning Neural Networks: From Accessible States
      and Robust Ensembles to Basic Algorithmic Schemes. arXiv:1605.06444

      Pittorino et al. Entropic gradient descent algorithms and wide flat minima. arXiv:2006.07897

    Notes:
      Place: before the optimiser, whose momentum then filters the pull too; after SAM and clipping,
      if those should see the loss alone. With a leading axis, an optimiser that is not elementwise
      (a global norm) would mix the replicas: use a named axis for it. A program that minimises
      :math:`\sum_a L(w_a) + g \|w_a - \bar w\|^2` has :math:`\gamma = 2 g`. Evaluate at
      `barycentre`. Gradient evaluations: none extra; one mean over the replicas. State: two
      scalars.
    """
    checks.check_number("strength", strength, low=0.0)
    checks.check_count("every", every, 1)
    checks.check_count("automatic", automatic, 1)
    off = checks.is_number(strength, 0) and automatic is None

    def init_one(params: optax.Params) -> CoupleReplicasState:
        del params
        return CoupleReplicasState(jnp.zeros([], jnp.int32), jnp.ones([], jnp.result_type(float)))

    def update_one(
        updates: optax.Updates, state: CoupleReplicasState, params: optax.Params, value: Any
    ) -> tuple[optax.Updates, CoupleReplicasState]:
        axes = LEADING_AXIS if axis_name is None else axis_name
        step = optax.safe_increment(state.step)
        if off or jax.lax.axis_size(axes) == 1:
            return updates, CoupleReplicasState(step, state.unit)

        def pulled(unit: jax.Array) -> optax.Updates:
            factor = value_at(strength, state.step) * unit * (every or 1)
            mean = _mean(params, axes)
            return jax.tree.map(
                lambda g, w, m: (g + factor * (w - m)).astype(g.dtype), updates, params, mean
            )

        if automatic is None:
            due = True if every in (None, 1) else step % every == 0
            unit = state.unit
        else:
            measuring = state.step < automatic
            due = ~measuring & (step % (every or 1) == 0)
            unit = jax.lax.cond(measuring, lambda: _unit(value, params, axes), lambda: state.unit)
        if due is True:
            return pulled(unit), CoupleReplicasState(step, unit)
        updates = jax.lax.cond(due, lambda: pulled(unit), lambda: updates)
        return updates, CoupleReplicasState(step, unit)

    def init_fn(params: optax.Params) -> CoupleReplicasState:
        return init_one(params) if axis_name is not None else over_leading_axis(init_one)(params)

    def update_fn(
        updates: optax.Updates,
        state: CoupleReplicasState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CoupleReplicasState]:
        del extra_args
        checks.require_params("couple_replicas", params)
        if automatic is not None and value is None:
            raise ValueError(
                "flatopt.couple_replicas(automatic=...) measures the strength in units of the "
                "loss. Call `tx.update(grads, opt_state, params, value=loss)`."
            )
        value = None if value is None else jnp.mean(value)
        if axis_name is not None:
            return update_one(updates, state, params, value)
        mapped = over_leading_axis(lambda u, s, p: update_one(u, s, p, value))
        return mapped(updates, state, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _unit(value: Any, params: optax.Params, axis_name: AxisName) -> jax.Array:
    """The strength at which the springs, as far as they are stretched, weigh as much as the loss.

    Zero when the replicas coincide: they then need no spring.
    """
    away = jax.tree.map(lambda w, m: w - m, params, _mean(params, axis_name))
    value, energy = jax.lax.pmean((value, 0.5 * tree_math.vdot(away, away)), axis_name)
    return tree_math.ratio_or_zero(value, energy).astype(jnp.result_type(float))
