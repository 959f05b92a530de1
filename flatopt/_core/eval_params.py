"""`eval_params`: the weights to evaluate, for any nest of methods."""

from typing import Any, Protocol, runtime_checkable

import jax
import optax


@runtime_checkable
class HoldsEvalParams(Protocol):
    """A state that keeps better weights to evaluate than those in training.

    Write the method in a state of your own, a named tuple, and `flatopt.eval_params` finds it
    wherever the state stands in a chain. It then looks for further such states inside, with what
    the method returned as their `params`; a true attribute `eval_params_is_complete` says that the
    method has looked there itself.
    """

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns a tree like `params`, which are the parameters in training, in their dtypes."""
        ...


def eval_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """Returns the weights to evaluate: averages where there are any, centres instead of offsets.

    Call it before every validation and before saving a model for use. It finds the outermost state
    that holds evaluation weights (`swa`, `params_ema`, `msam`, ...) through `optax.chain`,
    `named_chain`, `masked`, `partition`, `MultiSteps`, `inject_hyperparams` and `apply_if_finite`
    states, then looks inside it: `msam(chain(sgd, swa))` gives the average of the centres. Nothing
    is changed, and training goes on from `params`.

    Args:
      opt_state: state of any optax optimiser, with or without flatopt parts.
      params: the parameters in training that belong to it.

    Returns:
      A tree like `params`, in the same dtypes: `params` itself where nothing better is kept, such
      as leaves that `optax.masked` excludes and averages that have not begun.

    Raises:
      ValueError: if two states on one level each hold evaluation weights for the same leaf.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.swa())
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for grads in (jnp.array(-1.0), jnp.array(-2.0)):
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params, flatopt.eval_params(opt_state, params))
      3.0 2.0

    Notes:
      Costs no gradient. Pure: works under `jax.jit`; under `jax.vmap` over replicas, vmap it too.
    """
    holders = [s for s in jax.tree.leaves(opt_state, is_leaf=_holds_params) if _holds_params(s)]
    found = [_search(h, h.eval_params(params)) for h in holders]

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

    return jax.tree.map(pick, params, *found)


def _search(holder: Any, params: optax.Params) -> optax.Params:
    """One level deeper, from the weights that `holder` gives, unless it has looked there itself."""
    if getattr(holder, "eval_params_is_complete", False):
        return params
    return eval_params(tuple(holder), params)  # A tuple holds nothing itself.


def _holds_params(state: Any) -> bool:
    """Whether `state` has the method by which a state offers evaluation weights."""
    return isinstance(state, tuple) and isinstance(state, HoldsEvalParams)
