"""Bayes-SAM (Möllenhoff and Khan, arXiv:2210.01620): SAM that learns a Gaussian's width."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, rng, tree_math
from flatopt._core.timing import nonnegative_at


def draw(w: Any, s: Any, z: Any, n: float) -> Any:
    r"""A point of the posterior, :math:`w + z / \sqrt{N s}`."""
    return tree_math.on_inexact(lambda w, s, z: w + z / jnp.sqrt(n * s), w, s, z)


def ascend(w: Any, s: Any, g: Any, rho: Any) -> Any:
    r""":math:`w + \rho \, g / s`: far where the posterior is wide."""
    return tree_math.on_inexact(lambda w, s, g: w + rho * g / s, w, s, g)


def follow(m: Any, g: Any, w: Any, b1: float, delta: float) -> Any:
    r""":math:`\beta_1 m + (1 - \beta_1) (g + \delta w)`."""
    return tree_math.on_inexact(lambda m, g, w: b1 * m + (1 - b1) * (g + delta * w), m, g, w)


def sharpen(s: Any, g: Any, b2: float, floor: float) -> Any:
    r""":math:`\beta_2 s + (1 - \beta_2) (\sqrt{s} \, |g| + \delta + \gamma)`."""
    return tree_math.on_inexact(
        lambda s, g: b2 * s + (1 - b2) * (jnp.sqrt(s) * jnp.abs(g) + floor), s, g
    )


class BsamState(NamedTuple):
    """State of `bsam`.

    Attributes:
      step: int32 scalar, number of updates so far.
      key: uint32 key data.
      momentum: tree like the parameters, m.
      precision: tree like the parameters, s: the posterior's variance is 1 / (N s).
    """

    step: jax.Array
    key: jax.Array
    momentum: optax.Updates
    precision: Any


@registry.method("optimizer", needs=("grad_fn",))
def bsam(
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule,
    *,
    num_data: float,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 1e-4,
    damping: float = 0.1,
    initial_precision: float = 1.0,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Bayes-SAM: an Adam-like SAM whose scale is the precision of a Gaussian around the weights.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) (\nabla L(w + \rho \, g / s) + \delta w), \quad
      g = \nabla L(w + z / \sqrt{N s}), \\ w \leftarrow w - \eta \, m / s, \quad
      s \leftarrow \beta_2 s + (1 - \beta_2) (\sqrt{s} \, |g| + \delta + \gamma)

    Args:
      learning_rate, rho: :math:`\eta, \rho`, >= 0: numbers, traced arrays, schedules.
      num_data, initial_precision: N, number of examples, and s at first, > 0.
      b1, b2, weight_decay, damping: :math:`\beta_1, \beta_2 < 1` and :math:`\delta, \gamma`, >= 0.
      key: seed or key of the draws z.

    Returns:
      A whole optimiser; `update` needs `params` and `grad_fn`, not the loop's gradient.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.bsam(0.5, rho=0.05, num_data=1e6), jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0])
      [-0.16 -0.21]

    References:
      Möllenhoff, Khan. SAM as an Optimal Relaxation of Bayes. arXiv:2210.01620

    Cost: 2 extra gradients; 2 copies (+2 temporary).
    """
    _check(learning_rate, rho, num_data, b1, b2, weight_decay, damping, initial_precision)
    stream = rng.Stream(key)

    def init_fn(params: optax.Params) -> BsamState:
        def precision(w: jax.Array) -> jax.Array:
            return jnp.full_like(w, initial_precision, tree_math.scalar_dtype(w))

        zeros = optax.tree.zeros_like(params)
        step = jnp.zeros([], jnp.int32)
        return BsamState(step, stream.init(), zeros, jax.tree.map(precision, params))

    def update_fn(
        updates: Any, state: BsamState, params: Any = None, *, grad_fn: Any = None, **_: Any
    ) -> tuple[optax.Updates, BsamState]:
        gradient = checks.require_grad_fn("bsam", grad_fn, params)
        left, use = stream.split(state.key)
        s, z = state.precision, rng.normal_like(use, params)
        clean = gradient(draw(params, s, z, num_data), 0)
        radius = nonnegative_at(rho, state.step)
        perturbed = gradient(ascend(params, s, clean, radius), 1)
        m = follow(state.momentum, perturbed, params, b1, weight_decay)
        wide = tree_math.widened(updates, params)
        moves = tree_math.on_inexact(lambda _, m, s: m / s, wide, m, s)
        s = sharpen(s, clean, b2, weight_decay + damping)
        return moves, BsamState(optax.safe_increment(state.step), left, m, s)

    step = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return optax.chain(step, optax.scale_by_learning_rate(learning_rate))


def _check(
    learning_rate: Any, rho: Any, num_data: Any, b1: Any, b2: Any, delta: Any, gamma: Any, s: Any
) -> None:
    checks.check_number("learning_rate", learning_rate, low=0.0)
    checks.check_number("rho", rho, low=0.0)
    number = functools.partial(checks.check_number, low=0.0, schedule_allowed=False)
    number("num_data", num_data, low_allowed=False)
    number("initial_precision", s, low_allowed=False)
    number("b1", b1, high=1.0, high_allowed=False)
    number("b2", b2, high=1.0, high_allowed=False)
    number("weight_decay", delta)
    number("damping", gamma)
