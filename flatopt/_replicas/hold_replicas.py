"""A wrapper that keeps replicas in its state, for training loops that know of one model only."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, rng, tree_math
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
            return eval_params(_pick(self.inner_state, 0), params)
        replicas = _join(params, self.others)
        return barycentre(jax.vmap(eval_params)(self.inner_state, replicas))


def evaluation_number(j: Any, replica: Any, number: int) -> Any:
    r"""The number of the optimiser's j-th extra gradient in replica a, :math:`n - 1 + j n + a`.

    The first n - 1 are the gradients of the replicas 1, 2, ... themselves.
    """
    return number - 1 + j * number + replica


@registry.method("wrapper")
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

    Args:
      optimizer: any optax transformation, run for each replica under `jax.vmap`.
      number: n >= 1; with 1 this is `optimizer`. Static.
      axis_name: name of the mapped axis, for the stages inside that see the others. Static.
      std, key: of the noise that sets replicas 1, 2, ... apart at first; see `replicate_params`.
      evaluation: "unrolled", "loop" (one after another, compiled n - 1 times or once) or "vmap"
        (all at the same time): how the n - 1 gradients are computed. Static.

    Returns:
      A wrapper to be outermost; `update` needs `params` and, for n > 1, `grad_fn`. Evaluate at the
      barycentre: `flatopt.eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.hold_replicas(optax.sgd(0.1), 2), jnp.array(1.0)
      >>> updates, opt_state = tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w - 3.0)
      >>> print(f"{w + updates:.2f} {flatopt.eval_params(opt_state, w + updates):.2f}")
      0.90 1.05

    Cost: n - 1 extra gradients, n times those of `optimizer`; n - 1 copies, n of its state.
    """
    checks.check_count("number", number, 1, none_allowed=False)
    checks.check_number("std", std, low=0.0, schedule_allowed=False)
    rng.check_key(key)
    checks.check_choice("evaluation", evaluation, EVALUATIONS)
    optimizer = checks.as_transformation("optimizer", optimizer)

    def init_fn(params: optax.Params) -> HoldReplicasState:
        replicas = replicate_params(params, number, std=std, key=key)
        return HoldReplicasState(_others(replicas), _init_each(optimizer, replicas, number))

    def update_fn(
        updates: optax.Updates,
        state: HoldReplicasState,
        params: optax.Params | None = None,
        *,
        grad_fn: GradientFunction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HoldReplicasState]:
        checks.require_params("hold_replicas", params)
        grads = _all_gradients(evaluation, grad_fn, updates, params, state.others, number)
        extra_args |= _own_grad_fn(grad_fn, number, axis_name)
        replicas = _join(params, state.others)
        update = functools.partial(optimizer.update, **extra_args)
        mapped = jax.vmap(update, axis_name=axis_name, axis_size=number)
        moves, inner_state = mapped(grads, state.inner_state, replicas)
        others = _others(optax.apply_updates(replicas, moves))
        return _pick(moves, 0), HoldReplicasState(others, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init_each(optimizer: optax.GradientTransformation, replicas: Any, number: int) -> Any:
    """The optimiser's states for all replicas."""
    # One after another, not mapped: each state then lies on the devices as its replica does.
    return _stack([optimizer.init(_pick(replicas, a)) for a in range(number)])


def _all_gradients(
    evaluation: str, grad_fn: Any, first: Any, params: optax.Params, others: Any, number: int
) -> Any:
    """The gradients of all replicas: `first`, that of replica 0, and those at `others`."""
    if number == 1:
        return _join(first, None)
    gradient = checks.require_grad_fn("hold_replicas", grad_fn, params)
    # One after another: side by side, the activations of all would be in memory.
    others, first = jax.lax.optimization_barrier((others, first))
    return _join(first, tree_math.cast_like(_map(evaluation, gradient, others, number - 1), first))


def _own_grad_fn(
    grad_fn: GradientFunction | None, number: int, axis_name: str
) -> dict[str, GradientFunction]:
    """The argument `grad_fn` for the optimiser of the mapped replica, if there is one."""
    if grad_fn is None:
        return {}

    def own(point: optax.Params, i: jax.typing.ArrayLike) -> optax.Updates:
        return grad_fn(point, evaluation_number(i, jax.lax.axis_index(axis_name), number))

    return {"grad_fn": own}


def _map(evaluation: str, gradient: Callable[..., Any], points: Any, number: int) -> Any:
    """Gradients at `points`, which have a leading axis of length `number`; they get it too."""
    numbers = jnp.arange(number, dtype=jnp.int32)
    if evaluation == "vmap":
        return jax.vmap(gradient, axis_size=number)(points, numbers)
    if evaluation == "loop":
        return jax.lax.map(lambda pair: gradient(*pair), (points, numbers))
    each = []
    for a in range(number):
        grads = gradient(_pick(points, a), numbers[a])
        points, grads = jax.lax.optimization_barrier((points, grads))
        each.append(grads)
    return _stack(each)


def _pick(replicas: Any, a: int) -> Any:
    """Replica a."""
    return jax.tree.map(lambda x: x[a], replicas)


def _stack(trees: list[Any]) -> Any:
    """One tree with a leading replica axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _join(first: Any, others: Any) -> Any:
    """One tree with a leading replica axis from one tree without and one with, or None."""
    if others is None:
        return jax.tree.map(lambda x: jnp.asarray(x)[None], first)
    return jax.tree.map(
        lambda x, rest: jnp.concatenate([jnp.asarray(x)[None], rest]), first, others
    )


def _others(replicas: Any) -> Any:
    """All replicas but the first; None if that is all."""
    leaves = jax.tree.leaves(replicas)
    if leaves and len(leaves[0]) == 1:
        return None
    return jax.tree.map(lambda x: x[1:], replicas)
