"""Which leaves a measure varies, and the checks of what every measure is given."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import tree_math

Vector = tuple[jax.Array, ...]  # The varied leaves alone, in float32 at least.
Mask = Any


@dataclasses.dataclass(frozen=True)
class Variables:
    """Which leaves of a tree vary; the others are constants.

    Attributes:
      flags: one bool a leaf, in the order of `jax.tree.leaves`.
    """

    flags: tuple[bool, ...]

    def take(self, tree: Any) -> Vector:
        """The varied leaves of `tree`, in float32 at least."""
        leaves = jax.tree.leaves(tree)
        return tuple(
            jnp.asarray(x).astype(tree_math.accumulator_dtype(x.dtype))
            for x, flag in zip(leaves, self.flags, strict=True)
            if flag
        )

    def put(self, params: Any, vector: Vector) -> Any:
        """`params` with the varied leaves replaced."""
        values = iter(vector)
        leaves = [
            next(values) if flag else x
            for x, flag in zip(jax.tree.leaves(params), self.flags, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def spread(self, params: Any, vector: Vector, rows: int | None = None) -> Any:
        """A tree like `params` that is zero outside `vector`, with `rows` on a leading axis."""
        lead = () if rows is None else (rows,)
        zeros = jax.tree.map(lambda x: jnp.zeros(lead + jnp.shape(x), jnp.result_type(x)), params)
        return self.put(zeros, vector)


def dimension(vector: Vector) -> int:
    """Number of entries."""
    return sum(math.prod(x.shape) for x in vector)


def select(params: Any, mask: Mask = None) -> Variables:
    """The leaves that `mask` marks: a pytree of bools, a prefix of one, or a function to one."""
    tree_mask = mask(params) if callable(mask) else (True if mask is None else mask)
    try:
        spread = jax.tree.map(
            lambda chosen, leaves: jax.tree.map(lambda _: bool(chosen), leaves), tree_mask, params
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"mask={tree_mask!r} must be a pytree of bools with the structure of the parameters or "
            "a prefix of it, or a function from the parameters to one."
        ) from error
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
    chosen = zip(dtypes, jax.tree.leaves(spread), strict=True)
    flags = tuple(flag and jnp.issubdtype(dtype, jnp.inexact) for dtype, flag in chosen)
    if not any(flags):
        raise ValueError("There is nothing to vary: no floating-point leaf of params is chosen.")
    if not dimension(Variables(flags).take(params)):
        raise ValueError("There is nothing to vary: the chosen leaves of params have no entries.")
    if any(
        f and jnp.issubdtype(d, jnp.complexfloating) for d, f in zip(dtypes, flags, strict=True)
    ):
        raise ValueError(
            "params holds complex leaves, whose Hessian is not defined here. Split them into real "
            "and imaginary parts, or leave them out with mask."
        )
    return Variables(flags)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Loss and gradient on one batch."""

    loss_fn: _batches.LossFn
    variables: Variables

    def __call__(
        self, params: Any, vector: Vector, batch: tuple[Any, ...]
    ) -> tuple[jax.Array, Vector]:
        """Returns them where the varied leaves are `vector`."""

        def loss(vector: Vector) -> jax.Array:
            return self.loss_fn(self.variables.put(params, vector), *batch)

        return jax.value_and_grad(loss)(vector)


def prepare(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    data: _batches.Data,
    mask: Mask,
    *,
    model: bool = False,
) -> Variables:
    """Checks what every measure is given, and returns the leaves to vary.

    Outside `jax.jit` it evaluates the loss once, and refuses one that is NaN or infinite.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn={loss_fn!r} must be callable as loss_fn(params, batch).")
    variables = select(params, mask)
    shape = check_evaluates(loss_fn, params, data)
    if model:
        return variables
    leaves = jax.tree.leaves(shape)
    if len(leaves) != 1 or leaves[0].shape or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        found = ", ".join(f"{x.dtype}{list(x.shape)}" for x in leaves)
        raise ValueError(
            f"loss_fn must return one real scalar, and returns {found}. Take the mean over the "
            "batch, and drop auxiliary output."
        )
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
        point = variables.put(params, variables.take(params))
        value = _batches.mean_over(data, _batches.Call(loss_fn), point)
        if not isinstance(value, jax.core.Tracer) and not jnp.isfinite(value):
            raise ValueError(
                f"loss_fn is {value} at params: nothing can be measured there. Look for a run that "
                "diverged, or for data that hold NaN."
            )
    return variables


def check_evaluates(function: Callable[..., Any], params: optax.Params, data: _batches.Data) -> Any:
    """The shapes that `function` returns on one batch; one clear error if it returns none."""
    batch = _batches.first_batch(data)
    try:
        return jax.eval_shape(function, params, *batch)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        shapes = ", ".join(str(x.shape) for x in jax.tree.leaves(batch)) or "no data"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"loss_fn(params, batch) fails on one batch, arrays of shapes {shapes}: {reason} "
            "(Stacked data have the batches on the leading axis; for one batch pass [batch]. A "
            "batch is handed over whole: for loss_fn(params, x, y) write a function of (x, y).)"
        ) from error


def check_alike(name: str, tree: Any, params: optax.Params) -> None:
    """Raises unless `tree` has the leaves of `params`, in the same shapes."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): jnp.shape(x) for path, x in leaves}

    if shapes(tree) != shapes(params):
        raise ValueError(
            f"{name} has leaves of shapes {shapes(tree)}: it must be a tree like params, with "
            f"shapes {shapes(params)}."
        )
