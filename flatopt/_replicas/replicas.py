"""Replicas: several copies of the parameters, and what is done for each of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

from flatopt._core import checks, rng, tree_math

# One or several names of mapped axes; none of them, `()`, makes a single replica.
AxisName = str | tuple[str, ...]
LEADING_AXIS = "flatopt_replicas"


def mean_over(tree: Any, axis_name: AxisName) -> Any:
    r"""The mean over the mapped replicas, in the accumulator's dtype.

    Of counters and flags it is the largest, of random keys that of the first replica.
    """

    def leaf(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return _first_key(x, axis_name)
        inexact = tree_math.is_inexact(x)
        wide = x.astype(tree_math.accumulator_dtype(x.dtype) if x.dtype != bool else jnp.int32)
        if _must_be_gathered(x):
            # Along a last axis: a new first one JAX would take for the one that is sharded.
            everyone = jax.lax.all_gather(wide, axis_name, axis=wide.ndim)
            return jnp.mean(everyone, -1) if inexact else jnp.max(everyone, -1)
        return (jax.lax.pmean if inexact else jax.lax.pmax)(wide, axis_name)

    return tree if axis_name == () else jax.tree.map(leaf, tree)


def _first_key(key: jax.Array, axis_name: AxisName) -> jax.Array:
    """The key of the first replica."""
    everyone = jax.lax.all_gather(jax.random.key_data(key), axis_name)
    return jax.random.wrap_key_data(everyone[0], impl=jax.random.key_impl(key))


def _must_be_gathered(x: jax.Array) -> bool:
    """Whether the axes of the mesh are explicit, other than inside `jax.shard_map`.

    JAX cannot map a reduction over a `vmap` axis there; a gather it can, and it moves nothing.
    """
    sharding = jax.typeof(x).sharding
    kinds = sharding.mesh.axis_types or ()
    whole = AxisType.Explicit in kinds and AxisType.Manual not in kinds
    return whole or any(axis is not None for axis in sharding.spec)


def barycentre(params: optax.Params, axis_name: AxisName | None = None) -> optax.Params:
    r"""The mean of the replicas: the weights to evaluate.

    .. math:: \bar w = \frac1n \sum_a w_a

    Args:
      params: any tree with a leading replica axis, or one replica's inside a mapped axis.
      axis_name: None for a leading axis; else the name, or names, of the mapped one. Static.

    Returns:
      A tree without the replica axis, in the same dtypes. Integer and bool leaves, such as
      counters, have no mean: they are the largest; random keys are those of the first replica.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])}  # two replicas
      >>> print(flatopt.barycentre(params)["w"])
      [2. 4.]

    References:
      Baldassi et al. Unreasonable Effectiveness of Learning Neural Networks: From Accessible States
      and Robust Ensembles to Basic Algorithmic Schemes. arXiv:1605.06444

    Cost: 0 extra gradients; 0 copies.
    """
    if axis_name is None:
        one = lambda replica: barycentre(replica, LEADING_AXIS)  # noqa: E731
        return _vmap(one, params, out_axes=None)(params)
    return jax.tree.map(tree_math.as_dtype_of, mean_over(params, axis_name), params)


def kick(params: optax.Params, std: jax.typing.ArrayLike, noise: Any) -> optax.Params:
    r"""Where another replica starts, :math:`w + \sigma \, \xi_a`; counters start as they are."""
    return tree_math.on_inexact(lambda w, xi: w + std * xi, params, noise)


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
      std: :math:`\sigma` >= 0, of normal noise in the others; integer and bool leaves have none.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data, for the noise.
      init_fn: function from a key to parameters, such as `model.init` with an example bound, that
        draws the others instead. Static.

    Returns:
      A tree like `params` with one more axis, of length `number`, in front of each leaf.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> w = flatopt.replicate_params(jnp.ones(1000), 3, std=0.1)
      >>> print(w.shape, f"{jnp.std(w[0]):.2f} {jnp.std(w[1]):.2f}")
      (3, 1000) 0.00 0.10

    References:
      Pittorino et al. Entropic gradient descent algorithms and wide flat minima. arXiv:2006.07897

    Cost: 0 extra gradients; `number` copies.
    """
    checks.check_count("number", number, 1, none_allowed=False)
    checks.check_number("std", std, low=0.0, schedule_allowed=False)
    keys = jax.random.split(rng.as_key(key), number)[1:]

    # Compiled, so that replicas are the same to the last bit whether the caller compiles or not.
    # The parameters are an argument: as a constant, they could not span several processes.
    @jax.jit
    def other(key: jax.Array, params: optax.Params) -> optax.Params:
        if init_fn is not None:
            return tree_math.cast_like(init_fn(key), params)
        return kick(params, std, rng.normal_like(key, params))

    # Stacked one by one: each then lies on the devices as `params` does.
    replicas = [params, *(other(key, params) for key in keys)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *replicas)


def own_axis(axis_name: AxisName | None) -> AxisName:
    """The name of the axis that counts the replicas inside `for_each`."""
    return LEADING_AXIS if axis_name is None else axis_name


def agreed(step: jax.Array, axis_name: AxisName) -> jax.Array:
    """`step`, which all replicas share, so that what depends on it is one branch for them all."""
    return mean_over(step, axis_name) if axis_name == LEADING_AXIS else step


def for_each(function: Callable[..., Any], axis_name: AxisName | None) -> Callable[..., Any]:
    """`function`, written for one replica, for all of them, inside the axis `own_axis(axis_name)`.

    Without an `axis_name` it maps over the leading axis of all arguments but those by keyword. On a
    named axis the caller has done so, and `function` comes back as it is.
    """
    if axis_name is not None:
        return function

    def mapped(*trees: Any, **shared: Any) -> Any:
        one = functools.partial(function, **shared)
        axis = _mesh_axis(trees)
        result = _vmap(one, trees)(*(_lay_along(axis, tree) for tree in trees))
        return _lay_along(axis, result)

    return mapped


def _vmap(function: Callable[..., Any], trees: Any, **kwargs: Any) -> Callable[..., Any]:
    """`function` over the leading axis of `trees`; without a leaf they are one replica."""
    size = None if jax.tree.leaves(trees) else 1
    return jax.vmap(function, axis_name=LEADING_AXIS, axis_size=size, **kwargs)


def along_replicas(
    name: str,
    init_one: Callable[..., Any],
    update_one: Callable[..., tuple[optax.Updates, Any]],
    axis_name: AxisName | None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of all replicas, by the factory `name`, from what each of them does.

    `update_one(updates, state, params, **extra_args)` finds the others on `own_axis(axis_name)`.
    """

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        checks.require_params(name, params)
        return for_each(update_one, axis_name)(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(for_each(init_one, axis_name), update_fn)


def _mesh_axis(tree: Any) -> Any:
    """The explicit axis of the mesh along which the replicas lie; None without one."""
    specs = (jax.typeof(x).sharding.spec for x in jax.tree.leaves(tree))
    return next((spec[0] for spec in specs if len(spec) and spec[0] is not None), None)


def _lay_along(axis: Any, tree: Any) -> Any:
    """`tree` with its leading axis on that `axis`: JAX maps only over what lies alike."""

    def leaf(x: jax.Array) -> jax.Array:
        spec = jax.typeof(x).sharding.spec
        if spec and spec[0] == axis:
            return x
        return jax.sharding.reshard(x, PartitionSpec(axis, *spec[1:]))

    return tree if axis is None else jax.tree.map(leaf, tree)
