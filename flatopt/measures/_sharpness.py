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
    r"""The rise of the loss in the direction that SAM takes.

    .. math:: L(w + \epsilon_n) - L(w), \qquad
       \epsilon_{i+1} = \rho \, \nabla L(w + \epsilon_i) / \|\nabla L(w + \epsilon_i)\|,
       \quad \epsilon_0 = 0

    and of the n steps the one with the largest rise. One step is SAM's own. Many steps approach the
    maximum over the ball: on a quadratic they are a power iteration.

    Args:
      loss_fn: scalar loss, `loss_fn(params, batch)`; `loss_fn(params)` if `batches` is None.
        Static.
      params: where to measure.
      batches, weights: the data; see `hessian_vector_product`.
      rho: radius, >= 0, in units of the parameters' Euclidean norm.
      num_steps: n >= 1. Static.
      key: None: the first step follows the gradient. A random key or seed: it goes in a random
        direction, as is needed at a minimum, where there is no gradient; take 20 steps or more.
      per_batch: True: a displacement for each batch, and the mean of the rises (m-sharpness, with
        m the size of a batch). False: one for all data. Static.
      mask: which leaves to vary; see `hessian_vector_product`. Static.

    Returns:
      The rise, a scalar; negative where the ascent goes astray, NaN if the loss is NaN there.

    Raises:
      ValueError: if an argument is out of range, the loss is no scalar, not finite outside
        `jax.jit`, or fails on a batch, or there are no data.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> def loss_fn(w):
      ...     return 0.5 * jnp.sum(jnp.array([4.0, 1.0]) * w**2)
      >>> at_minimum = measures.sam_sharpness(loss_fn, jnp.zeros(2), rho=0.1, num_steps=20, key=0)
      >>> print(f"{at_minimum:.4f}")  # rho^2 / 2 times the largest eigenvalue
      0.0200

    References:
      Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
      Generalization. arXiv:2010.01412

    Notes:
      Cost: `num_steps` + 1 gradients over the data. At a minimum, for small rho and many steps, the
      result is half rho squared times the largest eigenvalue of the Hessian.
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

    .. math:: \max_{\|T^{-1} \epsilon\|_p \le \rho} L(w + \epsilon) - L(w)
       \quad\text{or}\quad \mathbb E_z \, L(w + \rho T z) - L(w), \qquad
       T = \mathrm{diag}(|w| + \eta)

    Rescaling the units of a ReLU network leaves it as it is, where plain sharpness changes.

    Args:
      loss_fn: scalar loss, `loss_fn(params, batch)`; `loss_fn(params)` if `batches` is None.
        Static.
      params: where to measure.
      batches, weights: the data; see `hessian_vector_product`.
      rho: radius, >= 0, as a share of each weight for "linf" and of the whole for "l2".
      norm: "l2" or "linf"; in the average case standard normal draws or uniform ones in [-1, 1].
        Static.
      case: "worst": ascent as in `sam_sharpness`; a lower bound of the maximum. "average": over
        random draws. Static.
      eta: added to `|w|`, >= 0.
      num_steps: steps of the worst case, >= 1. Static.
      num_samples: draws of the average case, >= 1. Static.
      key: random key or seed: of the draws; in the worst case of a random first direction, None
        meaning the gradient.
      per_batch: in the worst case a displacement for each batch; see `sam_sharpness`. Static.
      mask: which leaves to vary; see `hessian_vector_product`. Static.

    Returns:
      `Estimate`: the rise and its standard error over the draws, 0 in the worst case.

    Raises:
      ValueError: if an argument is out of range, the loss is no scalar, not finite outside
        `jax.jit`, or fails on a batch, or there are no data.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> def loss_fn(w):
      ...     return jnp.sum(w**2)
      >>> w = jnp.array([1.0, 2.0])
      >>> print(measures.adaptive_sharpness(loss_fn, w, rho=0.1, norm="linf").value)
      1.05

    References:
      Kwon, Kim, Park, Choi. ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks. arXiv:2102.11600. Andriushchenko, Croce, Mueller, Hein,
      Flammarion. A Modern Look at the Relationship between Sharpness and Generalization.
      arXiv:2302.07011

    Notes:
      Cost: `num_steps` + 1 gradients, or `num_samples` + 1 losses over the data. The second
      reference finds that none of these predicts generalisation reliably.
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
