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

    .. math:: \delta E(\sigma) = \mathbb E_z \, E(w \odot (1 + \sigma z)) - E(w), \qquad
       z \sim \mathcal N(0, I)

    Args:
      error_fn: the error, `error_fn(params, batch)`, a mean over its batch: the authors take the
        share of training examples classified wrongly. Static.
      params: where to measure.
      batches, weights: the data; see `hessian_vector_product`.
      sigmas: sizes of the noise, >= 0, relative to each weight.
      num_samples: draws of the noise, >= 1; the same ones for every size. Static.
      key: random key or integer seed.
      mask: which leaves to disturb; see `hessian_vector_product`. Static.

    Returns:
      `LocalEnergy`: the curve over `sigmas` with its standard errors.

    Raises:
      ValueError: if an argument is out of range, the error is no scalar, not finite outside
        `jax.jit`, or fails on a batch, or there are no data.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> def error_fn(w):
      ...     return jnp.mean(w < 1.0)  # Each weight is lost once it falls below 1.
      >>> result = measures.local_energy(error_fn, jnp.full(2000, 2.0), sigmas=[0.0, 0.5])
      >>> print(f"{result.energy[1]:.2f}")  # A normal draw lies below -1 in 16 cases of 100.
      0.16

    References:
      Pittorino, Lucibello, Feinauer, Perugini, Baldassi, Demyanenko, Zecchina. Entropic Gradient
      Descent Algorithms and Wide Flat Minima. arXiv:2006.07897

    Notes:
      Cost: `num_samples * len(sigmas)` errors over the data; no gradients, so the error need not be
      differentiable. Multiplicative noise does not see the scale of the weights, but it does see
      rescalings between layers that leave the network as it is.
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
