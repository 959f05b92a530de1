"""Replicas: several copies of the parameters, their barycentre, and the springs to it.

Everything here works in two layouts. Either every array has a leading replica axis, or the code
runs once per replica inside `jax.vmap(..., axis_name=...)` or `jax.shard_map`. The first is done by
the second: `_over_leading_axis` maps the code for one replica over the axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _random, _tree
from flatopt._schedules import value_at

# One or several names of mapped axes; none of them, `()`, makes a single replica.
AxisName = str | tuple[str, ...]
LEADING_AXIS = "flatopt_replicas"


def barycentre(params: optax.Params, axis_name: AxisName | None = None) -> optax.Params:
    r"""The mean of the replicas: the weights to evaluate.

    .. math:: \bar w = \frac1n \sum_a w_a

    Args:
      params: parameters with a leading replica axis, or one replica's inside a mapped axis. Any
        tree will do: BatchNorm statistics, gradients.
      axis_name: None for a leading axis; else the name of the mapped axis that counts the replicas,
        or several. Static.

    Returns:
      A tree without the replica axis, in the same dtypes. Integer and bool leaves, such as
      counters, have no mean: they are the largest.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import flatopt
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])}  # two replicas
      >>> print(flatopt.barycentre(params)["w"])
      [2. 4.]
      >>> mean = lambda p: flatopt.barycentre(p, axis_name="replicas")
      >>> print(jax.vmap(mean, axis_name="replicas")(params)["w"][0])
      [2. 4.]

    References:
      Baldassi et al. Unreasonable Effectiveness of Learning Neural Networks: From Accessible States
      and Robust Ensembles to Basic Algorithmic Schemes. arXiv:1605.06444

    Notes:
      Where replicas keep averages or offsets, take those first:
      `barycentre(flatopt.eval_params(opt_state, params))`, the inner one under `vmap`. Statistics
      of BatchNorm belong to the centre: recompute them there, or take their barycentre. Summed in
      float32 at least. Costs no gradient.
    """
    if axis_name is None:
        return over_leading_axis(lambda p: barycentre(p, LEADING_AXIS), out_axes=None)(params)
    return optax.tree.cast_like(_mean(params, axis_name), params)


def replicate_params(
    params: optax.Params,
    number: int,
    std: jax.typing.ArrayLike = 0.0,
    key: _random.KeyLike = 0,
    init_fn: Callable[[jax.Array], optax.Params] | None = None,
) -> optax.Params:
    r"""Makes replicas of the parameters, along a new leading axis.

    .. math:: w_0 = w, \qquad w_a = w + \sigma \, \xi_a \quad (a = 1, \dots, n - 1)

    Args:
      params: one set of parameters: replica 0.
      number: n >= 1. Static.
      std: :math:`\sigma` >= 0, of the normal noise that sets the other replicas apart, in units of
        the parameters. With 0 they are equal, and stay so when they see equal data.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      init_fn: function from a key to parameters, such as `model.init` with an example bound; the
        other replicas then start from draws of their own instead of from `params`. Static.

    Returns:
      A tree like `params` with one more axis, of length `number`, in front of each leaf.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> replicas = flatopt.replicate_params({"w": jnp.ones(1000)}, 3, std=0.1)
      >>> print(replicas["w"].shape)
      (3, 1000)
      >>> print(f"{jnp.std(replicas['w'][0]):.2f} {jnp.std(replicas['w'][1]):.2f}")
      0.00 0.10

    References:
      Pittorino et al. Entropic gradient descent algorithms and wide flat minima. arXiv:2006.07897

    Notes:
      Split the leading axis over devices with `jax.shard_map`. Costs no gradient.
    """
    _checks.check_count("number", number, 1)
    _checks.check_number("std", std, low=0.0)
    keys = jax.random.split(jax.random.wrap_key_data(_random.key_data(key)), number)[1:]

    def other(key: jax.Array) -> optax.Params:
        if init_fn is not None:
            return optax.tree.cast_like(init_fn(key), params)
        kicks = _random.normal_like(key, params)
        return jax.tree.map(lambda w, xi: (w + std * xi).astype(w.dtype), params, kicks)

    # Compiled, so that replicas are the same to the last bit whether the caller compiles or not.
    # Stacked one by one: each then lies on the devices as `params` does.
    replicas = [params, *map(jax.jit(other), keys)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *replicas)


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
    _checks.check_number("strength", strength, low=0.0)
    _checks.check_count("every", every, 1)
    _checks.check_count("automatic", automatic, 1)
    off = _checks.is_zero(strength) and automatic is None

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
        _checks.require_params("couple_replicas", params)
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


def over_leading_axis(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """Runs the code for one replica along the leading axis of all arguments."""
    return jax.vmap(function, axis_name=LEADING_AXIS, **kwargs)


def _mean(tree: Any, axis_name: AxisName) -> Any:
    """Mean over the replicas, in the accumulator's dtype; the maximum of integers."""

    def leaf(x: jax.Array) -> jax.Array:
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        wide = x.astype(_tree.accumulator_dtype(x.dtype) if inexact else jnp.int32)
        # On explicitly sharded arrays JAX cannot map a reduction over a `vmap` axis; a gather it
        # can, and there that moves nothing.
        if any(axis is not None for axis in jax.typeof(x).sharding.spec):
            everyone = jax.lax.all_gather(wide, axis_name)
            return jnp.mean(everyone, 0) if inexact else jnp.max(everyone, 0)
        return (jax.lax.pmean if inexact else jax.lax.pmax)(wide, axis_name)

    return tree if axis_name == () else jax.tree.map(leaf, tree)


def _unit(value: Any, params: optax.Params, axis_name: AxisName) -> jax.Array:
    """The strength at which the springs, as far as they are stretched, weigh as much as the loss.

    Zero when the replicas coincide: they then need no spring.
    """
    away = jax.tree.map(lambda w, m: w - m, params, _mean(params, axis_name))
    value, energy = jax.lax.pmean((value, 0.5 * _tree.vdot(away, away)), axis_name)
    return _tree.ratio_or_zero(value, energy).astype(jnp.result_type(float))
