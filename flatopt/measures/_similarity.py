"""How alike two networks are: features (CKA) and predictions."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from flatopt._core import batches as _batches
from flatopt._core import checks, tree_math
from flatopt.measures import _variables

FEWEST = {"unbiased": 4, "biased": 2}  # They divide by n - 3, and by n - 1.


@dataclasses.dataclass(frozen=True)
class _Dependences:
    """HSIC of the first with the second network's features, and of each with itself."""

    first: Callable[..., jax.Array]
    second: Callable[..., jax.Array]
    estimator: str

    def __call__(self, params: Any, other: Any, batch: tuple[Any, ...]) -> jax.Array:
        a, b = (_gram(f(p, *batch)) for f, p in ((self.first, params), (self.second, other)))
        hsic = _unbiased if self.estimator == "unbiased" else _biased
        return jnp.stack([hsic(a, b), hsic(a, a), hsic(b, b)])


def _gram(features: jax.Array) -> jax.Array:
    """Scalar products of the examples, with features of mean zero."""
    flat = features.reshape((features.shape[0], -1))
    flat = flat.astype(tree_math.accumulator_dtype(jnp.promote_types(flat.dtype, jnp.float32)))
    # The unbiased estimate does not change when all features are moved; small numbers lose fewer
    # digits.
    flat = flat - jnp.mean(flat, axis=0, keepdims=True)
    return jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)


def _biased(a: jax.Array, b: jax.Array) -> jax.Array:
    """The Hilbert-Schmidt independence criterion of the examples themselves."""
    return jnp.sum(a * b) / (len(a) - 1) ** 2


def _unbiased(a: jax.Array, b: jax.Array) -> jax.Array:
    """The unbiased estimate of it, without the products of an example with itself."""
    n = len(a)
    a, b = (x * (1 - jnp.eye(n, dtype=x.dtype)) for x in (a, b))
    total_a, total_b = jnp.sum(a), jnp.sum(b)
    both = jnp.sum(jnp.sum(a, axis=0) * jnp.sum(b, axis=0))
    value = jnp.sum(a * b) + total_a * total_b / ((n - 1) * (n - 2)) - 2 * both / (n - 2)
    return value / (n * (n - 3))


@dataclasses.dataclass(frozen=True)
class _Cka:
    function: _Dependences

    def __call__(
        self, mean: _batches.Mean, loops: _batches.Loops, params: Any, other: Any
    ) -> jax.Array:
        del loops
        cross, first, second = mean(self.function, params, other)
        return cross / jnp.sqrt(first * second)


def cka(
    features_fn: Callable[..., jax.Array],
    params: optax.Params,
    other_params: optax.Params,
    batches: _batches.Batches,
    *,
    weights: _batches.Weights = None,
    other_features_fn: Callable[..., jax.Array] | None = None,
    estimator: Literal["unbiased", "biased"] = "unbiased",
) -> jax.Array:
    r"""Linear centred kernel alignment of the features of two networks, over minibatches.

    .. math:: \sum_b H(K_b, K'_b) \big/ \sqrt{\sum_b H(K_b, K_b) \, \sum_b H(K'_b, K'_b)}

    Args:
      features_fn, other_features_fn: of (params, batch), [examples, ...]; None: the first. Static.
      params, other_params: the first network and the second.
      batches, weights: the data, four examples a batch at least; see `hessian_vector_product`.
      estimator: of H, HSIC; "biased" rises as batches shrink, and takes two at least. Static.

    Returns:
      A scalar: 1 for features equal up to rotation, scale and shift, about 0 for unrelated ones.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> x = jnp.array([[[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 3.0], [0.0, 2.0]]])
      >>> print(f"{measures.cka(lambda w, x: x @ w, jnp.eye(2), -2 * jnp.eye(2), x):.4f}")
      1.0000

    References:
      Kornblith, Norouzi, Lee, Hinton. Similarity of Representations Revisited. arXiv:1905.00414.
      Nguyen, Raghu, Kornblith. Do Wide and Deep Networks Learn the Same Things? arXiv:2010.15327

    Cost: one forward pass of each network, and batch size squared times features; one batch.
    """
    checks.check_choice("estimator", estimator, FEWEST)
    data = _batches.weigh(batches, weights)
    other_fn = features_fn if other_features_fn is None else other_features_fn
    shapes = [
        _variables.check_evaluates(f, p, data)
        for f, p in ((features_fn, params), (other_fn, other_params))
    ]
    sizes = [shape.shape[0] if shape.shape else 0 for shape in shapes]
    if sizes[0] != sizes[1] or sizes[0] < FEWEST[estimator]:
        raise ValueError(
            f"The networks give features of {sizes[0]} and {sizes[1]} examples a batch: cka needs "
            f"as many of both, and at least {FEWEST[estimator]}."
        )
    return _batches.run(
        _Cka(_Dependences(features_fn, other_fn, estimator)), params, data, other_params
    )


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """A mean over examples of what two networks' outputs say."""

    first: Callable[..., jax.Array]
    second: Callable[..., jax.Array]
    compare: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, params: Any, other: Any, batch: tuple[Any, ...]) -> jax.Array:
        outputs = self.first(params, *batch), self.second(other, *batch)
        value = jnp.mean(self.compare(*outputs), dtype=jnp.result_type(float))
        # The largest of NaN is no prediction.
        return jnp.where(
            jnp.isfinite(outputs[0]).all() & jnp.isfinite(outputs[1]).all(), value, jnp.nan
        )


