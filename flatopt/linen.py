"""Flax linen: BatchNorm statistics for averaged weights."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from flatopt import _tree
from flatopt._batch_stats import average_batch_stats

_Path = tuple[str, ...]


def recompute_batch_stats(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    sample_weighted: bool = True,
    **kwargs: Any,
) -> Any:
    r"""BatchNorm statistics that belong to given weights: their exact mean over given batches.

    .. math:: \bar s = \sum_b n_b \, s_b \Big/ \sum_b n_b

    with :math:`s_b` the means and variances that the layers see in batch b of :math:`n_b` examples.
    No momentum enters, and nothing given is changed.

    Args:
      model: the module.
      variables: `{"params": ..., "batch_stats": ...}`: the weights to evaluate and any statistics;
        other collections as `model` needs them.
      batches: inputs, batch by batch: an array, or a tuple of positional arguments, whose first
        array has the examples along its first axis. One pass over the training set, as a rule.
      sample_weighted: True: each example counts the same. False: each batch does, as in PyTorch's
        `update_bn`; then a short last batch weighs too much. Static.
      **kwargs: further arguments of `model.apply`: those with which it trains, such as `train=True`
        or `rngs={"dropout": key}`.

    Returns:
      A new `batch_stats` collection. Leaves that are not of a `nn.BatchNorm` are those given.

    Raises:
      ValueError: if there is no batch, or no BatchNorm layer, or one that is not in training mode.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from flatopt.linen import recompute_batch_stats
      >>> model = nn.BatchNorm()
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0]])]
      >>> variables = model.init(jax.random.key(0), batches[0], use_running_average=True)
      >>> stats = recompute_batch_stats(model, variables, batches, use_running_average=False)
      >>> print(f"{stats['mean'][0]:.4f} {stats['var'][0]:.4f}")
      3.0000 0.6667

    References:
      Izmailov, Podoprikhin, Garipov, Vetrov, Wilson. Averaging Weights Leads to Wider Optima and
      Better Generalization. arXiv:1803.05407

    Notes:
      A forward pass for each batch, compiled once for each of their shapes; no gradient. Works
      under `jax.jit` and `jax.vmap`. The variance is the mean of the batches' variances, as in the
      SWA authors' code. A layer that is called twice in one pass has no statistics of its own: give
      each call a layer.
    """
    original = variables["batch_stats"]
    leaves = flax.traverse_util.flatten_dict(original)

    def apply(leaves: Any, args: tuple[Any, ...]) -> Any:
        stats = flax.traverse_util.unflatten_dict(leaves)
        return model.apply(
            {**variables, "batch_stats": stats},
            *args,
            mutable=flax.core.DenyList("params"),
            **kwargs,
        )[1]["batch_stats"]

    tuples = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not tuples:
        raise ValueError("batches is empty: it must hold at least one batch.")
    momenta = _momenta(lambda: apply(leaves, tuples[0]))
    keep = {path: momenta[path[:-1]] for path in leaves if path[:-1] in momenta}
    # From zero, what a layer stores after one batch is (1 - momentum) times what it saw there.
    zeroed = leaves | {
        path: jnp.zeros_like(leaves[path], _tree.accumulator_dtype(leaves[path].dtype))
        for path in keep
    }

    @jax.jit
    def measure(args: tuple[Any, ...]) -> dict[_Path, jax.Array]:
        stored = flax.traverse_util.flatten_dict(apply(zeroed, args))
        return {path: stored[path] / (1 - momentum) for path, momentum in keep.items()}

    sizes = [jax.tree.leaves(args)[0].shape[0] for args in tuples]
    mean = average_batch_stats(map(measure, tuples), sizes if sample_weighted else None)
    new = leaves | {path: mean[path].astype(leaves[path].dtype) for path in keep}
    result = flax.traverse_util.unflatten_dict(new)
    return flax.core.freeze(result) if isinstance(original, flax.core.FrozenDict) else result


def _momenta(apply: Any) -> dict[_Path, float]:
    """Path and momentum of each BatchNorm layer that `apply` calls; computes nothing."""
    momenta: dict[_Path, float] = {}

    def watch(call: Any, args: Any, call_kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if isinstance(layer, nn.BatchNorm) and context.method_name == "__call__":
            flag = call_kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
            if layer.use_running_average if flag is None else flag:
                raise ValueError(
                    f"the BatchNorm layer at {'/'.join(layer.path) or 'the top'} uses its running "
                    "averages: pass the arguments with which the model trains, such as train=True."
                )
            if layer.momentum == 1:
                raise ValueError(
                    f"the BatchNorm layer at {'/'.join(layer.path) or 'the top'} has momentum=1 "
                    "and shows none of what it sees: it must be below 1."
                )
            momenta[layer.path] = layer.momentum
        return call(*args, **call_kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(apply)
    if not momenta:
        raise ValueError("model has no nn.BatchNorm layer: there are no statistics to recompute.")
    return momenta
