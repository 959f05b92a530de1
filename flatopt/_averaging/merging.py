"""Merging models: WSM (arXiv:2507.17634), LAWA (arXiv:2209.14981), soups (arXiv:2203.05482)."""

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

    .. math:: \theta_0 + \sum_{i=1}^{n-1} k(\tfrac{i}{n}) \, (\theta_i - \theta_{i-1})
      = \sum_{i=0}^{n-1} c_i \theta_i, \qquad c_i = k(\tfrac{i}{n}) - k(\tfrac{i+1}{n})

    Args:
      kernel: "linear" (:math:`k(x) = 1 - x`: equal weights), "cosine"
        (:math:`(1 + \cos \pi x) / 2`: the middle weighs most), "1-sqrt" (:math:`1 - \sqrt x`: the
        oldest weighs most), or a function of arrays in [0, 1] that falls from 1 to 0. Static.
      number: how many checkpoints of a run at a constant rate, n >= 1, oldest first. Static.

    Returns:
      float array [number], which sums to 1.

    Examples:
      >>> import flatopt
      >>> print(flatopt.merge_weights("1-sqrt", 4).round(2))
      [0.5  0.21 0.16 0.13]

    References:
      Tian et al. WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
      Pre-training. arXiv:2507.17634

    Cost: 0 extra gradients; 0 copies.
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
      weights: array [number], such as `merge_weights("cosine", number)`; may be traced and
        differentiated. None: the mean.

    Returns:
      Tree like the parameters, summed in float32 at least, in the dtypes of `stack`. Integer leaves
      are those of the last checkpoint.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> stack = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])}
      >>> print(flatopt.merge_params(stack, jnp.array([0.25, 0.75]))["w"])
      [2.5 5. ]

    References:
      Kaddour. Stop Wasting My Time! arXiv:2209.14981

    Cost: 0 extra gradients; 1 copy.
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

    .. math:: S \leftarrow S \cup \{i\} \quad \text{if} \quad
      s\big(\text{mean of } S \cup \{i\}\big) \ge s\big(\text{mean of } S\big)

    Args:
      stack: parameters stacked along their first axis, of runs that share their start.
      score_fn: function from parameters to a score on held-out data, higher is better. Any Python:
        it is called outside of `jit`, and may be jitted itself.

    Returns:
      The mean, and the positions in `stack` that make it up, in the order in which they joined,
      best alone first. It scores at least as well as the best single one.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> print(*flatopt.greedy_soup(jnp.array([0.0, 3.0, 8.0]), lambda w: -abs(w - 2.0)))
      1.5 [1, 0]

    References:
      Wortsman et al. Model soups: averaging weights of multiple fine-tuned models improves accuracy
      without increasing inference time. arXiv:2203.05482

    Cost: 0 extra gradients; 2 copies and a slice of each model; `score_fn` twice a model, less one.
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
