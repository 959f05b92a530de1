"""Running means of parameters: when a model enters, and how, in float32 at least."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import tree_math


def zeros(params: optax.Params, dtype: Any = None) -> optax.Params:
    """A mean of no models: zeros in `dtype`, or in float32 or wider; it lies as `params` lie.

    What no mean can be taken of, such as counters and random keys, is kept as it is.
    """

    def leaf(param: Any) -> jax.Array:
        kept = _dtype(param, dtype)
        return jnp.array(param, copy=True) if kept is None else jnp.zeros_like(param, kept)

    return jax.tree.map(leaf, params)


def copy(params: optax.Params, dtype: Any = None) -> optax.Params:
    """The parameters in `dtype`, or in float32 or wider, in memory of their own."""
    return jax.tree.map(lambda p: jnp.array(p, _dtype(p, dtype), copy=True), params)


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
        own = jnp.result_type(param)
        # A random key has no other dtype, and none of its own numbers.
        mean = mean if mean.dtype == own else mean.astype(own)
        return jnp.where(begun, mean, param)

    return jax.tree.map(leaf, params, tree_math.merge_masked([mean], params))


def reached(params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Where `updates` take `params`; what no number can be added to, such as keys, stays."""

    def leaf(update: Any, param: Any) -> Any:
        if update is None or jnp.issubdtype(jnp.result_type(param), jax.dtypes.extended):
            return param
        return optax.apply_updates(param, update)

    return jax.tree.map(leaf, updates, params, is_leaf=lambda x: x is None)


def moves(target: optax.Params, params: optax.Params, updates: optax.Updates) -> optax.Updates:
    """The updates, in dtypes that hold the parameters' numbers, that take `params` to `target`."""

    def leaf(target: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
        if not jnp.issubdtype(target.dtype, jnp.inexact):
            return update
        dtype = jnp.promote_types(jnp.result_type(update), jnp.result_type(param))
        return (target - param).astype(dtype)

    return jax.tree.map(leaf, target, params, updates)


def landed(target: optax.Params, params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Where `updates` that head for `target` take `params`: it, as rounded by the sum.

    Leaves that are kept in a wider dtype than the parameters or updates are those of `target`.
    """

    def leaf(target: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
        same = target.dtype == jnp.result_type(param) == jnp.result_type(update)
        return param + update if same and jnp.issubdtype(target.dtype, jnp.inexact) else target

    return jax.tree.map(leaf, target, params, updates)


def with_complex(dtype: Any, own: Any) -> Any:
    """`dtype`, or, where `own` is complex, the complex dtype of that precision."""
    is_complex = jnp.issubdtype(own, jnp.complexfloating)
    return jnp.promote_types(dtype, jnp.complex64) if is_complex else dtype


def _dtype(param: Any, dtype: Any) -> Any:
    """The dtype that a mean of `param` is kept in; None where there is no mean.

    A real `dtype` stands for its complex counterpart where parameters are complex.
    """
    own = jnp.result_type(param)
    if not jnp.issubdtype(own, jnp.inexact):
        return None
    return tree_math.accumulator_dtype(own) if dtype is None else with_complex(dtype, own)
