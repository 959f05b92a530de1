"""Losses on lines and planes through parameter space: numbers first, pictures with `plots`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng, tree_math
from flatopt._core import progress as _progress


class Plane(NamedTuple):
    """A plane in parameter space.

    Attributes:
      origin: tree like the parameters.
      directions: two trees like the parameters.
      coordinates: [n, 2], where the networks that span it lie, or None.
    """

    origin: optax.Params
    directions: tuple[optax.Params, optax.Params]
    coordinates: jax.Array | None = None


def random_direction(
    key: jax.typing.ArrayLike, params: optax.Params, normalisation: str = "filter"
) -> optax.Params:
    r"""A random direction in units of the parameters.

    .. math:: d_f \leftarrow \|w_f\| \, d_f / \|d_f\|

    Args:
      key: random key or integer seed. One key gives the same noise for every network of one shape.
      params: where the direction will start.
      normalisation: "filter": each filter, which leads to one output unit (the last axis of a
        kernel), is as long as that of `params`; biases and scales do not move. "leaf": one length
        for each leaf. "none": standard normal. Static.

    Returns:
      A tree like `params`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
      >>> print(jnp.linalg.norm(flatopt.landscape.random_direction(0, params)["kernel"]))
      5.0

    References:
      Li, Xu, Taylor, Studer, Goldstein. Visualizing the Loss Landscape of Neural Nets.
      arXiv:1712.09913

    Cost: 0 losses.
    """
    checks.check_choice("normalisation", normalisation, ("filter", "leaf", "none"))

    def leaf(noise: jax.Array, param: jax.Array) -> jax.Array:
        if normalisation == "none":
            return noise
        if normalisation == "filter" and param.ndim < 2:
            return jnp.zeros_like(param)
        axes = tuple(range(param.ndim - 1)) if normalisation == "filter" else None
        lengths = [jnp.sqrt(jnp.sum(x**2, axes, keepdims=True)) for x in (param, noise)]
        return noise * (lengths[0] / (lengths[1] + tree_math.EPSILON)).astype(noise.dtype)

    noise = optax.tree.random_like(rng.as_key(key), params, jax.random.normal)
    return jax.tree.map(leaf, noise, params)


def plane_through(first: optax.Params, second: optax.Params, third: optax.Params) -> Plane:
    r"""The plane through three networks, with orthonormal directions.

    .. math:: u = \frac{w_2 - w_1}{\|w_2 - w_1\|}, \qquad
       v \propto (w_3 - w_1) - \langle w_3 - w_1, u \rangle u

    Args:
      first, second, third: the origin, where the first direction leads, and the third network.

    Returns:
      `Plane` with the coordinates of the three, in units of Euclidean distance.

    Raises:
      ValueError: outside `jax.jit`, if the three lie on one line.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> corners = [jnp.array(x) for x in ([0.0, 0.0], [3.0, 0.0], [3.0, 4.0])]
      >>> print(flatopt.landscape.plane_through(*corners).coordinates[2])
      [3. 4.]

    References:
      Garipov, Izmailov, Podoprikhin, Vetrov, Wilson. Loss Surfaces, Mode Connectivity, and Fast
      Ensembling of DNNs. arXiv:1802.10026

    Cost: 0 losses.
    """
    to_second, to_third = optax.tree.sub(second, first), optax.tree.sub(third, first)
    length = tree_math.norm(to_second)
    u = tree_math.scale(1 / (length + tree_math.EPSILON), to_second)
    along = tree_math.vdot(u, to_third)
    rest = jax.tree.map(lambda x, y: x - (along * y).astype(x.dtype), to_third, u)
    height = tree_math.norm(rest)
    spread = jnp.stack([length, height])
    if not isinstance(spread, jax.core.Tracer) and not height > 1e-6 * (length + jnp.abs(along)):
        raise ValueError("The three networks lie on one line: they span no plane.")
    v = tree_math.scale(1 / (height + tree_math.EPSILON), rest)
    zero = jnp.zeros_like(length)
    corners = jnp.stack(
        [jnp.stack([zero, zero]), jnp.stack([length, zero]), jnp.stack([along, height])]
    )
    return Plane(first, (u, v), corners)


def project(params: optax.Params, plane: Plane) -> jax.Array:
    r"""The coordinates of a network's projection onto a plane, by least squares.

    .. math:: \arg\min_{x, y} \|w - w_0 - x u - y v\|

    Args:
      params: tree like the plane's origin; with a leading axis under `jax.vmap` (a trajectory).
      plane: the plane; its directions need not be orthogonal.

    Returns:
      [2] coordinates.

    Raises:
      ValueError: if the trees differ in structure.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import landscape
      >>> plane = landscape.Plane(jnp.zeros(3), (jnp.array([1.0, 0, 0]), jnp.array([0, 2.0, 0])))
      >>> print(landscape.project(jnp.array([3.0, 4.0, 5.0]), plane))
      [3. 2.]

    Cost: 0 losses.
    """
    offset = optax.tree.sub(params, plane.origin)
    u, v = plane.directions
    gram = jnp.stack([jnp.stack([tree_math.vdot(a, b) for b in (u, v)]) for a in (u, v)])
    return jnp.linalg.solve(gram, jnp.stack([tree_math.vdot(u, offset), tree_math.vdot(v, offset)]))


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Losses at `origin + sum of coordinates times directions`, for a list of coordinates."""

    loss_fn: _batches.LossFn
    chunk: int | None

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        directions: tuple[Any, ...],
        coordinates: jax.Array,
    ) -> jax.Array:
        def at(coordinate: jax.Array) -> jax.Array:
            place = params
            for number, direction in enumerate(directions):
                share = coordinate[number]
                place = jax.tree.map(
                    lambda w, d, share=share: w + (share * d).astype(w.dtype), place, direction
                )
            return mean(_batches.Call(self.loss_fn), place)

        if self.chunk is not None and loops.compiled:
            return jax.lax.map(at, coordinates, batch_size=self.chunk)
        return loops.map(at, coordinates)


