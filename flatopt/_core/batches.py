"""Means over batches: a scan over stacked arrays, or a Python loop over an iterable."""

import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from flatopt._core import tree_math

LossFn = Callable[..., jax.Array]
# One of: None; a pytree of arrays with the batches on the leading axis; a list or another iterable
# of batches; a function without arguments that returns an iterator.
Batches = Any
Mean = Callable[..., Any]  # mean(function, *args): the mean of function(*args, batch).


class Function(Protocol, Hashable):
    """A function of traced arguments whose last is the batch, as a tuple of none or one.

    Hashable, so that equal functions share one compiled program: a frozen dataclass whose fields
    are the static parts.
    """

    def __call__(self, *args: Any) -> Any:
        """Returns a pytree of arrays."""
        ...


def mean_over(batches: Batches, function: Function, *args: Any) -> Any:
    """The mean of `function(*args, batch)` over the batches, in float32 at least.

    Batches of an iterable count by the length of their leading axis, so that a shorter last batch
    gives the mean over examples.
    """
    if batches is None:
        return _once(function, args, ())
    if not is_separate(batches):
        return _scan(function, args, batches)
    total: Any = None
    weight = 0
    for batch in iterate(batches):
        size = size_of(batch)
        value = _once(function, args, (batch,))
        total = _add(total, value, size) if weight else _add(_zeros_like(value), value, size)
        weight += size
    return jax.tree.map(lambda x: x / weight, total)


def is_separate(batches: Batches) -> bool:
    """Whether the batches come one by one, from Python."""
    if isinstance(batches, list):
        return True
    is_leaf = jax.tree_util.all_leaves([batches])
    return is_leaf and batches is not None and not hasattr(batches, "shape")


def iterate(batches: Batches) -> Iterator[Any]:
    """A new pass over separate batches."""
    return iter(batches() if callable(batches) else batches)


def first_batch(batches: Batches) -> tuple[Any, ...]:
    """The shapes of one batch: what the loss takes after the parameters. Raises on empty data."""
    if batches is None:
        return ()
    if is_separate(batches):
        if not callable(batches) and not hasattr(batches, "__iter__"):
            raise ValueError(
                f"batches={batches!r} is none of: a pytree of arrays with the batches on the "
                "leading axis, a list or another iterable of batches, a function that returns one."
            )
        iterator = iterate(batches)
        if iterator is batches:
            raise ValueError(
                "batches is an iterator that can be read only once, and a measure reads the data "
                "several times. Pass list(batches), or a function that returns a new iterator."
            )
        batch = next(iterator, None)
        if batch is None:
            raise ValueError("batches is empty: there is no data to measure on.")
        if any(0 in jnp.shape(x) for x in jax.tree.leaves(batch)):
            raise ValueError("batches is empty: its first batch holds an array without entries.")
        return (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _arrays(batch)),)
    leaves = jax.tree.leaves(batches)
    sizes = {x.shape[0] if jnp.ndim(x) else None for x in leaves}
    if not leaves or any(0 in jnp.shape(x) for x in leaves):
        raise ValueError("batches is empty: there is no data to measure on.")
    if None in sizes or len(sizes) > 1:
        shapes = ", ".join(str(jnp.shape(x)) for x in leaves)
        raise ValueError(
            f"batches has arrays of shapes {shapes}: each needs the batches on its leading axis, "
            "the same number in all. For one batch (x, y) pass [(x, y)]."
        )
    return (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches),)


class Loops:
    """Loops inside a compiled program."""

    compiled = True

    def map(self, function: Callable[[Any], Any], xs: Any) -> Any:
        """`function` of each row of `xs`, stacked; one at a time."""
        return jax.lax.map(function, xs)

    def repeat(self, function: Callable[[Any], Any], carry: Any, times: int) -> Any:
        """`function` applied `times` times."""
        return jax.lax.fori_loop(0, times, lambda _, c: function(c), carry)

    def run_while(self, condition: Callable[[Any], Any], body: Any, carry: Any) -> Any:
        """`body` applied while `condition` holds."""
        return jax.lax.while_loop(condition, body, carry)


class PythonLoops(Loops):
    """The same loops in Python, for data that only Python can read."""

    compiled = False

    def map(self, function: Callable[[Any], Any], xs: Any) -> Any:
        """`function` of each row of `xs`, stacked."""
        number = len(jax.tree.leaves(xs)[0])
        rows = [function(jax.tree.map(lambda x, i=i: x[i], xs)) for i in range(number)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    def repeat(self, function: Callable[[Any], Any], carry: Any, times: int) -> Any:
        """`function` applied `times` times."""
        for _ in range(times):
            carry = function(carry)
        return carry

    def run_while(self, condition: Callable[[Any], Any], body: Any, carry: Any) -> Any:
        """`body` applied while `condition` holds."""
        while condition(carry):
            carry = body(carry)
        return carry


class Algorithm(Protocol, Hashable):
    """A measure: a frozen dataclass whose fields are its static settings."""

    def __call__(self, mean: Mean, loops: Loops, params: Any, *inputs: Any) -> Any:
        """Returns the result, a pytree."""
        ...


def run(algorithm: Algorithm, params: Any, batches: Batches, *inputs: Any) -> Any:
    """Runs a measure as one compiled program, or step by step if only Python can read the data."""
    if is_separate(batches):
        mean = functools.partial(mean_over, batches)
        return algorithm(mean, PythonLoops(), params, *inputs)
    return _compiled(algorithm, params, batches, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(algorithm: Algorithm, params: Any, batches: Batches, *inputs: Any) -> Any:
    return algorithm(functools.partial(mean_over, batches), Loops(), params, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _once(function: Function, args: tuple[Any, ...], batch: tuple[Any, ...]) -> Any:
    return function(*args, batch)


@functools.partial(jax.jit, static_argnums=0)
def _scan(function: Function, args: tuple[Any, ...], batches: Batches) -> Any:
    number = len(jax.tree.leaves(batches)[0])
    if number == 1:
        return function(*args, (jax.tree.map(lambda x: x[0], batches),))

    def one(total: Any, batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*args, (batch,))), None

    example = jax.eval_shape(
        lambda args, batches: function(*args, (jax.tree.map(lambda x: x[0], batches),)),
        args,
        batches,
    )
    total, _ = jax.lax.scan(one, _zeros_like(example), batches)
    return jax.tree.map(lambda x: x / number, total)


@jax.jit
def _add(total: Any, value: Any, weight: jax.Array) -> Any:
    return jax.tree.map(lambda t, v: t + (weight * v).astype(t.dtype), total, value)


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jnp.zeros_like(
            x, dtype=tree_math.accumulator_dtype(jnp.promote_types(x.dtype, jnp.float32))
        ),
        tree,
    )


def size_of(batch: Any) -> int:
    """How much a batch counts: the number of its examples."""
    leaves = jax.tree.leaves(batch)
    return leaves[0].shape[0] if leaves and jnp.ndim(leaves[0]) else 1


def _arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)
