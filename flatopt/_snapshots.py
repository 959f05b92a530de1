"""Stages that keep the latest few models: `snapshots`, and `lawa`, which averages them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _mean, _ring, _tree


class SnapshotsState(NamedTuple):
    """State of `snapshots`.

    Attributes:
      step: int32 scalar, number of updates so far.
      number: int32 scalar, number of models taken so far, also those overwritten since.
      ring: tree like the parameters with one more axis in front, in the parameters' dtypes: the
        latest models; model i (from 0) lies in slot i modulo the length of the axis.
    """

    step: jax.Array
    number: jax.Array
    ring: optax.Params


class LawaState(NamedTuple):
    """State of `lawa`.

    Attributes:
      step: int32 scalar, number of updates so far.
      number: int32 scalar, number of models taken so far, also those overwritten since.
      ready: bool scalar, whether a model has been taken at or after `start`.
      ring: as in `SnapshotsState`.
    """

    step: jax.Array
    number: jax.Array
    ready: jax.Array
    ring: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the mean of the models in the ring, or `params` before `start`."""
        shares = _ring.weights(self.number, _ring.size(self.ring))

        def leaf(stack: jax.Array) -> jax.Array:
            length = stack.shape[0]
            if not jnp.issubdtype(stack.dtype, jnp.inexact):
                return stack[(self.number - 1) % length]
            wide = stack.astype(_tree.accumulator_dtype(stack.dtype))
            column = shares.astype(wide.real.dtype).reshape(length, *[1] * (stack.ndim - 1))
            return jnp.sum(column * wide, axis=0)

        return _mean.evaluated(jax.tree.map(leaf, self.ring), params, self.ready)


def snapshots(
    number: int, start: int | None = None, every: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the latest models along the run.

    .. math:: \theta_i = w_t, \qquad t = start, start + every, \dots

    Args:
      number: how many models to keep, >= 1; a new one overwrites the oldest. Static.
      start: number of the first update, counted from 1, whose weights are kept, >= 0; None means
        the first. Static.
      every: one in `every` updates from there on, >= 1; None means each. Static.

    Returns:
      A stage to be chained last. It passes updates through unchanged, and needs `params`. Get the
      models with `flatopt.snapshot_params(opt_state)`.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.snapshots(2))
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):  # the weights are 1, 2, 3
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> stack, number = flatopt.snapshot_params(opt_state)
      >>> print(stack, number)
      [2. 3.] 2

    Notes:
      Place: last in its chain, as for `swa`. Gradient evaluations: none. State: `number` copies of
      the parameters, in their own dtypes, and two integers. `flatopt.eval_params` gives the
      parameters in training: merge with `merge_params`, choose with `greedy_soup`, or predict with
      all of them with `ensemble_predict`.
    """
    _checks.check_count("number", number, 1)
    first, period = _mean.timing(start, every)

    def init_fn(params: optax.Params) -> SnapshotsState:
        return SnapshotsState(
            step=jnp.zeros([], jnp.int32),
            number=jnp.zeros([], jnp.int32),
            ring=_ring.empty(params, number),
        )

    def update_fn(
        updates: optax.Updates,
        state: SnapshotsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SnapshotsState]:
        del extra_args
        _checks.require_params("snapshots", params)
        step = optax.safe_increment(state.step)
        due = _mean.is_due(step, first, period)
        ring = _push_if(due, state.ring, params, updates, state.number)
        return updates, SnapshotsState(step, state.number + due, ring)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def lawa(
    window: int, every: int | None = None, start: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Latest weight averaging: the mean of the latest few models.

    .. math::
      \bar w = \frac{1}{m} \sum_{i=n-m}^{n-1} w_{t_i}, \qquad t_i = (i + 1) \, every, \quad
      m = \min(n, window)

    Args:
      window: how many models the mean takes in, >= 1. Static.
      every: a model is taken after updates `every`, `2 every`, ..., >= 1; None means each. Static.
      start: before the first model at or after this update, `eval_params` gives the parameters
        themselves, >= 0; None means 0. The mean then takes in earlier models too. Static.

    Returns:
      A stage to be chained last. It passes updates through unchanged, and needs `params`. Get the
      mean with `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.lawa(2))
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):  # the weights are 1, 2, 3
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(flatopt.eval_params(opt_state, params))
      2.5

    References:
      Kaddour. Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight
      Averaging. arXiv:2209.14981

    Notes:
      Forgets what is older than `window * every` updates, so it needs no guess at when to start; an
      average of a decaying run that lags behind it can be worse than its last point. The models are
      kept in the parameters' own dtypes and averaged in float32 at least. Gradient evaluations:
      none. State: `window` copies of the parameters and three scalars. Other weights than equal
      ones: `snapshots` with `merge_params(stack, merge_weights("cosine", number))`.
    """
    _checks.check_count("window", window, 1)
    _checks.check_count("start", start, 0)
    _, period = _mean.timing(None, every)

    def init_fn(params: optax.Params) -> LawaState:
        return LawaState(
            step=jnp.zeros([], jnp.int32),
            number=jnp.zeros([], jnp.int32),
            ready=jnp.zeros([], bool),
            ring=_ring.empty(params, window),
        )

    def update_fn(
        updates: optax.Updates,
        state: LawaState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LawaState]:
        del extra_args
        _checks.require_params("lawa", params)
        step = optax.safe_increment(state.step)
        due = _mean.is_due(step, period, period)
        ring = _push_if(due, state.ring, params, updates, state.number)
        ready = state.ready | (due & (step >= (start or 0)))
        return updates, LawaState(step, state.number + due, ready, ring)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def snapshot_params(opt_state: optax.OptState) -> tuple[optax.Params, jax.Array]:
    """Returns the models that `snapshots` or `lawa` has kept, oldest first.

    Args:
      opt_state: state of any optax optimiser with one such stage anywhere in it.

    Returns:
      `(stack, number)`: a tree like the parameters with one more axis in front, and how many of its
      entries, from the first on, hold a model; the others are zeros.

    Raises:
      ValueError: if there is no such stage in `opt_state`, or more than one.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.snapshots(3))
      >>> params = jnp.array(0.0)
      >>> updates, opt_state = tx.update(jnp.array(-1.0), tx.init(params), params)
      >>> stack, number = flatopt.snapshot_params(opt_state)
      >>> print(stack, number)
      [1. 0. 0.] 1
      >>> print(jax.tree.map(lambda x: x[:number], stack))
      [1.]

    Notes:
      Costs no gradient. Pure: works under `jax.jit`, where `number` is traced. Where the state is
      vmapped over replicas, vmap this too.
    """

    def keeps(state: Any) -> bool:
        return isinstance(state, SnapshotsState | LawaState)

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=keeps) if keeps(s)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of `snapshots` or `lawa`: there must be one. "
            "Chain `flatopt.snapshots(number)` after the optimiser, or hand over the part of the "
            "state that you want."
        )
    (state,) = found
    stack = _ring.ordered(state.ring, state.number)
    return stack, jnp.minimum(state.number, _ring.size(state.ring))


def _push_if(
    due: jax.Array,
    ring: optax.Params,
    params: optax.Params,
    updates: optax.Updates,
    number: jax.Array,
) -> optax.Params:
    return _tree.apply_if(
        due, lambda ring: _ring.push(ring, optax.apply_updates(params, updates), number), ring
    )
