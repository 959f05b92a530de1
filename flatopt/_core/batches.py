"""Means over batches: a scan over stacked arrays, or a Python loop over an iterable."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import tree_math

LossFn = Callable[..., jax.Array]
# One of: None; a pytree of arrays with the batches on the leading axis; a list or another iterable
# of batches; a function without arguments that returns an iterator.
Batches = Any
Weights = Sequence[float] | jax.Array | None  # One number a batch.
Mean = Callable[..., Any]  # mean(function, *args): the mean of function(*args, batch).


class Function(Protocol, Hashable):
    """A function of traced arguments whose last is the batch, as a tuple of none or one.

    Hashable, so that equal functions share one compiled program: a frozen dataclass whose fields
    are the static parts.
    """

    def __call__(self, *args: Any) -> Any:
        """Returns a pytree of arrays."""
        ...


@dataclasses.dataclass(frozen=True)
class Call:
    """`function(*args)`, with the batch last if there is one: `loss_fn(params, batch)`."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Returns what the function returns."""
        *rest, batch = args
        return self.function(*rest, *batch)


class Data(NamedTuple):
    """Batches, and how much each counts.

    Attributes:
      batches: see `Batches`.
      weights: one number a batch, an array. None: stacked batches count alike, and those that come
        one by one count by the number of their examples.
    """

    batches: Batches
    weights: Any = None


def weigh(batches: Batches, weights: Weights) -> Data:
    """Puts the two together, and checks the weights."""
    return Data(batches, None if weights is None else check_weights(weights))


def check_weights(weights: Weights) -> Any:
    """One number a batch, as an array; raises for anything else."""
    if isinstance(weights, jax.core.Tracer):
        return weights
    array = np.asarray(weights, np.result_type(float))
    if array.ndim != 1 or not (np.isfinite(array) & (array >= 0)).all() or not array.sum() > 0:
        raise ValueError(
            f"weights={weights!r} must be finite numbers >= 0, one a batch, and not all zero."
        )
    # Only ratios count: times a power of two, which keeps every bit, they fit into float32.
    return np.ldexp(array, -np.frexp(array.max())[1])


def mean_over(data: Data, function: Function, *args: Any) -> Any:
    """The mean of `function(*args, batch)` over the batches, in float32 at least."""
    batches, weights = data
    if batches is None:
        return _once(function, args, ())
    if not is_separate(batches):
        return _scan(function, args, batches, weights)
    total: Any = None
    sum_of_weights = 0.0
    for batch, weight in with_weights(iterate(batches), weights):
        value = _once(function, args, (batch,))
        total = _add(_zeros_like(value) if total is None else total, value, weight)
        sum_of_weights += weight
    return jax.tree.map(lambda x: x / sum_of_weights, total)


def with_weights(batches: Iterator[Any], weights: Any) -> Iterator[tuple[Any, float]]:
    """Pairs of a batch and what it counts: its own weight, or its share of the first's examples."""
    if weights is not None:
        missing: Any = object()
        for batch, weight in itertools.zip_longest(batches, weights, fillvalue=missing):
            if batch is missing or weight is missing:
                raise ValueError(
                    f"weights has {len(weights)} entries and batches has "
                    f"{'fewer' if batch is missing else 'more'}: give one number a batch."
                )
            yield batch, weight
        return
    first: list[int | None] | None = None
    for batch in batches:
        lengths = _lengths(batch)
        first = lengths if first is None else first
        yield batch, _share(lengths, first)


def _lengths(batch: Any) -> list[int | None]:
    """The first axis of each leaf."""
    return [jnp.shape(x)[0] if jnp.ndim(x) else None for x in jax.tree.leaves(batch)]


def _share(lengths: list[int | None], first: list[int | None]) -> float:
    """Number of examples of a batch, as a multiple of the first batch's.

    Where the first axis changes from batch to batch, it counts examples: class weights, keys and
    biases keep theirs.
    """
    if lengths == first:
        return 1.0
    pairs = set(itertools.zip_longest(lengths, first))
    changed = {pair for pair in pairs if pair[0] != pair[1]}
    own, other = next(iter(changed), (None, None))
    if own is None or other is None or len(changed) != 1:
        raise ValueError(
            f"The number of examples of a batch cannot be told: the first axes of its arrays are "
            f"{lengths}, and those of the first batch {first}. Pass weights=[...], one number a "
            "batch."
        )
    return own / other


def is_separate(batches: Batches) -> bool:
    """Whether the batches come one by one, from Python."""
    if isinstance(batches, list):
        return True
    is_leaf = jax.tree_util.all_leaves([batches])
    return is_leaf and batches is not None and not hasattr(batches, "shape")


def iterate(batches: Batches) -> Iterator[Any]:
    """A new pass over separate batches."""
    return iter(batches() if callable(batches) else batches)


def first_batch(data: Data) -> tuple[Any, ...]:
    """The shapes of one batch: what the loss takes after the parameters. Raises on empty data."""
    batches, weights = data
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
    if weights is not None and len(weights) != leaves[0].shape[0]:
        raise ValueError(
            f"weights has {len(weights)} entries and batches has {leaves[0].shape[0]}: give one "
            "number a batch."
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


def run(algorithm: Algorithm, params: Any, data: Data, *inputs: Any) -> Any:
    """Runs a measure as one compiled program, or step by step if only Python can read the data."""
    if is_separate(data.batches):
        mean = functools.partial(mean_over, data)
        return algorithm(mean, PythonLoops(), params, *inputs)
    return _compiled(algorithm, params, data, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(algorithm: Algorithm, params: Any, data: Data, *inputs: Any) -> Any:
    return algorithm(functools.partial(mean_over, data), Loops(), params, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _once(function: Function, args: tuple[Any, ...], batch: tuple[Any, ...]) -> Any:
    return function(*args, batch)


@functools.partial(jax.jit, static_argnums=0)
def _scan(function: Function, args: tuple[Any, ...], batches: Batches, weights: Any) -> Any:
    number = len(jax.tree.leaves(batches)[0])
    if number == 1:
        return function(*args, (jax.tree.map(lambda x: x[0], batches),))

    def one(total: Any, row: tuple[Any, Any]) -> tuple[Any, None]:
        batch, weight = row
        value = function(*args, (batch,))
        if weight is None:
            return jax.tree.map(jnp.add, total, value), None
        return _add(total, value, weight), None

    example = jax.eval_shape(
        lambda args, batches: function(*args, (jax.tree.map(lambda x: x[0], batches),)),
        args,
        batches,
    )
    total, _ = jax.lax.scan(one, _zeros_like(example), (batches, weights))
    divisor = number if weights is None else jnp.sum(weights)
    return jax.tree.map(lambda x: (x / divisor).astype(x.dtype), total)


@jax.jit
def _add(total: Any, value: Any, weight: jax.Array) -> Any:
    # A batch without weight adds nothing, not even its NaN.
    return jax.tree.map(
        lambda t, v: t + jnp.where(weight > 0, weight * v, 0).astype(t.dtype), total, value
    )


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jnp.zeros_like(
            x, dtype=tree_math.accumulator_dtype(jnp.promote_types(x.dtype, jnp.float32))
        ),
        tree,
    )


def _arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)
