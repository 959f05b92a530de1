"""Local energy (Pittorino et al., arXiv:2006.07897): the error under noise on the weights."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng
from flatopt.measures import _results, _variables
from flatopt.measures._rises import Rises
from flatopt.measures._variables import Mask

SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


class LocalEnergy(NamedTuple):
    """Result of `local_energy`.

    Attributes:
      sigmas: [s], sizes of the noise.
      energy: [s], mean rise of the error.
      standard_error: [s], over the draws.
      error: error without noise.
    """

    sigmas: jax.Array
    energy: jax.Array
    standard_error: jax.Array
    error: jax.Array


def local_energy(
    error_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    sigmas: Sequence[float] | jax.Array = SIGMAS,
    num_samples: int = 32,
    key: jax.typing.ArrayLike = 0,
    mask: Mask = None,
) -> LocalEnergy:
    r"""The rise of the error under multiplicative Gaussian noise on the weights.

    .. math:: \delta E(\sigma) = \mathbb E_{z \sim \mathcal N(0, I)} E(w \odot (1+\sigma z)) - E(w)

    Args:
      error_fn: `error_fn(params, batch)`, a batch's mean, such as its share of mistakes. Static.
      params, batches, weights, mask: see `hessian_vector_product`.
      sigmas: sizes of the noise, >= 0, relative to each weight.
      num_samples, key: draws, >= 1, the same for every size (static); key or integer seed.

    Returns:
      `LocalEnergy`: the curve over `sigmas` with its standard errors.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> w = jnp.full(2000, 2.0)  # A weight is lost below 1: 16 normal draws of 100 lie below -1.
      >>> print(measures.local_energy(lambda w: jnp.mean(w < 1), w, sigmas=[0.5]).energy)
      [0.16]

    References:
      Pittorino, Lucibello, Feinauer, Perugini, Baldassi, Demyanenko, Zecchina. Entropic Gradient
      Descent Algorithms and Wide Flat Minima. arXiv:2006.07897

    Cost: `num_samples * len(sigmas)` errors over the data; no gradients.
    """
    data = _batches.weigh(batches, weights)
    sizes = jnp.asarray(sigmas, jnp.result_type(float))
    if sizes.ndim != 1 or not sizes.size:
        raise ValueError(f"sigmas={sigmas!r} must be a sequence of numbers.")
    checks.check_number("sigmas", sizes, low=0.0)
    checks.check_count("num_samples", num_samples, 1)
    variables = _variables.prepare(error_fn, params, data, mask)
    algorithm = Rises(error_fn, variables, num_samples, multiplicative=True)
    rises, error = _batches.run(algorithm, params, data, sizes, rng.as_key(key))
    return LocalEnergy(sizes, *_results.estimate(rises), error)
