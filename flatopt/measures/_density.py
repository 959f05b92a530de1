"""The density of the spectrum by stochastic Lanczos quadrature."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng
from flatopt.measures import _basis, _lanczos, _operator
from flatopt.measures._operator import Operator
from flatopt.measures._variables import Mask, dimension

# Half-width of the grid beyond the outermost nodes, in standard deviations of the smoothing.
_MARGIN = 5.0


class SpectralDensity(NamedTuple):
    """Result of `spectral_density`.

    Attributes:
      grid: [grid_size], equally spaced, from below the least node to above the largest.
      density: [grid_size], share of the eigenvalues per unit length, smoothed; its integral is 1.
      standard_error: [grid_size], of `density`, over the probes; NaN for one probe.
      nodes: [num_probes, num_steps], Ritz values.
      weights: [num_probes, num_steps], >= 0; each row sums to 1. Moment p of the spectrum,
        `trace(H^p) / n`, is `jnp.mean(jnp.sum(weights * nodes**p, axis=1))`.
      width: standard deviation of the Gaussian that smooths each node.
    """

    grid: jax.Array
    density: jax.Array
    standard_error: jax.Array
    nodes: jax.Array
    weights: jax.Array
    width: jax.Array


@dataclasses.dataclass(frozen=True)
class _Density:
    operator: Operator
    num_probes: int
    num_steps: int
    grid_size: int
    width: float | None

    def __call__(
        self, mean: _batches.Mean, loops: _batches.Loops, params: Any, key: jax.Array
    ) -> SpectralDensity:
        point, multiply = self.operator.at(mean, params)
        probe_key, step_key = jax.random.split(key)
        probes = self._probes(probe_key, point)

        def one(start: Any) -> tuple[jax.Array, jax.Array]:
            process = _lanczos.explore(
                multiply,
                start,
                self.num_steps,
                step_key,
                loops,
            )
            pairs = _lanczos.ritz(process)
            # After NaN the process stops early: then nothing of it is a spectrum.
            known = jnp.where(process.size == self.num_steps, 1.0, jnp.nan)
            return process.scale * pairs.values * known, pairs.rotation[0] ** 2 * known

        nodes, weights = loops.map(one, probes)
        return self._smooth(nodes, weights)

    def _probes(self, key: jax.Array, point: Any) -> Any:
        """Random orthonormal probes: each is uniform on the sphere, and they repel one another."""
        normals = jax.lax.map(
            lambda k: _basis.random_normal(k, point), jax.random.split(key, self.num_probes)
        )
        return _basis.orthonormalise(normals, key)[0]

    def _smooth(self, nodes: jax.Array, weights: jax.Array) -> SpectralDensity:
        low, high = jnp.min(nodes), jnp.max(nodes)
        span = high - low
        narrow = 0.01 * span + 1e-3 * jnp.maximum(jnp.abs(high), jnp.abs(low))
        narrow = jnp.where(narrow == 0, _basis.TINY, narrow)  # All eigenvalues are zero.
        width = narrow if self.width is None else jnp.asarray(self.width, nodes.dtype)
        margin = _MARGIN * width
        grid = low - margin + (span + 2 * margin) * jnp.linspace(0.0, 1.0, self.grid_size)

        def at(position: jax.Array) -> jax.Array:
            bumps = jnp.exp(-0.5 * ((position - nodes) / width) ** 2)
            return jnp.sum(weights * bumps, axis=1) / (width * jnp.sqrt(2 * jnp.pi))

        by_probe = jax.lax.map(at, grid)  # [grid_size, num_probes]
        error = jnp.full(self.grid_size, jnp.nan, nodes.dtype)
        if self.num_probes > 1:
            error = jnp.std(by_probe, axis=1, ddof=1) / self.num_probes**0.5
        return SpectralDensity(grid, jnp.mean(by_probe, axis=1), error, nodes, weights, width)


def spectral_density(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    num_probes: int | None = None,
    num_steps: int | None = None,
    grid_size: int = 512,
    width: float | None = None,
    key: jax.typing.ArrayLike = 0,
    output_loss: _operator.OutputLoss | None = None,
    mask: Mask = None,
) -> SpectralDensity:
    r"""The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    .. math:: \tfrac1n \sum_i \delta(t - \lambda_i) \approx
       \tfrac1p \sum_{jm} \tau_{jm} \, \mathcal N(t; \theta_{jm}, \text{width}^2)

    Args:
      loss_fn, params, batches, weights, output_loss, mask: see `top_eigenvalues`.
      num_probes, num_steps, key: probes, Lanczos steps of each (None: 8 and 64; static), and seed.
      grid_size, width: points of the grid, >= 2; None: a hundredth of the nodes' span. Static.

    Returns:
      `SpectralDensity`: grid, density with its standard error, Ritz values and weights.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> result = measures.spectral_density(lambda w: w @ w, jnp.ones(3), num_probes=3)
      >>> print(f"{jnp.mean(jnp.sum(result.weights * result.nodes, axis=1)):.4f}")  # The mean.
      2.0000

    References:
      Ubaru, Chen, Saad. Fast Estimation of tr(f(A)). SIAM J. Matrix Anal. Appl. 38(4), 2017.
      Ghorbani, Krishnan, Xiao. Hessian Eigenvalue Density. arXiv:1901.10159

    Cost: `num_probes * num_steps` Hessian-vector products; `num_steps + num_probes` copies.
    """
    data = _batches.weigh(batches, weights)
    operator = _operator.make(loss_fn, params, data, mask, output_loss)
    size = dimension(operator.variables.take(params))
    probes = min(8, size) if num_probes is None else num_probes
    steps = min(64, size) if num_steps is None else num_steps
    _basis.check_at_most_dimension("num_probes", probes, size)
    _basis.check_at_most_dimension("num_steps", steps, size)
    checks.check_count("grid_size", grid_size, 2)
    if width is not None and not width > 0:
        raise ValueError(f"width={width!r} is out of range: it must be above 0.")
    algorithm = _Density(operator, probes, steps, grid_size, width)
    return _batches.run(algorithm, params, data, rng.as_key(key))
