"""The radius of PAC-Bayes bounds: the largest noise under which the loss hardly rises."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng
from flatopt.measures import _results, _variables
from flatopt.measures._results import Estimate
from flatopt.measures._rises import Rises
from flatopt.measures._variables import Mask


class PacBayesSigma(NamedTuple):
    """Result of `pac_bayes_sigma`.

    Attributes:
      sigma: the largest size of the noise that keeps the mean rise within the target.
      rise: the mean rise there.
      standard_error: of `rise`, over the draws.
    """

    sigma: jax.Array
    rise: jax.Array
    standard_error: jax.Array


@dataclasses.dataclass(frozen=True)
class _LargestSigma:
    rises: Rises
    num_halvings: int

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        target: jax.Array,
        limits: jax.Array,
        key: jax.Array,
    ) -> PacBayesSigma:
        def rise(log_sigma: jax.Array) -> Estimate:
            # Always the same draws: the mean rise is then one fixed function of sigma.
            rises, _ = self.rises(mean, loops, params, jnp.exp(log_sigma)[None], key)
            return _results.estimate(rises[:, 0])

        def halve(limits: jax.Array) -> jax.Array:
            middle = jnp.mean(limits)
            within = rise(middle).value <= target  # NaN is not within.
            return jnp.where(within, jnp.stack([middle, limits[1]]), jnp.stack([limits[0], middle]))

        low = loops.repeat(halve, jnp.log(limits), self.num_halvings)[0]
        return PacBayesSigma(jnp.exp(low), *rise(low))


def pac_bayes_sigma(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    target: jax.typing.ArrayLike = 0.1,
    limits: tuple[float, float] = (1e-5, 1e1),
    num_samples: int = 16,
    num_halvings: int = 20,
    multiplicative: bool = False,
    key: jax.typing.ArrayLike = 0,
    mask: Mask = None,
) -> PacBayesSigma:
    r"""The largest Gaussian noise under which the loss rises by no more than a target.

    .. math:: \sigma^* = \max \{ \sigma : \mathbb E_z \, L(w + \sigma z) - L(w) \le \text{target} \}

    Args:
      loss_fn, params, batches, weights, mask: see `hessian_vector_product`.
      target: the rise allowed, > 0; 0.1 for an error is usual.
      limits, num_halvings: least and largest sigma, > 0; bisections of its logarithm, >= 1. Static.
      num_samples, key: draws, >= 1 (static), and their random key or integer seed.
      multiplicative: True: noise in units of each weight, `w (1 + sigma z)`. Static.

    Returns:
      `PacBayesSigma`. A `sigma` at one of the limits means that the answer lies beyond.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.pac_bayes_sigma(lambda w: w @ w / 2, jnp.zeros(1000), target=5.0).sigma)
      0.10

    References:
      Dziugaite, Roy. Computing Nonvacuous Generalization Bounds. arXiv:1703.11008. Jiang,
      Neyshabur, Mobahi, Krishnan, Bengio. Fantastic Generalization Measures. arXiv:1912.02178

    Cost: `num_samples * (num_halvings + 1)` losses over the data; no gradients.
    """
    data = _batches.weigh(batches, weights)
    array = np.asarray(limits, float)
    if array.shape != (2,) or not 0 < array[0] < array[1] < math.inf:
        raise ValueError(f"limits={limits!r} must be two numbers with 0 < first < second.")
    if not isinstance(target, jax.core.Tracer) and not np.asarray(target) > 0:
        raise ValueError(f"target={target!r} is out of range: it must be above 0.")
    checks.check_count("num_samples", num_samples, 1)
    checks.check_count("num_halvings", num_halvings, 1)
    variables = _variables.prepare(loss_fn, params, data, mask)
    rises = Rises(loss_fn, variables, num_samples, multiplicative=multiplicative)
    inputs = (jnp.asarray(target), jnp.asarray(array, jnp.result_type(float)))
    algorithm = _LargestSigma(rises, num_halvings)
    return _batches.run(algorithm, params, data, *inputs, rng.as_key(key))
