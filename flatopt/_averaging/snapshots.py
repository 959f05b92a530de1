"""Snapshots: the latest few models along the run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging import ring
from flatopt._core import checks, stage
from flatopt._core.timing import Every


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


def snapshots(
    number: int, *, start: int | None = None, every: int | None = None
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
    checks.check_count("number", number, 1)

    def init_fn(params: optax.Params) -> SnapshotsState:
        return SnapshotsState(
            step=jnp.zeros([], jnp.int32),
            number=jnp.zeros([], jnp.int32),
            ring=ring.empty(params, number),
        )

    return stage.observer("snapshots", init_fn, ring.collect, Every.after_update(start, every))


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
        return isinstance(state, tuple) and {"number", "ring"} <= set(getattr(state, "_fields", ()))

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=keeps) if keeps(s)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of `snapshots` or `lawa`: there must be one. "
            "Chain `flatopt.snapshots(number)` after the optimiser, or hand over the part of the "
            "state that you want."
        )
    (state,) = found
    stack = ring.ordered(state.ring, state.number)
    return stack, jnp.minimum(state.number, ring.size(state.ring))
