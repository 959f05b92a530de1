"""Langevin dynamics (Welling, Teh, ICML 2011): gradient descent with noise of a temperature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, rng, tree_math
from flatopt._core.timing import value_at


def thermal_kick(xi: jax.Array, eta: Any, temperature: Any) -> jax.Array:
    r""":math:`\sqrt{2 \eta T} \, \xi`."""
    return jnp.sqrt(2 * jnp.asarray(eta * temperature, jnp.result_type(float))) * xi


class LangevinState(NamedTuple):
    """State of `langevin`, and of the noise inside `local_entropy`.

    Attributes:
      step: int32 scalar, number of updates so far.
      key: raw uint32 data of the random key.
    """

    step: jax.Array
    key: jax.Array


def thermal_noise(
    learning_rate: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds :math:`\sqrt{2 \eta T} \xi` to a displacement; schedules follow `step=` if given."""
    checks.check_number("temperature", temperature, low=0.0)
    off = checks.is_number(temperature, 0)
    stream = rng.Stream(key)

    def init_fn(params: optax.Params) -> LangevinState:
        del params
        return LangevinState(step=jnp.zeros([], jnp.int32), key=stream.init())

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
        eta, heat = (value_at(v, step) for v in (learning_rate, temperature))
        key_later, key_now = stream.split(state.key)
        kicked = tree_math.on_inexact(
            jax.jit(lambda u, xi: u + thermal_kick(xi, eta, heat)),  # Traced once for a shape.
            updates,
            rng.normal_like(key_now, updates),
        )
        return kicked, LangevinState(later, key_later)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@registry.method("optimizer")
def langevin(
    learning_rate: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule,
    *,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient Langevin dynamics: an optimiser that samples exp(-L(w) / T).

    .. math:: w \leftarrow w - \eta \, g + \sqrt{2 \eta T} \, \xi, \qquad \xi \sim N(0, 1)

    Args:
      learning_rate: :math:`\eta` >= 0: a number, a traced array, or a schedule of the step count.
      temperature: T >= 0, in units of the loss: likewise. The number 0 is gradient descent, without
        a draw. For a posterior over N examples sampled with the MEAN loss, T = 1 / N.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.

    Returns:
      A whole optimiser, exact for the exact gradient and a small learning rate.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.langevin(0.02, temperature=0.5), jnp.zeros(100_000)
      >>> updates, _ = tx.update(w, tx.init(w), w)
      >>> print(f"{jnp.var(updates):.4f}")  # 2 * 0.02 * 0.5
      0.0199

    References:
      Welling, Teh. Bayesian Learning via Stochastic Gradient Langevin Dynamics. ICML 2011.

    Cost: 0 extra gradients; 0 copies.
    """
    checks.check_number("learning_rate", learning_rate, low=0.0)
    noise = thermal_noise(learning_rate, temperature, key)

    def update_fn(
        updates: optax.Updates,
        state: LangevinState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LangevinState]:
        eta: Any = value_at(learning_rate, state.step)
        descent = tree_math.scale(-eta, updates)
        return noise.update(descent, state, params, **{**extra_args, "step": state.step})

    return optax.GradientTransformationExtraArgs(noise.init, update_fn)
