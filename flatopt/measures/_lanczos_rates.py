"""A learning rate and a momentum from the spectrum of the Hessian (arXiv:2006.09092)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng, tree_math
from flatopt.measures import _basis, _lanczos, _operator
from flatopt.measures._operator import Operator
from flatopt.measures._variables import Mask, Vector, dimension

SPIKE = 0.5  # A Ritz value with more of the weight than this is the heap of eigenvalues near zero.


class LanczosRates(NamedTuple):
    """Result of `lanczos_rates`.

    Attributes:
      learning_rate: scalar; not finite where the largest curvature is zero.
      momentum: scalar in [0, 1]; None with the rule "median", which does not touch it.
      curvatures: [num_steps], absolute Ritz values in the order of the signed ones.
      weights: [num_steps], their shares of the start vector, which sum to 1.
      largest: scalar, the largest signed Ritz value.
    """

    learning_rate: jax.Array
    momentum: jax.Array | None
    curvatures: jax.Array
    weights: jax.Array
    largest: jax.Array


def polyak(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Heavy ball at its fastest on curvatures in :math:`[\mu, \lambda]`."""
    fast, slow = jnp.sqrt(high), jnp.sqrt(low)
    return (2 / (fast + slow)) ** 2, ((fast - slow) / (fast + slow)) ** 2


def authors(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""`polyak` as the authors' program has it, without the root of one :math:`\mu`."""
    fast, slow = jnp.sqrt(high), jnp.sqrt(low)
    return (2 / (fast + slow)) ** 2, ((fast - slow) / (fast + low)) ** 2


def normalised(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The authors' third program: the rate has no unit, and the momentum no square."""
    fast, slow = jnp.sqrt(high), jnp.sqrt(low)
    return slow / fast, (fast - slow) / (fast + slow)


def median(high: jax.Array, middle: jax.Array) -> tuple[jax.Array, None]:
    r"""The authors' first program, :math:`2 / (\lambda + \text{median})`."""
    return 2 / (high + middle), None


RULES: dict[str, Callable[..., Any]] = {
    "polyak": polyak,
    "median": median,
    "authors": authors,
    "normalised": normalised,
}
LOWEST = ("smallest", "median")


def smallest_outside_spike(curvatures: jax.Array, weights: jax.Array) -> jax.Array:
    """The smallest curvature but that which has most of the weight, if there are others."""
    is_spike = (weights > SPIKE) & (curvatures.size > 1)
    return jnp.min(jnp.where(is_spike, jnp.inf, curvatures))


def rates(curvatures: jax.Array, weights: jax.Array, rule: str, mu: str) -> tuple[Any, Any]:
    """Learning rate and momentum by one rule."""
    if rule == "median" or mu == "median":
        low = jnp.median(curvatures)
    else:
        low = smallest_outside_spike(curvatures, weights)
    return RULES[rule](jnp.max(curvatures), low)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How rates are made of a Lanczos process.

    Attributes:
      num_steps: number of products with the Hessian.
      rule: one of `RULES`.
      mu: one of `LOWEST`.
    """

    num_steps: int
    rule: str
    mu: str

    def __post_init__(self) -> None:
        checks.check_count("num_steps", self.num_steps, 1, none_allowed=False)
        checks.check_choice("rule", self.rule, RULES)
        checks.check_choice("mu", self.mu, LOWEST)

    def estimate(
        self,
        multiply: Callable[[Vector], Vector],
        start: Vector,
        key: jax.Array,
        loops: _batches.Loops,
    ) -> LanczosRates:
        """The rates of a symmetric matrix, from a start vector of any length."""
        steps = min(self.num_steps, dimension(start))
        start = tree_math.scale(1 / (tree_math.norm(start) + _basis.TINY), start)
        process = _lanczos.explore(multiply, start, steps, key, loops)
        pairs = _lanczos.ritz(process)
        # After NaN the process stops early: then nothing of it is a spectrum.
        known = jnp.where(process.size == steps, process.scale, jnp.nan)
        values, weights = known * pairs.values, pairs.rotation[0] ** 2
        learning_rate, momentum = rates(jnp.abs(values), weights, self.rule, self.mu)
        return LanczosRates(learning_rate, momentum, jnp.abs(values), weights, jnp.max(values))


@dataclasses.dataclass(frozen=True)
class _LanczosRates:
    operator: Operator
    rule: Rule

    def __call__(
        self, mean: _batches.Mean, loops: _batches.Loops, params: Any, key: jax.Array
    ) -> LanczosRates:
        point, multiply = self.operator.at(mean, params)
        start = _basis.random_unit(jax.random.fold_in(key, 0), point)
        return self.rule.estimate(multiply, start, jax.random.fold_in(key, 1), loops)


def lanczos_rates(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    num_steps: int = 20,
    rule: str = "polyak",
    mu: str = "smallest",
    mask: Mask = None,
    key: jax.typing.ArrayLike = 0,
) -> LanczosRates:
    r"""A learning rate and a momentum from the ends of the Hessian's spectrum.

    .. math:: \eta = 4 / (\sqrt\lambda + \sqrt\mu)^2, \qquad \beta = 1 - \eta \sqrt{\lambda \mu}

    Args:
      loss_fn, params, batches, weights, mask: see `hessian_vector_product`.
      rule: "polyak" as above; the authors' programs: "median", "authors", "normalised". Static.
      mu: "smallest" absolute Ritz value but one of most weight, or their "median". Static.
      num_steps, key: products with the Hessian, >= 1 (static); random key or integer seed.

    Returns:
      `LanczosRates`: for SGD on these data. Negative curvatures count by their size.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> curvatures = jnp.linspace(1.0, 4.0, 50)
      >>> found = measures.lanczos_rates(lambda w: 0.5 * curvatures @ w**2, jnp.ones(50))
      >>> print(f"{found.learning_rate:.3f} {found.momentum:.3f}")
      0.444 0.111

    References:
      Granziol, Zohren, Roberts. Learning Rates as a Function of Batch Size. arXiv:2006.09092

    Cost: `num_steps` Hessian-vector products; `num_steps` copies.
    """
    how = Rule(num_steps, rule, mu)
    data = _batches.weigh(batches, weights)
    operator = _operator.make(loss_fn, params, data, mask)
    return _batches.run(_LanczosRates(operator, how), params, data, rng.as_key(key))
