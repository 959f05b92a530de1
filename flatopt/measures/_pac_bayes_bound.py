"""PAC-Bayes bounds of networks with Gaussian noise on their weights (arXiv:1703.11008)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng
from flatopt.measures import _results, _variables
from flatopt.measures._kl_inverse import complexity, kl_inverse
from flatopt.measures._rises import Rises
from flatopt.measures._variables import Mask, Variables, Vector


class PriorGrid(NamedTuple):
    """Standard deviations that a prior may have, chosen before any data are seen.

    Attributes:
      sigmas: [r], standard deviations of every weight.
      weights: [r], the share of the failure probability that each may use; their sum is at most 1.
    """

    sigmas: jax.Array
    weights: jax.Array


class PacBayesBound(NamedTuple):
    """Result of `pac_bayes_bound`.

    Attributes:
      bound: on the mean error of the noisy network on new examples; 1 says nothing.
      kl: relative entropy of the posterior to the prior, in nats.
      stochastic_error: mean error of the noisy network on the examples, over the draws.
      standard_error: of `stochastic_error`.
      sample_bound: what that mean is at most over all draws.
      error: error of the network without noise.
      sigma: size of the posterior's noise for which all this holds.
      prior_sigma: standard deviation of the prior from the grid; without a grid, `sigma`.
    """

    bound: jax.Array
    kl: jax.Array
    stochastic_error: jax.Array
    standard_error: jax.Array
    sample_bound: jax.Array
    error: jax.Array
    sigma: jax.Array
    prior_sigma: jax.Array


def prior_grid(c: float = 0.1, b: float = 100.0, number: int = 1000) -> PriorGrid:
    r"""Dziugaite and Roy's variances of the prior, with the weights of their union bound.

    .. math:: \lambda_j = c \, e^{-j / b}, \quad
       p_j = \tfrac{6}{\pi^2 j^2}, \quad j = 1, \dots, number

    Args:
      c: largest variance, > 0; infinite precision in j costs little below it.
      b: number of variances in a factor of e, > 0.
      number: how many, >= 1.

    Returns:
      `PriorGrid`, with the square roots of the variances.

    Examples:
      >>> from flatopt import measures
      >>> grid = measures.prior_grid(c=1.0, b=1.0, number=2)
      >>> print(grid.sigmas, grid.weights)
      [0.607 0.368] [0.608 0.152]

    References:
      Dziugaite, Roy. Computing Nonvacuous Generalization Bounds. arXiv:1703.11008

    Cost: nothing.
    """
    for name, value in (("c", c), ("b", b)):
        checks.check_number(name, value, low=0.0, low_allowed=False, schedule_allowed=False)
    checks.check_count("number", number, 1, none_allowed=False)
    j = jnp.arange(1, number + 1, dtype=jnp.result_type(float))
    return PriorGrid(jnp.sqrt(c) * jnp.exp(-j / (2 * b)), 6 / (jnp.pi * j) ** 2)


class Moments(NamedTuple):
    """What the relative entropy of a Gaussian to isotropic ones around a centre depends on.

    Attributes:
      size: number of weights.
      square: mean over the weights of variance and squared distance from the centre together.
      geometric: geometric mean of the variances.
    """

    size: jax.Array
    square: jax.Array
    geometric: jax.Array


def moments(difference: Vector, log_sigmas: Vector) -> Moments:
    """The moments of a Gaussian whose mean differs from the centre by `difference`."""
    size = _variables.dimension(difference)
    pairs = list(zip(difference, log_sigmas, strict=True))
    squares = [jnp.sum(x**2 + jnp.exp(2 * s)) for x, s in pairs]
    log_variances = [2 * jnp.sum(jnp.broadcast_to(s, x.shape)) for x, s in pairs]
    square, log_variance = (jnp.sum(jnp.stack(x)) / size for x in (squares, log_variances))
    return Moments(jnp.asarray(size, square.dtype), square, jnp.exp(log_variance))


def kl_to_isotropic(moments: Moments, sigma: jax.Array) -> jax.Array:
    """Relative entropy to the isotropic Gaussian of standard deviation `sigma`."""
    ratio = moments.geometric / sigma**2
    # Both parts are at least zero: large terms that cancel are not formed.
    beyond = (moments.square - moments.geometric) / sigma**2
    return moments.size / 2 * (beyond + (ratio - 1 - jnp.log(ratio)))


@dataclasses.dataclass(frozen=True)
class _Bound:
    """The best bound over the sizes of the noise and the grid of the prior."""

    rises: Rises

    def __call__(
        self, mean: _batches.Mean, loops: _batches.Loops, params: Any, *inputs: Any
    ) -> PacBayesBound:
        prior, sigmas, scale, grid, (num_examples, delta, sample_delta), key = inputs
        number = len(sigmas)
        sizes = tuple(sigmas.reshape((-1,) + (1,) * s.ndim) * s[None] for s in scale)
        losses, error = self.rises.losses(mean, loops, params, sizes, key)
        known = jnp.all((losses >= 0) & (losses <= 1), axis=0)
        stochastic, standard_error = _results.estimate(jnp.where(known, losses, jnp.nan))
        # The size is chosen by these very draws: each has its share of what may fail.
        allowed = jnp.log(2 * number / sample_delta) / self.rises.num_samples
        sample_bounds = kl_inverse(stochastic, allowed)

        difference, is_same = _distance(self.rises.variables, params, prior)
        if grid is not None:
            found = jax.vmap(moments, in_axes=(None, 0))(difference, jax.tree.map(jnp.log, sizes))
            kl = jax.vmap(kl_to_isotropic, in_axes=(0, None))(found, grid.sigmas)
            prior_sigmas, log_shares = grid.sigmas, jnp.log(grid.weights)
        else:  # The prior has the size of the posterior: it was to be chosen from the sizes.
            kl = jax.vmap(lambda s: _kl_of_shift(difference, s))(sizes)[:, None]
            prior_sigmas, log_shares = sigmas, -jnp.log(jnp.asarray([number]))
        # What does not vary belongs to the prior: if it moved, no prior knew of it.
        kl = jnp.where(is_same, kl, jnp.inf)
        excess = complexity(kl - log_shares[None], num_examples, delta)
        bounds = kl_inverse(sample_bounds[:, None], excess)
        i, j = jnp.unravel_index(jnp.argmin(bounds), bounds.shape)
        prior_sigma = prior_sigmas[i if grid is None else j]
        return PacBayesBound(
            bounds[i, j], kl[i, j], stochastic[i], standard_error[i], sample_bounds[i], error,
            sigmas[i], prior_sigma,
        )  # fmt: skip


def _kl_of_shift(difference: Vector, sizes: Vector) -> jax.Array:
    """Relative entropy of two Gaussians of the same variances."""
    pairs = zip(difference, sizes, strict=True)
    return sum((jnp.sum((x / s) ** 2) for x, s in pairs), jnp.zeros([])) / 2


def _distance(variables: Variables, params: Any, prior: Any) -> tuple[Vector, jax.Array]:
    """What varies, less the prior's; and whether the two are equal in what does not."""
    pairs = zip(variables.take(params), variables.take(prior), strict=True)
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(prior), variables.flags, strict=True)
    same = [jnp.all(x == y) for x, y, flag in leaves if not flag]
    return tuple(x - y for x, y in pairs), jnp.all(jnp.asarray([True, *same]))


