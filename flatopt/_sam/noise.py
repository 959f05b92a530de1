"""Random displacements, scaled to the filters of a network (Li et al., arXiv:2404.00357)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng, tree_math
from flatopt._core.timing import nonnegative_at


def filter_squares(x: jax.Array, filter_axis: int | None) -> jax.Array:
    """Sum of squares over each filter, with the axes kept; float32 at least.

    A bias has one entry a filter: its squares as they are.
    """
    if jnp.ndim(x) < 2:
        return tree_math.square(x)
    axis = (-1 if filter_axis is None else filter_axis) % x.ndim
    axes = tuple(a for a in range(x.ndim) if a != axis)
    return jnp.sum(tree_math.square(x), axis=axes, keepdims=True)


def filter_norms(x: jax.Array, filter_axis: int | None) -> jax.Array:
    """Norm of each filter; of a bias, the norm of the whole, since its entries may be zero."""
    wide = jnp.asarray(x, tree_math.accumulator_dtype(jnp.result_type(x)))
    # Over a power of two, so that squares neither overflow nor underflow, and no bit changes.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(wide), initial=0))
    unit = jnp.ldexp(jnp.ones([], wide.real.dtype), jnp.clip(exponent, -120, 120))
    squares = filter_squares(wide / unit, filter_axis)
    return unit * jnp.sqrt(squares if jnp.ndim(x) > 1 else jnp.sum(squares))


class NoiseState(NamedTuple):
    """State of `standard_normal`.

    Attributes:
      key: uint32 key data.
    """

    key: jax.Array


def standard_normal(key: rng.KeyLike = 0) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by independent standard normal numbers.

    .. math:: z \sim \mathcal{N}(0, 1)

    Args:
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.

    Returns:
      A transformation; whatever comes in, only its shapes and dtypes matter.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> noise, zeros = flatopt.standard_normal(key=0), jnp.zeros(1000)
      >>> draws, _ = noise.update(zeros, noise.init(zeros))
      >>> print(bool(abs(draws.mean()) < 0.1), bool(abs(draws.std() - 1) < 0.1))
      True True

    References:
      Li et al. Revisiting Random Weight Perturbation for Efficiently Improving Generalization.
      arXiv:2404.00357

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    stream = rng.Stream(key)

    def init_fn(params: optax.Params) -> NoiseState:
        del params
        return NoiseState(stream.init())

    def update_fn(
        updates: optax.Updates, state: NoiseState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, NoiseState]:
        del params, extra_args
        # A gradient at the point that the noise leads to waits for this one: side by side, they
        # would keep the activations of both in memory.
        key, updates = jax.lax.optimization_barrier((state.key, updates))
        keep, use = stream.split(key)
        draws = tree_math.cast_like(rng.normal_like(use, updates), updates)
        return draws, NoiseState(keep)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class FilterNoiseState(NamedTuple):
    """State of `filter_noise`.

    Attributes:
      step: int32 scalar, number of displacements made so far.
      noise_state: state of what draws the noise.
    """

    step: jax.Array
    noise_state: optax.OptState


def filter_noise(
    std: optax.ScalarOrSchedule,
    *,
    key: rng.KeyLike = 0,
    filter_axis: int | None = None,
    noise: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A random displacement in proportion to the norm of each filter, or of a whole bias.

    .. math:: \epsilon_f = \sigma \, \|w_f\| \, z_f, \qquad z \sim \mathcal{N}(0, 1)

    Args:
      std: :math:`\sigma` >= 0: a number, a traced array, or a schedule of the step count.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      filter_axis: the axis that numbers the filters, the weights into one unit or channel; None
        means the last, as in Flax kernels; 0 for PyTorch's. Static.
      noise: transformation that draws z; None means `standard_normal(key)`.

    Returns:
      A perturbation that uses nothing of the gradient but shapes and dtypes; needs `params`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> perturbation, w = flatopt.filter_noise(std=0.01), jnp.array([[3.0, 0.0], [4.0, 0.0]])
      >>> print(perturbation.update(w, perturbation.init(w), w)[0][:, 1] == 0)
      [ True  True]

    References:
      Li et al. Revisiting Random Weight Perturbation for Efficiently Improving Generalization.
      arXiv:2404.00357

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    checks.check_number("std", std, low=0.0)
    noise = checks.as_transformation("noise", standard_normal(key) if noise is None else noise)

    def init_fn(params: optax.Params) -> FilterNoiseState:
        return FilterNoiseState(jnp.zeros([], jnp.int32), noise.init(params))

    def update_fn(
        updates: Any,
        state: FilterNoiseState,
        params: Any = None,
        *,
        step: Any = None,
        **kwargs: Any,
    ) -> tuple[optax.Updates, FilterNoiseState]:
        checks.require_params("filter_noise", params)
        draws, noise_state = noise.update(updates, state.noise_state, params, **kwargs)
        sigma = nonnegative_at(std, state.step if step is None else step)
        displacement = tree_math.on_inexact(
            lambda z, w: sigma * filter_norms(w, filter_axis) * z, draws, params
        )
        return displacement, FilterNoiseState(optax.safe_increment(state.step), noise_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
