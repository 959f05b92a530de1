"""SAM at saddles (Kim, Park, Choi, Lee, arXiv:2301.06308): what of it is exact, on two losses.

With the ascent step `rho * gradient`, the step of SAM along an eigenvector of curvature -c is that
of gradient descent times `1 - rho c`: from rho = 1 / c on, the saddle attracts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flatopt

Loss = Callable[[jax.Array], jax.Array]
BEALE_SADDLE = (0.0, 1.0)
STARTS = 64
ESCAPE_RATE, NOISE, ESCAPED = 0.02, 0.5, 0.5
SPREAD = 0.02  # Of the starts around the saddle.


def beale(w: jax.Array) -> jax.Array:
    """Beale's function, with a saddle at (0, 1) and its minimum, 0, at (3, 0.5)."""
    x, y = w
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def quartic(w: jax.Array, curvature: float) -> jax.Array:
    """A saddle at 0, of curvatures plus and minus `curvature`, between two minima."""
    x, y = w
    return curvature / 2 * (y**2 - x**2) + x**4 / 4


def threshold(loss: Loss, saddle: jax.Array) -> jax.Array:
    r"""The radius from which the saddle attracts, :math:`\rho^* = 1 / |\lambda_{\min}|`."""
    return -1 / jnp.linalg.eigvalsh(jax.hessian(loss)(saddle))[0]


def descend(
    tx: optax.GradientTransformationExtraArgs, loss: Loss, start: jax.Array, steps: int
) -> jax.Array:
    """Where an optimiser is after so many steps."""
    grad_fn = flatopt.make_grad_fn(loss)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        w, state = carry
        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, (start, tx.init(start)), length=steps)[0][0]


@functools.partial(jax.jit, static_argnames=("loss", "steps", "normalised"))
def trapped(
    loss: Loss,
    saddle: jax.Array,
    rho: jax.Array,
    learning_rate: float,
    steps: int,
    normalised: bool = False,
) -> jax.Array:
    """How many of `STARTS` runs of SAM from around the saddle are nearer than `SPREAD` in the end.

    Args:
      loss: of two numbers.
      saddle: where the runs start, but for normal noise of half of `SPREAD`.
      rho: radius.
      learning_rate: of the descent.
      steps: of a run.
      normalised: whether the ascent has length rho, as in SAM's own paper.
    """
    ascent = flatopt.unified_sam(rho, lam=1.0 if normalised else 0.0)
    tx = optax.chain(ascent, optax.sgd(learning_rate))
    noise = jax.random.normal(jax.random.key(0), (STARTS, 2))
    starts = saddle[None, :] + SPREAD / 2 * noise
    ends = jax.vmap(lambda start: descend(tx, loss, start, steps))(starts)
    return jnp.sum(jnp.linalg.norm(ends - saddle[None, :], axis=1) < SPREAD)


@functools.partial(jax.jit, static_argnames=("steps", "paths", "ema"))
def escape_times(
    rho: jax.Array,
    batch_size: jax.Array,
    momentum: float = 0.0,
    *,
    steps: int,
    paths: int = 256,
    ema: bool = False,
) -> jax.Array:
    """When runs of unnormalised SAM from the quartic saddle are `ESCAPED` away from it.

    Args:
      rho: radius.
      batch_size: B; a gradient's noise is `NOISE` / sqrt(B), the same in both gradients of a step.
      momentum: of the descent.
      steps: of a run, and the time of a run that stays.
      paths: number of runs.
      ema: whether momentum is a mean of gradients, instead of their sum.
    """
    rate = ESCAPE_RATE * ((1 - momentum) if ema else 1)
    tx = optax.chain(flatopt.unified_sam(rho, lam=0.0), optax.sgd(rate, momentum=momentum))

    def loss(w: jax.Array, noise: jax.Array) -> jax.Array:
        return quartic(w, 1.0) + jnp.vdot(noise, w)

    def run(key: jax.Array) -> jax.Array:
        def step(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
            w, state = carry
            draw = jax.random.normal(jax.random.fold_in(key, number), (2,))
            grad_fn = flatopt.make_grad_fn(loss, NOISE / jnp.sqrt(batch_size) * draw)
            updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
            w = optax.apply_updates(w, updates)
            return (w, state), jnp.abs(w[0]) > ESCAPED

        start = jnp.zeros(2)
        away = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))[1]
        return jnp.where(jnp.any(away), jnp.argmax(away) + 1, steps)

    return jax.vmap(run)(jax.random.split(jax.random.key(0), paths))


def cycle_radius(eta: float, lam: float, rho: float) -> float:
    r"""Where normalised SAM ends on a parabola, :math:`\eta \lambda \rho / (2 - \eta \lambda)`."""
    return eta * lam * rho / (2 - eta * lam)


def lookahead_variance_ratio(eta_a: float, alpha: float, k: int) -> float:
    r"""Lookahead's variance over its inner SGD's on a noisy quadratic (arXiv:1907.08610).

    .. math:: \frac{\alpha^2 (1 - q^{2k})}{\alpha^2 (1 - q^{2k}) + 2 \alpha (1 - \alpha)(1 - q^k)},
      \qquad q = 1 - \eta a
    """
    q = 1 - eta_a
    moved = alpha**2 * (1 - q ** (2 * k))
    return moved / (moved + 2 * alpha * (1 - alpha) * (1 - q**k))
