"""Training on the sphere: each step is followed by a return to the norm that the weights had."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, tree_math
from flatopt._core.timing import value_at
from flatopt._sphere.groups import Groups, Values


class ProjectToSphereState(NamedTuple):
    """State of `project_to_sphere` and `fixed_elr`.

    Attributes:
      step: int32 scalar, number of updates so far.
      radii: one array a group, in the order of their first leaves: a scalar, or with
        `groups="unit"` one entry a unit.
    """

    step: jax.Array
    radii: Values


def land(radius: jax.Array, norm: jax.Array, w: jax.Array, u: jax.Array) -> jax.Array:
    r"""The update that takes w to :math:`r \, (w + u) / \|w + u\|`; zero where that is nowhere."""
    wide = w.astype(tree_math.accumulator_dtype(w.dtype))
    target = radius / jnp.where(norm == 0, 1, norm) * (wide + u)
    # Without a direction there is nowhere to go; a norm that is NaN does not hide here.
    target = jnp.where((norm == 0) | (radius == 0), wide, target)
    # Where the gradient is narrower than the weights, its dtype would miss the sphere.
    return (target - wide).astype(jnp.promote_types(u.dtype, w.dtype))


def direction(norm: jax.Array, w: jax.Array) -> jax.Array:
    r""":math:`e = w / \|w\|`; zero where w is zero."""
    return tree_math.ratio_or_zero(w.astype(tree_math.accumulator_dtype(w.dtype)), norm)


def to_tangent(along: jax.Array, e: jax.Array, u: jax.Array) -> jax.Array:
    r"""The part of u along the sphere, :math:`u - (e \cdot u) \, e`."""
    return (u - along * e).astype(u.dtype)


@registry.method("average")
def project_to_sphere(
    groups: Any = "all",
    *,
    radius: optax.ScalarOrSchedule | None = None,
    tangent: bool = False,
    filter_axis: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets every step land on the sphere: the norm of each group of weights stays what it is.

    .. math:: w \leftarrow r \, (w + u) / \|w + u\|

    Args:
      groups: what shares a norm: "all", each "leaf", each "unit" (filter), or a tree of labels, or
        a function to one; leaves labelled None move freely. Static.
      radius: r > 0: a number, a traced array, or a schedule; None: each group's norm at the start.
      tangent: whether u first loses its part along w. Static.
      filter_axis: the axis that numbers the units; None: the last, 0 for PyTorch's. Static.

    Returns:
      A stage to be chained last; needs `params`. A group that begins at zero stays there.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = optax.chain(optax.sgd(1.0), flatopt.project_to_sphere()), jnp.array([3.0, 4.0])
      >>> print(w + tx.update(jnp.array([3.0, -8.0]), tx.init(w), w)[0])
      [0. 5.]

    References:
      Kodryan et al. Training Scale-Invariant Neural Networks on the Sphere Can Happen in Three
      Regimes. arXiv:2209.03695

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    division = Groups(groups, filter_axis)
    if radius is not None:
        checks.check_number("radius", radius, low=0.0, low_allowed=False)

    def init_fn(params: optax.Params) -> ProjectToSphereState:
        step = jnp.zeros([], jnp.int32)
        return ProjectToSphereState(step, radii_at(step, radius, division.norms(params, params)))

    def update_fn(
        updates: optax.Updates,
        state: ProjectToSphereState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectToSphereState]:
        del extra_args
        checks.require_params("project_to_sphere", params)
        if tangent:
            norms = (division.norms(params, params),)
            unit = division.map(direction, params, norms, params)
            along = (division.products(unit, updates, params),)
            updates = division.map(to_tangent, params, along, unit, updates)
        kept = radii_at(state.step, radius, state.radii)
        reached = jax.tree.map(_add, params, updates)
        both = kept, division.norms(reached, params)
        updates = division.map(land, params, both, params, updates)
        return updates, ProjectToSphereState(optax.safe_increment(state.step), kept)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def radii_at(step: jax.Array, radius: optax.ScalarOrSchedule | None, before: Values) -> Values:
    """The radii of a step: those from `before`, or `radius`."""
    if radius is None:
        return before
    return tuple(jnp.full_like(r, value_at(radius, step)) for r in before)


def _add(w: jax.Array, u: jax.Array) -> jax.Array:
    """The sum in float32 at least; of what no number can be added to, nothing."""
    if not tree_math.is_inexact(w):
        return w
    return jnp.asarray(w, tree_math.accumulator_dtype(jnp.result_type(w))) + u
