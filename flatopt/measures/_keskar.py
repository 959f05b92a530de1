"""Sharpness in a box around the parameters, after Keskar and others."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from flatopt._core import batches as _batches
from flatopt._core import checks, rng, tree_math
from flatopt.measures import _basis, _variables
from flatopt.measures._variables import Mask, Variables, Vector

METHODS = ("l-bfgs-b", "projected")


@dataclasses.dataclass(frozen=True)
class _ProjectedAscent:
    """The largest loss on a path of projected gradient steps in the box."""

    loss_fn: _batches.LossFn
    variables: Variables
    num_steps: int

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        epsilon: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        function = _variables.Gradient(self.loss_fn, self.variables)
        point = self.variables.take(params)
        half = _half_widths(point, epsilon)
        lower = tuple(x - h for x, h in zip(point, half, strict=True))
        upper = tuple(x + h for x, h in zip(point, half, strict=True))
        # At a minimum there is no gradient to follow: start a little beside it.
        noise = _basis.random_normal(key, point)
        start = jax.tree.map(lambda w, h, z: w + 0.01 * h * z, point, half, noise)
        loss, _ = mean(function, params, point)

        def step(carry: tuple[Vector, jax.Array]) -> tuple[Vector, jax.Array]:
            place, highest = carry
            value, grads = mean(function, params, place)
            # In units of the box, so that narrow sides move as many of their widths as wide ones;
            # the largest component crosses half the box.
            scaled = jax.tree.map(jnp.multiply, half, grads)
            largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in scaled]))
            moved = jax.tree.map(
                lambda w, h, g: w + h * (g / (largest + tree_math.EPSILON)).astype(w.dtype),
                place,
                half,
                scaled,
            )
            place = optax.projections.projection_box(moved, lower, upper)
            return place, jnp.maximum(highest, value)

        start = optax.projections.projection_box(start, lower, upper)
        place, highest = loops.repeat(step, (start, loss), self.num_steps)
        return _measure(loss, jnp.maximum(highest, mean(function, params, place)[0]))


def _half_widths(point: Vector, epsilon: jax.typing.ArrayLike) -> Vector:
    return tuple(jnp.asarray(epsilon * (jnp.abs(x) + 1), x.dtype) for x in point)


def _measure(loss: Any, highest: Any) -> Any:
    return 100 * (highest - loss) / (1 + loss)


def keskar_sharpness(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    epsilon: float = 1e-3,
    method: str = "l-bfgs-b",
    num_steps: int = 10,
    key: jax.typing.ArrayLike = 0,
    mask: Mask = None,
) -> jax.Array:
    r"""The rise of the loss in a box, in per cent of one plus the loss.

    .. math:: 100 \, \frac{\max_{|y_i| \le \epsilon (|w_i| + 1)} L(w + y) - L(w)}{1 + L(w)}

    Args:
      loss_fn, params, batches, weights, mask: see `hessian_vector_product`.
      epsilon: half the width of the box, >= 0, in units of `|w_i| + 1`. Static.
      method: "l-bfgs-b", SciPy's in float64, which cannot run under `jax.jit`; "projected",
        gradient ascent in the box, which can. Both give a lower bound of the maximum. Static.
      num_steps, key: iterations, >= 1 (static); key or seed of the first displacement.

    Returns:
      The measure, a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(f"{measures.keskar_sharpness(lambda w: w @ w, jnp.zeros(3), epsilon=0.1):.2f}")
      3.00

    References:
      Keskar, Mudigere, Nocedal, Smelyanskiy, Tang. On Large-Batch Training. arXiv:1609.04836.
      Byrd, Lu, Nocedal, Zhu. A Limited Memory Algorithm for Bound Constrained Optimization. 1995.

    Cost: `num_steps` + 2 gradients over the data; "l-bfgs-b" up to a few times that.
    """
    data = _batches.weigh(batches, weights)
    checks.check_number("epsilon", epsilon, low=0.0)
    checks.check_count("num_steps", num_steps, 1)
    checks.check_choice("method", method, METHODS)
    variables = _variables.prepare(loss_fn, params, data, mask)
    random_key = rng.as_key(key)
    if method == "projected":
        ascent = _ProjectedAscent(loss_fn, variables, num_steps)
        return _batches.run(ascent, params, data, jnp.asarray(epsilon), random_key)
    inputs = jax.tree.leaves((params, epsilon, random_key))
    if any(isinstance(x, jax.core.Tracer) for x in inputs):
        raise ValueError(
            'method="l-bfgs-b" is SciPy\'s and cannot run under jax.jit or jax.vmap: call '
            'keskar_sharpness outside, or use method="projected".'
        )
    return _with_scipy(loss_fn, variables, params, data, epsilon, num_steps, random_key)


def _with_scipy(
    loss_fn: _batches.LossFn,
    variables: Variables,
    params: Any,
    data: _batches.Data,
    epsilon: float,
    num_steps: int,
    key: jax.Array,
) -> jax.Array:
    import scipy.optimize  # Here, since it doubles the time that `import flatopt` takes.

    point = variables.take(params)
    flat, unravel = ravel_pytree(point)
    centre = np.asarray(flat, np.float64)
    half = epsilon * (np.abs(centre) + 1)
    gradient = functools.partial(
        _batches.mean_over, data, _variables.Gradient(loss_fn, variables), params
    )

    def negative(z: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the loss at `centre + half * z`, and its gradient by z."""
        loss, grads = gradient(unravel(jnp.asarray(centre + half * z, flat.dtype)))
        slope = np.asarray(ravel_pytree(grads)[0], np.float64)
        return -float(loss), -slope * half

    start = np.clip(0.01 * np.asarray(jax.random.normal(key, flat.shape), np.float64), -1, 1)
    loss = -negative(np.zeros_like(centre))[0]
    result = scipy.optimize.minimize(
        negative,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=scipy.optimize.Bounds(-1.0, 1.0),
        options={"maxiter": num_steps},
    )
    highest = -result.fun if np.isnan(result.fun) else max(-result.fun, loss)
    return jnp.asarray(_measure(loss, highest))