@dataclasses.dataclass(frozen=True)
class _Comparison:
    function: _Outputs

    def __call__(
        self, mean: _batches.Mean, loops: _batches.Loops, params: Any, other: Any
    ) -> jax.Array:
        del loops
        return mean(self.function, params, other)


def prediction_disagreement(
    model_fn: Callable[..., jax.Array],
    params: optax.Params,
    other_params: optax.Params,
    batches: _batches.Batches,
    *,
    weights: _batches.Weights = None,
    other_model_fn: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    r"""The share of examples that two networks classify differently.

    .. math:: \tfrac1n \sum_i \mathbb 1 [\arg\max f(x_i) \ne \arg\max f'(x_i)]

    Args:
      model_fn: the outputs, `model_fn(params, batch)`, [examples, classes]. Static.
      params, other_params: the first network and the second.
      batches, weights: the data; see `hessian_vector_product`.
      other_model_fn: outputs of the second network; None: `model_fn`. Static.

    Returns:
      A scalar in [0, 1]; NaN where an output is not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> x, w = jnp.array([[[1.0, 2.0], [3.0, 1.0], [5.0, 1.0]]]), jnp.diag(jnp.array([1.0, 4.0]))
      >>> print(measures.prediction_disagreement(lambda w, x: x @ w, jnp.eye(2), w, x))
      0.33333334

    References:
      Fort, Hu, Lakshminarayanan. Deep Ensembles: A Loss Landscape Perspective. arXiv:1912.02757

    Cost: one forward pass of each network.
    """
    return _compare(_differ, model_fn, params, other_params, batches, weights, other_model_fn)


def jensen_shannon(
    model_fn: Callable[..., jax.Array],
    params: optax.Params,
    other_params: optax.Params,
    batches: _batches.Batches,
    *,
    weights: _batches.Weights = None,
    other_model_fn: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    r"""The Jensen-Shannon divergence of two networks' predictive distributions, in the mean.

    .. math:: \tfrac1n \sum_i \tfrac12 \mathrm{KL}(p_i \| m_i) + \tfrac12 \mathrm{KL}(p'_i \| m_i),
       \quad m_i = \tfrac12 (p_i + p'_i)

    Args:
      model_fn: the logits, `model_fn(params, batch)`, [examples, classes]. Static.
      params, other_params: the first network and the second.
      batches, weights: the data; see `hessian_vector_product`.
      other_model_fn: logits of the second network; None: `model_fn`. Static.

    Returns:
      A scalar in [0, ln 2], in nats; NaN where a logit is not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flatopt import measures
      >>> x, eye = 99 * jnp.eye(2)[None], jnp.eye(2)  # Sure of themselves, and not of one mind.
      >>> print(f"{measures.jensen_shannon(lambda w, x: x @ w, eye, -eye, x):.4f}")
      0.6931

    References:
      Lin. Divergence Measures Based on the Shannon Entropy. 1991

    Cost: one forward pass of each network.
    """
    return _compare(_diverge, model_fn, params, other_params, batches, weights, other_model_fn)


def _differ(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.argmax(first, axis=-1) != jnp.argmax(second, axis=-1)


def _diverge(first: jax.Array, second: jax.Array) -> jax.Array:
    logs = [
        jax.nn.log_softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        for x in (first, second)
    ]
    mixture = jnp.logaddexp(*logs) - jnp.log(2)
    first, second = (jnp.sum(jnp.exp(log) * (log - mixture), axis=-1) for log in logs)
    return (first + second) / 2


def _compare(
    compare: Callable[[jax.Array, jax.Array], jax.Array],
    model_fn: Callable[..., jax.Array],
    params: optax.Params,
    other_params: optax.Params,
    batches: _batches.Batches,
    weights: _batches.Weights,
    other_model_fn: Callable[..., jax.Array] | None,
) -> jax.Array:
    """Checks the arguments, and takes the mean over the data."""
    data = _batches.weigh(batches, weights)
    other_fn = model_fn if other_model_fn is None else other_model_fn
    shapes = [
        _variables.check_evaluates(f, p, data).shape
        for f, p in ((model_fn, params), (other_fn, other_params))
    ]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            f"The networks give outputs of shapes {shapes[0]} and {shapes[1]}: they must be equal, "
            "[examples, classes]."
        )
    function = _Outputs(model_fn, other_fn, compare)
    return _batches.run(_Comparison(function), params, data, other_params)
