"""Langevin dynamics: gradient descent with thermal noise of a stated temperature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng
from flatopt._core.timing import value_at


class LangevinState(NamedTuple):
    """State of `langevin`, and of the noise inside `local_entropy`.

    Attributes:
      step: int32 scalar, number of updates so far.
      key: raw uint32 data of the random key.
    """

    step: jax.Array
    key: jax.Array


def langevin(
    learning_rate: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule,
    *,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient Langevin dynamics, an optimiser that samples.

    .. math:: w \leftarrow w - \eta \, g + \sqrt{2 \eta T} \, \xi, \qquad \xi \sim N(0, 1)

    With the exact gradient of L and a small learning rate its iterates follow
    :math:`p(w) \propto \exp(-L(w) / T)`.

    Args:
      learning_rate: the step size :math:`\eta` >= 0: a number, a traced array, or a schedule of the
        step count.
      temperature: T >= 0, in units of the loss: likewise. The number 0 is gradient descent, without
        a draw. For a posterior over N examples sampled with the MEAN loss, T = 1 / N.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.

    Returns:
      A whole optimiser.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.langevin(0.02, temperature=0.5, key=1)
      >>> params = jnp.zeros(4000)  # 4000 walkers in the potential w^2 / 2
      >>> def step(carry, _):
      ...     params, opt_state = carry
      ...     updates, opt_state = tx.update(params, opt_state, params)
      ...     return (optax.apply_updates(params, updates), opt_state), None
      >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=300)
      >>> print(f"{jnp.var(params):.1f}")
      0.5

    References:
      Welling, Teh. Bayesian Learning via Stochastic Gradient Langevin Dynamics. ICML 2011.

    Notes:
      Place: it is the whole optimiser, or the last stage of a chain that prepares the gradient
      (`optax.chain(flatopt.local_entropy(...), flatopt.langevin(...))` samples the local entropy).
      Noise of minibatches comes on top of the stated temperature. At a finite learning rate the
      variance along curvature c is :math:`T / (c (1 - \eta c / 2))`. Under `vmap` over replicas
      with one state the noise is shared: make each replica's state from a key of its own. Gradient
      evaluations: none extra. State: a counter and a key, no copy of the parameters.
    """
    checks.check_number("learning_rate", learning_rate, low=0.0)
    noise = thermal_noise(learning_rate, temperature, key)

    def update_fn(
        updates: optax.Updates,
        state: LangevinState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LangevinState]:
        rate = value_at(learning_rate, state.step)
        descent = jax.tree.map(lambda g: (-(rate * g)).astype(g.dtype), updates)
        return noise.update(descent, state, params, **{**extra_args, "step": state.step})

    return optax.GradientTransformationExtraArgs(noise.init, update_fn)


def thermal_noise(
    learning_rate: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds :math:`\sqrt{2 \eta T} \xi` to a displacement; schedules follow `step=` if given."""
    checks.check_number("temperature", temperature, low=0.0)
    off = checks.is_number(temperature, 0)

    def init_fn(params: optax.Params) -> LangevinState:
        del params
        return LangevinState(step=jnp.zeros([], jnp.int32), key=rng.key_data(key))

    def update_fn(
        updates: optax.Updates,
        state: LangevinState,
        params: optax.Params | None = None,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LangevinState]:
        del params, extra_args
        later = optax.safe_increment(state.step)
        if off:
            return updates, LangevinState(later, state.key)
        step = state.step if step is None else step
        rate, heat = (value_at(v, step) for v in (learning_rate, temperature))
        scale = jnp.sqrt(2 * jnp.asarray(rate * heat, jnp.result_type(float)))
        key_later, key_now = rng.split(state.key)
        kicks = rng.normal_like(key_now, updates)
        kicked = jax.tree.map(lambda u, xi: (u + scale * xi).astype(u.dtype), updates, kicks)
        return kicked, LangevinState(later, key_later)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
