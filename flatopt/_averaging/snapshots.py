"""Snapshots: the latest few models along the run."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging import ring
from flatopt._core import checks, registry, stage
from flatopt._core.timing import Every


class SnapshotsState(NamedTuple):
    """State of `snapshots`.

    Attributes:
      step: int32 scalar, number of updates so far.
      number: int32 scalar, number of models taken so far, also those overwritten since.
      ring: tree like the parameters with one more axis in front: the latest models; model i (from
        0) lies in slot i modulo the length of the axis.
    """

    step: jax.Array
    number: jax.Array
    ring: optax.Params


@registry.method("average")
def snapshots(
    number: int,
    *,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the latest models along the run; `eval_params` gives the weights in training.

    .. math:: \theta_i = w_t, \qquad t = start, start + every, \dots

    Args:
      number: how many models to keep, >= 1; a new one overwrites the oldest. Static.
      start, every: when a model is taken; see `swa`.
      accumulator_dtype: of the models that are kept; None: the parameters' own. Static.

    Returns:
      A stage to be chained last, as `swa`; needs `params`. Get the models by `snapshot_params`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, zero = flatopt.snapshots(2), jnp.array(0.0)
      >>> state = stage.init(zero)
      >>> for w in jnp.array([1.0, 2.0, 3.0]):  # the weights after each update
      ...     _, state = stage.update(zero, state, w)
      >>> print(*flatopt.snapshot_params(state))
      [2. 3.] 2

    Cost: 0 extra gradients; `number` copies.
    """
    checks.check_count("number", number, 1)

    def init_fn(params: optax.Params) -> SnapshotsState:
        return SnapshotsState(
            step=jnp.zeros([], jnp.int32),
            number=jnp.zeros([], jnp.int32),
            ring=ring.empty(params, number, accumulator_dtype),
        )

    collect = functools.partial(ring.collect, "snapshots", "number", number)
    return stage.observer("snapshots", init_fn, collect, Every.after_update(start, every))


def snapshot_params(opt_state: optax.OptState) -> tuple[optax.Params, jax.Array]:
    """Returns the models that `snapshots` or `lawa` has kept, oldest first.

    Args:
      opt_state: state of any optax optimiser with one such stage anywhere in it.

    Returns:
      `(stack, number)`: a tree like the parameters with one more axis in front, and how many of its
      entries, from the first on, hold a model; the others are zeros. Under `jax.jit`, `number` is
      traced.

    Raises:
      ValueError: if there is no such stage in `opt_state`, or more than one.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, zero = flatopt.snapshots(3), jnp.array(0.0)
      >>> _, state = stage.update(zero, stage.init(zero), jnp.array(1.0))
      >>> stack, number = flatopt.snapshot_params(state)
      >>> print(stack, stack[:number])
      [1. 0. 0.] [1.]

    Cost: 0 extra gradients; the stack once more.
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
