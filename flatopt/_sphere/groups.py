"""Which weights share a norm, and the norm of each group."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from flatopt._core import checks, tree_math

KINDS = ("all", "leaf", "unit")
Values = tuple[jax.Array, ...]  # One array a group: a scalar, or with "unit" one entry a unit.


@dataclasses.dataclass(frozen=True)
class Groups:
    """A division of the leaves into groups.

    Attributes:
      groups: "all", "leaf", "unit", a tree of labels or a prefix of one, or a function to one.
      filter_axis: with "unit", the axis that numbers the units; None is the last.
    """

    groups: Any
    filter_axis: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.groups, str):
            checks.check_choice("groups", self.groups, KINDS)

    def labels(self, params: Any) -> list[Hashable]:
        """The label of each leaf; None for a leaf in no group, as one that holds no numbers."""
        leaves = jax.tree.leaves(params)
        labels = self._given(params, len(leaves))
        pairs = zip(labels, leaves, strict=True)
        return [label if tree_math.is_inexact(x) else None for label, x in pairs]

    def norms(self, tree: Any, params: Any) -> Values:
        """The norm of each group of `tree`, a tree like `params`; float32 at least."""
        return self._reduce(tree_math.norm, _unit_norms, params, tree)

    def products(self, tree: Any, other: Any, params: Any) -> Values:
        """The scalar products of the groups of two trees."""
        return self._reduce(tree_math.vdot, _unit_products, params, tree, other)

    def map(
        self, function: Callable[..., Any], params: Any, values: tuple[Values, ...], *trees: Any
    ) -> Any:
        """`function(*values, *leaves)` on each leaf of a group, with its group's entry of `values`.

        A leaf in no group is that of the last tree.
        """
        labels = self.labels(params)
        order = {label: i for i, label in enumerate(_in_order(labels))}

        def leaf(label: Hashable, *own: Any) -> Any:
            if label is None:
                return own[-1]
            return function(*(v[order[label]] for v in values), *map(jnp.asarray, own))

        leaves = map(leaf, labels, *(_leaves(tree, params) for tree in trees))
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def _given(self, params: Any, number: int) -> list[Hashable]:
        """The labels as they were given, one a leaf."""
        if isinstance(self.groups, str):
            return [0] * number if self.groups == "all" else list(range(number))
        labels = self.groups(params) if callable(self.groups) else self.groups
        spread: list[Hashable] = []

        def add(label: Hashable, part: Any) -> None:
            spread.extend([label] * len(jax.tree.leaves(part)))

        try:
            jax.tree.map(add, labels, params, is_leaf=lambda x: x is None)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"groups={labels!r} must be one of {', '.join(KINDS)}, or a tree of labels with "
                "the structure of the parameters or a prefix of it; None is in no group."
            ) from error
        return spread

    def _reduce(self, whole: Any, unit: Any, params: Any, *trees: Any) -> Values:
        """`whole` of the leaves of each group, or `unit` of the units of each leaf."""
        labels = self.labels(params)
        leaves = [list(zip(labels, _leaves(tree, params), strict=True)) for tree in trees]
        reduced = []
        for label in _in_order(labels):
            own = [[jnp.asarray(x) for of, x in part if of == label] for part in leaves]
            if self.groups == "unit" and own[0][0].ndim > 1:
                reduced.append(unit(*(part[0] for part in own), self._axes(own[0][0])))
            else:
                reduced.append(whole(*own))
        return tuple(reduced)

    def _axes(self, x: jax.Array) -> tuple[int, ...]:
        """The axes inside a unit."""
        own = (-1 if self.filter_axis is None else self.filter_axis) % x.ndim
        return tuple(axis for axis in range(x.ndim) if axis != own)


def _leaves(tree: Any, params: Any) -> list[Any]:
    """What `tree` has for each leaf of `params`; None where it lacks one, as for a random key."""
    structure: Any = jax.tree.structure(params)
    return structure.flatten_up_to(tree)


def _in_order(labels: list[Hashable]) -> list[Hashable]:
    """The groups, in the order in which they appear."""
    return [label for label in dict.fromkeys(labels) if label is not None]


def _unit_products(x: jax.Array, y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    x, y = (z.astype(tree_math.accumulator_dtype(z.dtype)) for z in (x, y))
    return jnp.sum((x.conj() * y).real, axis=axes, keepdims=True)


def _unit_norms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Divided by the largest entry first, whose square may leave the range."""
    wide = x.astype(tree_math.accumulator_dtype(x.dtype))
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True, initial=0.0)
    squares = tree_math.square(wide / jnp.where(largest > 0, largest, 1))
    return largest * jnp.sqrt(jnp.sum(squares, axis=axes, keepdims=True))
