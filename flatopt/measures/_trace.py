"""The trace of the Hessian: Hutchinson, Hutch++ and XTrace, with standard errors."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng, tree_math
from flatopt.measures import _basis, _operator, _results
from flatopt.measures._operator import Operator, power_of_two
from flatopt.measures._variables import Mask, Vector, dimension

# Fewest products that give a value, and products that come in one go.
_METHODS = {"hutchinson": 1, "hutch++": 3, "xtrace": 2}


class Trace(NamedTuple):
    """Result of `trace`.

    Attributes:
      value: the estimate.
      standard_error: its standard error, over the draws; NaN for a single draw.
      samples: the single estimates whose mean is `value`.
      num_products: number of products with the matrix that were taken; a Python int outside jit.
    """

    value: jax.Array
    standard_error: jax.Array
    samples: jax.Array
    num_products: jax.typing.ArrayLike


@dataclasses.dataclass(frozen=True)
class _Trace:
    operator: Operator
    method: str
    num_draws: int

    def __call__(
        self, mean: _batches.Mean, loops: _batches.Loops, params: Any, key: jax.Array
    ) -> jax.Array:
        """Returns the samples."""
        point, product = self.operator.at(mean, params)

        def multiply(vectors: Vector) -> Vector:
            return loops.map(product, vectors)

        keys = jax.random.split(key, 3)
        if self.method == "hutchinson":
            # One probe after another: no more than one is in memory.
            def one(probe_key: jax.Array) -> jax.Array:
                probe = _signs(probe_key, point)
                return tree_math.vdot(probe, product(probe))

            return loops.map(one, jax.random.split(keys[0], self.num_draws))
        if self.method == "hutch++":
            return self._hutch_plus_plus(multiply, point, keys)
        return self._xtrace(multiply, point, keys)

    def _hutch_plus_plus(self, multiply: Any, point: Vector, keys: jax.Array) -> jax.Array:
        """Exact in the range of a sketch, Hutchinson's estimate in the rest."""
        sketch = multiply(self._draw(_signs, keys[0], point))
        sketch = tree_math.scale(1 / power_of_two(sketch), sketch)
        basis, _ = _basis.orthonormalise(sketch, keys[1])
        inside = _row_products(basis, multiply(basis))
        outside = jax.lax.map(lambda g: _outside(basis, g), self._draw(_signs, keys[2], point))
        return jnp.sum(inside) + _row_products(outside, multiply(outside))

    def _xtrace(self, multiply: Any, point: Vector, keys: jax.Array) -> jax.Array:
        """Each draw is the probe of an estimate whose sketch is made of all the other draws."""
        size = dimension(point)
        probes = self._draw(_basis.random_normal, keys[0], point)
        # On the sphere of radius sqrt(n): then the length of what is left can be divided out.
        probes = jax.vmap(lambda v: tree_math.scale(size**0.5 / tree_math.norm(v), v))(probes)
        sketch = multiply(probes)
        unit = power_of_two(sketch)
        basis, triangle = _basis.orthonormalise(tree_math.scale(1 / unit, sketch), keys[1])
        products = tree_math.scale(1 / unit, multiply(basis))
        inner = _basis.gram(basis, products)  # Q^T H Q
        inner = (inner + inner.T) / 2
        w = _basis.gram(basis, probes)  # Q^T Omega: one column a probe
        t = _basis.gram(products, probes)  # (H Q)^T Omega

        # Column i of s: the direction in the basis that only draw i spans.
        diagonal = jnp.abs(jnp.diag(triangle))
        floor = jnp.finfo(diagonal.dtype).eps * jnp.max(diagonal) + _basis.TINY
        safe = triangle + jnp.diag(jnp.where(diagonal < floor, floor, 0.0))
        eye = jnp.eye(self.num_draws, dtype=safe.dtype)
        s = jax.scipy.linalg.solve_triangular(safe, eye, trans="T", lower=False)
        s = s / (jnp.linalg.norm(s, axis=0, keepdims=True) + _basis.TINY)

        along = jnp.sum(s * w, axis=0)
        x = w - s * along[None]
        quadratic = (
            jnp.sum(w * triangle, axis=0)
            - 2 * jnp.sum(t * x, axis=0)
            + jnp.sum(x * (inner @ x), axis=0)
        )
        left = size - jnp.sum(x**2, axis=0)
        scale = (size - self.num_draws + 1) / jnp.maximum(left, _basis.TINY)
        return unit * (jnp.trace(inner) - jnp.sum(s * (inner @ s), axis=0) + scale * quadratic)

    def _draw(self, one: Any, key: jax.Array, point: Vector) -> Vector:
        return jax.lax.map(lambda k: one(k, point), jax.random.split(key, self.num_draws))


def _signs(key: jax.Array, template: Vector) -> Vector:
    keys = jax.random.split(key, len(template))
    pairs = zip(keys, template, strict=True)
    return tuple(_basis.like(x, jax.random.rademacher(k, x.shape, x.dtype)) for k, x in pairs)


def _outside(basis: Vector, vector: Vector) -> Vector:
    """What is left of `vector` outside the basis."""
    for _ in range(2):
        inside = _basis.combine(_basis.products(basis, vector), basis)
        vector = tuple(x - y for x, y in zip(vector, inside, strict=True))
    return vector


def _row_products(rows: Vector, others: Vector) -> jax.Array:
    """Scalar products, row by row."""
    return jax.lax.map(lambda pair: tree_math.vdot(*pair), (rows, others))


def trace(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    num_products: int = 30,
    method: str = "hutchinson",
    key: jax.typing.ArrayLike = 0,
    output_loss: _operator.OutputLoss | None = None,
    mask: Mask = None,
) -> Trace:
    r"""The trace of the Hessian: the sum of its eigenvalues, a measure of average flatness.

    .. math:: \operatorname{tr} H = \mathbb E \, z^\top H z, \qquad \mathbb E \, z z^\top = I

    Args:
      loss_fn, params, batches, weights, output_loss, mask: see `top_eigenvalues`.
      num_products: Hessian-vector products to spend. Static.
      method: "hutchinson" (random signs); "hutch++" or "xtrace": much more accurate where few
        eigenvalues dominate, with `num_products / 3` or `/ 2` copies twice. Static.
      key: random key or integer seed.

    Returns:
      `Trace`, with the standard error over the draws.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.trace(lambda w: w @ w, jnp.ones(3), num_products=6).value)
      6.0

    References:
      Hutchinson. A Stochastic Estimator of the Trace. 1989. Meyer, Musco, Musco, Woodruff. Hutch++.
      arXiv:2010.09649. Epperly, Tropp, Webber. XTrace. arXiv:2301.07825

    Cost: `num_products` Hessian-vector products.
    """
    data = _batches.weigh(batches, weights)
    checks.check_choice("method", method, _METHODS)
    each = _METHODS[method]
    checks.check_count("num_products", num_products, each)
    operator = _operator.make(loss_fn, params, data, mask, output_loss)
    draws = num_products // each
    size = dimension(operator.variables.take(params))
    if method != "hutchinson" and draws > size:
        raise ValueError(
            f"num_products={num_products} is out of range for {method}: {each * size} products "
            f"are exact for {size} parameters."
        )
    samples = _batches.run(_Trace(operator, method, draws), params, data, rng.as_key(key))
    return Trace(*_results.estimate(samples), samples, draws * each)
