"""ARWP: the gradient is taken at a randomly displaced point only."""

from typing import Any

import optax

from flatopt import _checks, _random
from flatopt._noise import AdaptiveFilterNoise, AdaptiveFilterNoiseState


def arwp(
    std: optax.ScalarOrSchedule,
    eta: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule,
    key: _random.KeyLike = 0,
    filter_axis: int | None = None,
    noise: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive random weight perturbation: descend with the gradient at a noisy point alone.

    .. math::
      g = \nabla L(w + \epsilon), \qquad
      \epsilon_f = \frac{\sigma \, \|w_f\|}{\sqrt{1 + \eta F_f}} \, z_f, \qquad
      F_f \leftarrow \beta F_f + \|g_f\|^2

    Args:
      std: :math:`\sigma`, >= 0: a number, a traced array, or a schedule of the step count. With the
        number 0 the stage is the identity and takes no gradient.
      eta: how strongly large gradients damp the noise, >= 0: likewise.
      decay: :math:`\beta`, in [0, 1): likewise.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      filter_axis: the axis that numbers the filters; see `filter_noise`. Static.
      noise: transformation that draws z; None means `standard_normal(key)`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`. The
      gradient it is given is not used: under `jit` it is not even computed, so that a step costs
      one gradient.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.arwp(std=0.01, eta=0.1, decay=0.99, key=0), optax.sgd(0.1))
      >>> params = jnp.ones((2, 3))
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(params, tx.init(params), params, grad_fn=grad_fn)
      >>> print(bool(jnp.all(abs(updates + 0.1) < 0.01)))
      True

    References:
      Li et al. Revisiting Random Weight Perturbation for Efficiently Improving Generalization.
      arXiv:2404.00357

    Notes:
      In a loop that cannot pass `grad_fn`, `hold_perturbed(optimizer, adaptive_filter_noise(...))`
      is the same method from its second step on. Gradient evaluations: one extra, and none by the
      loop. State: one float a filter, one key, one integer; one temporary copy of the parameters.
    """
    pieces = AdaptiveFilterNoise(std, eta, decay, key, filter_axis, noise)
    off = _checks.is_zero(std)

    def update_fn(
        updates: optax.Updates,
        state: AdaptiveFilterNoiseState,
        params: optax.Params | None = None,
        *,
        grad_fn: _checks.GradientFunction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveFilterNoiseState]:
        if off:
            return updates, state
        _checks.require_params("arwp", params)
        gradient = _checks.require_grad_fn("arwp", grad_fn)
        _checks.require_whole_tree("arwp", params)
        step = state.step
        displacement, state = pieces.displace(updates, state, params, step, **extra_args)
        grads = gradient(optax.apply_updates(params, displacement), 0)
        grads = optax.tree.cast_like(grads, updates)
        return grads, pieces.observe(grads, state, step)

    return optax.GradientTransformationExtraArgs(pieces.init, update_fn)
