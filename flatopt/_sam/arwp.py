"""ARWP (Li et al., arXiv:2404.00357): the gradient is taken at a randomly displaced point only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng, tree_math
from flatopt._core.grad_fn import GradientFunction
from flatopt._core.timing import value_at
from flatopt._sam.noise import filter_norms, filter_squares, standard_normal


class AdaptiveFilterNoiseState(NamedTuple):
    """State of `adaptive_filter_noise` and `arwp`.

    Attributes:
      step: int32 scalar, number of displacements made so far.
      noise_state: state of what draws the noise.
      fisher: tree like the parameters, one float for each filter: the decayed sum of its squared
        gradients. A leaf with less than two axes has one for each entry.
    """

    step: jax.Array
    noise_state: optax.OptState
    fisher: Any


def adaptive_filter_noise(
    std: optax.ScalarOrSchedule,
    *,
    eta: optax.ScalarOrSchedule = 0.1,
    decay: optax.ScalarOrSchedule = 0.99,
    key: rng.KeyLike = 0,
    filter_axis: int | None = None,
    noise: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`filter_noise` that is smaller where gradients have been large.

    .. math::
      \epsilon_f = \frac{\sigma \, \|w_f\|}{\sqrt{1 + \eta F_f}} \, z_f, \qquad
      F_f \leftarrow \beta F_f + \|g_f\|^2

    Args:
      std: :math:`\sigma`, >= 0: a number, a traced array, or a schedule of the step count (negative
        values of a schedule count as 0).
      eta: how strongly large gradients damp the noise, >= 0: likewise.
      decay: :math:`\beta`, in [0, 1): likewise. There is no factor :math:`1 - \beta`, as in the
        authors' code.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      filter_axis: the axis that numbers the filters; see `filter_noise`. Static.
      noise: transformation that draws z; None means `standard_normal(key)`.

    Returns:
      A perturbation; needs `params`. The gradient that it is given enters F before the
      displacement is made; one with inf or NaN does not enter.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> perturbation = flatopt.adaptive_filter_noise(std=0.01, eta=0.1, decay=0.9, key=0)
      >>> kernel = jnp.ones((2, 3))
      >>> _, state = perturbation.update(kernel, perturbation.init(kernel), kernel)
      >>> print(state.fisher)
      [[2. 2. 2.]]

    References:
      Li et al. Revisiting Random Weight Perturbation for Efficiently Improving Generalization.
      arXiv:2404.00357

    Notes:
      In `gradient_at` the clean gradient enters F. In `hold_perturbed` it is the gradient at the
      displaced point, as in the authors' code, at no extra gradient. Gradient evaluations: none of
      its own. State: one float a filter, one key, one integer.
    """
    pieces = AdaptiveFilterNoise(std, eta, decay, key, filter_axis, noise)

    def update_fn(
        updates: optax.Updates,
        state: AdaptiveFilterNoiseState,
        params: optax.Params | None = None,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveFilterNoiseState]:
        checks.require_params("adaptive_filter_noise", params)
        step = state.step if step is None else step
        state = pieces.observe(updates, state, step)
        return pieces.displace(updates, state, params, step, **extra_args)

    return optax.GradientTransformationExtraArgs(pieces.init, update_fn)


class AdaptiveFilterNoise:
    """The two halves of `adaptive_filter_noise`; `arwp` takes them in the other order."""

    def __init__(
        self,
        std: optax.ScalarOrSchedule,
        eta: optax.ScalarOrSchedule,
        decay: optax.ScalarOrSchedule,
        key: rng.KeyLike,
        filter_axis: int | None,
        noise: optax.GradientTransformation | None,
    ):
        """See `adaptive_filter_noise`."""
        checks.check_number("std", std, low=0.0)
        checks.check_number("eta", eta, low=0.0)
        checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)
        self.std, self.eta, self.decay, self.filter_axis = std, eta, decay, filter_axis
        self.noise = optax.with_extra_args_support(standard_normal(key) if noise is None else noise)

    def init(self, params: optax.Params) -> AdaptiveFilterNoiseState:
        """The state before the first gradient."""
        return AdaptiveFilterNoiseState(
            step=jnp.zeros([], jnp.int32),
            noise_state=self.noise.init(params),
            fisher=jax.tree.map(
                lambda p: jnp.zeros_like(filter_squares(p, self.filter_axis)), params
            ),
        )

    def observe(
        self, grads: optax.Updates, state: AdaptiveFilterNoiseState, step: jax.typing.ArrayLike
    ) -> AdaptiveFilterNoiseState:
        """Lets a gradient enter F."""
        beta = value_at(self.decay, step)
        fisher = jax.tree.map(
            lambda f, g: (beta * f + filter_squares(g, self.filter_axis)).astype(f.dtype),
            state.fisher,
            grads,
        )
        # The stage stands outside `apply_if_finite`, so it must not keep what that will reject.
        finite = jnp.isfinite(tree_math.norm(grads))
        fisher = optax.tree.where(finite, fisher, state.fisher)
        return state._replace(fisher=fisher)

    def displace(
        self,
        like: optax.Updates,
        state: AdaptiveFilterNoiseState,
        params: optax.Params,
        step: jax.typing.ArrayLike,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveFilterNoiseState]:
        """Draws a displacement."""
        draws, noise_state = self.noise.update(like, state.noise_state, params, **extra_args)
        sigma, eta = jnp.maximum(value_at(self.std, step), 0), value_at(self.eta, step)

        def leaf(z: jax.Array, w: jax.Array, f: jax.Array) -> jax.Array:
            scale = sigma * filter_norms(w, self.filter_axis) / jnp.sqrt(1 + eta * f)
            return (scale * z).astype(z.dtype)

        displacement = jax.tree.map(leaf, draws, params, state.fisher)
        number = optax.safe_increment(state.step)
        return displacement, AdaptiveFilterNoiseState(number, noise_state, state.fisher)


def arwp(
    std: optax.ScalarOrSchedule,
    *,
    eta: optax.ScalarOrSchedule = 0.1,
    decay: optax.ScalarOrSchedule = 0.99,
    key: rng.KeyLike = 0,
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
    off = checks.is_number(std, 0)

    def update_fn(
        updates: optax.Updates,
        state: AdaptiveFilterNoiseState,
        params: optax.Params | None = None,
        *,
        grad_fn: GradientFunction | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptiveFilterNoiseState]:
        if off:
            return updates, state
        gradient = checks.require_grad_fn("arwp", grad_fn, params)
        step = state.step
        displacement, state = pieces.displace(updates, state, params, step, **extra_args)
        grads = gradient(optax.apply_updates(params, displacement), 0)
        grads = optax.tree.cast_like(grads, updates)
        return grads, pieces.observe(grads, state, step)

    return optax.GradientTransformationExtraArgs(pieces.init, update_fn)
