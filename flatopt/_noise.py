"""Random displacements, scaled to the filters of a network."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt import _checks, _random, _tree
from flatopt._schedules import value_at


class NoiseState(NamedTuple):
    """State of `standard_normal`.

    Attributes:
      key: uint32 key data.
    """

    key: jax.Array


class FilterNoiseState(NamedTuple):
    """State of `filter_noise`.

    Attributes:
      step: int32 scalar, number of displacements made so far.
      noise_state: state of what draws the noise.
    """

    step: jax.Array
    noise_state: optax.OptState


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


def standard_normal(key: _random.KeyLike) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by independent standard normal numbers.

    .. math:: z \sim \mathcal{N}(0, 1)

    Args:
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.

    Returns:
      A transformation; whatever comes in, only its shapes and dtypes matter.

    Raises:
      TypeError: if `key` is none of these.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> noise = flatopt.standard_normal(key=0)
      >>> draws, _ = noise.update(jnp.zeros(1000), noise.init(jnp.zeros(1000)))
      >>> print(bool(abs(draws.mean()) < 0.1), bool(abs(draws.std() - 1) < 0.1))
      True True

    References:
      Li et al. Revisiting Random Weight Perturbation for Efficiently Improving Generalization.
      arXiv:2404.00357

    Notes:
      State: one key. Under `jax.vmap` over replicas each must get a key of its own.
    """
    data = _random.key_data(key)

    def init_fn(params: optax.Params) -> NoiseState:
        del params
        return NoiseState(key=jnp.array(data))

    def update_fn(
        updates: optax.Updates,
        state: NoiseState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NoiseState]:
        del params, extra_args
        # A gradient at the point that the noise leads to waits for this one: side by side, they
        # would keep the activations of both in memory.
        key, updates = jax.lax.optimization_barrier((state.key, updates))
        keep, use = _random.split(key)
        draws = optax.tree.cast_like(_random.normal_like(use, updates), updates)
        return draws, NoiseState(keep)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def filter_noise(
    std: optax.ScalarOrSchedule,
    key: _random.KeyLike = 0,
    filter_axis: int | None = None,
    noise: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A random displacement in proportion to the norm of each filter.

    .. math:: \epsilon_f = \sigma \, \|w_f\| \, z_f, \qquad z \sim \mathcal{N}(0, 1)

    A filter f is a slice of a leaf along `filter_axis`: the weights into one unit or channel. A
    leaf with less than two axes, such as a bias, has one norm for all.

    Args:
      std: :math:`\sigma`, >= 0: a number, a traced array, or a schedule of the step count (negative
        values of a schedule count as 0).
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      filter_axis: the axis that numbers the filters; None means the last, as in Flax kernels; 0 for
        PyTorch's. Static.
      noise: transformation that draws z; None means `standard_normal(key)`.

    Returns:
      A perturbation that uses nothing of the gradient but shapes and dtypes; needs `params`.

    Raises:
      ValueError: if `std` is negative or not finite, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> perturbation = flatopt.filter_noise(std=0.01, key=0)
      >>> kernel = jnp.array([[3.0, 0.0], [4.0, 0.0]])
      >>> displacement, _ = perturbation.update(kernel, perturbation.init(kernel), kernel)
      >>> print(displacement[:, 1])
      [0. 0.]

    References:
      Li et al. Revisiting Random Weight Perturbation for Efficiently Improving Generalization.
      arXiv:2404.00357

    Notes:
      Gradient evaluations: none of its own. State: one key and one integer.
    """
    _checks.check_number("std", std, low=0.0)
    noise = optax.with_extra_args_support(standard_normal(key) if noise is None else noise)

    def init_fn(params: optax.Params) -> FilterNoiseState:
        return FilterNoiseState(jnp.zeros([], jnp.int32), noise.init(params))

    def update_fn(
        updates: optax.Updates,
        state: FilterNoiseState,
        params: optax.Params | None = None,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FilterNoiseState]:
        _checks.require_params("filter_noise", params)
        draws, noise_state = noise.update(updates, state.noise_state, params, **extra_args)
        sigma = jnp.maximum(value_at(std, state.step if step is None else step), 0)
        displacement = jax.tree.map(
            lambda z, w: (sigma * _filter_norms(w, filter_axis) * z).astype(z.dtype), draws, params
        )
        return displacement, FilterNoiseState(optax.safe_increment(state.step), noise_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adaptive_filter_noise(
    std: optax.ScalarOrSchedule,
    eta: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule,
    key: _random.KeyLike = 0,
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
        _checks.require_params("adaptive_filter_noise", params)
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
        key: _random.KeyLike,
        filter_axis: int | None,
        noise: optax.GradientTransformation | None,
    ):
        """See `adaptive_filter_noise`."""
        _checks.check_number("std", std, low=0.0)
        _checks.check_number("eta", eta, low=0.0)
        _checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)
        self.std, self.eta, self.decay, self.filter_axis = std, eta, decay, filter_axis
        self.noise = optax.with_extra_args_support(standard_normal(key) if noise is None else noise)

    def init(self, params: optax.Params) -> AdaptiveFilterNoiseState:
        """The state before the first gradient."""
        return AdaptiveFilterNoiseState(
            step=jnp.zeros([], jnp.int32),
            noise_state=self.noise.init(params),
            fisher=jax.tree.map(
                lambda p: jnp.zeros_like(_filter_squares(p, self.filter_axis)), params
            ),
        )

    def observe(
        self, grads: optax.Updates, state: AdaptiveFilterNoiseState, step: jax.typing.ArrayLike
    ) -> AdaptiveFilterNoiseState:
        """Lets a gradient enter F."""
        beta = value_at(self.decay, step)
        fisher = jax.tree.map(
            lambda f, g: (beta * f + _filter_squares(g, self.filter_axis)).astype(f.dtype),
            state.fisher,
            grads,
        )
        # The stage stands outside `apply_if_finite`, so it must not keep what that will reject.
        finite = jnp.isfinite(_tree.norm(grads))
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
            scale = sigma * _filter_norms(w, self.filter_axis) / jnp.sqrt(1 + eta * f)
            return (scale * z).astype(z.dtype)

        displacement = jax.tree.map(leaf, draws, params, state.fisher)
        number = optax.safe_increment(state.step)
        return displacement, AdaptiveFilterNoiseState(number, noise_state, state.fisher)


def _filter_squares(x: jax.Array, filter_axis: int | None) -> jax.Array:
    """Sum of squares over each filter, with the axes kept; float32 at least.

    A bias has one entry a filter: its squares as they are.
    """
    wide = x.astype(_tree.accumulator_dtype(x.dtype))
    squares = (wide.conj() * wide).real
    if x.ndim < 2:
        return squares
    axis = (-1 if filter_axis is None else filter_axis) % x.ndim
    axes = tuple(a for a in range(x.ndim) if a != axis)
    return jnp.sum(squares, axis=axes, keepdims=True)


def _filter_norms(x: jax.Array, filter_axis: int | None) -> jax.Array:
    """Norm of each filter; of a bias, the norm of the whole, since its entries may be zero."""
    squares = _filter_squares(x, filter_axis)
    return jnp.sqrt(squares if x.ndim > 1 else jnp.sum(squares))
