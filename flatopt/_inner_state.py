"""Changing the momenta inside any optimiser's state, and nothing else in it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt import _mean, _tree


def reset(state: optax.OptState, fresh: optax.OptState, params: optax.Params) -> optax.OptState:
    """`state` with its momenta as in `fresh`, a state just made; schedules go on.

    A momentum is a field that holds a tree like `params`: `trace`, `mu`, `nu`, a mean. Numbers in
    the same state belong to it and are reset too (Adam's count corrects the bias of its momenta).
    Numbers in other states stay: the count of a learning-rate schedule, injected hyperparameters.
    """
    return _walk(state, fresh, params, lambda _, new: new, numbers_too=True)


def towards(
    state: optax.OptState, other: optax.OptState, params: optax.Params, share: Any
) -> optax.OptState:
    """`state` with its momenta moved by `share` of the way to those of `other`."""
    return _walk(
        state, other, params, lambda old, new: _mean.towards(old, new, share), numbers_too=False
    )


def _walk(
    state: Any,
    other: Any,
    params: optax.Params,
    function: Callable[[Any, Any], Any],
    numbers_too: bool,
) -> Any:
    """Applies `function` to every tree like `params` in `state` and its counterpart in `other`."""
    if _is_like(state, params):
        return function(state, other)
    if isinstance(state, dict):
        walked = {
            key: _walk(value, other[key], params, function, numbers_too)
            for key, value in state.items()
        }
        return type(state)(walked)
    if not isinstance(state, tuple | list):
        return state
    is_named = hasattr(state, "_fields")
    holds_momentum = is_named and any(_is_like(field, params) for field in state)

    def child(own: Any, others: Any) -> Any:
        if holds_momentum and numbers_too and jax.tree_util.all_leaves([own]):
            return others
        return _walk(own, others, params, function, numbers_too)

    children = [child(own, others) for own, others in zip(state, other, strict=True)]
    return type(state)(*children) if is_named else type(state)(children)


def _is_like(node: Any, params: optax.Params) -> bool:
    """Whether `node` is a tree of momenta for `params`; leaves or branches may be masked out."""
    leaves = jax.tree.leaves(node, is_leaf=_tree.is_masked)
    if not leaves:
        return False
    if jax.tree_util.all_leaves([params]):
        # One array is like any other array, so look closer: a count is no momentum.
        same = jax.tree_util.all_leaves([node]) and jnp.shape(node) == jnp.shape(params)
        return same and jnp.issubdtype(jnp.result_type(node), jnp.inexact)
    if len({jax.tree.structure(tree) for tree in (node, params)}) == 1:
        return True
    if all(_tree.is_masked(leaf) for leaf in leaves) or not any(map(_tree.is_masked, leaves)):
        return False
    try:
        merged = _tree.merge_masked([node], params)
    except (ValueError, TypeError):
        return False
    return all(_is_one_leaf(leaf) for leaf in jax.tree.leaves(merged, is_leaf=_tree.is_masked))


def _is_one_leaf(leaf: Any) -> bool:
    return _tree.is_masked(leaf) or jax.tree_util.all_leaves([leaf])
