"""A Gaussian on the weights, trained on its own PAC-Bayes bound (arXiv:1703.11008)."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng
from flatopt._core import progress as _progress
from flatopt.measures import _pac_bayes_bound, _variables
from flatopt.measures._kl_inverse import complexity
from flatopt.measures._pac_bayes_bound import PriorGrid, prior_grid


class GaussianPosterior(NamedTuple):
    """Weights with independent Gaussian noise, each of its own size.

    Attributes:
      mean: tree of the weights.
      log_sigma: tree like it, the logarithms of the standard deviations.
    """

    mean: optax.Params
    log_sigma: optax.Params

    @property
    def sigma(self) -> optax.Params:
        """The standard deviations, a tree like `mean`."""
        return jax.tree.map(jnp.exp, self.log_sigma)


def pac_bayes_objective(
    loss_fn: _batches.LossFn,
    prior: optax.Params,
    *,
    num_examples: int,
    grid: PriorGrid | None = None,
    delta: float = 0.05,
) -> Callable[..., jax.Array]:
    r"""A bound on the error as a differentiable function of a Gaussian posterior.

    .. math:: L(\mu + \sigma z) + \min_j \sqrt{(KL_j + \ln(2 \sqrt m / (p_j \delta))) / (2 m)}

    Args:
      loss_fn: `loss_fn(params, *args)`, in place of an error, such as cross-entropy over ln 2.
      prior: mean of the prior, which must not know the examples.
      num_examples, delta: m examples; probability with which the bound may fail, in (0, 1].
      grid: variances of the prior, with their weights; None: `prior_grid()`.

    Returns:
      `objective(posterior, key, *args)`, of a `GaussianPosterior` and the random key of one draw.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import measures
      >>> posterior = measures.GaussianPosterior(jnp.zeros(3), jnp.full(3, -2.0))
      >>> objective = measures.pac_bayes_objective(lambda w: w @ w, jnp.zeros(3), num_examples=1000)
      >>> print(f"{objective(posterior, jax.random.key(0)):.2f}")
      0.11

    References:
      Dziugaite, Roy. Computing Nonvacuous Generalization Bounds. arXiv:1703.11008

    Cost: 1 loss.
    """
    checks.check_count("num_examples", num_examples, 1, none_allowed=False)
    checks.check_number("delta", delta, 0.0, 1.0, low_allowed=False, schedule_allowed=False)
    chosen = prior_grid() if grid is None else grid
    variables = _variables.select(prior)

    def objective(posterior: GaussianPosterior, key: Any, *args: Any) -> jax.Array:
        mean, log_sigma = variables.take(posterior.mean), variables.take(posterior.log_sigma)
        noise = rng.normal_like(key, mean)
        moved = jax.tree.map(lambda w, s, z: w + jnp.exp(s) * z, mean, log_sigma, noise)
        loss = loss_fn(variables.put(posterior.mean, moved), *args)

        pairs = zip(mean, variables.take(prior), strict=True)
        moments = _pac_bayes_bound.moments(tuple(x - y for x, y in pairs), log_sigma)
        kl = _pac_bayes_bound.kl_to_isotropic(moments, chosen.sigmas) - jnp.log(chosen.weights)
        return loss + jnp.sqrt(complexity(jnp.min(kl), num_examples, delta) / 2)

    return objective


def pac_bayes_optimise(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    prior: optax.Params,
    optimizer: optax.GradientTransformation,
    batches: Iterable[Any],
    *,
    num_examples: int,
    sigma: Any = 0.01,
    grid: PriorGrid | None = None,
    delta: float = 0.05,
    key: jax.typing.ArrayLike = 0,
    progress: bool = False,
) -> GaussianPosterior:
    r"""Trains a Gaussian posterior on a bound of its own error: one step a batch.

    .. math:: \min_{\mu, \sigma} \; \mathbb E_z L(\mu + \sigma z) + bound(\mu, \sigma)

    Args:
      loss_fn, prior, num_examples, grid, delta: see `pac_bayes_objective`. Static.
      params, sigma: mean and standard deviations (a number, or a tree like `params`) to start from.
      optimizer: any optax transformation, for mean and log sigma together.
      batches, progress, key: one a step; whether to show a bar (needs tqdm); key or integer seed.

    Returns:
      `GaussianPosterior`; for its bound pass `scale=posterior.sigma` to `pac_bayes_bound`.

    Examples:
      >>> import flatopt, jax.numpy as jnp, optax
      >>> w, train = jnp.zeros(2), flatopt.measures.pac_bayes_optimise
      >>> steep = lambda w, batch: w @ (jnp.array([1, 100]) * w)
      >>> sigma = train(steep, w, w, optax.adam(0.05), [None] * 200, num_examples=1000).sigma
      >>> print(bool(sigma[0] > 2 * sigma[1]))
      True

    References:
      Dziugaite, Roy. Computing Nonvacuous Generalization Bounds. arXiv:1703.11008

    Cost: 1 gradient a batch.
    """
    _variables.check_alike("prior", prior, params)
    objective = pac_bayes_objective(
        loss_fn, prior, num_examples=num_examples, grid=grid, delta=delta
    )
    tx = checks.as_transformation("optimizer", optimizer)

    @jax.jit
    def step(posterior: Any, opt_state: Any, key: jax.Array, batch: Any) -> tuple[Any, Any]:
        def grad_fn(posterior: Any, i: jax.typing.ArrayLike) -> Any:
            del i
            return jax.grad(objective)(posterior, key, batch)

        updates, opt_state = tx.update(grad_fn(posterior, 0), opt_state, posterior, grad_fn=grad_fn)
        return optax.apply_updates(posterior, updates), opt_state

    posterior = GaussianPosterior(params, _log_sigma(params, sigma))
    opt_state = tx.init(posterior)
    random_key = rng.as_key(key)
    for number, batch in enumerate(_progress.bar(batches, "posterior", progress)):
        posterior, opt_state = step(
            posterior, opt_state, jax.random.fold_in(random_key, number), batch
        )
    return posterior


def _log_sigma(params: optax.Params, sigma: Any) -> optax.Params:
    """The logarithms of the standard deviations, one a weight."""
    for value in jax.tree.leaves(sigma):
        checks.check_number("sigma", value, low=0.0, low_allowed=False, schedule_allowed=False)
    sizes = _pac_bayes_bound.spread("sigma", sigma, params)
    return jax.tree.map(lambda w, s: jnp.broadcast_to(jnp.log(s), jnp.shape(w)), params, sizes)
