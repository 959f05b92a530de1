"""SWAG (Maddox et al., arXiv:1902.02476): SWA's mean, and a Gaussian around it to sample from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging import ring as _ring
from flatopt._core import checks, means, registry, stage, tree_math
from flatopt._core.timing import Every


class SwagState(NamedTuple):
    """State of `swag`.

    Attributes:
      step: int32 scalar, number of updates so far.
      number: int32 scalar, number of models taken in so far.
      mean: tree like the parameters, the models' mean, in the accumulator's dtype.
      variance: tree like `mean`, their variance around it (the mean of squares less the square of
        the mean, computed without that cancellation).
      deviations: tree like `mean` with one more axis in front, of length `rank`: the latest models,
        each less the mean as it was with that model in it.
    """

    step: jax.Array
    number: jax.Array
    mean: optax.Params
    variance: optax.Params
    deviations: optax.Params

    def eval_params(self, params: optax.Params) -> optax.Params:
        """Returns the mean in the dtypes of `params`, or `params` before the first model."""
        return means.evaluated(self.mean, params, self.number > 0)


class SwagCovariance(NamedTuple):
    """Covariance of SWAG's Gaussian: diagonal plus a product of factors.

    Attributes:
      marginal: tree like the parameters, the variance of each weight, both parts together.
      diagonal: tree like the parameters, the diagonal part.
      factors: tree like the parameters with one more axis in front, of length `rank`: the sum over
        that axis of the outer products of its entries is the other part.
    """

    marginal: optax.Params
    diagonal: optax.Params
    factors: optax.Params


def spread(variance: Any, params: Any, old_mean: Any, deviations: Any, number: Any) -> Any:
    r"""Welford's recursion: :math:`v + \big((w - \bar w_{n-1}) (w - \bar w_n) - v\big) / n`."""

    def leaf(v: jax.Array, w: jax.Array, old: jax.Array, d: jax.Array) -> jax.Array:
        if not jnp.issubdtype(w.dtype, jnp.inexact):
            return v
        return (v + (((w - old) * d.conj()).real - v) / number).astype(v.dtype)

    return jax.tree.map(leaf, variance, params, old_mean, deviations)


def low_rank_factors(state: SwagState) -> optax.Params:
    r""":math:`D / \sqrt{2 (K - 1)}`: the latest deviations as factors of the covariance."""
    columns = jnp.minimum(state.number, _ring.size(state.deviations))
    divisor = jnp.sqrt(2.0 * jnp.maximum(columns - 1, 1))

    def leaf(deviations: jax.Array) -> jax.Array:
        if not jnp.issubdtype(deviations.dtype, jnp.inexact):
            return jnp.zeros(deviations.shape)
        return (deviations / divisor).astype(deviations.dtype)

    return jax.tree.map(leaf, state.deviations)


def displace(state: SwagState, z1: optax.Params, z2: jax.Array, scale: Any) -> optax.Params:
    r""":math:`\bar w + \sqrt s \, (\sigma z_1 / \sqrt 2 + D z_2 / \sqrt{2 (K - 1)})`."""

    def leaf(mean: jax.Array, variance: jax.Array, factors: jax.Array, z: jax.Array) -> jax.Array:
        if not jnp.issubdtype(mean.dtype, jnp.inexact):
            return mean
        # Elementwise: a dot product would be rounded to TF32 or bfloat16 on accelerators.
        low_rank = jnp.sum(factors * z2.reshape(-1, *[1] * mean.ndim), axis=0)
        moved = jnp.sqrt(variance / 2).astype(mean.dtype) * z + low_rank
        return (mean + jnp.sqrt(scale) * moved).astype(mean.dtype)

    return jax.tree.map(leaf, state.mean, state.variance, low_rank_factors(state), z1)


