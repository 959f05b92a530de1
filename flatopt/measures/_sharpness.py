"""Worst- and average-case sharpness: how far the loss rises in a ball around the parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng, tree_math
from flatopt.measures import _basis, _results, _variables
from flatopt.measures._results import Estimate
from flatopt.measures._variables import Mask, Variables, Vector

NORMS = ("l2", "linf")
CASES = ("worst", "average")


@dataclasses.dataclass(frozen=True)
class _Ascent:
    """The largest rise of the loss along an ascent on the surface of a ball.

    The displacement is `unit * z`; each step moves z to the point of the ball that the gradient
    singles out. From z = 0 the first step is SAM's; on a quadratic the steps are a power iteration;
    on a convex loss no step lowers the loss.
    """

    loss_fn: _batches.LossFn
    variables: Variables
    num_steps: int
    random_start: bool
    per_batch: bool
    norm: str = "l2"
    adaptive: bool = False

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        rho: jax.Array,
        eta: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        if self.per_batch:
            return mean(_OneBatch(self), params, rho, eta, key)
        return self.climb(mean, loops, params, rho, eta, key)

    def climb(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        rho: jax.Array,
        eta: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        """Returns the largest rise seen."""
        function = _variables.Gradient(self.loss_fn, self.variables)
        point = self.variables.take(params)
        unit = tuple(jnp.abs(x) + eta if self.adaptive else jnp.ones_like(x) for x in point)

        def value_and_grad(z: Vector) -> tuple[jax.Array, Vector]:
            moved = jax.tree.map(lambda w, t, z: w + (t * z).astype(w.dtype), point, unit, z)
            loss, grads = mean(function, params, moved)
            return loss, jax.tree.map(jnp.multiply, unit, grads)

        loss, grads = value_and_grad(tree_math.scale(0.0, point))
        if self.random_start:
            grads = _basis.random_normal(key, point)
        start = (grads, jnp.full_like(loss, -jnp.inf))

        def step(carry: tuple[Vector, jax.Array]) -> tuple[Vector, jax.Array]:
            grads, highest = carry
            value, grads = value_and_grad(self._to_surface(grads, rho))
            # `maximum` hands NaN on: a loss that overflows in the ball is not hidden.
            return grads, jnp.maximum(highest, value)

        _, highest = loops.repeat(step, start, self.num_steps)
        return highest - loss

    def _to_surface(self, grads: Vector, rho: jax.Array) -> Vector:
        if self.norm == "linf":
            return jax.tree.map(lambda g: (rho * jnp.sign(g)).astype(g.dtype), grads)
        return tree_math.scale(rho / (tree_math.norm(grads) + tree_math.EPSILON), grads)


@dataclasses.dataclass(frozen=True)
class _OneBatch:
    """The rise on one batch, with a displacement of its own."""

    ascent: _Ascent

    def __call__(
        self, params: Any, rho: Any, eta: Any, key: Any, batch: tuple[Any, ...]
    ) -> jax.Array:
        def mean(function: Any, *args: Any) -> Any:
            return function(*args, batch)

        return self.ascent.climb(mean, _batches.Loops(), params, rho, eta, key)


@dataclasses.dataclass(frozen=True)
class _Average:
    """The mean rise of the loss under random displacements, in units of the weights."""

    loss_fn: _batches.LossFn
    variables: Variables
    num_samples: int
    norm: str

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        rho: jax.Array,
        eta: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        point = self.variables.take(params)

        def loss_at(vector: Vector) -> jax.Array:
            return mean(_batches.Call(self.loss_fn), self.variables.put(params, vector))

        def rise(sample_key: jax.Array) -> jax.Array:
            if self.norm == "l2":
                z = _basis.random_normal(sample_key, point)
            else:
                keys = jax.random.split(sample_key, len(point))
                z = tuple(
                    _basis.like(x, jax.random.uniform(k, x.shape, x.dtype, -1.0, 1.0))
                    for k, x in zip(keys, point, strict=True)
                )
            moved = jax.tree.map(
                lambda w, z: w + (rho * (jnp.abs(w) + eta) * z).astype(w.dtype), point, z
            )
            return loss_at(moved)

        losses = loops.map(rise, jax.random.split(key, self.num_samples))
        return losses - loss_at(point)


def sam_sharpness(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    rho: jax.typing.ArrayLike = 0.05,
    num_steps: int = 1,
    key: jax.typing.ArrayLike | None = None,
    per_batch: bool = False,
    mask: Mask = None,
) -> jax.Array:
    r"""The rise of the loss in the direction that SAM takes, the largest of n steps.

    .. math:: \max_{1 \le i \le n} L(w + \epsilon_i) - L(w), \quad \epsilon_0 = 0, \quad
       \epsilon_{i+1} = \rho \, \nabla L(w + \epsilon_i) / \|\nabla L(w + \epsilon_i)\|

    Args:
      loss_fn, params, batches, weights, mask: see `hessian_vector_product`.
      rho: radius, >= 0, in units of the parameters' Euclidean norm.
      num_steps: n >= 1; one step is SAM's own. Static.
      key: None: the first step follows the gradient; a key or seed: it is random.
      per_batch: True: a displacement for each batch, and the mean of the rises. Static.

    Returns:
      The rise, a scalar; negative where the ascent goes astray, NaN if the loss is NaN there.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.sam_sharpness(lambda w: w @ w, jnp.array([3.0, 4.0]), rho=1.0))
      11.0

    References:
      Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization. arXiv:2010.01412

    Cost: `num_steps` + 1 gradients over the data.
    """
    data = _batches.weigh(batches, weights)
    checks.check_number("rho", rho, low=0.0)
    checks.check_count("num_steps", num_steps, 1)
    variables = _variables.prepare(loss_fn, params, data, mask)
    ascent = _Ascent(
        loss_fn, variables, num_steps, random_start=key is not None, per_batch=per_batch
    )
    random_key = rng.as_key(0 if key is None else key)
    return _batches.run(ascent, params, data, jnp.asarray(rho), jnp.zeros([]), random_key)


def adaptive_sharpness(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    rho: jax.typing.ArrayLike = 0.5,
    norm: str = "l2",
    case: str = "worst",
    eta: jax.typing.ArrayLike = 0.0,
    num_steps: int = 20,
    num_samples: int = 32,
    key: jax.typing.ArrayLike | None = None,
    per_batch: bool = False,
    mask: Mask = None,
) -> Estimate:
    r"""The rise of the loss when every weight moves in proportion to itself.

    .. math:: \max_{\|\epsilon / t\|_p \le \rho} L(w + \epsilon) - L(w), \qquad t = |w| + \eta

    Args:
      loss_fn, params, batches, weights, mask: see `hessian_vector_product`.
      rho, eta: both >= 0; rho is a share of each weight for "linf", of the whole for "l2".
      norm, case: "l2" or "linf"; "worst" or "average", the mean rise at `w + rho t z`. Static.
      num_steps, num_samples: of the worst case; of the average one; >= 1. Static.
      key, per_batch: as in `sam_sharpness` for the worst case; the key is the draws' too.

    Returns:
      `Estimate`: the rise and its standard error over the draws, 0 in the worst case.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.adaptive_sharpness(jnp.sum, jnp.arange(3.0), rho=0.1, norm="linf").value)
      0.3

    References:
      Kwon, Kim, Park, Choi. ASAM. arXiv:2102.11600. Andriushchenko, Croce, Mueller, Hein,
      Flammarion. A Modern Look at Sharpness and Generalization. arXiv:2302.07011

    Cost: `num_steps` + 1 gradients, or `num_samples` + 1 losses over the data.
    """
    data = _batches.weigh(batches, weights)
    checks.check_choice("norm", norm, NORMS)
    checks.check_choice("case", case, CASES)
    checks.check_number("rho", rho, low=0.0)
    checks.check_number("eta", eta, low=0.0)
    checks.check_count("num_steps", num_steps, 1)
    checks.check_count("num_samples", num_samples, 1)
    variables = _variables.prepare(loss_fn, params, data, mask)
    random_key = rng.as_key(0 if key is None else key)
    inputs = (jnp.asarray(rho), jnp.asarray(eta), random_key)
    if case == "average":
        average = _Average(loss_fn, variables, num_samples, norm)
        return _results.estimate(_batches.run(average, params, data, *inputs))
    ascent = _Ascent(
        loss_fn,
        variables,
        num_steps,
        random_start=key is not None,
        per_batch=per_batch,
        norm=norm,
        adaptive=True,
    )
    value = _batches.run(ascent, params, data, *inputs)
    return Estimate(value, jnp.zeros_like(value))
