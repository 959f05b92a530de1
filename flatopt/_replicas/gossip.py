"""Gossip: replicas that average with their neighbours instead of with everyone."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import checks, tree_math
from flatopt._replicas.replicas import LEADING_AXIS, AxisName, over_leading_axis

TOPOLOGIES = ("ring", "exponential", "torus", "full")


class GossipState(NamedTuple):
    """State of `gossip`; with a leading replica axis each entry has it too.

    Attributes:
      inner_state: state of the wrapped optimiser.
    """

    inner_state: optax.OptState


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
      optimizer: any optax transformation, run for each replica; it is shown the mixed weights as
        `params`, so that weight decay acts on them.
      mixing: "ring", "exponential", "torus" or "full", see `mixing_matrix`; or a doubly stochastic
        n x n matrix. Static, but a matrix may be traced.
      axis_name: None when updates and parameters have a leading replica axis; inside `jax.vmap` or
        `jax.shard_map`, the name of the axis that counts the replicas. Static.

    Returns:
      A wrapper to be outermost; `update` needs `params`. Evaluate at `barycentre(params)`.

    Raises:
      ValueError: if `mixing` is no topology or not doubly stochastic, or `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = flatopt.gossip(optax.sgd(0.1), "ring")
      >>> params = jnp.array([[3.0], [0.0], [0.0], [0.0]])  # four replicas of one weight
      >>> updates, _ = tx.update(jnp.zeros([4, 1]), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates).ravel())
      [1. 1. 0. 1.]

    References:
      Lian et al. Can Decentralized Algorithms Outperform Centralized Algorithms? A Case Study for
      Decentralized Parallel Stochastic Gradient Descent. arXiv:1705.09056

      Zhu et al. Decentralized SGD and Average-direction SAM are Asymptotically Equivalent.
      arXiv:2306.02913

    Notes:
      With a leading axis, mixing is one product with W; on a named axis, a topology costs one
      `jax.lax.ppermute` a neighbour ("full": one mean), a matrix an `all_gather`. Gradients are
      taken at the weights before mixing, so that the two can overlap. SAM inside `optimizer`
      ascends from the mixed weights: chain it before `gossip` to ascend from the replica's own.
      BatchNorm statistics are not mixed. Gradient evaluations: none extra. State: that of
      `optimizer`, once a replica.
    """
    if isinstance(mixing, str):
        if mixing not in TOPOLOGIES:
            raise ValueError(f"mixing={mixing!r} must be one of {', '.join(TOPOLOGIES)}.")
    elif not isinstance(mixing, jax.core.Tracer):
        _check_matrix(np.asarray(mixing))
    optimizer = optax.with_extra_args_support(optimizer)

    def init_one(params: optax.Params) -> GossipState:
        return GossipState(optimizer.init(params))

    def update_one(
        updates: optax.Updates,
        state: GossipState,
        params: optax.Params,
        mixed: optax.Params,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, GossipState]:
        moves, inner_state = optimizer.update(updates, state.inner_state, mixed, **extra_args)
        if jax.lax.axis_size(LEADING_AXIS if axis_name is None else axis_name) > 1:
            moves = jax.tree.map(
                lambda u, new, old: (u + (new - old)).astype(u.dtype), moves, mixed, params
            )
        return moves, GossipState(inner_state)

    def init_fn(params: optax.Params) -> GossipState:
        return init_one(params) if axis_name is not None else over_leading_axis(init_one)(params)

    def update_fn(
        updates: optax.Updates,
        state: GossipState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GossipState]:
        checks.require_params("gossip", params)
        if axis_name is not None:
            mixed = _mix_by_name(mixing, params, axis_name)
            return update_one(updates, state, params, mixed, extra_args)
        mapped = over_leading_axis(lambda u, s, p, m: update_one(u, s, p, m, extra_args))
        return mapped(updates, state, params, _mix_leading(mixing, params))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mixing_matrix(topology: str, number: int) -> np.ndarray:
    r"""The doubly stochastic matrix with which a topology mixes n replicas.

    .. math:: W = \frac1m \sum_{k=1}^m P_k, \qquad P_k \text{ a permutation}

    Args:
      topology: "ring" (the two neighbours), "exponential" (those 1, 2, 4, ... places ahead),
        "torus" (four neighbours on the most nearly square grid of n), or "full" (all). Each mixes
        with equal weights, its own included. Static.
      number: n >= 1. Static.

    Returns:
      A float64 array, n x n; rows and columns sum to 1.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import flatopt
      >>> for row in flatopt.mixing_matrix("exponential", 4):
      ...     print(*(f"{entry:.2f}" for entry in row))
      0.33 0.33 0.33 0.00
      0.00 0.33 0.33 0.33
      0.33 0.00 0.33 0.33
      0.33 0.33 0.00 0.33

    References:
      Ying et al. Exponential Graph is Provably Efficient for Decentralized Deep Training.
      arXiv:2110.13363

    Notes:
      One minus the second largest absolute value of its eigenvalues, the spectral gap, says how
      fast replicas agree. On a ring it falls as 1 / n^2, on an exponential graph as 1 / log n.
    """
    shifts = _permutations(topology, number)
    return sum(np.eye(number)[shift] for shift in shifts) / len(shifts)


