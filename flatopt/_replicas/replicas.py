"""Replicas: several copies of the parameters, and their barycentre."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng, tree_math

# One or several names of mapped axes; none of them, `()`, makes a single replica.
AxisName = str | tuple[str, ...]
LEADING_AXIS = "flatopt_replicas"


def barycentre(params: optax.Params, axis_name: AxisName | None = None) -> optax.Params:
    r"""The mean of the replicas: the weights to evaluate.

    .. math:: \bar w = \frac1n \sum_a w_a

    Args:
      params: parameters with a leading replica axis, or one replica's inside a mapped axis. Any
        tree will do: BatchNorm statistics, gradients.
      axis_name: None for a leading axis; else the name of the mapped axis that counts the replicas,
        or several. Static.

    Returns:
      A tree without the replica axis, in the same dtypes. Integer and bool leaves, such as
      counters, have no mean: they are the largest.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import flatopt
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])}  # two replicas
      >>> print(flatopt.barycentre(params)["w"])
      [2. 4.]
      >>> mean = lambda p: flatopt.barycentre(p, axis_name="replicas")
      >>> print(jax.vmap(mean, axis_name="replicas")(params)["w"][0])
      [2. 4.]

    References:
      Baldassi et al. Unreasonable Effectiveness of Learning Neural Networks: From Accessible States
      and Robust Ensembles to Basic Algorithmic Schemes. arXiv:1605.06444

    Notes:
      Where replicas keep averages or offsets, take those first:
      `barycentre(flatopt.eval_params(opt_state, params))`, the inner one under `vmap`. Statistics
      of BatchNorm belong to the centre: recompute them there, or take their barycentre. Summed in
      float32 at least. Costs no gradient.
    """
    if axis_name is None:
        return over_leading_axis(lambda p: barycentre(p, LEADING_AXIS), out_axes=None)(params)
    return optax.tree.cast_like(_mean(params, axis_name), params)


def replicate_params(
    params: optax.Params,
    number: int,
    *,
    std: jax.typing.ArrayLike = 0.0,
    key: rng.KeyLike = 0,
    init_fn: Callable[[jax.Array], optax.Params] | None = None,
) -> optax.Params:
    r"""Makes replicas of the parameters, along a new leading axis.

    .. math:: w_0 = w, \qquad w_a = w + \sigma \, \xi_a \quad (a = 1, \dots, n - 1)

    Args:
      params: one set of parameters: replica 0.
      number: n >= 1. Static.
      std: :math:`\sigma` >= 0, of the normal noise that sets the other replicas apart, in units of
        the parameters. With 0 they are equal, and stay so when they see equal data.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      init_fn: function from a key to parameters, such as `model.init` with an example bound; the
        other replicas then start from draws of their own instead of from `params`. Static.

    Returns:
      A tree like `params` with one more axis, of length `number`, in front of each leaf.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> replicas = flatopt.replicate_params({"w": jnp.ones(1000)}, 3, std=0.1)
      >>> print(replicas["w"].shape)
      (3, 1000)
      >>> print(f"{jnp.std(replicas['w'][0]):.2f} {jnp.std(replicas['w'][1]):.2f}")
      0.00 0.10

    References:
      Pittorino et al. Entropic gradient descent algorithms and wide flat minima. arXiv:2006.07897

    Notes:
      Split the leading axis over devices with `jax.shard_map`. Costs no gradient.
    """
    checks.check_count("number", number, 1)
    checks.check_number("std", std, low=0.0)
    keys = jax.random.split(jax.random.wrap_key_data(rng.key_data(key)), number)[1:]

    def other(key: jax.Array) -> optax.Params:
        if init_fn is not None:
            return optax.tree.cast_like(init_fn(key), params)
        kicks = rng.normal_like(key, params)
        return jax.tree.map(lambda w, xi: (w + std * xi).astype(w.dtype), params, kicks)

    # Compiled, so that replicas are the same to the last bit whether the caller compiles or not.
    # Stacked one by one: each then lies on the devices as `params` does.
    replicas = [params, *map(jax.jit(other), keys)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *replicas)


def over_leading_axis(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """Runs the code for one replica along the leading axis of all arguments."""
    return jax.vmap(function, axis_name=LEADING_AXIS, **kwargs)


def _mean(tree: Any, axis_name: AxisName) -> Any:
    """Mean over the replicas, in the accumulator's dtype; the maximum of integers."""

    def leaf(x: jax.Array) -> jax.Array:
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        wide = x.astype(tree_math.accumulator_dtype(x.dtype) if inexact else jnp.int32)
        # On explicitly sharded arrays JAX cannot map a reduction over a `vmap` axis; a gather it
        # can, and there that moves nothing.
        if any(axis is not None for axis in jax.typeof(x).sharding.spec):
            everyone = jax.lax.all_gather(wide, axis_name)
            return jnp.mean(everyone, 0) if inexact else jnp.max(everyone, 0)
        return (jax.lax.pmean if inexact else jax.lax.pmax)(wide, axis_name)

    return tree if axis_name == () else jax.tree.map(leaf, tree)
