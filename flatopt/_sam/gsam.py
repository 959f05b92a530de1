"""GSAM (Zhuang et al., arXiv:2203.08065): SAM that also closes the gap between its two losses."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, stage, tree_math
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

    With the clean gradient c, the perturbed gradient p, and :math:`x_{\perp y}` the part of x that
    is orthogonal to y:

    .. math:: p - \alpha \, c_{\perp p} \qquad \text{or} \qquad c + \alpha \, p_{\perp c}

    Args:
      alpha: weight of the orthogonal part, >= 0; 0.1 to 0.6 are usual. A number, a traced array, or
        a schedule of the step count.
      minimise_perturbed: True: the first form, which descends the perturbed loss. False: the
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

    .. math::
      \rho_t = \rho_{min} + (\rho_{max} - \rho_{min})
        \frac{\eta_t - \eta_{min}}{\eta_{max} - \eta_{min}}

    Args:
      learning_rate: the schedule :math:`\eta_t` that the optimiser uses.
      rho_max: radius at the highest learning rate, >= 0.
      rho_min: radius at the lowest, >= 0.
      learning_rate_max: the highest learning rate.
      learning_rate_min: the lowest learning rate; if both are equal the radius is `rho_max`.

    Returns:
      A schedule of the step count. It never falls below 0: during a warm-up that starts below
      `learning_rate_min` the formula alone would turn the ascent into a descent.

    Raises:
      ValueError: if a radius is negative, or the highest learning rate is below the lowest.

    Examples:
      >>> import optax
      >>> import flatopt
      >>> learning_rate = optax.linear_schedule(0.1, 0.0, 10)
      >>> rho = flatopt.proportional_rho_schedule(learning_rate, 0.6, 0.1, 0.1, 0.0)
      >>> print(f"{rho(0):.2f} {rho(5):.2f} {rho(10):.2f}")
      0.60 0.35 0.10

    References:
      Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. arXiv:2203.08065

    Notes:
      To be passed as `rho` to `gsam` or any other method.
    """
    checks.check_number("rho_max", rho_max, low=0.0)
    checks.check_number("rho_min", rho_min, low=0.0)
    checks.check_number("learning_rate_max", learning_rate_max, low=learning_rate_min)
    span = learning_rate_max - learning_rate_min
    if span == 0:
        return optax.constant_schedule(rho_max)

    def schedule(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        share = (learning_rate(step) - learning_rate_min) / span
        return jnp.maximum(rho_min + (rho_max - rho_min) * share, 0.0)

    return schedule


def gsam(
    rho: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule = 0.4,
    *,
    perturbation: optax.GradientTransformation | None = None,
    minimise_perturbed: bool = True,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM: SAM that also closes the surrogate gap, perturbed loss minus clean loss.

    With the clean gradient c and the perturbed one :math:`p = \nabla L(w + \rho \, c / \|c\|)`:

    .. math:: g \leftarrow p - \alpha \, c_{\perp p}

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count; the authors use
        `proportional_rho_schedule`. With the number 0 the stage is the identity and takes no
        gradient.
      alpha: weight of the gap, >= 0; 0 is `sam`, 0.1 to 0.6 are usual. Likewise.
      perturbation: the ascent step; None is `scale_to_norm(rho)`. The authors' adaptive forms are
        `scale_to_adaptive_norm(rho)` in PyTorch and `scale_to_weighted_norm(rho)` in JAX.
      minimise_perturbed: False descends the clean loss, :math:`c + \alpha \, p_{\perp c}`. Static.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.gsam(rho=0.5, alpha=0.4), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 1.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * (w[0] ** 2 + 4.0 * w[1] ** 2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.3109 -0.5712]

    References:
      Zhuang et al. Surrogate Gap Minimization Improves Sharpness-Aware Training. arXiv:2203.08065

    Notes:
      Place: as for `sam`. Gradient
      evaluations: one extra per sharp update. State: three integers; two temporary copies of the
      parameters.
    """
    checks.check_number("rho", rho, low=0.0)
    perturbation = scale_to_norm(rho) if perturbation is None else perturbation
    combiner = surrogate_gap(alpha, minimise_perturbed=minimise_perturbed)
    return ascent_stage(rho, perturbation, combiner=combiner, start=start, every=every)


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
        return jax.tree.map(lambda u, w: (jnp.abs(w) * u).astype(u.dtype), climbed, params)

    return stage.perturbation(displace, needs_params="scale_to_weighted_norm", rho=rho)
