"""SGD on the sphere at a fixed effective learning rate (Kodryan et al., arXiv:2209.03695)."""

from typing import Any

import jax
import optax

from flatopt._core import checks, registry
from flatopt._core.timing import value_at
from flatopt._sphere.groups import Groups
from flatopt._sphere.project_to_sphere import ProjectToSphereState, project_to_sphere, radii_at


def descend(radius: jax.Array, g: jax.Array, rate: Any) -> jax.Array:
    r"""The step at the effective learning rate :math:`\eta`, :math:`-\eta \, r^2 g`."""
    # Not r * r, which may overflow: the gradient of a scale-invariant loss goes as 1 / r.
    return (-rate * radius * (radius * g)).astype(g.dtype)


@registry.method("optimizer")
def fixed_elr(
    learning_rate: optax.ScalarOrSchedule,
    groups: Any = "all",
    *,
    radius: optax.ScalarOrSchedule | None = None,
    tangent: bool = False,
    filter_axis: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD on the sphere at a fixed effective learning rate.

    .. math:: w \leftarrow r \, \frac{w - \eta \, r^2 g}{\|w - \eta \, r^2 g\|}

    Args:
      learning_rate: :math:`\eta` >= 0, the learning rate that the step would have at norm 1: a
        number, a traced array, or a schedule.
      groups, radius, tangent, filter_axis: see `project_to_sphere`; leaves labelled None stand
        still, as a last layer that is not trained.

    Returns:
      An optimiser, last in its chain; needs `params`. For other leaves use `optax.partition`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.fixed_elr(0.1), jnp.array([3.0, 4.0])
      >>> print(w + tx.update(jnp.array([1.2, -0.4]), tx.init(w), w)[0])  # From (0, 5).
      [0. 5.]

    References:
      Kodryan et al. Training Scale-Invariant Neural Networks on the Sphere Can Happen in Three
      Regimes. arXiv:2209.03695

    Cost: 0 extra gradients; 0 copies (+1 temporary).
    """
    checks.check_number("learning_rate", learning_rate, low=0.0)
    division = Groups(groups, filter_axis)
    sphere = project_to_sphere(groups, radius=radius, tangent=tangent, filter_axis=filter_axis)

    def update_fn(
        updates: optax.Updates,
        state: ProjectToSphereState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectToSphereState]:
        del extra_args
        checks.require_params("fixed_elr", params)
        rate = value_at(learning_rate, state.step)
        own = (radii_at(state.step, radius, state.radii),)
        still = optax.tree.zeros_like(updates)
        steps = division.map(lambda r, g, _: descend(r, g, rate), params, own, updates, still)
        return sphere.update(steps, state, params)

    return optax.GradientTransformationExtraArgs(sphere.init, update_fn)
