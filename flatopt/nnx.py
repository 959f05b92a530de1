"""Flax nnx: BatchNorm statistics for averaged weights."""

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from flatopt._batch_stats import average_batch_stats

_Module = TypeVar("_Module", bound=nnx.Module)


def recompute_batch_stats(
    model: _Module, batches: Iterable[Any], *, sample_weighted: bool = True, **kwargs: Any
) -> _Module:
    r"""A copy of a model with the BatchNorm statistics that belong to its weights.

    .. math:: \bar s = \sum_b n_b \, s_b \Big/ \sum_b n_b

    with :math:`s_b` the means and variances that the layers see in batch b of :math:`n_b` examples.
    No momentum enters, and `model` is not changed.

    Args:
      model: the module, holding the weights to evaluate. The layers' own mode does not matter: the
        statistics are taken in training mode, which includes dropout.
      batches: inputs, batch by batch: an array, or a tuple of positional arguments, whose first
        array has the examples along its first axis. One pass over the training set, as a rule.
      sample_weighted: True: each example counts the same. False: each batch does, as in PyTorch's
        `update_bn`; then a short last batch weighs too much. Static.
      **kwargs: further arguments of the model's call.

    Returns:
      A new model, in the mode of the old one: call its `eval()` before evaluation. What is not in a
      `nnx.BatchNorm` is as it was.

    Raises:
      ValueError: if there is no batch, or no BatchNorm layer.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from flatopt.nnx import recompute_batch_stats
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0]])]
      >>> new = recompute_batch_stats(model, batches)
      >>> print(f"{new.mean[...][0]:.4f} {new.var[...][0]:.4f} {model.mean[...][0]:.4f}")
      3.0000 0.6667 0.0000

    References:
      Izmailov, Podoprikhin, Garipov, Vetrov, Wilson. Averaging Weights Leads to Wider Optima and
      Better Generalization. arXiv:1803.05407

    Notes:
      A forward pass for each batch, compiled once for each of their shapes; no gradient. The
      variance is the mean of the batches' variances, as in the SWA authors' code. A layer that is
      called twice in one pass keeps the statistics of the second call.
    """
    working = nnx.clone(model)
    working.train()
    layers = [
        (path, layer)
        for path, layer in nnx.iter_modules(working)
        if isinstance(layer, nnx.BatchNorm)
    ]
    if not layers:
        raise ValueError("model has no nnx.BatchNorm layer: there are no statistics to recompute.")
    for _, layer in layers:
        layer.momentum = 0.0  # The copy's layers store what the last batch showed them.
        for stored in (layer.mean, layer.var):
            stored[...] = jnp.zeros_like(stored[...])
    paths = {path for path, _ in layers}
    graphdef, state = nnx.split(working)

    @jax.jit
    def measure(state: nnx.State, args: tuple[Any, ...]) -> dict[Any, jax.Array]:
        one = nnx.merge(graphdef, state)
        one(*args, **kwargs)
        stats = nnx.to_flat_state(nnx.state(one, nnx.BatchStat))
        return {path: stat[...] for path, stat in stats if path[:-1] in paths}

    tuples = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not tuples:
        raise ValueError("batches is empty: it must hold at least one batch.")
    sizes = [jax.tree.leaves(args)[0].shape[0] for args in tuples]
    stats = (measure(state, args) for args in tuples)
    mean = average_batch_stats(stats, sizes if sample_weighted else None)
    result = nnx.clone(model)
    for path, module in nnx.iter_modules(result):
        if isinstance(module, nnx.BatchNorm):
            module.mean[...], module.var[...] = mean[*path, "mean"], mean[*path, "var"]
    return result
