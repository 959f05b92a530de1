"""Control points: where a curve begins, and the networks on it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks
from flatopt.curves._bases import Basis, bezier, polychain


def control_points(solutions: Sequence[optax.Params], num_bends: int = 3) -> optax.Params:
    """Control points on the straight lines from one solution to the next.

    Args:
      solutions: two or more trees of one shape. More than two are spread evenly over the control
        points, so `num_bends - 1` must be a multiple of their number minus 1.
      num_bends: number of control points, ends included, >= 2. Static.

    Returns:
      A tree like a solution with the control points on a leading axis: the parameters to train,
      with `keep_fixed(optimizer, fixed_points(len(solutions), num_bends))`.

    Raises:
      ValueError: if there are fewer than two solutions, they differ in shape, or `num_bends` does
        not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import curves
      >>> print(curves.control_points([jnp.array(0.0), jnp.array(4.0)], num_bends=5))
      [0. 1. 2. 3. 4.]

    Cost: 0 losses; `num_bends` copies of a solution.
    """
    fixed_points(len(solutions), num_bends)
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(s)] for s in solutions]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"The solutions differ in shape: {shapes}.")
    share = jnp.linspace(0.0, 1.0, num_bends)
    weights = jax.vmap(lambda t: polychain(t, len(solutions)))(share)

    def leaf(*leaves: jax.Array) -> jax.Array:
        stack = jnp.stack(leaves)
        return jnp.tensordot(weights.astype(stack.dtype), stack, axes=1, precision="highest")

    return jax.tree.map(leaf, *solutions)


def fixed_points(num_solutions: int = 2, num_bends: int = 3) -> tuple[int, ...]:
    """The control points that are solutions: the two ends, and others in between if there are more.

    Args:
      num_solutions: number of solutions, >= 2; with more than two use `polychain`. Static.
      num_bends: number of control points. Static.

    Returns:
      Their numbers.

    Raises:
      ValueError: if `num_bends - 1` is no multiple of `num_solutions - 1`.

    Examples:
      >>> from flatopt import curves
      >>> print(curves.fixed_points(3, 5))
      (0, 2, 4)

    Cost: 0 losses.
    """
    checks.check_count("num_solutions", num_solutions, 2)
    checks.check_count("num_bends", num_bends, num_solutions)
    every, rest = divmod(num_bends - 1, num_solutions - 1)
    if rest:
        raise ValueError(
            f"num_bends={num_bends} does not fit {num_solutions} solutions: num_bends - 1 must be "
            f"a multiple of {num_solutions - 1}."
        )
    return tuple(range(0, num_bends, every))


def point(
    controls: optax.Params, position: jax.typing.ArrayLike, basis: Basis = bezier
) -> optax.Params:
    r"""The point of a curve at a position.

    .. math:: w(t) = \sum_j c_j(t) \, w_j

    Args:
      controls: tree with the control points on a leading axis.
      position: t in [0, 1].
      basis: `bezier`, `polychain` or another function of position and number. Static.

    Returns:
      A tree like one control point. Works under `jax.jit`, `jax.vmap` and `jax.grad`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import curves
      >>> print(curves.point(jnp.array([0.0, 2.0, 1.0]), 0.5))
      1.25

    References:
      Garipov, Izmailov, Podoprikhin, Vetrov, Wilson. Loss Surfaces, Mode Connectivity, and Fast
      Ensembling of DNNs. arXiv:1802.10026

    Cost: 0 losses.
    """
    number = len(jax.tree.leaves(controls)[0])
    coefficients = basis(position, number)

    def leaf(x: jax.Array) -> jax.Array:
        weights = coefficients.astype(x.dtype).reshape((-1, *[1] * (x.ndim - 1)))
        return jnp.sum(weights * x, axis=0)

    return jax.tree.map(leaf, controls)