def _permutations(topology: str, number: int) -> list[np.ndarray]:
    """For each neighbour (oneself first), whose weights each replica receives."""
    if topology not in TOPOLOGIES:
        raise ValueError(f"topology={topology!r} must be one of {', '.join(TOPOLOGIES)}.")
    checks.check_count("number", number, 1)
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
    # Small graphs have fewer neighbours than directions: each counts once.
    return [np.array(p) for p in dict.fromkeys(tuple(p.tolist()) for p in receive)]


def _mix_leading(mixing: Any, params: optax.Params) -> optax.Params:
    """One matrix product for each leaf."""

    def leaf(x: jax.Array) -> jax.Array:
        if len(x) == 1:
            return x
        dtype = tree_math.accumulator_dtype(x.dtype)
        matrix = mixing_matrix(mixing, len(x)) if isinstance(mixing, str) else mixing
        if matrix.shape != (len(x), len(x)):
            raise ValueError(f"mixing is {matrix.shape}, but there are {len(x)} replicas.")
        product = jnp.einsum("ab,b...->a...", matrix, x.astype(dtype), precision="highest")
        return product.astype(x.dtype)

    return jax.tree.map(leaf, params)


def _mix_by_name(mixing: Any, params: optax.Params, axis_name: AxisName) -> optax.Params:
    """Neighbour by neighbour, or, for a matrix, everyone's weights at once."""
    number = jax.lax.axis_size(axis_name)

    def leaf(x: jax.Array) -> jax.Array:
        own = x.astype(tree_math.accumulator_dtype(x.dtype))
        if not isinstance(mixing, str):
            row = jnp.asarray(mixing, own.dtype)[jax.lax.axis_index(axis_name)]
            everyone = jax.lax.all_gather(own, axis_name)
            return jnp.einsum("b,b...->...", row, everyone, precision="highest").astype(x.dtype)
        if mixing == "full":
            return jax.lax.pmean(own, axis_name).astype(x.dtype)
        received = [
            jax.lax.ppermute(own, axis_name, [(int(b), a) for a, b in enumerate(permutation)])
            for permutation in _permutations(mixing, number)[1:]
        ]
        return (sum(received, start=own) / (len(received) + 1)).astype(x.dtype)

    return jax.tree.map(leaf, params)


def _check_matrix(matrix: np.ndarray) -> None:
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    if not square or (matrix < 0).any():
        raise ValueError(f"mixing, {matrix.shape}, must be a square matrix without negatives.")
    sums = np.concatenate([matrix.sum(0), matrix.sum(1)])
    if not np.allclose(sums, 1, atol=1e-5):  # Room for float32.
        raise ValueError("mixing must be doubly stochastic: each row and column must sum to 1.")
