"""Running means of parameters: when a model enters, and how, in float32 at least."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _tree


def timing(start: int | None, every: int | None) -> tuple[int, int]:
    """Checks `start` and `every`; returns the number of the first update, and the period."""
    _checks.check_count("start", start, 0)
    _checks.check_count("every", every, 1)
    first, period = max(start or 1, 1), every or 1
    if start == 0 and period > 1:
        first = period  # "After updates 0, every, 2 every, ...": nothing is averaged after none.
    return first, period


def is_due(step: jax.Array, first: int, period: int) -> jax.Array:
    """Whether update number `step`, counted from 1, is one of `first`, `first + period`, ..."""
    return (step >= first) & ((step - first) % period == 0)


def zeros(params: optax.Params, dtype: Any = None) -> optax.Params:
    """A mean of no models: zeros in `dtype`, or in float32 or wider; it lies as `params` lie."""

    def leaf(param: Any) -> jax.Array:
        own = jnp.result_type(param)
        inexact = jnp.issubdtype(own, jnp.inexact)
        return jnp.zeros_like(
            param, dtype if dtype is not None and inexact else _tree.accumulator_dtype(own)
        )

    return jax.tree.map(leaf, params)


def copy(params: optax.Params) -> optax.Params:
    """The parameters themselves in float32 or wider, in memory of their own."""
    return jax.tree.map(
        lambda p: jnp.array(p, _tree.accumulator_dtype(jnp.result_type(p)), copy=True), params
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
        if _tree.is_masked(mean):
            return param
        return jnp.where(begun, mean.astype(param.dtype), param)

    return jax.tree.map(leaf, params, _tree.merge_masked([mean], params))


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
