"""An estimate of the local entropy (Chaudhari et al., arXiv:1611.01838)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng
from flatopt.measures import _results, _variables
from flatopt.measures._rises import Rises
from flatopt.measures._variables import Mask


class LocalEntropy(NamedTuple):
    """Result of `local_entropy_estimate`.

    Attributes:
      value: the estimate of the local entropy.
      standard_error: by the delta method, over the draws.
      effective_samples: number of draws that carry the estimate; near 1, it is worth nothing.
    """

    value: jax.Array
    standard_error: jax.Array
    effective_samples: jax.Array


def local_entropy_estimate(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    gamma: jax.typing.ArrayLike,
    beta: jax.typing.ArrayLike = 1.0,
    num_samples: int = 128,
    key: jax.typing.ArrayLike = 0,
    mask: Mask = None,
) -> LocalEntropy:
    r"""The logarithm of the Gaussian-weighted volume of low loss around the parameters.

    .. math:: F = \log \mathbb E_{w' \sim \mathcal N(w, I / \gamma)} \, e^{-\beta L(w')}

    Args:
      loss_fn, params, batches, weights, mask: see `hessian_vector_product`.
      gamma: inverse variance of the Gaussian, > 0.
      beta: inverse temperature, > 0; for a mean loss, the number of examples is natural.
      num_samples, key: draws, >= 1 (static), and their random key or integer seed.

    Returns:
      `LocalEntropy`; higher is wider or deeper. Look at `effective_samples`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> result = measures.local_entropy_estimate(lambda w: w @ w / 2, jnp.zeros(2), gamma=10.0)
      >>> print(f"{result.value:.1f}")  # Exactly minus log 1.1.
      -0.1

    References:
      Chaudhari et al. Entropy-SGD: Biasing Gradient Descent into Wide Valleys. arXiv:1611.01838

    Cost: `num_samples` losses over the data; no gradients.
    """
    data = _batches.weigh(batches, weights)
    for name, value in (("gamma", gamma), ("beta", beta)):
        if not isinstance(value, jax.core.Tracer) and not 0 < float(np.asarray(value)) < math.inf:
            raise ValueError(f"{name}={value!r} is out of range: it must be above 0 and finite.")
    checks.check_count("num_samples", num_samples, 1)
    variables = _variables.prepare(loss_fn, params, data, mask)
    algorithm = Rises(loss_fn, variables, num_samples)
    sigma = jnp.asarray(1 / jnp.sqrt(gamma), jnp.result_type(float))[None]
    rises, loss = _batches.run(algorithm, params, data, sigma, rng.as_key(key))
    strength = jnp.asarray(beta)
    exponents = -strength * rises[:, 0]
    largest = jnp.max(exponents)
    weights = jnp.exp(exponents - largest)
    mean, error = _results.estimate(weights)
    value = jnp.log(mean) + largest - strength * loss
    return LocalEntropy(value, error / mean, jnp.sum(weights) ** 2 / jnp.sum(weights**2))
