"""The inverse of the binary relative entropy, and Seeger's PAC-Bayes bound that it gives."""

import jax
import jax.numpy as jnp

from flatopt._core import checks

_HALVINGS = 100  # Of [0, 1 - q]: a distance from q of 1e-14 is then known to all its digits.


def kl_inverse(q: jax.typing.ArrayLike, c: jax.typing.ArrayLike) -> jax.Array:
    r"""The largest mean p that a relative entropy of c allows, by bisection.

    .. math:: \max \{ p \in [q, 1] : q \ln \tfrac q p + (1 - q) \ln \tfrac{1 - q}{1 - p} \le c \}

    Args:
      q: observed means, such as an error on the training examples, in [0, 1].
      c: relative entropies, >= 0, in nats; broadcast against `q`.

    Returns:
      An array, exact to rounding; its derivatives are those of the inverse function. NaN where an
      argument is NaN or, under `jax.jit`, out of range.

    Examples:
      >>> from flatopt import measures
      >>> print(f"{measures.kl_inverse(0.0, 0.7):.4f} {measures.kl_inverse(0.1, 0.05):.4f}")
      0.5034 0.2201

    References:
      Langford, Caruana. (Not) Bounding the True Error. 2001. Seeger. PAC-Bayesian Generalisation
      Error Bounds for Gaussian Process Classification. 2002

    Cost: nothing.
    """
    checks.check_number("q", q, low=0.0, high=1.0, schedule_allowed=False)
    checks.check_number("c", c, low=0.0, schedule_allowed=False)
    dtype = jnp.promote_types(jnp.result_type(q, c), jnp.float32)
    return _inverse(*jnp.broadcast_arrays(jnp.asarray(q, dtype), jnp.asarray(c, dtype)))


@jax.custom_jvp
def _inverse(q: jax.Array, c: jax.Array) -> jax.Array:
    rest = 1 - q

    def halve(_: int, limits: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = limits
        middle = (low + high) / 2
        within = _divergence(q, middle) <= c
        return jnp.where(within, middle, low), jnp.where(within, high, middle)

    _, high = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(q), rest))
    # The upper end, so that rounding errs on the side of a bound; nothing above 1 is a mean.
    known = (q >= 0) & (rest >= 0) & (c >= 0)
    return jnp.where(known, jnp.where(c > 0, jnp.minimum(q + high, 1), q), jnp.nan)


def _divergence(q: jax.Array, distance: jax.Array) -> jax.Array:
    """The relative entropy of q to q + distance; the distance keeps digits that the sum loses."""
    ahead = jnp.where(q > 0, q * jnp.log1p(distance / jnp.where(q > 0, q, 1)), 0)
    behind = jnp.where(q < 1, (1 - q) * jnp.log1p(-distance / jnp.where(q < 1, 1 - q, 1)), 0)
    return -ahead - behind


@_inverse.defjvp
def _inverse_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """By the implicit function theorem: kl(q, p(q, c)) = c."""
    (q, c), (dq, dc) = primals, tangents
    p = _inverse(q, c)
    inside = (p > q) & (p < 1)  # At q itself (c = 0) it moves with q; at 1 it stands.
    safe_p, safe_q = jnp.where(inside, p, 0.5), jnp.where(inside, q, 0.25)
    tilt = jnp.log(safe_p) - jnp.log1p(-safe_p) - jnp.log(safe_q) + jnp.log1p(-safe_q)
    by_q = jnp.where(inside, tilt * _slope(safe_p, safe_q), jnp.where(p < 1, 1.0, 0.0))
    return p, by_q * dq + _slope(p, q) * dc


def _slope(p: jax.Array, q: jax.Array) -> jax.Array:
    """The derivative of p by c."""
    return jnp.where(p < 1, p * (1 - p) / jnp.where(p < 1, p - q, 1), 0)


def seeger_bound(
    error: jax.typing.ArrayLike,
    kl: jax.typing.ArrayLike,
    m: jax.typing.ArrayLike,
    delta: jax.typing.ArrayLike = 0.05,
) -> jax.Array:
    r"""Seeger's PAC-Bayes bound, with Maurer's constant, on a stochastic classifier's error.

    .. math:: \mathrm{kl}^{-1} \Big( \hat L(Q), \;
       \tfrac1m \big( \mathrm{KL}(Q \| P) + \ln \tfrac{2 \sqrt m}{\delta} \big) \Big)

    Args:
      error: mean error of the posterior Q on the m examples, in [0, 1].
      kl: relative entropy of the posterior to the prior, which must not know the examples, >= 0.
      m: number of examples, drawn independently, >= 1.
      delta: probability with which the bound may fail, in (0, 1].

    Returns:
      An array: with probability 1 - delta over the examples, the mean error of Q on new ones is at
      most that, for all Q at once. 1 says nothing.

    Examples:
      >>> from flatopt import measures
      >>> print(f"{measures.seeger_bound(0.02, kl=100.0, m=10000, delta=0.05):.4f}")
      0.0479

    References:
      Seeger. PAC-Bayesian Generalisation Error Bounds for Gaussian Process Classification. 2002.
      Maurer. A Note on the PAC Bayesian Theorem. arXiv:cs/0411099

    Cost: nothing.
    """
    checks.check_number("kl", kl, low=0.0, schedule_allowed=False)
    checks.check_number("m", m, low=1.0, schedule_allowed=False)
    checks.check_number(
        "delta", delta, low=0.0, high=1.0, low_allowed=False, schedule_allowed=False
    )
    return kl_inverse(error, complexity(kl, m, delta))


def complexity(
    kl: jax.typing.ArrayLike, m: jax.typing.ArrayLike, delta: jax.typing.ArrayLike
) -> jax.Array:
    """What may lie between the errors on m examples and on new ones, in nats an example."""
    return (jnp.asarray(kl) + jnp.log(2 * jnp.sqrt(m) / delta)) / m
