"""RWP (Li et al., arXiv:2404.00357): mix in the gradient at a randomly displaced point."""

import optax

from flatopt._core.rng import KeyLike
from flatopt._sam.combiners import mix_clean
from flatopt._sam.gradient_at import ascent_stage
from flatopt._sam.noise import filter_noise


def rwp(
    std: optax.ScalarOrSchedule,
    *,
    alpha: optax.ScalarOrSchedule = 0.5,
    key: KeyLike = 0,
    filter_axis: int | None = None,
    start: int | None = None,
    every: int | None = None,
    noise: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Random weight perturbation: mix in the gradient at a randomly displaced point.

    .. math::
      g \leftarrow (1 - \alpha) \, g + \alpha \, \nabla L(w + \epsilon), \qquad
      \epsilon_f = \sigma \, \|w_f\| \, z_f, \quad z \sim \mathcal{N}(0, 1)

    Args:
      std: :math:`\sigma`, >= 0, in units of each filter's norm; 0.01 is usual: a number, a traced
        array, or a schedule of the step count. With the number 0 the stage is the identity and
        takes no gradient.
      alpha: weight of the displaced gradient; 1 is its gradient alone. Likewise.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      filter_axis: the axis that numbers the filters; see `filter_noise`. Static.
      start: number of plain updates before the first displaced one, >= 0; None means 0. Static.
      every: displace one update in `every`, >= 1; None means each. Static.
      noise: transformation that draws z; None means `standard_normal(key)`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`. The authors
      take the second gradient on another batch: let `grad_fn` do so.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.rwp(std=0.01, alpha=0.5, key=0), optax.sgd(0.1))
      >>> params = jnp.ones((2, 3))
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(bool(jnp.all(abs(updates + 0.1) < 0.01)))
      True

    References:
      Li et al. Revisiting Random Weight Perturbation for Efficiently Improving Generalization.
      arXiv:2404.00357

    Notes:
      Place: as for `sam`. Gradient evaluations: one extra. Though it does not depend on the clean
      one, it waits for it, so that the activations of one pass at a time are in memory; XLA for
      CPUs does not keep to the order. State: one key, a few integers; two temporary copies of the
      parameters, and the random bits.
    """
    perturbation = filter_noise(std, key=key, filter_axis=filter_axis, noise=noise)
    return ascent_stage(std, perturbation, combiner=mix_clean(alpha), start=start, every=every)
