"""How many weights of each leaf are alive, and which ones at first."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, quantile, rng


def number_alive(sparsity: float, size: int) -> int:
    """Weights that live in a leaf of `size`; one at least, for `sparsity` is less than 1."""
    return size - math.floor(sparsity * size)


def check_sparsity(sparsity: Any) -> None:
    """Raises unless it is a number in [0, 1)."""
    checks.check_number(
        "sparsity", sparsity, low=0.0, high=1.0, high_allowed=False, schedule_allowed=False
    )


def uniform_sparsities(params: optax.Params, sparsity: float, *, mask: Any = None) -> Any:
    """The same sparsity for each chosen leaf, None for the others; see `erk_sparsities`."""
    check_sparsity(sparsity)
    return jax.tree.map(lambda chosen: sparsity if chosen else None, _spread(mask, params))


def _spread(mask: Any, params: optax.Params) -> Any:
    """The mask as one bool a leaf; None chooses kernels, not biases, scales and counters."""

    def is_kernel(x: Any) -> bool:
        return jnp.ndim(x) > 1 and jnp.issubdtype(jnp.result_type(x), jnp.inexact)

    if mask is None:
        return jax.tree.map(is_kernel, params)
    tree = mask(params) if callable(mask) else mask
    return jax.tree.map(lambda m, part: jax.tree.map(lambda _: bool(m), part), tree, params)


def erk_sparsities(
    params: optax.Params,
    sparsity: float,
    *,
    mask: Any | Callable[[optax.Params], Any] = None,
    custom: Any = None,
    power: float = 1.0,
) -> Any:
    r"""Erdos-Renyi-Kernel sparsities: small leaves keep a larger share of their weights.

    .. math:: 1 - s_l = \min\big(1, \; \epsilon \, (\textstyle\sum_i d_i / \prod_i d_i)^p\big)

    Args:
      params: the parameters, or their shapes; leaf l has the dimensions d.
      sparsity: share of all their weights that is off, in [0, 1); it sets epsilon.
      mask: bools, a tree like the parameters or a prefix of it, or a function from them to one:
        which leaves are sparse; None: those of rank 2 and more.
      custom: tree like the parameters: sparsities of leaves that do not count, None for others.
      power: p, >= 0; 0 is a uniform distribution, 1 the paper's.

    Returns:
      A tree like `params` of numbers in [0, 1), None for leaves that stay dense.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> params = {"hidden": jnp.zeros((64, 256)), "out": jnp.zeros((256, 10))}
      >>> print({k: round(s, 3) for k, s in flatopt.erk_sparsities(params, 0.9).items()})
      {'hidden': 0.937, 'out': 0.664}

    References:
      Evci et al. Rigging the Lottery: Making All Tickets Winners. arXiv:1911.11134

    Cost: 0 extra gradients; 0 copies.
    """
    check_sparsity(sparsity)
    checks.check_number("power", power, low=0.0, schedule_allowed=False)
    leaves, structure = jax.tree.flatten(params)
    chosen = jax.tree.leaves(_spread(mask, params))
    given = [None] * len(leaves) if custom is None else structure.flatten_up_to(custom)  # type: ignore[attr-defined]
    open_leaves = [i for i, value in enumerate(given) if chosen[i] and value is None]
    shares = solve_erk([jnp.shape(leaves[i]) for i in open_leaves], sparsity, power)
    for i, share in zip(open_leaves, shares, strict=True):
        given[i] = 1.0 - share
    return jax.tree.unflatten(structure, given)


def solve_erk(shapes: list[tuple[int, ...]], sparsity: float, power: float) -> list[float]:
    """The share of living weights of each shape, with those that would exceed 1 cut to 1."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [(sum(s) / n) ** power if n else 1.0 for s, n in zip(shapes, sizes, strict=True)]
    budget = float(sum(number_alive(sparsity, size) for size in sizes))
    left = {i for i, size in enumerate(sizes) if size}
    epsilon = 0.0
    while total := sum(raw[i] * sizes[i] for i in sorted(left)):
        epsilon = budget / total
        most = max(raw[i] for i in left)
        if epsilon * most <= 1:
            break
        full = {i for i in left if raw[i] == most}
        left -= full
        budget -= sum(sizes[i] for i in full)
    return [epsilon * r if i in left else 1.0 for i, r in enumerate(raw)]


def sparsities_by(sparsity: Any, distribution: Any, mask: Any) -> Callable[[optax.Params], Any]:
    """The function from parameters to the sparsity of each leaf, None where dense."""
    if isinstance(distribution, str) or distribution is None:
        checks.check_choice("distribution", distribution, ("erk", "uniform"))
        check_sparsity(sparsity)
        make = erk_sparsities if distribution == "erk" else uniform_sparsities
        return lambda params: make(params, sparsity, mask=mask)
    for value in jax.tree.leaves(distribution):
        check_sparsity(value)
    return lambda _: distribution


def draw_mask(key: jax.Array, params: optax.Params, sparsities: Any) -> Any:
    """A random mask, with as many weights alive in each leaf as its sparsity asks for."""
    sparse = _map_sparse(lambda _, p: p, sparsities, params)
    draws = rng.uniform_like(key, sparse)

    def leaf(sparsity: float, draw: jax.Array) -> jax.Array:
        return quantile.largest_in_tree(draw, number_alive(sparsity, draw.size))

    return _map_sparse(leaf, sparsities, draws)


def mask_density(mask: Any) -> jax.Array:
    """The share of weights that a mask, or a tree of masks, keeps alive.

    Args:
      mask: tree of bools, such as `opt_state.mask` or a leaf of it; dense leaves have no mask and
        do not count.

    Returns:
      A float32 scalar in [0, 1]; 1 for a tree without masks.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx = flatopt.sparse_training(optax.sgd(0.1), 0.9)
      >>> opt_state = tx.init({"kernel": jnp.ones((20, 30)), "bias": jnp.ones(30)})
      >>> print(round(float(flatopt.mask_density(opt_state.mask)), 6))
      0.1

    Cost: 0 extra gradients; 0 copies.
    """
    leaves = jax.tree.leaves(mask)
    size = sum(x.size for x in leaves)
    alive = jnp.asarray(sum(jnp.count_nonzero(x) for x in leaves), jnp.float32)
    return alive / size if size else jnp.ones([])


def _map_sparse(function: Callable[..., Any], sparsities: Any, tree: Any) -> Any:
    """`function(sparsity, leaf)` where there is a sparsity; else `optax.MaskedNode`."""

    def leaf(sparsity: float | None, x: Any) -> Any:
        return optax.MaskedNode() if sparsity is None else function(sparsity, x)

    return jax.tree.map(leaf, sparsities, tree, is_leaf=lambda s: s is None)