@registry.method("average")
def swag(
    rank: int,
    *,
    start: int | None = None,
    every: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SWA-Gaussian: SWA's mean, and the spread of the weights around it.

    .. math:: \Sigma = \tfrac12 \mathrm{diag}(\overline{w^2} - \bar w^2) + D D^\top / (2 (K - 1))

    Args:
      rank: K, how many of the latest deviations, columns of D, to keep, >= 2. Static.
      start, every, accumulator_dtype: when a model enters, in what it adds up; see `swa`.

    Returns:
      A stage to be chained last, as `swa`; needs `params`. See `sample_params`, `swag_covariance`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, zero = flatopt.swag(rank=2), jnp.array(0.0)
      >>> state = stage.init(zero)
      >>> for w in jnp.array([1.0, 2.0, 3.0]):  # the weights after each update
      ...     _, state = stage.update(zero, state, w)
      >>> print(f"{state.mean:.4f} {state.variance:.4f}")
      2.0000 0.6667

    References:
      Maddox, Garipov, Izmailov, Vetrov, Wilson. A Simple Baseline for Bayesian Uncertainty in Deep
      Learning. arXiv:1902.02476

    Cost: 0 extra gradients; 2 + `rank` copies.
    """
    checks.check_count("rank", rank, 2)

    def init_fn(params: optax.Params) -> SwagState:
        mean = means.zeros(params, accumulator_dtype)
        return SwagState(
            step=jnp.zeros([], jnp.int32),
            number=jnp.zeros([], jnp.int32),
            mean=mean,
            variance=jax.tree.map(_no_spread, mean),
            deviations=_ring.empty(jax.tree.map(_movable, mean), rank),
        )

    def collect(state: SwagState, params: optax.Params) -> SwagState:
        number = optax.safe_increment(state.number)
        _ring.require_size("swag", "rank", rank, state.deviations)
        mean = means.towards(state.mean, params, 1.0 / number)
        deviations = optax.tree.sub(*(jax.tree.map(_movable, tree) for tree in (params, mean)))
        return SwagState(
            step=state.step,
            number=number,
            mean=mean,
            variance=spread(state.variance, params, state.mean, deviations, number),
            deviations=_ring.push(state.deviations, deviations, state.number),
        )

    return stage.observer("swag", init_fn, collect, Every.after_update(start, every))


def sample_params(
    opt_state: optax.OptState,
    key: jax.Array,
    *,
    params: optax.Params | None = None,
    scale: jax.typing.ArrayLike = 1.0,
) -> optax.Params:
    r"""Draws weights from the Gaussian of `swag`.

    .. math:: w = \bar w + \sqrt s \, \big(\sigma z_1 / \sqrt 2 + D z_2 / \sqrt{2 (K - 1)}\big)

    Args:
      opt_state: state of any optax optimiser with one `swag` stage anywhere in it.
      key: random key: one for each sample. For several samples, `jax.vmap` over the keys.
      params: those in training: gives the dtypes, stands in for leaves that `optax.masked`
        excludes, and is returned before the first model. None: the mean's dtypes.
      scale: s, factor on the covariance, >= 0; 1 is the paper's, 0 gives the mean.

    Returns:
      Tree like the parameters.

    Raises:
      ValueError: if there is no `swag` stage in `opt_state`, or more than one.

    Examples:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> stage, w = flatopt.swag(rank=2), jnp.array([1.0, 2.0])
      >>> _, state = stage.update(jnp.zeros(2), stage.init(w), w)  # one model: no spread yet
      >>> print(flatopt.sample_params(state, jax.random.key(0)))
      [1. 2.]

    Cost: 0 extra gradients; 1 copy for each sample (+2 temporaries).
    """
    state = _find(opt_state)
    key_diagonal, key_low_rank = jax.random.split(key)
    leaves, structure = jax.tree.flatten(state.mean)
    keys = jax.random.split(key_diagonal, max(len(leaves), 1))
    noise = [
        jax.random.normal(k, x.shape, x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else None)
        for k, x in zip(keys, leaves, strict=False)
    ]
    columns = _ring.size(state.deviations)
    z2 = jax.random.normal(key_low_rank, [columns], tree_math.scalar_dtype(state.mean))
    sample = displace(state, jax.tree.unflatten(structure, noise), z2, scale)
    return sample if params is None else means.evaluated(sample, params, state.number > 0)


def swag_covariance(opt_state: optax.OptState) -> SwagCovariance:
    r"""The covariance that `sample_params` draws with, in parts that fit into memory.

    .. math:: \Sigma = \mathrm{diag}(\texttt{diagonal}) + \sum_k f_k f_k^\top, \qquad
      \texttt{marginal} = \mathrm{diag}(\Sigma)

    Args:
      opt_state: state of any optax optimiser with one `swag` stage anywhere in it.

    Returns:
      A `SwagCovariance`; integer leaves have variance 0, factors not yet filled are zeros.

    Raises:
      ValueError: if there is no `swag` stage in `opt_state`, or more than one.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stage, zero = flatopt.swag(rank=2), jnp.array(0.0)
      >>> state = stage.init(zero)
      >>> for w in jnp.array([1.0, 2.0, 3.0]):  # the last deviations are 0.5 and 1
      ...     _, state = stage.update(zero, state, w)
      >>> covariance = flatopt.swag_covariance(state)
      >>> print(f"{covariance.diagonal:.3f} {covariance.marginal:.3f}")
      0.333 0.958

    Cost: 0 extra gradients; 2 + `rank` copies.
    """
    state = _find(opt_state)
    factors = low_rank_factors(state)
    diagonal = jax.tree.map(lambda v: v / 2, state.variance)
    marginal = jax.tree.map(
        lambda d, f: d + jnp.sum(jnp.square(jnp.abs(f)), axis=0), diagonal, factors
    )
    return SwagCovariance(marginal, diagonal, factors)


def _movable(x: jax.Array) -> jax.Array:
    """`x`, or zero for what has no deviation: random keys, counters, flags."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.zeros(x.shape, jnp.int32)


def _no_spread(mean: jax.Array) -> jax.Array:
    x = _movable(mean)
    return jnp.zeros_like(x, x.real.dtype)


def _find(opt_state: optax.OptState) -> SwagState:
    def is_swag(state: Any) -> bool:
        return isinstance(state, SwagState)

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_swag) if is_swag(s)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of `swag`: there must be one. Chain "
            "`flatopt.swag(rank)` after the optimiser, or hand over the part of the state that you "
            "want."
        )
    return found[0]
