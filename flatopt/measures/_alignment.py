"""Permutations of hidden units that bring two networks together (arXiv:2209.04836)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import checks
from flatopt.measures import _variables
from flatopt.measures._symmetry import Units, along, by_path, check_units


class Alignment(NamedTuple):
    """Result of `align_units`.

    Attributes:
      params: the second network with its units permuted.
      permutations: for each set of units, an int array: entry i is the number of the second
        network's unit that now stands in place i.
      sweeps: number of rounds until nothing changed any more.
      signs: for each set of units, an array: entry i is the sign that the unit in place i got.
    """

    params: optax.Params
    permutations: tuple[np.ndarray, ...]
    sweeps: int
    signs: tuple[np.ndarray, ...]


class _Move(NamedTuple):
    """Where units go: place i takes unit `order[i]`, times `signs[i]`."""

    order: np.ndarray
    signs: np.ndarray

    def then(self, move: "_Move") -> "_Move":
        return _Move(self.order[move.order], self.signs[move.order] * move.signs)


def align_units(
    params: optax.Params,
    other_params: optax.Params,
    units: Sequence[Units],
    *,
    signs: bool = False,
    max_sweeps: int = 100,
) -> Alignment:
    r"""Permutes the hidden units of a second network to match those of the first.

    .. math:: \min_\pi \|w - \pi(w')\|

    Args:
      params, other_params: the first network and the second, of the same shapes.
      units: the hidden units: `chain_units(params)`.
      signs: whether units may change their sign too: for odd activations (tanh, erf, sign).
      max_sweeps: most rounds over the sets of units, >= 1.

    Returns:
      `Alignment`: the second network permuted, which computes what it did, and the permutations.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> first = {"a": {"kernel": jnp.array([[1.0, 5.0]])}, "b": {"kernel": jnp.eye(2)}}
      >>> second = {"a": {"kernel": jnp.array([[5.1, 0.9]])}, "b": {"kernel": jnp.eye(2)[::-1]}}
      >>> print(measures.align_units(first, second, measures.chain_units(first)).permutations[0])
      [1 0]

    References:
      Ainsworth, Hayase, Srinivasa. Git Re-Basin. arXiv:2209.04836

    Cost: no pass over data; not under `jax.jit`.
    """
    checks.check_count("max_sweeps", max_sweeps, 1)
    _variables.check_alike("other_params", other_params, params)
    first, second = by_path(params), by_path(other_params)
    checked = check_units(first, units)
    if any(isinstance(x, jax.core.Tracer) for x in [*first.values(), *second.values()]):
        raise ValueError("align_units cannot run under jax.jit: the assignment is SciPy's.")
    ours = {path: np.asarray(x, np.float64) for path, x in first.items()}
    theirs = {path: np.asarray(x, np.float64) for path, x in second.items()}
    if not all(np.isfinite(x).all() for x in [*ours.values(), *theirs.values()]):
        raise ValueError("A weight is NaN or infinite: such networks cannot be aligned.")
    moves = [_stay(ours, group) for group in checked]
    sweeps = 0
    changed = True
    while changed and sweeps < max_sweeps:
        changed = False
        for number, group in enumerate(checked):
            best = _match(ours, theirs, group, signs)
            if best is not None:
                changed = True
                moves[number] = moves[number].then(best)
                theirs |= _moved(theirs, group, best)
        sweeps += 1
    aligned = dict(second)
    for group, move in zip(checked, moves, strict=True):
        aligned |= _moved(aligned, group, move)
    tree = jax.tree.unflatten(jax.tree.structure(other_params), list(aligned.values()))
    orders, flips = (tuple(part) for part in zip(*moves, strict=True)) if moves else ((), ())
    return Alignment(tree, orders, sweeps, flips)


def _stay(leaves: dict[str, Any], group: Units) -> _Move:
    path, axis = group.incoming[0]
    number = leaves[path].shape[axis]
    return _Move(np.arange(number), np.ones(number))


def _match(ours: dict[str, Any], theirs: dict[str, Any], group: Units, signs: bool) -> _Move | None:
    """The move of their units that makes them most like ours; None if nothing is gained."""
    from scipy.optimize import linear_sum_assignment  # Here, since it is slow to import.

    slots = dict.fromkeys(group.incoming + group.outgoing)  # Tied weights have one slot for both.
    likeness = sum(_rows(ours[p], axis) @ _rows(theirs[p], axis).T for p, axis in slots)
    rows, order = linear_sum_assignment(np.abs(likeness) if signs else likeness, maximize=True)
    flips = np.where((likeness[rows, order] < 0) & signs, -1.0, 1.0)
    best = _Move(order, flips)
    # Of all axes at once: where one array has two of them, the assignment looks at each alone.
    moved = _moved(theirs, group, best)
    gain = sum(np.sum(ours[path] * (x - theirs[path])) for path, x in moved.items())
    return best if gain > 1e-12 * np.abs(likeness).sum() else None


def _moved(leaves: dict[str, Any], group: Units, move: _Move) -> dict[str, Any]:
    """The leaves of one set of units, each slot moved once."""
    moved: dict[str, Any] = {}
    for path, axis in dict.fromkeys(group.incoming + group.outgoing):
        x = moved.get(path, leaves[path])
        numpy: Any = np if isinstance(x, np.ndarray) else jnp
        moved[path] = numpy.take(x, move.order, axis) * along(numpy.asarray(move.signs), x, axis)
    return moved


def _rows(x: np.ndarray, axis: int) -> np.ndarray:
    """A matrix with the units as rows."""
    return np.moveaxis(x, axis, 0).reshape((x.shape[axis], -1))
