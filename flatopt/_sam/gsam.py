"""GSAM (Zhuang et al., arXiv:2203.08065): SAM that also closes the gap between its two losses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, stage, tree_math
from flatopt._sam.ascent import climb_to_norm, scale_to_norm
from flatopt._sam.gradient_at import ascent_stage


def close_gap(perturbed: Any, clean: Any, alpha: Any) -> Any:
    r"""The paper's update, :math:`p - \alpha \, c_{\perp p}`."""
    return tree_math.add_scaled(perturbed, -alpha, tree_math.orthogonal(clean, to=perturbed))


def close_gap_from_below(perturbed: Any, clean: Any, alpha: Any) -> Any:
    r"""The same seen from the clean loss, :math:`c + \alpha \, p_{\perp c}`."""
    return tree_math.add_scaled(clean, alpha, tree_math.orthogonal(perturbed, to=clean))


def surrogate_gap(
    alpha: optax.ScalarOrSchedule, *, minimise_perturbed: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a descent of the surrogate gap that leaves one of the two losses alone: GSAM.

    .. math:: p - \alpha \, c_{\perp p} \qquad \text{or} \qquad c + \alpha \, p_{\perp c}

    of the clean gradient c and the perturbed one p; the part of x orthogonal to y is
    :math:`x_{\perp y}`, all of x where y is zero.

    Args:
      alpha: weight of the orthogonal part, >= 0: a number, a traced array, or a schedule.
      minimise_perturbed: False: the second form, which descends the clean loss. Static.

    Returns:
      A combiner for `gradient_at`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> combiner = flatopt.surrogate_gap(0.5)
      >>> perturbed, clean = jnp.array([2.0, 0.0]), jnp.array([1.0, 1.0])
      >>> print(combiner.update(perturbed, combiner.init(clean), clean_updates=clean)[0])
      [ 2.  -0.5]

    References:
      Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. arXiv:2203.08065

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    checks.check_number("alpha", alpha, low=0.0)
    if not minimise_perturbed:
        return stage.combiner("surrogate_gap", close_gap_from_below, alpha=alpha)
    if checks.is_number(alpha, 0):  # Exactly SAM, whatever the clean gradient holds.
        return stage.combiner("surrogate_gap", lambda perturbed, *_, **__: perturbed)
    return stage.combiner("surrogate_gap", close_gap, alpha=alpha)


def proportional_rho_schedule(
    learning_rate: optax.Schedule,
    rho_max: float,
    rho_min: float,
    learning_rate_max: float,
    learning_rate_min: float,
) -> optax.Schedule:
    r"""A radius that rises and falls with the learning rate, as in GSAM.

    .. math:: \rho_t = \rho_{min} + (\rho_{max} - \rho_{min})
        \frac{\eta_t - \eta_{min}}{\eta_{max} - \eta_{min}}, \quad \text{but never below 0}

    Args:
      learning_rate: the schedule :math:`\eta_t` that the optimiser uses.
      rho_max, rho_min: radii, >= 0, at the highest and at the lowest learning rate.
      learning_rate_max, learning_rate_min: these rates; if they are equal the radius is `rho_max`.

    Returns:
      A schedule of the step count, to be passed as `rho` to `gsam` or any other method.

    Examples:
      >>> import optax, flatopt
      >>> learning_rate = optax.linear_schedule(0.1, 0.0, 10)
      >>> rho = flatopt.proportional_rho_schedule(learning_rate, 0.6, 0.1, 0.1, 0.0)
      >>> print(f"{rho(0):.2f} {rho(5):.2f} {rho(10):.2f}")
      0.60 0.35 0.10

    References:
      Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. arXiv:2203.08065

    Cost: 0 extra gradients; 0 copies.
    """
    check_number = functools.partial(checks.check_number, schedule_allowed=False)
    check_number("rho_max", rho_max, low=0.0)
    check_number("rho_min", rho_min, low=0.0)
    check_number("learning_rate_min", learning_rate_min)
    check_number("learning_rate_max", learning_rate_max, low=learning_rate_min)
    span = learning_rate_max - learning_rate_min
    if span == 0:
        return optax.constant_schedule(rho_max)

    def schedule(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        share = (learning_rate(step) - learning_rate_min) / span
        # A warm-up from below `learning_rate_min` would turn the ascent into a descent.
        return jnp.maximum(rho_min + (rho_max - rho_min) * share, 0.0)

    return schedule


@registry.method("stage", needs=("grad_fn",))
def gsam(
    rho: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule = 0.4,
    *,
    perturbation: optax.GradientTransformation | None = None,
    minimise_perturbed: bool = True,
    start: int | None = None,
    every: int | None = None,
    record: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM: SAM that also closes the surrogate gap, perturbed loss minus clean loss.

    .. math:: g \leftarrow p - \alpha \, c_{\perp p}, \qquad p = \nabla L(w + \rho \, c / \|c\|)

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule (`proportional_rho_schedule`).
      alpha: weight of the gap, >= 0; 0 is `sam`, 0.1 to 0.6 are usual. Likewise.
      perturbation: the ascent step; None is `scale_to_norm(rho)`.
      minimise_perturbed: False descends the clean loss, :math:`c + \alpha \, p_{\perp c}`. Static.
      start, every, record: when it acts, and what it keeps of it; see `gradient_at`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.gsam(rho=0.5, alpha=0.4), jnp.array([3.0, 1.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * (w[0] ** 2 + 4.0 * w[1] ** 2))
      >>> print(tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0])
      [3.109 5.712]

    References:
      Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. arXiv:2203.08065

    Cost: 1 extra gradient; 0 copies (+2 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    if perturbation is None:
        perturbation = scale_to_norm(rho)
    perturbation = checks.as_transformation("perturbation", perturbation)
    combiner = surrogate_gap(alpha, minimise_perturbed=minimise_perturbed)
    return ascent_stage(
        rho, perturbation, combiner=combiner, start=start, every=every, record=record
    )


def scale_to_weighted_norm(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to a given length, then each entry by its weight: GSAM's in JAX.

    .. math:: \epsilon = \rho \, |w| \, g / (\|g\| + 10^{-12})

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count.

    Returns:
      A perturbation for `gsam(perturbation=...)`; needs `params`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation = flatopt.scale_to_weighted_norm(0.5)
      >>> params, grads = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
      >>> print(perturbation.update(grads, perturbation.init(params), params)[0])
      [0.3 0.8]

    References:
      Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. arXiv:2203.08065

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)

    def displace(grads: Any, params: Any, rho: Any) -> Any:
        climbed = climb_to_norm(grads, rho)
        return tree_math.on_inexact(lambda u, w: jnp.abs(w) * u, climbed, params)

    return stage.perturbation(displace, needs_params="scale_to_weighted_norm", rho=rho)