def pac_bayes_bound(
    error_fn: _batches.LossFn,
    params: optax.Params,
    prior: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    num_examples: int,
    sigma: float | Sequence[float] | jax.Array,
    scale: Any = None,
    grid: PriorGrid | None = None,
    num_samples: int = 256,
    delta: jax.typing.ArrayLike = 0.05,
    sample_delta: jax.typing.ArrayLike = 0.01,
    key: jax.typing.ArrayLike = 0,
    mask: Mask = None,
) -> PacBayesBound:
    r"""A bound on a noisy network's error on new examples, with k for `kl_inverse`.

    .. math:: k(k(\hat L, \ln(2 s / \delta') / n), \; (KL + \ln(2 \sqrt m / (p_j \delta))) / m)

    Args:
      error_fn: mean over a batch of an error in [0, 1]: `error_fn(params, batch)`. Static.
      params, prior: centre of the posterior Q, and of P, which must not know the examples.
      batches, weights, mask, num_examples: the m examples; see `hessian_vector_product`.
      sigma, scale: standard deviation, > 0, or s of them; a tree (prefix) of its factors, None: 1.
      grid: of P's variance: `prior_grid()`. None: it is Q's; `scale` must not know the examples.
      num_samples, key, delta, sample_delta: n draws, their key; shares that may fail, in (0, 1].

    Returns:
      `PacBayesBound`: it holds with probability 1 less both shares.

    Examples:
      >>> import flatopt, jax.numpy as jnp
      >>> bound, w = flatopt.measures.pac_bayes_bound, jnp.ones(2)
      >>> print(bound(lambda w: (w < 0).mean(), w, w, num_examples=1000, sigma=0.1).bound)
      0.042

    References:
      Dziugaite, Roy. Computing Nonvacuous Generalization Bounds. arXiv:1703.11008

    Cost: `num_samples * s` errors over the data; no gradients.
    """
    data = _batches.weigh(batches, weights)
    checks.check_count("num_examples", num_examples, 1, none_allowed=False)
    checks.check_count("num_samples", num_samples, 1, none_allowed=False)
    for name, value in (("delta", delta), ("sample_delta", sample_delta)):
        checks.check_number(name, value, 0.0, 1.0, low_allowed=False, schedule_allowed=False)
    sigmas = jnp.atleast_1d(jnp.asarray(sigma, jnp.result_type(float)))
    checks.check_number("sigma", sigmas, 0.0, low_allowed=False)
    if sigmas.ndim != 1 or not sigmas.size:
        raise ValueError(f"sigma={sigma!r} must be a number or a sequence of numbers.")
    _variables.check_alike("prior", prior, params)
    variables = _variables.prepare(error_fn, params, data, mask)
    sizes = variables.take(spread("scale", 1.0 if scale is None else scale, params))
    failure = tuple(jnp.asarray(x, sigmas.dtype) for x in (num_examples, delta, sample_delta))
    rises = Rises(error_fn, variables, num_samples)
    result = _batches.run(
        _Bound(rises), params, data, prior, sigmas, sizes, grid, failure, rng.as_key(key)
    )
    if not isinstance(result.error, jax.core.Tracer) and not 0 <= result.error <= 1:
        raise ValueError(f"error_fn is {result.error} at params: it must lie in [0, 1].")
    return result


def spread(name: str, values: Any, params: optax.Params) -> Any:
    """`values`, a prefix of `params`, as a tree whose leaves broadcast to those of `params`."""

    def leaf(x: Any, value: Any) -> jax.Array:
        if jnp.shape(value) not in ((), jnp.shape(x)):
            raise ValueError(
                f"{name} has an entry of shape {jnp.shape(value)} for a leaf of shape "
                f"{jnp.shape(x)}: it must be a number or of the leaf's shape."
            )
        return jnp.asarray(value, jnp.result_type(float))

    return jax.tree.map(lambda v, tree: jax.tree.map(lambda x: leaf(x, v), tree), values, params)