def line(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    direction: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    positions: jax.typing.ArrayLike | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""The loss along a line.

    .. math:: t \mapsto L(w + t d)

    Args:
      loss_fn: loss or error of `(params, batch)`, or of `(params)` without `batches`. Static.
      params, direction: w, and d like it: `random_direction`, an eigenvector, a difference.
      batches, weights: the data; see `flatopt.measures.hessian_vector_product`.
      positions: [n]; None: 25 from -1 to 1.
      chunk: how many positions to evaluate at once; None: one. Static.

    Returns:
      Positions and losses.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> w, direction, loss_fn = jnp.zeros(2), jnp.array([1.0, 2.0]), lambda w: jnp.sum(w**2)
      >>> print(flatopt.landscape.line(loss_fn, w, direction, positions=[0.0, 1.0, 2.0])[1])
      [ 0.  5. 20.]

    References:
      Goodfellow, Vinyals, Saxe. Qualitatively Characterizing Neural Network Optimization Problems.
      arXiv:1412.6544

    Cost: 1 loss over the data a position, in `chunk` copies of the parameters.
    """
    data = _batches.weigh(batches, weights)
    places = jnp.linspace(-1.0, 1.0, 25) if positions is None else jnp.asarray(positions, float)
    if places.ndim != 1 or not places.size:
        raise ValueError(f"positions has shape {places.shape}: it must be a list of numbers.")
    checks.check_count("chunk", chunk, 1)
    _batches.first_batch(data)
    grid = _Grid(loss_fn, chunk)
    return places, _batches.run(grid, params, data, (direction,), places[:, None])


def plane(
    loss_fn: _batches.LossFn,
    where: Plane,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    xs: Sequence[float] | jax.typing.ArrayLike,
    ys: Sequence[float] | jax.typing.ArrayLike,
    chunk: int | None = None,
    progress: bool = False,
) -> jax.Array:
    r"""The loss on a grid in a plane.

    .. math:: (x, y) \mapsto L(w + x u + y v)

    Args:
      loss_fn, batches, weights, chunk: the loss or error, and the data; see `line`.
      where: the plane: `plane_through(...)`, or `Plane(params, (u, v))`.
      xs, ys: [n] and [m] coordinates in the first and in the second direction.
      progress: whether to show a bar, one step a row (needs tqdm; not under `jax.jit`).

    Returns:
      [m, n] losses: row i belongs to `ys[i]`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> where = flatopt.landscape.Plane(jnp.zeros(2), tuple(jnp.eye(2)))
      >>> print(flatopt.landscape.plane(lambda w: w @ w, where, xs=[0.0, 1.0], ys=[0.0, 2.0]))
      [[0. 1.]
       [4. 5.]]

    References:
      Li, Xu, Taylor, Studer, Goldstein. Visualizing the Loss Landscape of Neural Nets.
      arXiv:1712.09913

    Cost: 1 loss over the data a point, in `chunk` copies of the parameters.
    """
    data = _batches.weigh(batches, weights)
    columns, rows = jnp.asarray(xs, float), jnp.asarray(ys, float)
    for name, values in (("xs", columns), ("ys", rows)):
        if values.ndim != 1 or not values.size:
            raise ValueError(f"{name} has shape {values.shape}: it must be a list of numbers.")
    checks.check_count("chunk", chunk, 1)
    _batches.first_batch(data)
    grid = _Grid(loss_fn, chunk)

    def losses(points: jax.Array) -> jax.Array:
        return _batches.run(grid, where.origin, data, where.directions, points)

    def row(y: jax.Array) -> jax.Array:
        return jnp.stack([columns, jnp.full_like(columns, y)], axis=1)

    if progress:
        return jnp.stack([losses(row(y)) for y in _progress.bar(rows, "landscape", progress)])
    points = jnp.concatenate([row(y) for y in rows])
    return losses(points).reshape((len(rows), len(columns)))
