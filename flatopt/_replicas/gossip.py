"""Gossip (Lian et al., arXiv:1705.09056): replicas that average with their neighbours only."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import checks, registry, tree_math
from flatopt._replicas.replicas import (
    AxisName,
    for_each,
    mean_over,
    own_axis,
)

TOPOLOGIES = ("ring", "exponential", "torus", "full")


class GossipState(NamedTuple):
    """State of `gossip`; with a leading replica axis each entry has it too.

    Attributes:
      inner_state: state of the wrapped optimiser.
    """

    inner_state: optax.OptState


def neighbours(topology: str, number: int) -> list[np.ndarray]:
    r"""The permutations :math:`P_1, \dots, P_m`: whose weights each replica receives.

    The first is its own. Small graphs have fewer neighbours than directions: each counts once.
    """
    checks.check_choice("topology", topology, TOPOLOGIES)
    checks.check_count("number", number, 1, none_allowed=False)
    index = np.arange(number)
    if topology == "torus":
        rows = max(r for r in range(1, math.isqrt(number) + 1) if number % r == 0)
        grid = index.reshape(rows, number // rows)
        moved = [np.roll(grid, by, axis).ravel() for axis in (0, 1) for by in (1, -1)]
        receive = [index, *moved]
    else:
        offsets = {
            "ring": [0, 1, -1],
            "exponential": [0, *(2**k for k in range(max(number - 1, 0).bit_length()))],
            "full": list(range(number)),
        }[topology]
        receive = [(index + offset) % number for offset in offsets]
    return [np.array(p) for p in dict.fromkeys(tuple(p.tolist()) for p in receive)]


def mixing_matrix(topology: str, number: int) -> np.ndarray:
    r"""The doubly stochastic matrix with which a topology mixes n replicas.

    .. math:: W = \frac1m \sum_{k=1}^m P_k, \qquad P_k \text{ a permutation}

    Args:
      topology: "ring" (the two neighbours), "exponential" (those 1, 2, 4, ... places ahead),
        "torus" (four, on the most nearly square grid of n), or "full" (all); each mixes with equal
        weights, its own included. Static.
      number: n >= 1. Static.

    Returns:
      A float64 array, n x n; rows and columns sum to 1.

    Examples:
      >>> import flatopt
      >>> print(flatopt.mixing_matrix("ring", 4)[0].round(2))
      [0.33 0.33 0. 0.33]

    References:
      Ying et al. Exponential Graph is Provably Efficient for Decentralized Deep Training.
      arXiv:2110.13363

    Cost: 0 extra gradients; 0 copies.
    """
    permutations = neighbours(topology, number)
    return sum(np.eye(number)[p] for p in permutations) / len(permutations)


def mix_all(params: optax.Params, mixing: Any) -> optax.Params:
    r"""The weights mixed, :math:`\tilde w_a = \sum_b W_{ab} w_b`, of all replicas at once."""

    def leaf(x: jax.Array) -> jax.Array:
        if len(x) == 1 or not tree_math.is_inexact(x):
            return x
        matrix = mixing_matrix(mixing, len(x)) if isinstance(mixing, str) else mixing
        _check_size(matrix, len(x))
        wide, sharding = x.astype(tree_math.accumulator_dtype(x.dtype)), jax.typeof(x).sharding
        # Where the axes of the mesh are explicit, a product must be told where it shall lie.
        explicit = any(axis is not None for axis in sharding.spec)
        product = jnp.einsum(
            "ab,b...->a...",
            matrix,
            wide,
            precision="highest",
            out_sharding=sharding if explicit else None,
        )
        return product.astype(x.dtype)

    return jax.tree.map(leaf, params)


def mix_one(params: optax.Params, mixing: Any, axis_name: AxisName) -> optax.Params:
    r"""The weights mixed, :math:`\tilde w_a = \sum_b W_{ab} w_b`, of the replica a on a named axis.

    Neighbour by neighbour, or, for a matrix, from everyone's weights.
    """
    number = jax.lax.axis_size(axis_name)

    def leaf(x: jax.Array) -> jax.Array:
        if number == 1 or not tree_math.is_inexact(x):
            return x
        own = x.astype(tree_math.accumulator_dtype(x.dtype))
        if not isinstance(mixing, str):
            _check_size(mixing, number)
            row = jnp.asarray(mixing, own.dtype)[jax.lax.axis_index(axis_name)]
            everyone = jax.lax.all_gather(own, axis_name)
            return jnp.einsum("b,b...->...", row, everyone, precision="highest").astype(x.dtype)
        if mixing == "full":
            return mean_over(own, axis_name).astype(x.dtype)
        received = [
            jax.lax.ppermute(own, axis_name, [(int(b), a) for a, b in enumerate(permutation)])
            for permutation in neighbours(mixing, number)[1:]
        ]
        return (sum(received, start=own) / (len(received) + 1)).astype(x.dtype)

    return jax.tree.map(leaf, params)


def move_from_mixed(
    moves: optax.Updates, mixed: optax.Params, params: optax.Params
) -> optax.Updates:
    r"""The update that leads to :math:`\tilde w_a + u`, which is :math:`u + (\tilde w_a - w_a)`."""
    wide = tree_math.widened(moves, params)
    return tree_math.on_inexact(lambda u, new, old: u + (new - old), wide, mixed, params)


@registry.method("wrapper")
def gossip(
    optimizer: optax.GradientTransformation,
    mixing: str | np.ndarray | jax.Array,
    *,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Decentralised parallel SGD: mix with the neighbours, then step with one's own gradient.

    .. math:: w_a \leftarrow \tilde w_a + u(\nabla L_a(w_a), \tilde w_a), \qquad
       \tilde w_a = \sum_b W_{ab} w_b

    Args:
      optimizer: any optax transformation, run for each replica; its `params` are the mixed weights.
      mixing: "ring", "exponential", "torus" or "full", see `mixing_matrix`; or a doubly stochastic
        n x n matrix. Static, but a matrix may be traced.
      axis_name: as for `couple_replicas`. Static.

    Returns:
      A wrapper to be outermost; `update` needs `params`. Evaluate at `barycentre(params)`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.gossip(optax.sgd(0.1), "ring"), jnp.array([[3.0], [0.0], [0.0], [0.0]])
      >>> updates, _ = tx.update(jnp.zeros([4, 1]), tx.init(w), w)
      >>> print(optax.apply_updates(w, updates).ravel())
      [1. 1. 0. 1.]

    References:
      Lian et al., arXiv:1705.09056; Zhu et al., arXiv:2306.02913

    Cost: 0 extra gradients; 0 copies; 1 exchange with each neighbour.
    """
    if isinstance(mixing, str):
        checks.check_choice("mixing", mixing, TOPOLOGIES)
    elif not isinstance(mixing, jax.core.Tracer):
        mixing = mixing if isinstance(mixing, jax.Array) else np.asarray(mixing)
        _check_matrix(np.asarray(mixing))
    optimizer, axes = checks.as_transformation("optimizer", optimizer), own_axis(axis_name)

    def init_one(params: optax.Params) -> GossipState:
        return GossipState(optimizer.init(params))

    def update_one(
        updates: optax.Updates,
        state: GossipState,
        params: optax.Params,
        mixed: optax.Params,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GossipState]:
        moves, inner_state = optimizer.update(updates, state.inner_state, mixed, **extra_args)
        if jax.lax.axis_size(axes) > 1:
            moves = move_from_mixed(moves, mixed, params)
        return moves, GossipState(inner_state)

    def update_fn(
        updates: optax.Updates,
        state: GossipState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GossipState]:
        checks.require_params("gossip", params)
        leading = axis_name is None
        mixed = mix_all(params, mixing) if leading else mix_one(params, mixing, axes)
        return for_each(update_one, axis_name)(updates, state, params, mixed, **extra_args)

    return optax.GradientTransformationExtraArgs(for_each(init_one, axis_name), update_fn)


def _check_matrix(matrix: np.ndarray) -> None:
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    if not square or (matrix < 0).any():
        raise ValueError(f"mixing, {matrix.shape}, must be a square matrix without negatives.")
    sums = np.concatenate([matrix.sum(0), matrix.sum(1)])
    if not np.allclose(sums, 1, atol=1e-5):  # Room for float32.
        raise ValueError("mixing must be doubly stochastic: each row and column must sum to 1.")


def _check_size(matrix: Any, number: int) -> None:
    if matrix.shape != (number, number):
        raise ValueError(f"mixing is {matrix.shape}, but there are {number} replicas.")
