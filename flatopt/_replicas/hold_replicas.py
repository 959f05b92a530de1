"""A wrapper that keeps replicas in its state, for training loops that know of one model only."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng
from flatopt._core.eval_params import eval_params
from flatopt._core.grad_fn import GradientFunction
from flatopt._replicas.replicas import barycentre, replicate_params

EVALUATIONS = ("unrolled", "loop", "vmap")


class HoldReplicasState(NamedTuple):
    """State of `hold_replicas`.

    Attributes:
      others: replicas 1, 2, ...: a tree like the parameters with a leading axis; None if there are
        none. Replica 0 is the parameters themselves.
      inner_state: state of the wrapped optimiser, with a leading axis over all replicas.
    """

    others: optax.Params | None
    inner_state: optax.OptState

    @property
    def eval_params_is_complete(self) -> bool:
        """True: what the inner states hold is one replica's, and `eval_params` has looked there."""
        return True

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the barycentre of the replicas' own evaluation weights."""
        if not jax.tree.leaves(params):
            return params
        if self.others is None:
            return eval_params(jax.tree.map(lambda x: x[0], self.inner_state), params)
        replicas = _join(params, self.others)
        return barycentre(jax.vmap(eval_params)(self.inner_state, replicas))


def hold_replicas(
    optimizer: optax.GradientTransformation,
    number: int,
    *,
    axis_name: str = "replicas",
    std: jax.typing.ArrayLike = 0.0,
    key: rng.KeyLike = 0,
    evaluation: str = "unrolled",
) -> optax.GradientTransformationExtraArgs:
    r"""Trains several replicas where the training loop sees one.

    .. math:: w_a \leftarrow w_a + u_a(\nabla L_a(w_a), w_0, \dots, w_{n-1}), \qquad w_0 = w

    The parameters are replica 0; the others live in the state and get their gradients from
    `grad_fn`. `optimizer` runs once per replica under `jax.vmap`, so that whatever it does with
    norms or with gradients elsewhere (SAM, clipping) it does per replica; stages that take an
    `axis_name` see the other replicas.

    Args:
      optimizer: any optax transformation, such as
        `optax.chain(flatopt.couple_replicas(0.1, axis_name="replicas"), optax.sgd(0.1))`.
      number: n >= 1; with 1 this is `optimizer`. Static.
      axis_name: name of the mapped axis for the stages inside. Static.
      std: standard deviation >= 0 of the noise that sets replicas 1, 2, ... apart from the initial
        parameters; see `replicate_params`.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data, for that noise.
      evaluation: how the n - 1 gradients are computed. "unrolled": one after another, as fast as
        that of a single network whatever it is made of; compiles it n - 1 times. XLA for CPUs does
        not keep to the order and may hold the activations of all. "loop": one after another,
        compiled once, in the least memory; but on a CPU, XLA runs derived gradients of
        convolutions in a loop tens of times slower. "vmap": all at the same time, compiled once;
        the fastest for small dense networks, slow for convolutions. Static.

    Returns:
      A wrapper to be outermost; `update` needs `params` and, for n > 1, `grad_fn`. Evaluate at the
      barycentre: `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if an argument is out of range, `params` or `grad_fn` is missing, or the wrapper
        stands inside `optax.masked`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> inner = optax.chain(flatopt.couple_replicas(1.0, axis_name="replicas"), optax.sgd(0.1))
      >>> tx = flatopt.hold_replicas(inner, number=3, std=0.5)
      >>> params = jnp.array(1.0)
      >>> opt_state = tx.init(params)
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * (w - 2.0) ** 2)
      >>> for _ in range(100):
      ...     updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{flatopt.eval_params(opt_state, params):.3f}")
      2.000

    Notes:
      Place: outermost. Replica a > 0 takes its gradient from `grad_fn(w_a, a - 1)`: pick minibatch
      i there to give each its own batch, or ignore i to share one. The extra evaluation number j of
      `optimizer` in replica a is number n - 1 + j n + a. Random keys in the state of `optimizer`
      start equal in all replicas. Gradient evaluations: n - 1 extra, and n times those of
      `optimizer`. State: n - 1 copies of the parameters, and n states of `optimizer`.
    """
    checks.check_count("number", number, 1)
    checks.check_number("std", std, low=0.0)
    if evaluation not in EVALUATIONS:
        raise ValueError(f"evaluation={evaluation!r} must be one of {', '.join(EVALUATIONS)}.")
    optimizer = optax.with_extra_args_support(optimizer)
    over_replicas = functools.partial(jax.vmap, axis_name=axis_name, axis_size=number)

    def init_fn(params: optax.Params) -> HoldReplicasState:
        replicas = replicate_params(params, number, std=std, key=key)
        # One after another, not mapped: each state then lies on the devices as its replica does.
        states = [
            optimizer.init(jax.tree.map(lambda x, a=a: x[a], replicas)) for a in range(number)
        ]
        inner_state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return HoldReplicasState(_others(replicas), inner_state)

    def update_fn(
        updates: optax.Updates,
        state: HoldReplicasState,
        params: optax.Params | None = None,
        *,
        grad_fn: GradientFunction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HoldReplicasState]:
        checks.require_params("hold_replicas", params)
        grads_of_others = None
        if number > 1:
            gradient = checks.require_grad_fn("hold_replicas", grad_fn, params)
            # One after another: side by side, the activations of all would be in memory.
            others, updates = jax.lax.optimization_barrier((state.others, updates))
            grads_of_others = _map(evaluation, gradient, others, number - 1)
            grads_of_others = optax.tree.cast_like(grads_of_others, updates)

        def update_one(grads: Any, inner_state: Any, replica: Any) -> Any:
            def own_grad_fn(point: optax.Params, i: jax.typing.ArrayLike) -> optax.Updates:
                assert grad_fn is not None
                number_of = number - 1 + i * number + jax.lax.axis_index(axis_name)
                return grad_fn(point, number_of)

            own = {} if grad_fn is None else {"grad_fn": own_grad_fn}
            return optimizer.update(grads, inner_state, replica, **extra_args, **own)

        replicas = _join(params, state.others)
        moves, inner_state = over_replicas(update_one)(
            _join(updates, grads_of_others), state.inner_state, replicas
        )
        others = _others(optax.apply_updates(replicas, moves))
        return jax.tree.map(lambda u: u[0], moves), HoldReplicasState(others, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _map(evaluation: str, gradient: Callable[..., Any], points: Any, number: int) -> Any:
    """Gradients at `points`, which have a leading axis of length `number`; they get it too."""
    numbers = jnp.arange(number, dtype=jnp.int32)
    if evaluation == "vmap":
        return jax.vmap(gradient, axis_size=number)(points, numbers)
    if evaluation == "loop":
        return jax.lax.map(lambda pair: gradient(*pair), (points, numbers))
    each = []
    for a in range(number):
        grads = gradient(jax.tree.map(lambda x, a=a: x[a], points), numbers[a])
        points, grads = jax.lax.optimization_barrier((points, grads))
        each.append(grads)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _join(first: Any, others: Any) -> Any:
    """One tree with a leading replica axis from one tree without and one with, or None."""
    if others is None:
        return jax.tree.map(lambda x: x[None], first)
    return jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest]), first, others)


def _others(replicas: Any) -> Any:
    """All replicas but the first; None if that is all."""
    leaves = jax.tree.leaves(replicas)
    if leaves and len(leaves[0]) == 1:
        return None
    return jax.tree.map(lambda x: x[1:], replicas)
