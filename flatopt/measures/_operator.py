"""The Hessian and the Gauss-Newton matrix, as what they do to a vector."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt.measures import _variables
from flatopt.measures._variables import Mask, Variables, Vector

OutputLoss = str | Callable[..., jax.Array]
CLOSED_FORMS = ("softmax_cross_entropy", "squared_error")


@dataclasses.dataclass(frozen=True)
class Operator:
    """The Hessian of a loss, or with `output_loss` the Gauss-Newton matrix of a model.

    It acts on the varied leaves, is linear in the vector, and a mean over the batches.
    """

    function: Callable[..., jax.Array]
    variables: Variables
    output_loss: OutputLoss | None = None

    def at(self, mean: _batches.Mean, params: Any) -> tuple[Vector, Callable[[Vector], Vector]]:
        """The varied leaves, and the product with a vector like them over all batches."""
        point = self.variables.take(params)
        return point, lambda vector: mean(self, params, point, vector)

    def __call__(
        self, params: Any, point: Vector, vector: Vector, batch: tuple[Any, ...]
    ) -> Vector:
        """The product on one batch."""

        def function(leaves: Vector) -> jax.Array:
            return self.function(self.variables.put(params, leaves), *batch)

        if self.output_loss is None:
            return jax.jvp(jax.grad(function), (point,), (vector,))[1]
        outputs, tangent = jax.jvp(function, (point,), (vector,))
        _, pull_back = jax.vjp(function, point)
        return pull_back(self._output_product(outputs, tangent, batch))[0]

    def _output_product(
        self, outputs: jax.Array, tangent: jax.Array, batch: tuple[Any, ...]
    ) -> jax.Array:
        """Hessian of the loss with respect to the outputs, times `tangent`."""
        if callable(self.output_loss):
            loss = self.output_loss
            gradient = jax.grad(lambda outputs: loss(outputs, *batch))
            return jax.jvp(gradient, (outputs,), (tangent,))[1]
        examples = max(1, outputs.size // outputs.shape[-1])
        if self.output_loss == "squared_error":
            return tangent / examples
        probabilities = jax.nn.softmax(outputs, axis=-1)
        mean = jnp.sum(probabilities * tangent, axis=-1, keepdims=True)
        return probabilities * (tangent - mean) / examples


def make(
    function: Callable[..., jax.Array],
    params: optax.Params,
    data: _batches.Data,
    mask: Mask,
    output_loss: OutputLoss | None = None,
) -> Operator:
    """Checks the arguments, and returns the matrix."""
    gauss_newton = output_loss is not None
    variables = _variables.prepare(function, params, data, mask, model=gauss_newton)
    if gauss_newton:
        if not callable(output_loss) and output_loss not in CLOSED_FORMS:
            raise ValueError(
                f"output_loss={output_loss!r} must be None, one of {', '.join(CLOSED_FORMS)}, or a "
                "function from outputs and batch to a scalar."
            )
        leaves = jax.tree.leaves(_variables.check_evaluates(function, params, data))
        if len(leaves) != 1 or not leaves[0].shape:
            raise ValueError(
                "With output_loss, the first argument is the model and must return one array of "
                f"outputs, [examples, outputs]; it returns {[list(x.shape) for x in leaves]}."
            )
    return Operator(function, variables, output_loss)


def power_of_two(vectors: Any) -> jax.Array:
    """The power of two next to the largest entry; 1 where there is none, or it is not finite.

    Products are divided by it before anything is squared, so that losses in small or large units
    are measured like others; nothing is rounded.
    """
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in vectors])
    limit = jnp.finfo(largest.dtype).maxexp - 2  # Its reciprocal must be a normal number too.
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 0.0))
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, -limit, limit))


@dataclasses.dataclass(frozen=True)
class _Product:
    operator: Operator

    def __call__(self, mean: _batches.Mean, loops: _batches.Loops, params: Any, vector: Any) -> Any:
        del loops
        variables = self.operator.variables
        _, multiply = self.operator.at(mean, params)
        return variables.spread(params, multiply(variables.take(vector)))


def hessian_vector_product(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    vector: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    mask: Mask = None,
) -> optax.Params:
    r"""Product of the Hessian of the loss with a vector.

    .. math:: H v = \nabla_w \, (\nabla_w L(w) \cdot v), \qquad L(w) = \tfrac1n \sum_b L_b(w)

    Args:
      loss_fn: a scalar, `loss_fn(params, batch)`, a mean; `loss_fn(params)` without data. Static.
      params, vector: where to take the Hessian, and a tree like it.
      batches: arrays with the batches on the leading axis, an iterable of batches, a function that
        returns an iterator, or None. A batch is handed to the loss whole, a tuple too.
      weights: one number a batch; None: stacked ones count alike, others by their examples.
      mask: leaves to vary: tree or prefix of bools, or function to one; None: all. Static.

    Returns:
      A tree like `params`, float32 at least, zero outside the mask.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.hessian_vector_product(jnp.prod, jnp.arange(1.0, 4.0), jnp.ones(3)))
      [5. 4. 3.]

    References:
      Pearlmutter. Fast Exact Multiplication by the Hessian. Neural Computation 6(1), 1994.

    Cost: about three gradients over the data, and outside `jax.jit` one loss.
    """
    data = _batches.weigh(batches, weights)
    operator = make(loss_fn, params, data, mask)
    _variables.check_alike("vector", vector, params)
    return _batches.run(_Product(operator), params, data, vector)


def gauss_newton_vector_product(
    model_fn: Callable[..., jax.Array],
    params: optax.Params,
    vector: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    output_loss: OutputLoss = "softmax_cross_entropy",
    mask: Mask = None,
) -> optax.Params:
    r"""Product of the generalised Gauss-Newton matrix with a vector.

    .. math:: G v = \tfrac1n \sum_i J_i^\top (\nabla^2_f \ell)(f_i) \, J_i v, \quad J = \nabla_w f

    Args:
      model_fn: the outputs f, `model_fn(params, batch)`, [examples, outputs]. Static.
      params, vector, batches, weights, mask: see `hessian_vector_product`.
      output_loss: "softmax_cross_entropy" (of logits), "squared_error" (half the sum of squares),
        or a function `output_loss(outputs, batch)` to a scalar. Static.

    Returns:
      A tree like `params`, float32 at least, zero outside the mask.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> logits, vector = jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])
      >>> print(measures.gauss_newton_vector_product(lambda w: w, logits, vector))
      [[ 0.25 -0.25]]

    References:
      Schraudolph. Fast Curvature Matrix-Vector Products. Neural Computation 14(7), 2002. Martens.
      New Insights and Perspectives on the Natural Gradient Method. arXiv:1412.1193

    Cost: about two gradients over the data.
    """
    data = _batches.weigh(batches, weights)
    operator = make(model_fn, params, data, mask, output_loss)
    _variables.check_alike("vector", vector, params)
    return _batches.run(_Product(operator), params, data, vector)
