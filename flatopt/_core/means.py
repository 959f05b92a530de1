"""Running means of parameters: when a model enters, and how, in float32 at least."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import tree_math


def zeros(params: optax.Params, dtype: Any = None) -> optax.Params:
    """A mean of no models: zeros in `dtype`, or in float32 or wider; it lies as `params` lie."""

    def leaf(param: Any) -> jax.Array:
        own = jnp.result_type(param)
        inexact = jnp.issubdtype(own, jnp.inexact)
        return jnp.zeros_like(
            param, dtype if dtype is not None and inexact else tree_math.accumulator_dtype(own)
        )

    return jax.tree.map(leaf, params)


def copy(params: optax.Params) -> optax.Params:
    """The parameters themselves in float32 or wider, in memory of their own."""
    return jax.tree.map(
        lambda p: jnp.array(p, tree_math.accumulator_dtype(jnp.result_type(p)), copy=True), params
    )


def towards(mean: optax.Params, params: optax.Params, share: jax.typing.ArrayLike) -> optax.Params:
    """`mean + share * (params - mean)` in the dtypes of `mean`; integer leaves are copied."""

    def leaf(mean: jax.Array, param: jax.Array) -> jax.Array:
        if not jnp.issubdtype(mean.dtype, jnp.inexact):
            return param
        return (mean + share * (param - mean)).astype(mean.dtype)

    return jax.tree.map(leaf, mean, params)


def evaluated(mean: optax.Params, params: optax.Params, begun: Any = True) -> optax.Params:
    """`mean` in the dtypes of `params`; `params` before it has `begun` and where it is masked."""

    def leaf(param: jax.Array, mean: Any) -> jax.Array:
        if tree_math.is_masked(mean):
            return param
        return jnp.where(begun, mean.astype(param.dtype), param)

    return jax.tree.map(leaf, params, tree_math.merge_masked([mean], params))


def moves(target: optax.Params, params: optax.Params, updates: optax.Updates) -> optax.Updates:
    """The updates, in the dtypes of `updates`, that take `params` to `target`."""

    def leaf(target: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
        if not jnp.issubdtype(target.dtype, jnp.inexact):
            return update
        return (target - param).astype(update.dtype)

    return jax.tree.map(leaf, target, params, updates)


def landed(target: optax.Params, params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Where `updates` that head for `target` take `params`: it, as rounded by the sum.

    Leaves that are kept in a wider dtype than the parameters or updates are those of `target`.
    """

    def leaf(target: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
        same = target.dtype == jnp.result_type(param) == jnp.result_type(update)
        return param + update if same and jnp.issubdtype(target.dtype, jnp.inexact) else target

    return jax.tree.map(leaf, target, params, updates)
