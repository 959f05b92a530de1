"""Measures under random noise on the weights: local energy, local entropy, PAC-Bayes radius."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng
from flatopt.measures import _basis, _results, _variables
from flatopt.measures._results import Estimate
from flatopt.measures._variables import Mask, Variables

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
class _Rises:
    """Rise of the loss for each draw and each size: [draws, sizes], and the loss itself."""

    loss_fn: _batches.LossFn
    variables: Variables
    num_samples: int
    multiplicative: bool

    def __call__(
        self,
        mean: _batches.Mean,
        loops: _batches.Loops,
        params: Any,
        sigmas: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        function = _variables.Loss(self.loss_fn, self.variables)
        point = self.variables.take(params)
        loss = mean(function, params, point)

        def one_draw(sample_key: jax.Array) -> jax.Array:
            # The same draw for every size: the curve is smoother than its standard errors.
            noise = _basis.random_normal(sample_key, point)
            if self.multiplicative:
                noise = jax.tree.map(jnp.multiply, point, noise)

            def at(sigma: jax.Array) -> jax.Array:
                moved = jax.tree.map(lambda w, z: w + sigma.astype(w.dtype) * z, point, noise)
                return mean(function, params, moved)

            return loops.map(at, sigmas)

        return loops.map(one_draw, jax.random.split(key, self.num_samples)) - loss, loss


def local_energy(
    error_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
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
      batches: the data; see `hessian_vector_product`.
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
    sizes = jnp.asarray(sigmas, jnp.result_type(float))
    if sizes.ndim != 1 or not sizes.size:
        raise ValueError(f"sigmas={sigmas!r} must be a sequence of numbers.")
    checks.check_number("sigmas", sizes, low=0.0)
    checks.check_count("num_samples", num_samples, 1)
    variables = _variables.prepare(error_fn, params, batches, mask)
    algorithm = _Rises(error_fn, variables, num_samples, True)
    rises, error = _batches.run(algorithm, params, batches, sizes, rng.as_key(key))
    return LocalEnergy(sizes, *_results.estimate(rises), error)


@dataclasses.dataclass(frozen=True)
class _LargestSigma:
    rises: _Rises
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

    The flatness term of PAC-Bayes bounds is then of the order of :math:`\|w\|^2 / \sigma^{*2}`.

    Args:
      loss_fn: loss or error, `loss_fn(params, batch)`; `loss_fn(params)` if `batches` is None.
        Static.
      params: where to measure.
      batches: the data; see `hessian_vector_product`.
      target: the rise allowed, > 0; 0.1 for an error is usual.
      limits: the least and the largest sigma to look between, > 0. Static.
      num_samples: draws, >= 1. Static.
      num_halvings: halvings of the interval between the logarithms of `limits`, >= 1. Static.
      multiplicative: True: noise in units of each weight, `w (1 + sigma z)`. Static.
      key: random key or integer seed.
      mask: which leaves to disturb; see `hessian_vector_product`. Static.

    Returns:
      `PacBayesSigma`. A `sigma` at one of the limits means that the answer lies beyond.

    Raises:
      ValueError: if an argument is out of range, the loss is no scalar, not finite outside
        `jax.jit`, or fails on a batch, or there are no data.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> def loss_fn(w):
      ...     return 0.5 * jnp.sum(w**2)  # The mean rise is 500 sigma^2.
      >>> result = measures.pac_bayes_sigma(loss_fn, jnp.zeros(1000), target=5.0)
      >>> print(f"{result.sigma:.2f}")
      0.10

    References:
      Dziugaite, Roy. Computing Nonvacuous Generalization Bounds for Deep (Stochastic) Neural
      Networks with Many More Parameters than Training Data. arXiv:1703.11008. Jiang, Neyshabur,
      Mobahi, Krishnan, Bengio. Fantastic Generalization Measures and Where to Find Them.
      arXiv:1912.02178

    Notes:
      Cost: `num_samples * (num_halvings + 1)` losses over the data, no gradients. It supposes that
      the rise grows with sigma.
    """
    array = np.asarray(limits, float)
    if array.shape != (2,) or not 0 < array[0] < array[1] < math.inf:
        raise ValueError(f"limits={limits!r} must be two numbers with 0 < first < second.")
    if not isinstance(target, jax.core.Tracer) and not np.asarray(target) > 0:
        raise ValueError(f"target={target!r} is out of range: it must be above 0.")
    checks.check_count("num_samples", num_samples, 1)
    checks.check_count("num_halvings", num_halvings, 1)
    variables = _variables.prepare(loss_fn, params, batches, mask)
    rises = _Rises(loss_fn, variables, num_samples, multiplicative)
    inputs = (jnp.asarray(target), jnp.asarray(array, jnp.result_type(float)))
    algorithm = _LargestSigma(rises, num_halvings)
    return _batches.run(algorithm, params, batches, *inputs, rng.as_key(key))


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
    gamma: jax.typing.ArrayLike,
    beta: jax.typing.ArrayLike = 1.0,
    num_samples: int = 128,
    key: jax.typing.ArrayLike = 0,
    mask: Mask = None,
) -> LocalEntropy:
    r"""The logarithm of the Gaussian-weighted volume of low loss around the parameters.

    .. math:: F = \log \mathbb E_{w' \sim \mathcal N(w, I / \gamma)} \, e^{-\beta L(w')}

    up to a constant the local entropy of Entropy-SGD: higher is wider or deeper.

    Args:
      loss_fn: scalar loss, `loss_fn(params, batch)`; `loss_fn(params)` if `batches` is None.
        Static.
      params: where to measure.
      batches: the data; see `hessian_vector_product`.
      gamma: inverse variance of the Gaussian, > 0.
      beta: inverse temperature, > 0; for a mean loss, the number of examples is natural.
      num_samples: draws, >= 1. Static.
      key: random key or integer seed.
      mask: which leaves to disturb; see `hessian_vector_product`. Static.

    Returns:
      `LocalEntropy`. Look at `effective_samples`.

    Raises:
      ValueError: if an argument is out of range, the loss is no scalar, not finite outside
        `jax.jit`, or fails on a batch, or there are no data.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> def loss_fn(w):
      ...     return 0.5 * jnp.sum(w**2)
      >>> result = measures.local_entropy_estimate(loss_fn, jnp.zeros(2), gamma=10.0)
      >>> print(f"{result.value:.1f}")  # Exactly minus log 1.1.
      -0.1

    References:
      Chaudhari et al. Entropy-SGD: Biasing Gradient Descent into Wide Valleys. arXiv:1611.01838

    Notes:
      Cost: `num_samples` losses over the data, no gradients. Plain sampling: as `beta` or the
      number of parameters grows, few draws carry the mean, and the estimate is too low.
    """
    for name, value in (("gamma", gamma), ("beta", beta)):
        if not isinstance(value, jax.core.Tracer) and not 0 < float(np.asarray(value)) < math.inf:
            raise ValueError(f"{name}={value!r} is out of range: it must be above 0 and finite.")
    checks.check_count("num_samples", num_samples, 1)
    variables = _variables.prepare(loss_fn, params, batches, mask)
    algorithm = _Rises(loss_fn, variables, num_samples, False)
    sigma = jnp.asarray(1 / jnp.sqrt(gamma), jnp.result_type(float))[None]
    rises, loss = _batches.run(algorithm, params, batches, sigma, rng.as_key(key))
    strength = jnp.asarray(beta)
    exponents = -strength * rises[:, 0]
    largest = jnp.max(exponents)
    weights = jnp.exp(exponents - largest)
    mean, error = _results.estimate(weights)
    value = jnp.log(mean) + largest - strength * loss
    return LocalEntropy(value, error / mean, jnp.sum(weights) ** 2 / jnp.sum(weights**2))
