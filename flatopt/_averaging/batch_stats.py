"""BatchNorm statistics for averaged weights (SWA, arXiv:1803.05407), whatever the framework."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flatopt._core import batches as _batches
from flatopt._core import checks, means, tree_math


def average_batch_stats(
    stats: Iterable[Any], sizes: Iterable[jax.typing.ArrayLike] | None = None
) -> Any:
    r"""The exact mean of statistics measured batch by batch.

    .. math:: \bar s = \sum_b n_b \, s_b \Big/ \sum_b n_b

    Args:
      stats: one tree a batch: the means and variances that its BatchNorm layers saw.
      sizes: number of examples in each batch. None: every batch has the same weight.

    Returns:
      Tree like one of `stats`, summed in float32 at least. Integer leaves are those of the last.

    Raises:
      ValueError: if there is no batch, or `sizes` has another length than `stats`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> print(flatopt.average_batch_stats([jnp.array(1.0), jnp.array(4.0)], sizes=[2, 1]))
      2.0

    References:
      Izmailov, Podoprikhin, Garipov, Vetrov, Wilson. Averaging Weights Leads to Wider Optima and
      Better Generalization. arXiv:1803.05407

    Cost: 0 extra gradients; 1 copy of the statistics.
    """
    stats = list(stats)
    weights = [1] * len(stats) if sizes is None else list(sizes)
    if not stats or len(weights) != len(stats):
        raise ValueError(
            f"stats has {len(stats)} batches and sizes {len(weights)}: there must be at least one "
            "batch, and a size for each."
        )
    # A batch without weight has no part in the mean, not even by its NaN.
    pairs = [(s, w) for s, w in zip(stats, weights, strict=True) if not checks.is_number(w, 0)]
    if not pairs:
        raise ValueError(f"sizes={weights!r} are all zero: at least one batch must count.")
    (first, total), *others = pairs
    mean = means.copy(first)
    for batch, weight in others:
        total = total + weight
        traced = isinstance(total, jax.core.Tracer)  # And may be zero yet.
        share = tree_math.ratio_or_zero(weight, jnp.asarray(total)) if traced else weight / total
        mean = means.towards(mean, batch, share)
    return jax.tree.map(lambda m, x: m.astype(x.dtype), mean, first)


def unbiased(
    var: jax.Array, shape: tuple[int, ...], axis: int | Sequence[int], path: Iterable[Any]
) -> jax.Array:
    """The variance times n / (n - 1), of a layer that saw n values of each channel on `axis`."""
    axes = (axis,) if isinstance(axis, int) else axis
    number = math.prod(shape) // math.prod(shape[a] for a in axes)
    if number < 2:
        raise ValueError(
            f"the BatchNorm layer at {'/'.join(map(str, path)) or 'the top'} sees one value a "
            "channel, which has no unbiased variance: drop such a batch, or set unbiased=False."
        )
    return var * (number / (number - 1))


def arguments_of(batches: Iterable[Any]) -> tuple[tuple[Any, ...], Iterator[tuple[Any, ...]]]:
    """The positional arguments of the first batch, and an iterator over those of all."""
    arguments = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    first = next(arguments, None)
    if first is None:
        raise ValueError("batches is empty: it must hold at least one batch.")
    return first, itertools.chain([first], arguments)


def average_over(
    measure: Callable[[tuple[Any, ...]], Any],
    arguments: Iterator[tuple[Any, ...]],
    *,
    sample_weighted: bool,
    weights: _batches.Weights,
) -> Any:
    """The mean of `measure(arguments)` over the batches: one loop for every framework."""
    if weights is not None:
        weights = _batches.check_weights(weights)
    elif not sample_weighted:
        stats = list(map(measure, arguments))
        return average_batch_stats(stats)
    pairs = [(measure(args), w) for args, w in _batches.with_weights(arguments, weights)]
    return average_batch_stats([stats for stats, _ in pairs], [weight for _, weight in pairs])
