"""Merging checkpoints: weights that stand in for a decaying learning rate, and the greedy soup."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, tree_math

_KERNELS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + jnp.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - jnp.sqrt(x),
}


def merge_weights(kernel: str | Callable[[jax.Array], jax.Array], number: int) -> jax.Array:
    r"""Weights for merging checkpoints, after the learning-rate decay that they stand in for.

    A constant learning rate gives checkpoints :math:`\theta_0, \dots, \theta_{n-1}`, oldest first.
    Had the rate decayed by the factors :math:`k(i/n)`, each step between two of them would have
    been that much shorter:

    .. math::
      \theta_0 + \sum_{i=1}^{n-1} k(i/n) \, (\theta_i - \theta_{i-1})
      = \sum_{i=0}^{n-1} c_i \theta_i, \qquad
      c_i = k\big(\tfrac{i}{n}\big) - k\big(\tfrac{i+1}{n}\big)

    Args:
      kernel: "linear" (:math:`k(x) = 1 - x`: equal weights), "cosine"
        (:math:`(1 + \cos \pi x) / 2`: the middle weighs most), "1-sqrt"
        (:math:`1 - \sqrt x`: the oldest weighs most), or a function of arrays in [0, 1] that falls
        from 1 to 0. Static.
      number: how many checkpoints, n >= 1. Static.

    Returns:
      float array [number], which sums to 1.

    Raises:
      ValueError: if `kernel` is an unknown name or `number` is below 1.

    Examples:
      >>> import flatopt
      >>> print(flatopt.merge_weights("linear", 4))
      [0.25 0.25 0.25 0.25]
      >>> print(flatopt.merge_weights("1-sqrt", 4).round(2))
      [0.5  0.21 0.16 0.13]

    References:
      Tian et al. WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
      Pre-training. arXiv:2507.17634

    Notes:
      Exact where the steps do not depend on the rate; otherwise a guess at what the decay would
      have done. Costs no gradient.
    """
    checks.check_count("number", number, 1)
    if not callable(kernel) and kernel not in _KERNELS:
        raise ValueError(
            f"kernel={kernel!r} is unknown: it must be one of {', '.join(_KERNELS)}, or a function "
            "that falls from 1 to 0 on [0, 1]."
        )
    decay = kernel if callable(kernel) else _KERNELS[kernel]
    factors = decay(jnp.linspace(0.0, 1.0, number + 1))
    return factors[:-1] - factors[1:]


def merge_params(stack: optax.Params, weights: jax.typing.ArrayLike | None = None) -> optax.Params:
    r"""Weighted sum of parameters that are stacked along their first axis.

    .. math:: \bar w = \sum_i c_i \, \theta_i

    Args:
      stack: tree whose leaves have one more axis than the parameters', in front: `snapshot_params`,
        or `jax.tree.map(lambda *w: jnp.stack(w), *checkpoints)`.
      weights: array [number], such as `merge_weights("cosine", number)`. None: the mean. May be
        traced and differentiated: train the weights by the gradient of a validation loss.

    Returns:
      Tree like the parameters, summed in float32 at least, in the dtypes of `stack`. Integer leaves
      are those of the last checkpoint.

    Raises:
      ValueError: if the number of weights is not that of the checkpoints.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> stack = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])}
      >>> print(flatopt.merge_params(stack)["w"])
      [2. 4.]
      >>> print(flatopt.merge_params(stack, jnp.array([0.25, 0.75]))["w"])
      [2.5 5. ]

    References:
      Kaddour. Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight
      Averaging. arXiv:2209.14981

    Notes:
      Merge models of one run, or of runs that share their start: others do not lie in one valley.
      BatchNorm statistics belong to a model: recompute them for the merged one.
    """

    def leaf(stack: jax.Array) -> jax.Array:
        number = stack.shape[0]
        if weights is not None and jnp.shape(weights) != (number,):
            raise ValueError(
                f"weights has shape {jnp.shape(weights)}: it must be ({number},), one for each "
                "tree in `stack`."
            )
        if not jnp.issubdtype(stack.dtype, jnp.inexact):
            return stack[-1]
        wide = stack.astype(tree_math.accumulator_dtype(stack.dtype))
        if weights is None:
            return jnp.mean(wide, axis=0).astype(stack.dtype)
        # Elementwise: a dot product would be rounded to TF32 or bfloat16 on accelerators.
        factors = jnp.asarray(weights).reshape(number, *[1] * (stack.ndim - 1))
        return jnp.sum(factors * wide, axis=0).astype(stack.dtype)

    return jax.tree.map(leaf, stack)


def greedy_soup(
    stack: optax.Params, score_fn: Callable[[optax.Params], Any]
) -> tuple[optax.Params, list[int]]:
    r"""The mean of those checkpoints that help it: each joins if the score does not fall.

    .. math::
      S \leftarrow S \cup \{i\} \quad \text{if} \quad
      s\big(\text{mean of } S \cup \{i\}\big) \ge s\big(\text{mean of } S\big),
      \qquad \text{best } i \text{ first}

    Args:
      stack: parameters stacked along their first axis: `snapshot_params` or checkpoints of runs
        that share their start.
      score_fn: function from parameters to a score on held-out data, higher is better. Any Python:
        it is called outside of `jit`, and may be jitted itself.

    Returns:
      The mean, and the positions in `stack` that make it up, in the order in which they joined. It
      scores at least as well as the best single one.

    Raises:
      ValueError: if `stack` is empty.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> stack = jnp.array([0.0, 3.0, 8.0])
      >>> params, chosen = flatopt.greedy_soup(stack, lambda w: -abs(w - 2.0))
      >>> print(params, chosen)
      1.5 [1, 0]

    References:
      Wortsman et al. Model soups: averaging weights of multiple fine-tuned models improves accuracy
      without increasing inference time. arXiv:2203.05482

    Notes:
      Calls `score_fn` twice for each checkpoint, less one. The score is chosen on, so measure the
      result on other data. For a trained average, minimise a validation loss of
      `merge_params(stack, jax.nn.softmax(logits))` over `logits`.
    """
    number = next((leaf.shape[0] for leaf in jax.tree.leaves(stack)), 0)
    if number == 0:
        raise ValueError("stack is empty: it must hold at least one tree of parameters.")
    trees = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(number)]
    scores = [float(score_fn(tree)) for tree in trees]
    # A model that scores NaN comes last: no comparison lets it in.
    best_first = sorted(range(number), key=lambda i: (math.isnan(scores[i]), -scores[i]))
    chosen, soup = best_first[:1], trees[best_first[0]]
    best = scores[best_first[0]]
    for i in best_first[1:]:
        positions = jnp.array([*chosen, i])
        candidate = merge_params(jax.tree.map(lambda x: x[positions], stack))  # noqa: B023
        score = float(score_fn(candidate))
        if score >= best:
            chosen, soup, best = [*chosen, i], candidate, score
    return soup, chosen
