"""The largest eigenvalues of the Hessian."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng
from flatopt.measures import _basis, _lanczos, _operator
from flatopt.measures._lanczos import Process, Ritz
from flatopt.measures._operator import Operator
from flatopt.measures._variables import Mask, dimension

WHICH = ("largest", "smallest", "magnitude")


class Eigenvalues(NamedTuple):
    """Result of `top_eigenvalues`.

    Attributes:
      values: [k], in the order asked for.
      vectors: tree like the parameters with a leading axis of length k: unit eigenvectors, zero
        outside the mask.
      residuals: [k], length of `H v - value v` as the Lanczos process gives it.
      converged: [k] bools: the residual is within the tolerance. False for NaN.
      num_products: number of products with the matrix that were taken.
    """

    values: jax.Array
    vectors: optax.Params
    residuals: jax.Array
    converged: jax.Array
    num_products: jax.Array


@dataclasses.dataclass(frozen=True)
class _TopEigenvalues:
    operator: Operator
    k: int
    num_steps: int
    tolerance: float
    which: str
    size: int

    def __call__(
        self, mean: _batches.Mean, loops: _batches.Loops, params: Any, key: jax.Array
    ) -> Eigenvalues:
        point, multiply = self.operator.at(mean, params)
        start = _basis.random_unit(jax.random.fold_in(key, 0), point)
        process = _lanczos.explore(
            multiply,
            start,
            self.num_steps,
            jax.random.fold_in(key, 1),
            loops,
            self._finished,
        )
        pairs, chosen, converged = self._choose(process)
        rotation = jnp.where(
            jnp.arange(self.num_steps)[:, None] < process.size, pairs.rotation[:, chosen], 0.0
        )
        vectors = jax.lax.map(lambda c: _basis.combine(c, process.basis), rotation.T)
        found = pairs.valid[chosen] & jnp.all(jnp.isfinite(process.diagonal))
        return Eigenvalues(
            values=jnp.where(found, process.scale * pairs.values[chosen], jnp.nan),
            vectors=self.operator.variables.spread(params, vectors, self.k),
            residuals=jnp.where(found, process.scale * pairs.residuals[chosen], jnp.nan),
            converged=converged,
            num_products=process.size,
        )

    def _finished(self, process: Process) -> jax.Array:
        return jnp.all(self._choose(process)[2])

    def _choose(self, process: Process) -> tuple[Ritz, jax.Array, jax.Array]:
        """The eigenpairs, the indices of those asked for, and whether these have converged."""
        pairs = _lanczos.ritz(process)
        rank = {
            "largest": pairs.values,
            "smallest": -pairs.values,
            "magnitude": jnp.abs(pairs.values),
        }[self.which]
        _, chosen = jax.lax.top_k(jnp.where(pairs.valid, rank, -jnp.inf), self.k)
        scale = jnp.max(jnp.where(pairs.valid, jnp.abs(pairs.values), 0.0))
        within = pairs.residuals[chosen] <= self.tolerance * scale
        # In an exhausted space every eigenpair is exact, whatever rounding has left.
        exhausted = process.size >= self.size
        return pairs, chosen, pairs.valid[chosen] & (within | exhausted) & (process.size > 0)


def top_eigenvalues(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    k: int = 1,
    key: jax.typing.ArrayLike = 0,
    num_steps: int | None = None,
    tolerance: float = 1e-3,
    which: str = "largest",
    output_loss: _operator.OutputLoss | None = None,
    mask: Mask = None,
) -> Eigenvalues:
    r"""The k largest eigenvalues of the Hessian, with eigenvectors and residuals.

    .. math:: H v_i = \lambda_i v_i, \qquad \lambda_1 \ge \lambda_2 \ge \dots \ge \lambda_k

    Args:
      params, batches, weights, mask: see `hessian_vector_product`.
      loss_fn, output_loss: a loss, None; or model, loss of `gauss_newton_vector_product`. Static.
      k, key: number of eigenvalues (static); random key or integer seed of the start vector.
      num_steps: most products, >= k; None: 4 k + 40, at most the number of parameters. Static.
      tolerance: of a residual, >= 0, in units of the largest absolute eigenvalue. Static.
      which: "largest", "smallest" (most negative first), or "magnitude". Static.

    Returns:
      `Eigenvalues`. Look at `converged`: what has not converged is returned all the same.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.top_eigenvalues(lambda w: w[0] ** 2 - w[1] ** 2, jnp.ones(2), k=2).values)
      [ 2. -2.]

    References:
      Lanczos. 1950. Golub, Van Loan. Matrix Computations, section 10.3.

    Cost: at most `num_steps` Hessian-vector products; `num_steps` copies.
    """
    data = _batches.weigh(batches, weights)
    operator = _operator.make(loss_fn, params, data, mask, output_loss)
    size = dimension(operator.variables.take(params))
    _basis.check_at_most_dimension("k", k, size)
    checks.check_count("num_steps", num_steps, k)
    checks.check_number("tolerance", tolerance, low=0.0)
    checks.check_choice("which", which, WHICH)
    steps = min(size, 4 * k + 40 if num_steps is None else num_steps)
    algorithm = _TopEigenvalues(operator, k, steps, float(tolerance), which, size)
    return _batches.run(algorithm, params, data, rng.as_key(key))
