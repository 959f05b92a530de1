"""SASSHA (Shin et al., arXiv:2502.18153): second-order steps whose curvature is that of SAM."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import checks, means, registry, rng, tree_math
from flatopt._core.timing import Every, nonnegative_at
from flatopt._sam.ascent import scale_to_norm
from flatopt._sam.gradient_at import gradient_at


class HutchinsonState(NamedTuple):
    """State of `scale_by_hutchinson`.

    Attributes:
      t: int32 scalar, number of updates so far, which corrects the bias of the means.
      mu: tree like the parameters, decaying mean of the gradients.
      nu: likewise, decaying mean of the estimates of the Hessian's diagonal.
      noise_state: state of what draws the probes.
    """

    t: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    noise_state: optax.OptState


def absolute_diagonal(grad: Callable[[Any], Any], point: optax.Params, z: Any) -> optax.Params:
    r"""Hutchinson's estimate of the Hessian's diagonal, :math:`|z \odot \nabla^2 L(w) z|`.

    NaN where it is infinite: a step divided by it would be a quiet zero.
    """
    _, product = jax.jvp(grad, (point,), (jax.tree.map(_tangent, z, point),))

    def leaf(z: jax.Array, hz: jax.Array) -> jax.Array:
        size = jnp.abs(z * hz)
        return jnp.where(jnp.isinf(size), jnp.nan, size)

    return tree_math.on_inexact(leaf, z, product)


def debias(mean: optax.Updates, decay: Any, t: jax.Array) -> optax.Updates:
    r""":math:`m / (1 - b^t)`; written so, float32 keeps the digits of 1 - b."""
    return tree_math.scale(-1 / jnp.expm1(t * jnp.log1p(decay - 1)), mean)


def stable_step(mu: Any, nu: Any, power: Any, eps: Any) -> optax.Updates:
    r"""The gradient over the curvature, :math:`\hat m / (\hat h^p + \epsilon)`."""
    return tree_math.on_inexact(lambda m, h: m / (h.real**power + eps), mu, nu)


@registry.method("stage", needs=("grad_fn",))
def scale_by_hutchinson(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    power: optax.ScalarOrSchedule = 0.5,
    eps: float = 1e-4,
    every: int | None = None,
    key: rng.KeyLike = 0,
    noise: optax.GradientTransformation | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides the mean of the gradients by that of the Hessian's diagonal, estimated at times.

    .. math:: u = \hat m_t / (\hat h^p + \epsilon), \qquad h \leftarrow b_2 h + (1 - b_2) \,
      |z \odot \nabla^2 L(w) z|, \quad z \in \{-1, 1\}^n

    Args:
      b1, b2: decays of the means m and h, in [0, 1). Both are debiased by the number of updates.
      power: p >= 0: a number, a traced array, or a schedule; 1 is Newton's, 1/2 is SASSHA's.
      eps: :math:`\epsilon` > 0.
      every: period of the estimates, >= 1; None is 10. Others cost nothing. Static.
      key, noise: of the probes z; or a transformation that draws them in the gradient's place.
      accumulator_dtype: of m and h; None: float32, or wider where the parameters are. Static.

    Returns:
      A stage, to be followed by decay and a learning rate; needs `params` and `grad_fn`. As
      `gradient_at`'s combiner, or inside `msam`, it looks where the gradient was taken.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.scale_by_hutchinson(power=1.0), jnp.array([3.0, 1.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: w[0] ** 2 + 4.0 * w[1] ** 2)
      >>> print(tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0])  # Newton's step.
      [3. 1.]

    Cost: 0 extra gradients, 1 Hessian-vector product in `every` updates; 2 copies.
    """
    _check(power, eps, b1=b1, b2=b2)
    when = Every.before_update(None, 10 if every is None else every)
    noise = checks.as_transformation("noise", _signs(key) if noise is None else noise)

    def init_fn(params: optax.Params) -> HutchinsonState:
        mu, nu = (means.zeros(params, accumulator_dtype) for _ in range(2))
        return HutchinsonState(jnp.zeros([], jnp.int32), mu, nu, noise.init(params))

    def update_fn(
        updates: Any, state: HutchinsonState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, HutchinsonState]:
        grad_fn = checks.require_grad_fn("scale_by_hutchinson", extra_args.get("grad_fn"), params)
        point = extra_args.get("perturbed_params", params)

        def renew(carry: Any) -> Any:
            z, noise_state = noise.update(updates, carry[1], params)
            diagonal = absolute_diagonal(lambda point: grad_fn(point, 0), point, z)
            return means.towards(carry[0], diagonal, 1 - b2), noise_state

        t = optax.safe_increment(state.t)
        mu = means.towards(state.mu, updates, 1 - b1)
        nu, noise_state = when.run(state.t, renew, (state.nu, state.noise_state))
        h = debias(nu, b2, optax.safe_increment(when.latest(state.t)))
        step = stable_step(debias(mu, b1, t), h, nonnegative_at(power, state.t), eps)
        # The stage may stand outside `apply_if_finite`: it must not keep what that will reject.
        new, is_finite = HutchinsonState(t, mu, nu, noise_state), jnp.isfinite(tree_math.norm(step))
        return tree_math.cast_like(step, updates), optax.tree.where(is_finite, new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@registry.method("stage", needs=("grad_fn",))
def sassha(
    rho: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    power: optax.ScalarOrSchedule = 0.5,
    eps: float = 1e-4,
    every: int | None = None,
    perturbation: optax.GradientTransformation | None = None,
    key: rng.KeyLike = 0,
    noise: optax.GradientTransformation | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SASSHA: gradient and curvature of the point that SAM climbs to, one over the other.

    .. math:: u = \hat m_t / (\hat h^p + \epsilon), \qquad m, h \text{ of } \nabla L, \,
      |z \odot \nabla^2 L z| \text{ at } w + \rho \, g / \|g\|

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule. 0: `scale_by_hutchinson`.
      b1, b2, power, eps, every, key, noise, accumulator_dtype: see `scale_by_hutchinson`.
      perturbation: the ascent step; None is `scale_to_norm(rho)`.

    Returns:
      A stage, to be followed by decay and a learning rate; needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.sassha(0.5, power=1.0, eps=1e-9), jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: jnp.sum(w**2))
      >>> print(tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0])
      [3.3 4.4]

    References:
      Shin, Lee, Chung, Lee. Sassha: Sharpness-aware Adaptive Second-order Optimization with Stable
      Hessian Approximation. arXiv:2502.18153

    Cost: 1 extra gradient, 1 Hessian-vector product in `every` updates; 2 copies (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    scaler = scale_by_hutchinson(
        b1=b1,
        b2=b2,
        power=power,
        eps=eps,
        every=every,
        key=key,
        noise=noise,
        accumulator_dtype=accumulator_dtype,
    )
    if checks.is_number(rho, 0):
        return scaler
    ascent = scale_to_norm(rho) if perturbation is None else perturbation
    return gradient_at(checks.as_transformation("perturbation", ascent), combiner=scaler)


def _tangent(z: Any, w: Any) -> Any:
    """A probe as JAX asks for it: of what no gradient moves there is no derivative."""
    if tree_math.is_inexact(w):
        return tree_math.as_dtype_of(z, w)
    return np.zeros(jnp.shape(w), jax.dtypes.float0)


def _signs(key: rng.KeyLike) -> optax.GradientTransformation:
    """Independent signs in the place of the gradient; the state is raw key data."""
    stream = rng.Stream(key)

    def update_fn(updates: Any, state: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        del params
        state, use = stream.split(state)
        return tree_math.cast_like(rng.signs_like(use, updates), updates), state

    return optax.GradientTransformation(lambda _: stream.init(), update_fn)


def _check(power: Any, eps: float, **decays: float) -> None:
    checks.check_number("power", power, low=0.0)
    checks.check_number("eps", eps, low=0.0, low_allowed=False, schedule_allowed=False)
    for name, decay in decays.items():
        checks.check_number(
            name, decay, low=0.0, high=1.0, high_allowed=False, schedule_allowed=False
        )
