"""Combiners: transformations of the perturbed gradient that also see the clean one.

`gradient_at` hands them the perturbed gradient as `updates` and the clean one as `clean_updates=`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _tree
from flatopt._schedules import value_at


class CombinerState(NamedTuple):
    """State of a combiner whose weight may follow a schedule.

    Attributes:
      step: int32 scalar, number of gradients combined so far.
    """

    step: jax.Array


def surrogate_gap(
    alpha: optax.ScalarOrSchedule, minimize_perturbed: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a descent of the surrogate gap that leaves one of the two losses alone: GSAM.

    With the clean gradient c, the perturbed gradient p, and :math:`x_{\perp y}` the part of x that
    is orthogonal to y:

    .. math:: p - \alpha \, c_{\perp p} \qquad \text{or} \qquad c + \alpha \, p_{\perp c}

    Args:
      alpha: weight of the orthogonal part, >= 0; 0.1 to 0.6 are usual. A number, a traced array, or
        a schedule of the step count.
      minimize_perturbed: True: the first form, which descends the perturbed loss. False: the
        second, which descends the clean loss (`minimize_fp=False` of the authors' JAX code).
        Static.

    Returns:
      A combiner for `gradient_at`. Where the gradient projected on is zero, nothing is projected
      away.

    Raises:
      ValueError: if `alpha` is negative or not finite, or used outside `gradient_at`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> combiner = flatopt.surrogate_gap(0.5)
      >>> perturbed, clean = jnp.array([2.0, 0.0]), jnp.array([1.0, 1.0])
      >>> updates, _ = combiner.update(perturbed, combiner.init(clean), clean_updates=clean)
      >>> print(updates)
      [ 2.  -0.5]

    References:
      Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. arXiv:2203.08065

    Notes:
      Gradient evaluations: none of its own. State: one integer.
    """
    _checks.check_number("alpha", alpha, low=0.0)

    def combine(perturbed: Any, clean: Any, weight: Any) -> Any:
        if not minimize_perturbed:
            return _tree.add_scaled(clean, weight, _tree.orthogonal(perturbed, clean))
        if _checks.is_zero(alpha):  # Exactly SAM, whatever the clean gradient holds.
            return perturbed
        return _tree.add_scaled(perturbed, -weight, _tree.orthogonal(clean, perturbed))

    return _combiner("surrogate_gap", combine, alpha)


def mix_clean(
    alpha: optax.ScalarOrSchedule, normalize_clean: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Mixes the perturbed gradient p with the clean gradient c.

    .. math::
      \alpha \, p + (1 - \alpha) \, c
      \qquad \text{or} \qquad \alpha \, p + (1 - \alpha) \, c / \|c\|

    Args:
      alpha: weight of the perturbed gradient, any finite number: 1 is SAM, 0 the clean gradient,
        and more than 1 extrapolates. A number, a traced array, or a schedule of the step count.
      normalize_clean: the second form. Static.

    Returns:
      A combiner for `gradient_at`.

    Raises:
      ValueError: if `alpha` is not finite, or used outside `gradient_at`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> combiner = flatopt.mix_clean(0.8)
      >>> perturbed, clean = jnp.array([2.0, 0.0]), jnp.array([1.0, 1.0])
      >>> updates, _ = combiner.update(perturbed, combiner.init(clean), clean_updates=clean)
      >>> print(updates)
      [1.8 0.2 ]

    References:
      Zhao, Zhang, Hu. Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning. arXiv:2202.03599

    Notes:
      Gradient evaluations: none of its own. State: one integer.
    """
    _checks.check_number("alpha", alpha)

    def combine(perturbed: Any, clean: Any, weight: Any) -> Any:
        if normalize_clean:
            clean = _tree.scale(1 / (_tree.norm(clean) + _tree.EPSILON), clean)
        return jax.tree.map(
            lambda p, c: (weight * p + (1 - weight) * c).astype(p.dtype), perturbed, clean
        )

    return _combiner("mix_clean", combine, alpha)


def _combiner(
    name: str, combine: Any, alpha: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """The transformation that calls `combine(perturbed, clean, weight)`."""

    def init_fn(params: optax.Params) -> CombinerState:
        del params
        return CombinerState(step=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: CombinerState,
        params: optax.Params | None = None,
        *,
        clean_updates: optax.Updates | None = None,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CombinerState]:
        del params, extra_args
        if clean_updates is None:
            raise ValueError(
                f"flatopt.{name} needs the clean gradient beside the perturbed one. Use it as "
                f"`flatopt.gradient_at(perturbation, combiner=flatopt.{name}(...))`."
            )
        weight = value_at(alpha, state.step if step is None else step)
        combined = combine(updates, clean_updates, weight)
        return combined, CombinerState(optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
