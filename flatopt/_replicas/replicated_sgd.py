"""Replicated SGD as a recipe, and the schedules of its coupling."""

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng
from flatopt._replicas.couple_replicas import couple_replicas
from flatopt._replicas.hold_replicas import hold_replicas

KINDS = ("exponential", "linear", "cosine")
_AXIS = "replicas"


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

    .. math:: w_a \leftarrow w_a + u\big(\nabla L_a(w_a) + \gamma \, (w_a - \bar w)\big),
       \qquad a = 0, \dots, n - 1

    Args:
      optimizer: any optax transformation, run for each replica.
      number: n >= 1; 3 to 7 are usual. With 1 this is `optimizer`. Static.
      strength: :math:`\gamma` >= 0 of the pull; usually a schedule that grows until the replicas
        have collapsed into one: `strength_schedule`. See `couple_replicas`.
      std: standard deviation >= 0 of the noise that sets the replicas apart at first. With 0, and
        equal data, they never differ. For independent initial weights, replace `others` in the
        state that `init` returns.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data, for that noise.
      every: pull once in so many updates; see `couple_replicas`. Static.
      automatic: measure the unit of the strength in so many first updates, which needs `value=`;
        see `couple_replicas`. Static.
      evaluation: "unrolled", "loop" or "vmap": how the gradients of the other replicas are
        computed, one after another or at the same time; see `hold_replicas`. Static.

    Returns:
      `hold_replicas(optax.chain(couple_replicas(...), optimizer), number, ...)`: a wrapper to be
      outermost; `update` needs `params` and, for n > 1, `grad_fn`. Evaluate at the barycentre:
      `flatopt.eval_params(opt_state, params)`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> def loss_fn(w, x):
      ...     return 0.5 * jnp.mean((w - x) ** 2)
      >>> batches = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # one for each replica
      >>> tx = flatopt.replicated_sgd(optax.sgd(0.1), number=3, strength=2.0)
      >>> params = jnp.array(0.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(200):
      ...     grads = jax.grad(loss_fn)(params, batches[0])
      ...     updates, opt_state = tx.update(grads, opt_state, params,
      ...         grad_fn=lambda w, i: jax.grad(loss_fn)(w, batches[i + 1]))
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params:.2f} {flatopt.eval_params(opt_state, params):.2f}")
      2.83 3.50

    References:
      Baldassi et al. Unreasonable Effectiveness of Learning Neural Networks: From Accessible States
      and Robust Ensembles to Basic Algorithmic Schemes. arXiv:1605.06444

      Pittorino et al. Entropic gradient descent algorithms and wide flat minima. arXiv:2006.07897

    Notes:
      To spread the replicas over devices, use `optax.chain(couple_replicas(...), optimizer)` inside
      `jax.shard_map` instead. Gradient evaluations: n - 1 extra, and n times those of `optimizer`
      (SAM per replica: n more). State: n - 1 copies of the parameters, n states of `optimizer`, a
      few scalars.
    """
    coupling = couple_replicas(strength, axis_name=_AXIS, every=every, automatic=automatic)
    return hold_replicas(
        optax.chain(coupling, optimizer),
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

    .. math::
      \gamma_0 \Big(\frac{\gamma_1}{\gamma_0}\Big)^s, \quad \gamma_0 + (\gamma_1 - \gamma_0) s,
      \quad \gamma_0 + (\gamma_1 - \gamma_0) \frac{1 - \cos \pi s}{2}, \qquad s = \min(t / n, 1)

    Args:
      kind: "exponential", "linear" or "cosine", in the order of the formulae. Static.
      init_value: :math:`\gamma_0` at step 0, >= 0, for the exponential one > 0.
      end_value: :math:`\gamma_1` >= `init_value`, reached after n steps and kept from there on.
      steps: n >= 1. Static.
      every: hold the value for so many steps (an epoch), >= 1; None means 1. Static.

    Returns:
      A schedule: a function of the step count.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> import flatopt
      >>> for kind in ("exponential", "linear", "cosine"):
      ...     schedule = flatopt.strength_schedule(kind, 0.01, 1.0, steps=100)
      ...     print(f"{schedule(0):.3f} {schedule(50):.3f} {schedule(100):.3f} {schedule(999):.3f}")
      0.010 0.100 1.000 1.000
      0.010 0.505 1.000 1.000
      0.010 0.505 1.000 1.000

    References:
      Pittorino et al. Entropic gradient descent algorithms and wide flat minima. arXiv:2006.07897

    Notes:
      Costs nothing. With `couple_replicas(automatic=...)` the values are multiples of the measured
      unit: from 1 to about 1e4 is usual there.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}.")
    checks.check_count("steps", steps, 1)
    checks.check_count("every", every, 1)
    checks.check_number("init_value", init_value, low=0.0)
    checks.check_number("end_value", end_value, low=float(init_value))
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
