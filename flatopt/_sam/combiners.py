"""Combiners: transformations of the perturbed gradient that also see the clean one.

`gradient_at` hands them the perturbed gradient as `updates` and the clean one as `clean_updates=`.
"""

from typing import Any

import optax

from flatopt._core import checks, stage, tree_math


def mix(perturbed: Any, clean: Any, alpha: Any) -> Any:
    r""":math:`\alpha \, p + (1 - \alpha) \, c`."""
    return tree_math.on_inexact(lambda p, c: alpha * p + (1 - alpha) * c, perturbed, clean)


def mix_clean(
    alpha: optax.ScalarOrSchedule, *, normalise_clean: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Mixes the perturbed gradient p with the clean gradient c.

    .. math:: \alpha \, p + (1 - \alpha) \, c \quad \text{or} \quad
      \alpha \, p + (1 - \alpha) \, c / \|c\|

    Args:
      alpha: weight of the perturbed gradient, any finite number: 1 is SAM, 0 the clean gradient,
        and more than 1 extrapolates. A number, a traced array, or a schedule of the step count.
      normalise_clean: the second form. Static.

    Returns:
      A combiner for `gradient_at`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> combiner = flatopt.mix_clean(0.8)
      >>> perturbed, clean = jnp.array([2.0, 0.0]), jnp.array([1.0, 1.0])
      >>> print(combiner.update(perturbed, combiner.init(clean), clean_updates=clean)[0])
      [1.8 0.2 ]

    References:
      Zhao, Zhang, Hu. Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning. arXiv:2202.03599

    Cost: 0 extra gradients; 0 copies.
    """
    checks.check_number("alpha", alpha)

    def combine(perturbed: Any, clean: Any, alpha: Any) -> Any:
        if normalise_clean:
            clean = tree_math.scale(1 / (tree_math.norm(clean) + tree_math.EPSILON), clean)
        return mix(perturbed, clean, alpha)

    return stage.combiner("mix_clean", combine, alpha=alpha)
