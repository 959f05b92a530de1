"""RWP (Li et al., arXiv:2404.00357): mix in the gradient at a randomly displaced point."""

import optax

from flatopt._core import registry
from flatopt._core.rng import KeyLike
from flatopt._sam.combiners import mix_clean
from flatopt._sam.gradient_at import ascent_stage
from flatopt._sam.noise import filter_noise


@registry.method("stage", needs=("grad_fn",))
def rwp(
    std: optax.ScalarOrSchedule,
    *,
    alpha: optax.ScalarOrSchedule = 0.5,
    key: KeyLike = 0,
    filter_axis: int | None = None,
    noise: optax.GradientTransformation | None = None,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Random weight perturbation: mix in the gradient at a randomly displaced point.

    .. math:: g \leftarrow (1 - \alpha) \, g + \alpha \, \nabla L(w + \epsilon), \qquad
      \epsilon_f = \sigma \, \|w_f\| \, z_f, \quad z \sim \mathcal{N}(0, 1)

    Args:
      std: see `filter_noise`; 0.01 is usual, and with the number 0 the stage is the identity.
      alpha: weight of the displaced gradient; 1 is its gradient alone. Likewise.
      key, filter_axis, noise: see `filter_noise`.
      start, every: when it acts; see `gradient_at`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`. The authors
      take the second gradient on another batch: let `grad_fn` do so.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.rwp(std=0.01), jnp.ones((2, 3))
      >>> print(jnp.round(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0][0], 1))
      [1. 1. 1.]

    References:
      Li et al. Revisiting Random Weight Perturbation. arXiv:2404.00357

    Cost: 1 extra gradient; 0 copies (+2 temporary).
    """
    perturbation = filter_noise(std, key=key, filter_axis=filter_axis, noise=noise)
    return ascent_stage(std, perturbation, combiner=mix_clean(alpha), start=start, every=every)
