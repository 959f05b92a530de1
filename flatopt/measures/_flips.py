"""Binary weights: ways from one to another sign by sign, and errors after random flips."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng
from flatopt.measures import _barrier, _results, _variables
from flatopt.measures._barrier import Barrier
from flatopt.measures._local_energy import LocalEnergy
from flatopt.measures._variables import Mask, Variables

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1)


def _split(flat: jax.Array, tree: Any) -> Any:
    """A vector cut into the shapes of the leaves of `tree`."""
    leaves = jax.tree.leaves(tree)
    ends = np.cumsum([math.prod(jnp.shape(x)) for x in leaves])[:-1]
    parts = zip(jnp.split(flat, ends), leaves, strict=True)
    rows = [part.reshape(jnp.shape(x)) for part, x in parts]
    return jax.tree.unflatten(jax.tree.structure(tree), rows)


def _differ(params: Any, other: Any) -> jax.Array:
    """Where two trees differ, as one vector."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
    return jnp.concatenate([jnp.ravel(jnp.not_equal(a, b)) for a, b in pairs])


def _random_ranks(key: jax.Array, differ: jax.Array) -> jax.Array:
    """Places 0, 1, ... in a random order of the entries that differ, then those of the others."""
    draws = jnp.where(differ, jax.random.uniform(key, differ.shape), 2.0)
    return jnp.argsort(jnp.argsort(draws))


def _take_over(params: Any, other: Any, flipped: jax.Array) -> Any:
    """`params` with the flipped entries of `other`."""
    return jax.tree.map(jnp.where, _split(flipped, params), other, params)


def flip_path(
    params: optax.Params,
    other_params: optax.Params,
    position: jax.typing.ArrayLike,
    *,
    key: jax.typing.ArrayLike = 0,
) -> optax.Params:
    r"""A point of a shortest way between two binary networks: differing signs flipped one by one.

    .. math:: w_i(t) = w'_i \; \text{ if } \; r_i < t D, \quad \text{else } w_i

    with r a random order 0, 1, ..., D - 1 of the D entries that differ.

    Args:
      params, other_params: networks of the same shapes.
      position: t in [0, 1], 0 at the first; t D is rounded.
      key: of the order, or an integer seed: one key, one way.

    Returns:
      A tree like `params`, each entry of which is one of the two networks'.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> w = measures.flip_path(-jnp.ones(10), jnp.ones(10), 0.3)
      >>> print(jnp.sum(w > 0))
      3

    References:
      Pittorino and others. Deep Networks on Toroids. arXiv:2202.03038

    Cost: nothing.
    """
    _variables.check_alike("other_params", other_params, params)
    differ = _differ(params, other_params)
    ranks = _random_ranks(rng.as_key(key), differ)
    return _take_over(params, other_params, ranks < jnp.round(position * jnp.sum(differ)))


@dataclasses.dataclass(frozen=True)
class _Profile:
    """Errors on a way of flips, random or greedy.

    Attributes:
      error_fn: the error.
      greedy: whether each point flips the signs that cost least, not the next in a random order.
    """

    error_fn: _batches.LossFn
    greedy: bool

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        other: Any,
        positions: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        """Returns the error at each position."""
        differ = _differ(params, other)
        size = jnp.sum(differ)
        ranks = _random_ranks(key, differ)

        def error_at(flipped: jax.Array) -> jax.Array:
            return mean(_batches.Call(self.error_fn), _take_over(params, other, flipped))

        if not self.greedy:
            return loops.map(lambda t: error_at(ranks < jnp.round(t * size)), positions)
        sites = jnp.arange(len(differ))

        def advance(carry: Any) -> Any:
            index, flipped, errors = carry
            count = jnp.round(positions[index] * size)
            costs = loops.map(lambda i: error_at(flipped | (sites == i)), sites)
            # What is flipped stays so, what does not differ comes last; ranks break ties.
            costs = jnp.where(flipped, -jnp.inf, jnp.where(differ, costs, jnp.inf))
            flipped = jnp.argsort(jnp.lexsort((ranks, costs))) < count
            return index + 1, flipped, errors.at[index].set(error_at(flipped))

        start = jnp.zeros_like(differ)
        first = error_at(start)
        errors = jnp.full(len(positions), first)
        return loops.repeat(advance, (jnp.asarray(1), start, errors), len(positions) - 1)[2]


