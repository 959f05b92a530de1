"""Whether a loss minds the length of the weights."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import tree_math
from flatopt.measures import _variables
from flatopt.measures._variables import Mask, Variables


@dataclasses.dataclass(frozen=True)
class _ScaleInvarianceError:
    loss_fn: _batches.LossFn
    variables: Variables

    def __call__(
        self, mean: _batches.Mean, loops: _batches.Loops, params: optax.Params
    ) -> jax.Array:
        del loops
        point = self.variables.take(params)
        gradient = mean(_variables.Gradient(self.loss_fn, self.variables), params, point)[1]
        # One after the other, so that the product of two small norms does not vanish.
        length, steepness = tree_math.norm(point), tree_math.norm(gradient)
        direction = tree_math.scale(tree_math.ratio_or_zero(1, length), point)
        slope = jnp.abs(tree_math.vdot(direction, gradient))
        cosine = tree_math.ratio_or_zero(slope, steepness)
        return jnp.where(jnp.isfinite(slope), cosine, jnp.nan)


def scale_invariance_error(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    mask: Mask = None,
) -> jax.Array:
    r"""How much the loss minds the length of the weights: the gradient's share along them.

    .. math:: \frac{|w \cdot \nabla L(w)|}{\|w\| \, \|\nabla L(w)\|}

    Args:
      loss_fn, params, batches, weights, mask: see `hessian_vector_product`; the mask marks the
        weights that are to share a sphere.

    Returns:
      A scalar in [0, 1]: 0 if only the direction of the weights matters to first order, as before a
      normalisation layer without a shift; 1 if only their length does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> loss_fn = lambda w: (w[0] / jnp.linalg.norm(w) - 1.0) ** 2
      >>> print(f"{measures.scale_invariance_error(loss_fn, jnp.array([3.0, 4.0])):.4f}")
      0.0000

    References:
      Kodryan et al. Training Scale-Invariant Neural Networks on the Sphere Can Happen in Three
      Regimes. arXiv:2209.03695

    Cost: one gradient over the data.
    """
    data = _batches.weigh(batches, weights)
    variables = _variables.prepare(loss_fn, params, data, mask)
    return _batches.run(_ScaleInvarianceError(loss_fn, variables), params, data)
