"""Replicated SGD (Baldassi et al., arXiv:1605.06444) as a recipe, and how its coupling grows."""

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, rng
from flatopt._replicas.couple_replicas import couple_replicas
from flatopt._replicas.hold_replicas import hold_replicas

KINDS = ("exponential", "linear", "cosine")
_AXIS = "replicas"


@registry.method("wrapper", needs=("grad_fn",))
def replicated_sgd(
    optimizer: optax.GradientTransformation,
    number: int,
    strength: optax.ScalarOrSchedule,
    *,
    std: jax.typing.ArrayLike = 0.01,
    key: rng.KeyLike = 0,
    every: int | None = None,
    automatic: int | None = None,
    evaluation: str = "unrolled",
) -> optax.GradientTransformationExtraArgs:
    r"""Replicated SGD: several replicas that attract each other, evaluated at their barycentre.

    .. math:: w_a \leftarrow w_a + u\big(\nabla L_a(w_a) + \gamma \, (w_a - \bar w)\big)

    Args:
      optimizer, number, std, key, evaluation: as for `hold_replicas`; 3 to 7 replicas are usual.
      strength: :math:`\gamma` >= 0 of the pull; usually a schedule: `strength_schedule`.
      every, automatic: as for `couple_replicas`. Static.

    Returns:
      `hold_replicas(optax.chain(couple_replicas(...), optimizer), number, ...)`: a wrapper to be
      outermost. Evaluate at the barycentre: `flatopt.eval_params(opt_state, params)`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt
      >>> tx, w = flatopt.replicated_sgd(optax.sgd(0.1), 3, 0.5, std=0.0), jnp.array(0.0)
      >>> grad_fn = lambda w, i: w - jnp.array([2.0, 6.0])[i]  # a batch for each other replica
      >>> updates, opt_state = tx.update(w - 1.0, tx.init(w), w, grad_fn=grad_fn)
      >>> print(f"{updates:.2f} {flatopt.eval_params(opt_state, updates):.2f}")
      0.10 0.30

    References:
      Baldassi et al., arXiv:1605.06444; Pittorino et al., arXiv:2006.07897

    Cost: n - 1 extra gradients, n times those of `optimizer`; n - 1 copies, n of its state.
    """
    coupling = couple_replicas(strength, axis_name=_AXIS, every=every, automatic=automatic)
    return hold_replicas(
        optax.chain(coupling, checks.as_transformation("optimizer", optimizer)),
        number,
        axis_name=_AXIS,
        std=std,
        key=key,
        evaluation=evaluation,
    )


def strength_schedule(
    kind: str, init_value: float, end_value: float, steps: int, *, every: int | None = None
) -> optax.Schedule:
    r"""The growth of a coupling from `init_value` to `end_value` over a run.

    .. math:: \gamma_0 (\gamma_1 / \gamma_0)^s, \quad \gamma_0 + (\gamma_1 - \gamma_0) s, \quad
      \gamma_0 + (\gamma_1 - \gamma_0) \tfrac12 (1 - \cos \pi s), \qquad s = \min(t / n, 1)

    Args:
      kind: "exponential", "linear" or "cosine", in the order of the formulae. Static.
      init_value: :math:`\gamma_0` at step 0, >= 0, for the exponential one > 0.
      end_value: :math:`\gamma_1` >= `init_value`, reached after n steps and kept from there on.
      steps: n >= 1. Static.
      every: hold the value for so many steps (an epoch), >= 1; None means 1. Static.

    Returns:
      A schedule: a function of the step count.

    Examples:
      >>> import flatopt
      >>> schedule = flatopt.strength_schedule("exponential", 0.01, 1.0, steps=100)
      >>> print(f"{schedule(0):.3f} {schedule(50):.3f} {schedule(100):.3f} {schedule(999):.3f}")
      0.010 0.100 1.000 1.000

    References:
      Pittorino et al. Entropic gradient descent algorithms and wide flat minima. arXiv:2006.07897

    Cost: 0 extra gradients; 0 copies.
    """
    checks.check_choice("kind", kind, KINDS)
    checks.check_count("steps", steps, 1, none_allowed=False)
    checks.check_count("every", every, 1)
    checks.check_number("init_value", init_value, low=0.0, schedule_allowed=False)
    checks.check_number("end_value", end_value, low=float(init_value), schedule_allowed=False)
    if kind == "exponential" and init_value == 0:
        raise ValueError("init_value=0 cannot grow exponentially: it must be above 0.")
    period = every or 1

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        started = jnp.asarray(count) // period * period
        left = 1 - jnp.minimum(started / steps, 1)  # So that the end is met exactly.
        if kind == "exponential":
            return end_value * (init_value / end_value) ** left
        share = left if kind == "linear" else (1 - jnp.cos(jnp.pi * left)) / 2
        return end_value + (init_value - end_value) * share

    return schedule