def flip_barrier(
    error_fn: _batches.LossFn,
    params: optax.Params,
    other_params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    order: str = "random",
    num_points: int = 25,
    key: jax.typing.ArrayLike = 0,
) -> Barrier:
    r"""The rise of the error while the signs of one binary network become those of another.

    .. math:: \max_t \, E(w(t)) - (1 - t) E(w) - t E(w')

    Args:
      error_fn, batches, weights: a loss or an error, and the data; see `hessian_vector_product`.
      params, other_params: networks of the same shapes.
      order: "random", that of `flip_path`, or "greedy": at each point those that cost least now.
      num_points, key: points, >= 2, ends included (static); key of order and ties, or a seed.

    Returns:
      `Barrier`: height, positions and errors.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> lean = lambda w: jnp.abs(jnp.mean(w))  # As many of one sign as of the other.
      >>> w = jnp.where(jnp.arange(10) < 5, 1.0, -1.0)
      >>> print(measures.flip_barrier(lean, w, -w, order="greedy", num_points=11).height)
      0.2

    References:
      Pittorino and others. Deep Networks on Toroids. arXiv:2202.03038

    Cost: `num_points` losses over the data; "greedy" one for each point and each weight.
    """
    if order not in ("random", "greedy"):
        raise ValueError(f'order={order!r} must be "random" or "greedy".')
    checks.check_count("num_points", num_points, 2)
    data = _batches.weigh(batches, weights)
    for tree in (params, other_params):
        _variables.check_alike("other_params", tree, params)
        _variables.prepare(error_fn, tree, data, None)
    positions = jnp.linspace(0.0, 1.0, num_points)
    algorithm = _Profile(error_fn, order == "greedy")
    errors = _batches.run(algorithm, params, data, other_params, positions, rng.as_key(key))
    return Barrier(_barrier.barrier_height(positions, errors), positions, errors)


@dataclasses.dataclass(frozen=True)
class _Flips:
    """Rise of the error for each draw and each share: [draws, shares], and the error itself."""

    error_fn: _batches.LossFn
    variables: Variables
    num_samples: int

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        shares: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        point = self.variables.take(params)
        size = _variables.dimension(point)

        def error_at(vector: Any) -> jax.Array:
            return mean(_batches.Call(self.error_fn), self.variables.put(params, vector))

        error = error_at(point)

        def one_draw(sample_key: jax.Array) -> jax.Array:
            # One order for every share: each set of flips holds the smaller ones.
            ranks = jax.random.permutation(sample_key, size)

            def at(share: jax.Array) -> jax.Array:
                flipped = _split(ranks < jnp.round(share * size), point)
                return error_at(jax.tree.map(lambda w, f: jnp.where(f, -w, w), point, flipped))

            return loops.map(at, shares)

        return loops.map(one_draw, jax.random.split(key, self.num_samples)) - error, error


def flip_energy(
    error_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    shares: Sequence[float] | jax.Array = SHARES,
    num_samples: int = 32,
    key: jax.typing.ArrayLike = 0,
    mask: Mask = None,
) -> LocalEnergy:
    r"""The local energy of binary weights: the rise of the error when random signs are flipped.

    .. math:: \delta E(d) = \mathbb E_{|S| = d n} \, E(w \odot (1 - 2 \cdot 1_S)) - E(w)

    Args:
      error_fn: `error_fn(params, batch)`, a batch's mean, such as its share of mistakes. Static.
      params, batches, weights, mask: see `hessian_vector_product`.
      shares: Hamming distances d, as shares of the n weights, in [0, 1]; d n is rounded.
      num_samples, key: draws, >= 1, one order of flips each (static); key or integer seed.

    Returns:
      `LocalEnergy`: the curve over `shares`, which stand in `sigmas`, with its standard errors.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> result = measures.flip_energy(lambda w: jnp.mean(w < 0), jnp.ones(99), shares=[1 / 3])
      >>> print(result.energy)
      [0.333]

    References:
      Baldassi, Borgs, Chayes, Ingrosso, Lucibello, Saglietti, Zecchina. Unreasonable Effectiveness
      of Learning Neural Networks. arXiv:1605.06444

    Cost: `num_samples * len(shares)` errors over the data; no gradients.
    """
    data = _batches.weigh(batches, weights)
    sizes = jnp.asarray(shares, jnp.result_type(float))
    if sizes.ndim != 1 or not sizes.size:
        raise ValueError(f"shares={shares!r} must be a sequence of numbers.")
    checks.check_number("shares", sizes, low=0.0, high=1.0)
    checks.check_count("num_samples", num_samples, 1)
    variables = _variables.prepare(error_fn, params, data, mask)
    algorithm = _Flips(error_fn, variables, num_samples)
    rises, error = _batches.run(algorithm, params, data, sizes, rng.as_key(key))
    return LocalEnergy(sizes, *_results.estimate(rises), error)
