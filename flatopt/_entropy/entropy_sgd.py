"""Entropy-SGD as a whole, in the three forms in which it was published."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, rng
from flatopt._core.timing import value_at
from flatopt._entropy.local_entropy import LocalEntropyState, local_entropy


class _Form(NamedTuple):
    """In what the published programs differ."""

    momentum_over: str  # What the inner momentum filters.
    initial_gradient: bool  # Whether the gradient at the centre is used.
    scale_by_gamma: bool
    outer_momentum: bool
    seeded: bool  # Whether the outer buffer starts from the first gradient of the loss.


FORMS = {
    "python": _Form("decay", False, False, outer_momentum=True, seeded=True),
    "lua": _Form("gradient", False, False, outer_momentum=False, seeded=False),
    "pittorino": _Form("pull", True, True, outer_momentum=True, seeded=False),
}


class EntropySgdState(NamedTuple):
    """State of `entropy_sgd`.

    Attributes:
      step: int32 scalar, number of updates so far.
      trace: momentum of the outer loop, a tree like the parameters; `optax.EmptyState()` in a form
        without.
      local_entropy_state: state of the inner loop.
    """

    step: jax.Array
    trace: optax.Updates
    local_entropy_state: LocalEntropyState


def entropy_sgd(
    learning_rate: optax.ScalarOrSchedule,
    num_steps: int,
    gamma: optax.ScalarOrSchedule,
    *,
    form: str = "python",
    inner_learning_rate: optax.ScalarOrSchedule = 0.1,
    noise: optax.ScalarOrSchedule | optax.GradientTransformation = 1e-4,
    momentum: optax.ScalarOrSchedule = 0.9,
    inner_momentum: optax.ScalarOrSchedule | None = None,
    nesterov: bool = True,
    dampening: optax.ScalarOrSchedule = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    averaging: optax.ScalarOrSchedule = 0.75,
    scale_by_gamma: bool | None = None,
    initial_gradient: bool | None = None,
    key: rng.KeyLike = 0,
    automatic: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Entropy-SGD: SGD on the local entropy, as one of the published programs computes it.

    .. math::
      D = w - \mu(w) + \lambda w, \qquad b \leftarrow \beta b + (1 - \delta) D, \qquad
      w \leftarrow w - \eta \, c \, (D + \beta b)

    with the mean :math:`\mu` of `local_entropy`'s inner loop, and the step :math:`\eta c b` without
    `nesterov`. The forms:

    ================================  =================  ==================  ====================
    form                              "python"           "lua"               "pittorino"
    ================================  =================  ==================  ====================
    inner momentum filters            gradient, decay    gradient            gradient, decay, pull
    factor c                          1                  1                   gamma
    outer momentum and decay          yes                no                  yes
    outer buffer starts from          first gradient     -                   zero
    evaluations in an update          L + 1              L + 1               L
    ================================  =================  ==================  ====================

    "python" and "lua" are the two programs of the authors, "pittorino" the entropic SGD of
    Pittorino et al. In "python" without `nesterov`, pull and noise enter the inner momentum too.

    Args:
      learning_rate: :math:`\eta` >= 0 of the outer step: a number, a traced array, or a schedule of
        the step count. With c = 1 and no momentum, 1 moves to the mean of the loop.
      num_steps: L, inner steps in an update, >= 0; 0 is plain SGD. Static.
      gamma: stiffness >= 0 of the spring: likewise a number or a schedule. The "lua" and
        "pittorino" programs raise it as `exponential_scoping` does ("lua" once before the first
        update); the "python" program leaves it constant.
      form: "python", "lua" or "pittorino". Static.
      inner_learning_rate: of the loop, >= 0; the authors' is 0.1 throughout.
      noise: root of the temperature, >= 0, or a transformation; see `local_entropy`. The programs'
        own `eps`.
      momentum: :math:`\beta` of the outer loop, in [0, 1). "lua" has none there.
      inner_momentum: of the inner loop; None means `momentum`.
      nesterov: whether both are Nesterov's. Static.
      dampening: :math:`\delta` of both, in [0, 1).
      weight_decay: :math:`\lambda` >= 0, in both loops ("lua": in the inner one).
      averaging: weight of the past in the mean, in [0, 1).
      scale_by_gamma: whether c is gamma, which makes the step that of the local entropy's own
        gradient, and scales the decay too; None means the form's choice. Static.
      initial_gradient: whether the incoming gradient is that of the first inner step, which saves
        an evaluation; None means the form's choice. Static.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      automatic: measure the unit of gamma in so many first updates; see `local_entropy`. Static.

    Returns:
      A whole optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> tx = flatopt.entropy_sgd(0.5, num_steps=5, gamma=0.03, form="pittorino",
      ...     scale_by_gamma=False, noise=0.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> opt_state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params[0]:.3f} {params[1]:.3f}")
      -0.352 0.704

    References:
      Chaudhari et al. Entropy-SGD: Biasing Gradient Descent Into Wide Valleys. arXiv:1611.01838

      Pittorino et al. Entropic gradient descent algorithms and wide flat minima. arXiv:2006.07897

    Notes:
      Place: it is the whole optimiser; to put another outer one (Adam, a clip), chain it after
      `local_entropy` instead. In the first two forms the programs evaluate a gradient at the
      centre and, after the first update, throw it away; so does `update`, unless
      `initial_gradient=True`. Gradient evaluations: L extra, "pittorino" L - 1. State: one copy of
      the parameters ("lua": none), a few scalars; temporaries as for `local_entropy`.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(FORMS)}.")
    own = FORMS[form]
    checks.check_number("learning_rate", learning_rate, low=0.0)
    checks.check_number("momentum", momentum, low=0.0, high=1.0, high_allowed=False)
    aliased = form == "python" and not nesterov
    scaled = own.scale_by_gamma if scale_by_gamma is None else scale_by_gamma
    stage = local_entropy(
        num_steps,
        gamma,
        inner_learning_rate=inner_learning_rate,
        noise=noise,
        momentum=momentum if inner_momentum is None else inner_momentum,
        nesterov=nesterov,
        averaging=averaging,
        weight_decay=weight_decay,
        initial_gradient=own.initial_gradient if initial_gradient is None else initial_gradient,
        key=key,
        dampening=dampening,
        momentum_over="noise" if aliased else own.momentum_over,
        automatic=automatic,
    )

    def init_fn(params: optax.Params) -> EntropySgdState:
        return EntropySgdState(
            step=jnp.zeros([], jnp.int32),
            trace=optax.tree.zeros_like(params) if own.outer_momentum else optax.EmptyState(),
            local_entropy_state=stage.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: EntropySgdState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EntropySgdState]:
        direction, inner_state = stage.update(
            updates, state.local_entropy_state, params, **extra_args
        )

        def now(hyperparameter: optax.ScalarOrSchedule) -> Any:
            return value_at(hyperparameter, state.step)

        rate, beta, undamped = now(learning_rate), now(momentum), 1 - now(dampening)
        if scaled:  # The rate, not the gradient: the buffer holds distances, whatever gamma was.
            rate = rate * now(gamma) * inner_state.unit
        trace = state.trace
        if own.outer_momentum:
            decay = now(weight_decay)
            direction = jax.tree.map(
                lambda d, w: (d + decay * w).astype(d.dtype), direction, params
            )
            if own.seeded:
                trace = optax.tree.where(state.step == 0, updates, trace)
            trace = jax.tree.map(
                lambda b, d: (beta * b + undamped * d).astype(b.dtype), trace, direction
            )
            direction = (
                jax.tree.map(lambda d, b: (d + beta * b).astype(d.dtype), direction, trace)
                if nesterov
                else trace
            )
        moves = jax.tree.map(lambda d: (-rate * d).astype(d.dtype), direction)
        return moves, EntropySgdState(optax.safe_increment(state.step), trace, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
