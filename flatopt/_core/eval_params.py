"""`eval_params`: the weights to evaluate, for any nest of methods."""

from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import optax

from flatopt._core import checks

_Params = TypeVar("_Params")


@runtime_checkable
class HoldsEvalParams(Protocol):
    """A state that keeps better weights to evaluate than those in training.

    Write the method in a state of your own, a named tuple, and `flatopt.eval_params` finds it
    wherever the state stands in a chain. It then looks for further such states inside, with what
    the method returned as their `params`; a true attribute `eval_params_is_complete` says that the
    method has looked there itself. A true `eval_params_is_projection` says that the method comes
    last, on what its neighbours and those inside give, as a mask does.
    """

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns a tree like `params`, which are the parameters in training, in their dtypes."""
        ...


def eval_params(opt_state: optax.OptState, params: _Params) -> _Params:
    """Returns the weights to evaluate: averages where there are any, centres instead of offsets.

    Args:
      opt_state: state of any optax optimiser, with or without flatopt parts.
      params: the parameters in training that belong to it.

    Returns:
      A tree like `params`, in the same dtypes: `params` itself where nothing better is kept, such
      as leaves that `optax.masked` excludes and averages that have not begun.

    Raises:
      ValueError: if two states on one level each hold evaluation weights for the same leaf.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, params = optax.chain(optax.sgd(1.0), flatopt.swa()), jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for grads in (jnp.array(-1.0), jnp.array(-2.0)):
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params, flatopt.eval_params(opt_state, params))
      3.0 2.0

    Cost: 0 extra gradients; 0 copies. Pure; under `jax.vmap` over replicas, vmap it too.
    """
    _require_state(opt_state, params)
    checks.require_arrays("params", params)
    if isinstance(params, optax.LookaheadParams):  # Of `optax.lookahead`, whose slow weights count.
        slow = eval_params(opt_state, params.slow)
        return optax.LookaheadParams(fast=slow, slow=slow)
    return _evaluate(opt_state, params)


def holds_eval_params(opt_state: optax.OptState) -> bool:
    """Says whether a state holds other weights to evaluate than the parameters in training.

    Args:
      opt_state: state of any optax optimiser.

    Returns:
      True if `eval_params` looks into it for averages, centres or slow weights, begun or not.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> for tx in (optax.sgd(0.1), optax.chain(optax.sgd(0.1), flatopt.swa())):
      ...     print(flatopt.holds_eval_params(tx.init(jnp.zeros(2))))
      False
      True

    Cost: 0 extra gradients; 0 copies.
    """
    return bool(_holders(opt_state))


def _evaluate(opt_state: optax.OptState, params: Any) -> Any:
    holders = _holders(opt_state)
    found = [_search(holder, params) for holder in holders]

    def pick(own: jax.Array, *candidates: jax.Array) -> jax.Array:
        better = [c for c in candidates if c is not own]
        if len(better) > 1:
            raise ValueError(
                "opt_state holds evaluation weights twice on one level, in "
                f"{' and '.join(type(h).__name__ for h in holders)}: eval_params cannot choose. "
                "Nest them (`flatopt.msam(optax.chain(optimizer, flatopt.swa(...)))`) or call the "
                "method `eval_params` of the state that you want."
            )
        return better[0] if better else own

    params = jax.tree.map(pick, params, *found)
    for holder in filter(_projects, holders):
        params = holder.eval_params(params)
    return params


def _projects(holder: Any) -> bool:
    """Whether a state changes whatever weights its neighbours hold, and holds none itself."""
    return getattr(holder, "eval_params_is_projection", False)


def _search(holder: Any, params: optax.Params) -> optax.Params:
    """The weights that `holder` gives, and those inside it, unless it has looked there itself."""
    if isinstance(holder, optax.contrib.ScheduleFreeState):
        return optax.contrib.schedule_free_eval_params(holder, params)
    if _projects(holder):
        return _evaluate(tuple(holder), params)
    params = holder.eval_params(params)
    if getattr(holder, "eval_params_is_complete", False):
        return params
    return _evaluate(tuple(holder), params)  # A tuple holds nothing itself.


def _holders(opt_state: optax.OptState) -> list[Any]:
    leaves = jax.tree.leaves(opt_state, is_leaf=_holds_params)
    return [state for state in leaves if _holds_params(state)]


def _holds_params(state: Any) -> bool:
    """Whether `state` offers evaluation weights: by the method, or as optax's schedule-free one."""
    known = HoldsEvalParams | optax.contrib.ScheduleFreeState
    return isinstance(state, tuple) and isinstance(state, known)


def _require_state(opt_state: Any, params: Any) -> None:
    """Raises for what is no state: nothing, parameters, or a state that came back as plain data."""
    if opt_state is None:
        raise TypeError(
            "opt_state is None: call `flatopt.eval_params(opt_state, params)` with the optimiser's "
            "state, `tx.init(params)` or what `tx.update` returned."
        )
    if _holders(params):
        raise TypeError(
            "params holds the state of an optimiser: the order of the arguments is "
            "`flatopt.eval_params(opt_state, params)`."
        )
    plain = type(opt_state) in (dict, list) and not _holds_named_tuple(opt_state)
    if plain and jax.tree.leaves(opt_state):
        raise TypeError(
            "opt_state consists of plain dicts and lists, so that nothing tells which weights to "
            "evaluate. A checkpoint restored without a template looks like this: restore it into "
            "`tx.init(params)`, with `flax.serialization.from_state_dict(tx.init(params), "
            "opt_state)` or with that state as the template of Orbax."
        )


def _holds_named_tuple(tree: Any) -> bool:
    def is_named(node: Any) -> bool:
        return isinstance(node, tuple) and hasattr(node, "_fields")

    return any(map(is_named, jax.tree.leaves(tree, is_leaf=is_named)))
