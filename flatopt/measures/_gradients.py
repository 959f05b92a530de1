"""Measures made of first derivatives: the gradient norm and the trace of the Fisher matrix."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, rng, tree_math
from flatopt.measures import _results, _variables
from flatopt.measures._results import Estimate
from flatopt.measures._variables import Mask, Variables


@dataclasses.dataclass(frozen=True)
class _GradientNorm:
    loss_fn: _batches.LossFn
    variables: Variables

    def __call__(self, mean: _batches.Mean, loops: _batches.Loops, params: Any) -> jax.Array:
        del loops
        function = _variables.Gradient(self.loss_fn, self.variables)
        return tree_math.norm(mean(function, params, self.variables.take(params))[1])


def gradient_norm(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: _batches.Batches = None,
    *,
    weights: _batches.Weights = None,
    mask: Mask = None,
) -> jax.Array:
    r"""The Euclidean norm of the gradient over all data.

    .. math:: \|\nabla L(w)\|

    Args:
      loss_fn, params, batches, weights, mask: see `hessian_vector_product`.

    Returns:
      The norm, a scalar, float32 at least.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> print(measures.gradient_norm(lambda w: 0.5 * jnp.sum(w**2), jnp.array([3.0, 4.0])))
      5.0

    References:
      Zhao, Zhang, Hu. Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning. arXiv:2202.03599

    Cost: one gradient over the data.
    """
    data = _batches.weigh(batches, weights)
    variables = _variables.prepare(loss_fn, params, data, mask)
    return _batches.run(_GradientNorm(loss_fn, variables), params, data)


@dataclasses.dataclass(frozen=True)
class _FisherBatch:
    """Mean over a batch of the squared length of each example's gradient."""

    model_fn: Callable[..., jax.Array]
    variables: Variables
    labels: Callable[..., jax.Array] | None

    def __call__(self, params: Any, key: jax.Array, batch: tuple[Any, ...]) -> jax.Array:
        point = self.variables.take(params)
        given = None if self.labels is None else self.labels(*batch)

        def squared_length(example: tuple[Any, jax.Array, Any]) -> jax.Array:
            one, example_key, label = example

            def log_likelihood(vector: Any) -> jax.Array:
                own = jax.tree.map(lambda x: x[None], one)
                logits = self.model_fn(self.variables.put(params, vector), *own)[0]
                drawn = jax.random.categorical(example_key, jax.lax.stop_gradient(logits))
                return jax.nn.log_softmax(logits)[drawn if label is None else label]

            gradient = jax.grad(log_likelihood)(point)
            return tree_math.vdot(gradient, gradient)

        number = len(jax.tree.leaves(batch)[0])
        # One draw a place in the batch; the content tells batches apart.
        keys = jax.random.split(jax.random.fold_in(key, _fingerprint(batch)), number)
        return jnp.mean(jax.vmap(squared_length)((batch, keys, given)))


@dataclasses.dataclass(frozen=True)
class _FisherTrace:
    function: _FisherBatch
    num_samples: int

    def __call__(
        self, mean: _batches.Mean, loops: _batches.Loops, params: Any, key: jax.Array
    ) -> jax.Array:
        keys = jax.random.split(key, self.num_samples)
        return loops.map(lambda k: mean(self.function, params, k), keys)


def _fingerprint(batch: tuple[Any, ...]) -> jax.Array:
    """A number that differs from batch to batch, so that each draws its own labels."""
    leaves = jax.tree.leaves(batch)
    total = sum((jnp.sum(x.astype(jnp.float32)) for x in leaves), start=jnp.zeros([]))
    return jax.lax.bitcast_convert_type(total.astype(jnp.float32), jnp.uint32)


def fisher_trace(
    model_fn: Callable[..., jax.Array],
    params: optax.Params,
    batches: _batches.Batches,
    *,
    weights: _batches.Weights = None,
    labels: Callable[..., jax.Array] | None = None,
    num_samples: int = 8,
    key: jax.typing.ArrayLike = 0,
    mask: Mask = None,
) -> Estimate:
    r"""The trace of the Fisher information matrix of a classifier.

    .. math:: \tfrac1n \sum_i \mathbb E_{y \sim p_w(\cdot | x_i)} \|\nabla_w \log p_w(y | x_i)\|^2

    Args:
      params, batches, weights, mask: see `hessian_vector_product`.
      model_fn: the logits, `model_fn(params, batch)`, [examples, classes]. Static.
      labels: None: drawn from the model; a function from a batch to its labels. Static.
      num_samples, key: draws, >= 1 (static), and their random key or integer seed.

    Returns:
      `Estimate`; its standard error is that of the draws, 0 with `labels`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> x = jnp.array([[1.0, 3.0]])  # One batch of two examples.
      >>> print(measures.fisher_trace(lambda w, x: jnp.outer(x, w), jnp.zeros(2), x).value)
      2.5

    References:
      Martens. New Insights and Perspectives on the Natural Gradient Method. arXiv:1412.1193.
      Kunstner, Balles, Hennig. Limitations of the Empirical Fisher Approximation. arXiv:1905.12558

    Cost: a gradient for each example and draw; a copy for each example of one batch.
    """
    data = _batches.weigh(batches, weights)
    checks.check_count("num_samples", num_samples, 1)
    variables = _variables.prepare(model_fn, params, data, mask, model=True)
    if batches is None:
        raise ValueError("fisher_trace needs batches: it takes a gradient for each example.")
    function = _FisherBatch(model_fn, variables, labels)
    algorithm = _FisherTrace(function, 1 if labels is not None else num_samples)
    result = _results.estimate(_batches.run(algorithm, params, data, rng.as_key(key)))
    if labels is None:
        return result
    return Estimate(result.value, jnp.zeros_like(result.value))
