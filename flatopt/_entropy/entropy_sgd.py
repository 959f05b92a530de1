"""Entropy-SGD (Chaudhari et al., arXiv:1611.01838) as three programs compute it.

"python" and "lua" are those of its authors, "pittorino" the one of Pittorino et al.
(arXiv:2006.07897). Each is an inner step, handed to `local_entropy`, and an outer step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, registry, rng, tree_math
from flatopt._entropy.local_entropy import (
    InnerStep,
    LocalEntropyState,
    Numbers,
    decayed,
    langevin_step,
    local_entropy,
    momentum_step,
)


def heavy_ball_step(
    y: Any, v: Any, g: Any, w: Any, xi: Any, now: Numbers, damp: Any = 0.0
) -> tuple[Any, Any]:
    """The "python" program without Nesterov's: spring and noise enter the momentum too."""
    d = -now.eta * decayed(g, y, now.decay)
    v = now.beta * v + (1 - damp) * d - now.eta * now.gamma * (y - w) + xi
    return y + v, v


def lua_step(y: Any, v: Any, g: Any, w: Any, xi: Any, now: Numbers) -> tuple[Any, Any]:
    """Nesterov's momentum filters the gradient alone."""
    d = -now.eta * g
    v = now.beta * v + d
    return y + d + now.beta * v - now.eta * decayed(now.gamma * (y - w), y, now.decay) + xi, v


def pittorino_step(y: Any, v: Any, g: Any, w: Any, xi: Any, now: Numbers) -> tuple[Any, Any]:
    """Nesterov's momentum filters gradient, decay and spring."""
    d = -now.eta * (decayed(g, y, now.decay) + now.gamma * (y - w))
    v = now.beta * v + d
    return y + d + now.beta * v + xi, v


def outer_step(b: Any, d: Any, w: Any, now: Numbers, damp: Any, nesterov: Any) -> tuple[Any, Any]:
    r"""SGD's momentum: :math:`D = d + \lambda w, b \leftarrow \beta b + (1 - \delta) D`.

    Returns the direction to step along, D + beta b or b, and the new b.
    """
    d = tree_math.add_scaled(d, now.decay, w)
    b = tree_math.on_inexact(lambda b, d: now.beta * b + (1 - damp) * d, b, d)
    return (tree_math.add_scaled(d, now.beta, b) if nesterov else b), b


class Form(NamedTuple):
    """A published program.

    Attributes:
      inner_step: the step of its loop.
      initial_gradient: whether the gradient at the centre is that of the first inner step.
      scale_by_gamma: whether the outer learning rate is multiplied by gamma.
      outer_momentum: whether the outer step has momentum and decay.
      seeded: whether that momentum starts from the first gradient of the loss.
    """

    inner_step: InnerStep
    initial_gradient: bool = False
    scale_by_gamma: bool = False
    outer_momentum: bool = True
    seeded: bool = False


FORMS = {
    "python": Form(momentum_step, seeded=True),
    "lua": Form(lua_step, outer_momentum=False),
    "pittorino": Form(pittorino_step, initial_gradient=True, scale_by_gamma=True),
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


@registry.method("optimizer", needs=("grad_fn",))
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
    dampening: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    scale_by_gamma: bool | None = None,
    initial_gradient: bool | None = None,
    automatic: int | None = None,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Entropy-SGD: SGD on the local entropy, as one of the published programs computes it.

    .. math:: D = w - \mu + \lambda w, \quad b \leftarrow \beta b + (1 - \delta) D, \quad
      w \leftarrow w - \eta \, c \, (D + \beta b)

    Args:
      learning_rate: :math:`\eta` >= 0 of the outer step; 1 without momentum moves to the mean.
      num_steps, gamma, inner_learning_rate, noise, automatic, key: see `local_entropy`.
      form: "python", "lua" (no outer momentum and decay) or "pittorino" (c = gamma). Static.
      momentum, inner_momentum: :math:`\beta` of each loop, in [0, 1); None is `momentum`.
      nesterov, dampening: of "python" alone: False steps along b; :math:`\delta` in [0, 1).
      weight_decay: :math:`\lambda` >= 0, in both loops ("lua": in the inner one).
      scale_by_gamma, initial_gradient: whether c is gamma, not 1; whether the incoming gradient
        is used in the loop. None is the form's own choice. Static.

    Returns:
      A whole optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.entropy_sgd(1.0, 5, 0.1, noise=0.0, form="lua"), jnp.array([1.0])
      >>> print(f"{tx.update(w, tx.init(w), w, grad_fn=lambda y, i: y)[0][0]:.3f}")
      -0.593

    Cost: `num_steps` extra gradients ("pittorino": 1 fewer); 1 copy, "lua": 0 (+3 temporary).
    """
    checks.check_number("learning_rate", learning_rate, low=0.0)
    beta_inner = momentum if inner_momentum is None else inner_momentum
    _check_momenta(momentum=momentum, inner_momentum=beta_inner)
    program = _program(form, nesterov, dampening)
    scaled = program.scale_by_gamma if scale_by_gamma is None else scale_by_gamma
    reuses = program.initial_gradient if initial_gradient is None else initial_gradient
    loop = local_entropy(
        num_steps,
        gamma,
        inner_learning_rate=inner_learning_rate,
        noise=noise,
        momentum=beta_inner,
        weight_decay=weight_decay,
        initial_gradient=reuses,
        automatic=automatic,
        inner_step=langevin_step if checks.is_number(beta_inner, 0) else program.inner_step,
        key=key,
    )
    outer = Numbers(learning_rate, gamma, weight_decay, momentum)

    def init_fn(params: optax.Params) -> EntropySgdState:
        trace = optax.tree.zeros_like(params) if program.outer_momentum else optax.EmptyState()
        return EntropySgdState(jnp.zeros([], jnp.int32), trace, loop.init(params))

    def update_fn(
        updates: Any, state: EntropySgdState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, EntropySgdState]:
        if params is not None:
            updates = tree_math.widened(updates, params)
        d, inner = loop.update(updates, state.local_entropy_state, params, **extra_args)
        now, b = outer.at(state.step), state.trace
        if program.outer_momentum:
            if program.seeded:
                first = tree_math.cast_like(updates, b)
                b = optax.tree.where(state.step == 0, first, b)
            d, b = outer_step(b, d, params, now, damp=dampening, nesterov=nesterov)
        # The rate, not the gradient: the momentum holds distances, whatever gamma was.
        eta = now.eta * now.gamma * inner.unit if scaled else now.eta
        step = optax.safe_increment(state.step)
        return tree_math.scale(-eta, d), EntropySgdState(step, b, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_momenta(**momenta: Any) -> None:
    for name, beta in momenta.items():
        checks.check_number(name, beta, low=0.0, high=1.0, high_allowed=False)


def _program(form: str, nesterov: bool, dampening: Any) -> Form:
    """The form with its knobs set; raises where it has none."""
    checks.check_choice("form", form, FORMS)
    checks.check_number(
        "dampening", dampening, low=0.0, high=1.0, high_allowed=False, schedule_allowed=False
    )
    if form == "python":
        step = momentum_step if nesterov else heavy_ball_step
        return FORMS[form]._replace(inner_step=functools.partial(step, damp=dampening))
    if not nesterov or not checks.is_number(dampening, 0):
        raise ValueError(
            f"nesterov={nesterov}, dampening={dampening}: form={form!r} has Nesterov's momentum "
            "without dampening; only form='python' has these knobs."
        )
    return FORMS[form]
