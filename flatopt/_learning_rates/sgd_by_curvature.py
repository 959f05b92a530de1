"""SGD whose learning rate follows from its Hessian (Granziol et al., arXiv:2006.09092)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import checks, registry, rng, tree_math
from flatopt._core.batches import Loops
from flatopt._core.timing import Every, value_at

if TYPE_CHECKING:
    from flatopt.measures._lanczos_rates import LanczosRates, Rule

Vector = tuple[jax.Array, ...]  # Real and not empty, in float32 at least.


class SgdByCurvatureState(NamedTuple):
    """State of `sgd_by_curvature`.

    Attributes:
      step: int32 scalar, number of updates so far.
      learning_rate: scalar, from the last estimate.
      momentum: scalar, from the last estimate.
      trace: tree like the parameters, the sum of past gradients.
      key: raw uint32 key data, advanced by every estimate.
    """

    step: jax.Array
    learning_rate: jax.Array
    momentum: jax.Array
    trace: optax.Updates
    key: jax.Array


def follow(found: "LanczosRates", state: SgdByCurvatureState, highest: Any) -> SgdByCurvatureState:
    """Takes what was found; not where no direction curves upwards. NaN shows."""
    own = state.momentum if found.momentum is None else found.momentum
    upwards = ~(found.largest <= 0)
    rate = jnp.where(upwards, found.learning_rate, state.learning_rate)
    beta = jnp.where(upwards, own, state.momentum)
    return state._replace(learning_rate=jnp.minimum(rate, highest), momentum=beta)


def accumulate(state: SgdByCurvatureState, g: optax.Updates) -> optax.Updates:
    r"""Heavy ball's momentum, :math:`\beta m + g`."""
    return tree_math.add_scaled(tree_math.widened(g, state.trace), state.momentum, state.trace)


def to_vector(tree: Any, like: Any) -> Vector:
    """What moves of `tree`: real and imaginary parts, as told by the leaves of `like`."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    moved = (jnp.asarray(x) for x, w in pairs if _moves(w))
    parts = (part for x in moved for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,)))
    return tuple(part.astype(tree_math.accumulator_dtype(part.dtype)) for part in parts)


def to_tangent(vector: Vector, like: Any) -> Any:
    """A tree of tangents of `like`; zero where nothing moves."""
    parts = iter(vector)

    def leaf(w: Any) -> Any:
        if not tree_math.is_inexact(w):
            return np.zeros(jnp.shape(w), jax.dtypes.float0)
        if not _moves(w):
            return jnp.zeros_like(w)
        x = next(parts)
        return tree_math.as_dtype_of(
            jax.lax.complex(x, next(parts)) if jnp.iscomplexobj(w) else x, w
        )

    return jax.tree.map(leaf, like)


def _moves(w: Any) -> bool:
    return tree_math.is_inexact(w) and np.size(w) > 0


def rates_at(
    how: "Rule", grad_fn: Callable[[Any, Any], Any], params: Any, start: Any, key: jax.Array
) -> "LanczosRates":
    """What the Hessian at `params` asks for, from a tree to start from or, None, a random one."""
    point = to_vector(params, params)
    first, rest = jax.random.split(key)
    begin = rng.normal_like(first, point) if start is None else to_vector(start, params)

    def multiply(vector: Vector) -> Vector:
        # Every product on the data of evaluation number 0: one matrix.
        tangent = to_tangent(vector, params)
        product = jax.jvp(lambda w: grad_fn(w, 0), (params,), (tangent,))[1]
        return tree_math.cast_like(to_vector(product, params), vector)

    return how.estimate(multiply, tree_math.cast_like(begin, point), rest, Loops())


@registry.method("optimizer", needs=("grad_fn",))
def sgd_by_curvature(
    learning_rate: jax.typing.ArrayLike,
    *,
    momentum: jax.typing.ArrayLike = 0.0,
    every: int,
    start: int | None = None,
    num_steps: int = 20,
    rule: str = "polyak",
    mu: str = "smallest",
    max_learning_rate: optax.ScalarOrSchedule = 1.0,
    key: rng.KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD that takes its learning rate and momentum from its Hessian.

    .. math:: m \leftarrow \beta m + g, \qquad w \leftarrow w - \eta \, m

    Args:
      learning_rate, momentum: before `start`, and while no direction curves upwards: numbers.
      every, start: period of the estimates, and updates before the first; see `gradient_at`.
      num_steps, rule, mu: see `measures.lanczos_rates`. Static.
      max_learning_rate: what an estimate is cut to, > 0: a number, a traced array, or a schedule.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.

    Returns:
      A whole optimiser; `update` needs `params`, `grad_fn`, and may take a `start_vector`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx, w = flatopt.sgd_by_curvature(0.1, every=100), jnp.ones(50)
      >>> _, state = tx.update(w, tx.init(w), w, grad_fn=lambda w, i: jnp.linspace(1, 4, 50) * w)
      >>> print(f"{state.learning_rate:.3f} {state.momentum:.3f}")
      0.444 0.111

    References:
      Granziol, Zohren, Roberts. Learning Rates as a Function of Batch Size. arXiv:2006.09092

    Cost: 0 extra gradients, `num_steps` Hessian-vector products in `every` updates; 1 copy.
    """
    from flatopt.measures._lanczos_rates import Rule  # Not above: most runs need no measures.

    _check(learning_rate, momentum, every, max_learning_rate)
    how = Rule(num_steps, rule, mu)
    when, stream = Every.before_update(start, every), rng.Stream(key)

    def init_fn(params: optax.Params) -> SgdByCurvatureState:
        dtype, trace = tree_math.scalar_dtype(params), optax.tree.zeros_like(params)
        rates = jnp.asarray(learning_rate, dtype), jnp.asarray(momentum, dtype)
        return SgdByCurvatureState(jnp.zeros([], jnp.int32), *rates, trace, stream.init())

    def update_fn(
        updates: Any, state: SgdByCurvatureState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, SgdByCurvatureState]:
        grad_fn = checks.require_grad_fn("sgd_by_curvature", extra_args.get("grad_fn"), params)

        def renew(state: SgdByCurvatureState) -> SgdByCurvatureState:
            keep, use = stream.split(state.key)
            found = rates_at(how, grad_fn, params, extra_args.get("start_vector"), use)
            return follow(found, state._replace(key=keep), value_at(max_learning_rate, state.step))

        if tree_math.size(params):  # Else there is no curvature.
            state = when.run(state.step, renew, state)
        trace, step = accumulate(state, updates), optax.safe_increment(state.step)
        return tree_math.scale(-state.learning_rate, trace), state._replace(step=step, trace=trace)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check(learning_rate: Any, momentum: Any, every: int, max_learning_rate: Any) -> None:
    checks.check_number("learning_rate", learning_rate, low=0.0, schedule_allowed=False)
    checks.check_number("momentum", momentum, low=0.0, high=1.0, schedule_allowed=False)
    checks.check_count("every", every, 1, none_allowed=False)
    checks.check_number("max_learning_rate", max_learning_rate, low=0.0, low_allowed=False)
