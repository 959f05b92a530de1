"""SWAG: the mean of the weights along the run, and a Gaussian around it to sample from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._averaging import ring as _ring
from flatopt._core import checks, means, stage, tree_math
from flatopt._core.timing import Every


class SwagState(NamedTuple):
    """State of `swag`.

    Attributes:
      step: int32 scalar, number of updates so far.
      number: int32 scalar, number of models taken in so far.
      mean: tree like the parameters, the models' mean, in float32 at least.
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

    def columns(self) -> jax.Array:
        """How many deviations there are so far: at most `rank`."""
        return jnp.minimum(self.number, _ring.size(self.deviations))

    def sample(
        self, diagonal_noise: optax.Params, low_rank_noise: jax.Array, scale: Any
    ) -> optax.Params:
        """The sample that standard normal draws make: a tree like `mean` and an array [rank]."""
        divisor = jnp.sqrt(2.0 * jnp.maximum(self.columns() - 1, 1))

        def leaf(mean: jax.Array, variance: jax.Array, deviations: jax.Array, z: jax.Array) -> Any:
            if not jnp.issubdtype(mean.dtype, jnp.inexact):
                return mean
            column = low_rank_noise.reshape(-1, *[1] * mean.ndim)
            # Elementwise: a dot product would be rounded to TF32 or bfloat16 on accelerators.
            low_rank = jnp.sum(deviations * column, axis=0) / divisor
            spread = jnp.sqrt(variance / 2).astype(mean.dtype) * z + low_rank
            return (mean + jnp.sqrt(scale) * spread).astype(mean.dtype)

        return jax.tree.map(leaf, self.mean, self.variance, self.deviations, diagonal_noise)


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


def swag(
    rank: int, *, start: int | None = None, every: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""SWA-Gaussian: SWA's mean, and the spread of the weights around it.

    .. math::
      \bar w = \frac1n \sum_i w_i, \qquad
      \Sigma = \frac12 \mathrm{diag}\Big(\frac1n \sum_i w_i^2 - \bar w^2\Big)
      + \frac{1}{2 (K - 1)} \sum_{i = n - K + 1}^{n} (w_i - \bar w_i) (w_i - \bar w_i)^\top

    with :math:`\bar w_i` the mean of the first i models, and K = `rank`, or n while n is smaller.

    Args:
      rank: K, how many of the latest deviations to keep, >= 2. Static.
      start: number of the first update, counted from 1, whose weights enter, >= 0; None means the
        first. Static.
      every: one in `every` updates from there on, >= 1; None means each. Static.

    Returns:
      A stage to be chained last. It passes updates through unchanged, and needs `params`.
      `flatopt.eval_params(opt_state, params)` gives the mean, `flatopt.sample_params(opt_state,
      key)` a sample, `flatopt.swag_covariance(opt_state)` the covariance.

    Raises:
      ValueError: if an argument is out of range, or `params` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.swag(rank=2))
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):  # the weights are 1, 2, 3
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(flatopt.eval_params(opt_state, params))
      2.0
      >>> print(f"{flatopt.swag_covariance(opt_state).diagonal:.4f}")
      0.3333

    References:
      Maddox, Garipov, Izmailov, Vetrov, Wilson. A Simple Baseline for Bayesian Uncertainty in Deep
      Learning. arXiv:1902.02476

    Notes:
      Place: last in its chain, as for `swa`; like it, SWAG wants a learning rate that stays high,
      and BatchNorm statistics recomputed for each sample. Integer leaves are copied. The variance
      is accumulated around the mean: the difference of two means of squares has no digits left in
      float32 where weights of order 1 move by 1e-4. Gradient evaluations: none. State: 2 + `rank`
      copies of the parameters, in float32 at least, and two integers.
    """
    checks.check_count("rank", rank, 2)

    def init_fn(params: optax.Params) -> SwagState:
        return SwagState(
            step=jnp.zeros([], jnp.int32),
            number=jnp.zeros([], jnp.int32),
            mean=means.zeros(params),
            variance=jax.tree.map(lambda m: jnp.zeros_like(m, m.real.dtype), means.zeros(params)),
            deviations=_ring.empty(means.zeros(params), rank),
        )

    def collect(state: SwagState, params: optax.Params) -> SwagState:
        number = optax.safe_increment(state.number)
        mean = means.towards(state.mean, params, 1.0 / number)
        deviations = optax.tree.sub(params, mean)

        def spread(variance: jax.Array, w: jax.Array, old: jax.Array, d: jax.Array) -> Any:
            """Welford's recursion: the new deviation times that from the old mean."""
            product = ((w - old) * d.conj()).real
            return (variance + (product - variance) / number).astype(variance.dtype)

        return SwagState(
            step=state.step,
            number=number,
            mean=mean,
            variance=jax.tree.map(spread, state.variance, params, state.mean, deviations),
            deviations=_ring.push(state.deviations, deviations, state.number),
        )

    return stage.observer("swag", init_fn, collect, Every.after_update(start, every))


