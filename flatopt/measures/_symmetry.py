"""Hidden units: where their weights are, and rescalings that leave a network as it is."""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Slot = tuple[str, int]  # Path of a leaf, such as "params/Dense_0/kernel", and one of its axes.


class Units(NamedTuple):
    """One set of interchangeable hidden units, and where their weights are.

    Attributes:
      incoming: slots of the weights that lead to the units: kernels by their output axis, biases.
      outgoing: slots of the weights that lead away from them: kernels by their input axis.
    """

    incoming: tuple[Slot, ...]
    outgoing: tuple[Slot, ...]


def chain_units(params: optax.Params, layers: Sequence[str] | None = None) -> tuple[Units, ...]:
    """The hidden units of a plain chain of layers, each leading to the next alone.

    Args:
      params: tree of nested dicts in Flax's layout: each layer a dict with a "kernel" of shape
        (..., inputs, outputs) and, if it has one, a "bias" of shape (outputs,).
      layers: paths of the layers in order, such as "params/Dense_0". None: all layers, sorted by
        the numbers in their names.

    Returns:
      One `Units` for every layer but the last.

    Raises:
      ValueError: if there are fewer than two layers, or one does not fit the next.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> layer = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> (units,) = measures.chain_units({"Dense_0": layer, "Dense_1": layer})
      >>> print(units.incoming, units.outgoing)
      (('Dense_0/kernel', -1), ('Dense_0/bias', -1)) (('Dense_1/kernel', -2),)

    Cost: nothing.
    """
    leaves = by_path(params)
    if layers is None:
        found = [path.rpartition("/")[0] for path in leaves if path.split("/")[-1] == "kernel"]
        layers = sorted(found, key=_natural)
    if len(layers) < 2:
        raise ValueError(f"layers={list(layers)} has no hidden units: a chain has two or more.")
    missing = [layer for layer in layers if f"{layer}/kernel" not in leaves]
    if missing:
        raise ValueError(f"params has no leaf {missing[0]}/kernel: there are {', '.join(leaves)}.")
    chain = []
    for layer, following in itertools.pairwise(layers):
        kernel, after = leaves[f"{layer}/kernel"], leaves[f"{following}/kernel"]
        if kernel.ndim < 2 or after.ndim < 2 or kernel.shape[-1] != after.shape[-2]:
            raise ValueError(
                f"{layer} with a kernel of shape {kernel.shape} does not lead to {following} with "
                f"one of shape {after.shape}: name the layers in order, or write Units by hand."
            )
        bias = ((f"{layer}/bias", -1),) if f"{layer}/bias" in leaves else ()
        chain.append(Units(((f"{layer}/kernel", -1), *bias), ((f"{following}/kernel", -2),)))
    return tuple(chain)


def rescale_units(params: optax.Params, units: Sequence[Units]) -> optax.Params:
    r"""Scales every hidden unit of a ReLU network to incoming weights of length 1.

    .. math:: (w_{in}, b) \leftarrow (w_{in}, b) / c, \quad w_{out} \leftarrow c \, w_{out}, \quad
       c = \|(w_{in}, b)\|

    Args:
      params: the network.
      units: its hidden units, from the first layer to the last: `chain_units(params)`. Static.

    Returns:
      A tree like `params`, which computes what it did. Units without incoming weights stay.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> params = {"a": {"kernel": jnp.array([[3.0], [4.0]])}, "b": {"kernel": jnp.array([[2.0]])}}
      >>> scaled = measures.rescale_units(params, measures.chain_units(params))
      >>> print(scaled["a"]["kernel"].ravel(), scaled["b"]["kernel"].ravel())
      [0.6 0.8] [10.]

    References:
      Pittorino, Ferraro, Perugini, Feinauer, Baldassi, Zecchina. Deep Networks on Toroids.
      arXiv:2202.03038

    Cost: nothing.
    """
    leaves = by_path(params)
    checked = check_units(leaves, units)
    _refuse_tied(checked)
    for group in checked:
        squares = sum(sum_others(leaves[path] ** 2, axis) for path, axis in group.incoming)
        length = jnp.sqrt(squares)
        scale = jnp.where(length > 0, length, 1.0)
        for path, axis in group.incoming:
            leaves[path] = leaves[path] / along(scale, leaves[path], axis)
        for path, axis in group.outgoing:
            leaves[path] = leaves[path] * along(scale, leaves[path], axis)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def _refuse_tied(units: Sequence[Units]) -> None:
    """Raises where one array would be both divided and multiplied, or divided twice."""
    incoming: set[str] = set()
    for group in units:
        own = {path for path, _ in group.incoming}
        tied = (own & {path for path, _ in group.outgoing}) | (own & incoming)
        if tied:
            raise ValueError(
                f"{min(tied)!r} is tied: it leads to hidden units and away from them, or to two "
                "sets of them, so no rescaling leaves the network as it is. Rescale before tying, "
                "or leave these units out."
            )
        incoming |= own


def by_path(params: Any) -> dict[str, Any]:
    """The leaves in order, by paths such as "params/Dense_0/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): jnp.asarray(x) for p, x in leaves}


def _natural(path: str) -> list[Any]:
    """Sorts Dense_10 after Dense_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def check_units(leaves: dict[str, Any], units: Sequence[Units]) -> list[Units]:
    """The sets of units with each slot once and axes counted from the front; raises for misfits."""
    checked: list[Units] = []
    taken: set[Slot] = set()
    for group in units:
        _check_slots(leaves, group)
        ways = ([(p, axis % leaves[p].ndim) for p, axis in slots] for slots in group)
        unique = Units(*(tuple(dict.fromkeys(slots)) for slots in ways))
        again = taken & set(unique.incoming + unique.outgoing)
        if again:
            path, axis = min(again)
            raise ValueError(
                f"units names axis {axis} of {path!r} in two sets: weights that are tied belong to "
                "one set of units, with all their slots."
            )
        taken |= set(unique.incoming + unique.outgoing)
        checked.append(unique)
    return checked


def _check_slots(leaves: dict[str, Any], group: Units) -> None:
    sizes = {}
    for path, axis in group.incoming + group.outgoing:
        if path not in leaves:
            raise ValueError(f"units names {path!r}; params has {', '.join(leaves)}.")
        shape = leaves[path].shape
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"units names axis {axis} of {path!r}, whose shape is {shape}.")
        sizes[f"{path}, axis {axis}"] = shape[axis]
    if not group.incoming or len(set(sizes.values())) > 1:
        raise ValueError(f"One set of units needs slots of one size, and has {sizes}.")


def sum_others(x: jax.Array, axis: int) -> jax.Array:
    """The sum over all axes but one."""
    return jnp.sum(x, axis=tuple(i for i in range(x.ndim) if i != axis % x.ndim))


def along(values: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """`values` as an array that broadcasts along one axis of `like`."""
    shape = [1] * like.ndim
    shape[axis] = len(values)
    return values.reshape(shape).astype(like.dtype)