def sample_params(
    opt_state: optax.OptState,
    key: jax.Array,
    params: optax.Params | None = None,
    scale: jax.typing.ArrayLike = 1.0,
) -> optax.Params:
    r"""Draws weights from the Gaussian of `swag`.

    .. math::
      w = \bar w + \sqrt{s} \, \Big( \tfrac{1}{\sqrt 2} \sigma \odot z_1
      + \tfrac{1}{\sqrt{2 (K - 1)}} D z_2 \Big), \qquad z_1, z_2 \sim N(0, 1)

    Args:
      opt_state: state of any optax optimiser with one `swag` stage anywhere in it.
      key: random key, `jax.random.key(seed)`: one for each sample.
      params: the parameters in training: gives the dtypes, stands in for leaves that
        `optax.masked` excludes, and is returned before the first model. None: the mean's dtypes.
      scale: s, factor on the covariance, >= 0; 1 is the paper's, 0 gives the mean.

    Returns:
      Tree like the parameters. For several samples, `jax.vmap` over the keys.

    Raises:
      ValueError: if there is no `swag` stage in `opt_state`, or more than one.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.swag(rank=2))
      >>> params = jnp.zeros(3)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, opt_state = tx.update(-jnp.ones(3), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> keys = jax.random.split(jax.random.key(0), 1000)
      >>> samples = jax.vmap(lambda key: flatopt.sample_params(opt_state, key))(keys)
      >>> print(samples.shape, f"{jnp.mean(samples):.1f}")
      (1000, 3) 2.0

    References:
      Maddox, Garipov, Izmailov, Vetrov, Wilson. A Simple Baseline for Bayesian Uncertainty in Deep
      Learning. arXiv:1902.02476

    Notes:
      The factor 1/2 on both parts is part of the covariance here; in the authors' code it is its
      argument `scale=0.5`. Costs no gradient. Recompute BatchNorm statistics for each sample.
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
    sample = state.sample(
        jax.tree.unflatten(structure, noise),
        jax.random.normal(key_low_rank, [columns], tree_math.scalar_dtype(state.mean)),
        scale,
    )
    return sample if params is None else means.evaluated(sample, params, state.number > 0)


def swag_covariance(opt_state: optax.OptState) -> SwagCovariance:
    r"""The covariance that `sample_params` draws with, in parts that fit into memory.

    .. math::
      \Sigma = \mathrm{diag}(\texttt{diagonal}) + \sum_k f_k f_k^\top, \qquad
      \texttt{marginal} = \mathrm{diag}(\Sigma)

    Args:
      opt_state: state of any optax optimiser with one `swag` stage anywhere in it.

    Returns:
      A `SwagCovariance`. Large marginal variances tell weights that the run did not settle; a
      `diagonal` far from half of `marginal` tells that the latest models spread otherwise than all.

    Raises:
      ValueError: if there is no `swag` stage in `opt_state`, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.swag(rank=2))
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):  # the weights are 1, 2, 3; the last deviations 0.5 and 1
      ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> covariance = flatopt.swag_covariance(opt_state)
      >>> print(f"{covariance.diagonal:.3f} {covariance.marginal:.3f}")
      0.333 0.958

    Notes:
      Costs no gradient. Integer leaves have variance 0. Entries not yet filled are zeros.
    """
    state = _find(opt_state)
    divisor = jnp.sqrt(2.0 * jnp.maximum(state.columns() - 1, 1))

    def factor(deviations: jax.Array) -> jax.Array:
        if not jnp.issubdtype(deviations.dtype, jnp.inexact):
            return jnp.zeros(deviations.shape)
        return (deviations / divisor).astype(deviations.dtype)

    factors = jax.tree.map(factor, state.deviations)
    diagonal = jax.tree.map(lambda v: v / 2, state.variance)
    marginal = jax.tree.map(
        lambda d, f: d + jnp.sum(jnp.square(jnp.abs(f)), axis=0), diagonal, factors
    )
    return SwagCovariance(marginal, diagonal, factors)


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
