"""SAM on a part of the weights or of the examples: sparse SAM, SAM-ON, ESAM."""

from typing import Any

import jax
import optax

from flatopt import _checks, _tree
from flatopt._gradient_at import ascent_stage
from flatopt._perturbations import mask_displacement, scale_to_norm
from flatopt._random import KeyLike
from flatopt._sparse import drop_displacement


def sparse_sam(
    rho: optax.ScalarOrSchedule,
    mask: Any,
    epsilon: float = _tree.EPSILON,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse SAM: the ascent moves only the weights in a mask.

    .. math:: g \leftarrow \nabla L(w + m \circ \rho \, g / \|g\|)

    Args:
      rho: radius of the whole ascent step, >= 0, of which the mask keeps a part: a number, a traced
        array, or a schedule of the step count. With the number 0 the stage is the identity and
        takes no gradient.
      mask: what moves; see `mask_displacement`. Static. For masks that change use
        `gradient_at(mask_by_fisher(scale_to_norm(rho), ...))` or `mask_at_random`.
      epsilon: what guards the division by the norm, > 0; the authors' program has 1e-7.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> mask = jnp.array([True, False])
      >>> tx = optax.chain(flatopt.sparse_sam(rho=0.5, mask=mask), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.33 -0.4 ]

    References:
      Mi et al. Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach.
      arXiv:2210.05177

    Notes:
      The second gradient is still a whole one: a sparse ascent saves no time. Place: as for `sam`.
      Gradient evaluations: one extra per sharp update. State: two integers; one temporary copy of
      the parameters.
    """
    _checks.check_number("rho", rho, low=0.0)
    perturbation = optax.chain(scale_to_norm(rho, epsilon), mask_displacement(mask))
    return ascent_stage(rho, perturbation, start=start, every=every)


def sam_on(
    rho: optax.ScalarOrSchedule,
    mask: Any = None,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM-ON: the ascent moves the normalisation layers only.

    .. math:: g \leftarrow \nabla L(w + \rho \, (m \circ g) / \|m \circ g\|)

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      mask: what moves; see `mask_displacement`. None: `normalization_mask`. Static.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, `params` or `grad_fn` is missing, or no
        normalisation layer is found.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.sam_on(rho=0.5), optax.sgd(0.1))
      >>> params = {"dense": {"kernel": jnp.array([3.0])}, "norm": {"scale": jnp.array([1.0])}}
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * optax.tree.norm(w, squared=True))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates["dense"]["kernel"], updates["norm"]["scale"])
      [-0.3] [-0.15]

    References:
      Müller, Vlaar, Rolnick, Hein. Normalization Layers Are All That Sharpness-Aware Minimization
      Needs. arXiv:2306.04226

    Notes:
      Unlike `sparse_sam`, the chosen weights get the whole radius. Place: as for `sam`. Gradient
      evaluations: one extra per sharp update. State: two integers; one temporary copy of the
      parameters.
    """
    _checks.check_number("rho", rho, low=0.0)
    chosen = mask_displacement(normalization_mask if mask is None else mask)
    perturbation = optax.chain(chosen, scale_to_norm(rho))
    return ascent_stage(rho, perturbation, start=start, every=every)


def normalization_mask(params: optax.Params) -> Any:
    r"""Marks the weights of normalisation layers: every leaf called `scale`, and those beside it.

    .. math:: m_i = 1 \iff i \text{ stands in one dict with a leaf named } scale

    Args:
      params: parameters as nested mappings or objects, as of Flax or Haiku.

    Returns:
      A tree of bools with the structure of `params`.

    Raises:
      ValueError: if there is no such leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> import flatopt
      >>> params = {"dense": {"bias": jnp.ones(2)}, "norm": {"bias": 0.0, "scale": 1.0}}
      >>> print(flatopt.normalization_mask(params))
      {'dense': {'bias': False}, 'norm': {'bias': True, 'scale': True}}

    References:
      Müller, Vlaar, Rolnick, Hein. Normalization Layers Are All That Sharpness-Aware Minimization
      Needs. arXiv:2306.04226

    Notes:
      BatchNorm, LayerNorm, GroupNorm and RMSNorm of Flax and Haiku are found so. Where a library
      calls its scale otherwise, pass a mask of your own.
    """
    paths, structure = jax.tree.flatten_with_path(params)
    names = [[_name(entry) for entry in path] for path, _ in paths]
    # A leaf of flax.nnx.State is called `value` or nothing below its own name.
    layers = {tuple(path[: path.index("scale")]) for path in names if "scale" in path}
    if not layers:
        raise ValueError(
            "normalization_mask found no leaf named 'scale' in params: pass `mask=`, a tree of "
            "bools that marks the weights of the normalisation layers."
        )
    marks = [any(tuple(path[: len(layer)]) == layer for layer in layers) for path in names]
    return jax.tree.unflatten(structure, marks)


def esam(
    rho: optax.ScalarOrSchedule,
    beta: float = 1.0,
    key: KeyLike = 0,
    per_tensor: bool = False,
    epsilon: float = _tree.EPSILON,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ESAM: the ascent moves random weights, and the second gradient is of the hardest examples.

    .. math::
      g \leftarrow \nabla L_S(w + m \circ \rho \, g / (\beta \|g\|)), \qquad P(m_i = 1) = \beta

    where S are the examples whose loss the ascent raises most. `make_selective_grad_fn` makes the
    `grad_fn` that selects them; with that of `make_grad_fn`, S is the whole batch.

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      beta: share of the weights that move, in (0, 1]; see `drop_displacement`.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      per_tensor: whether whole leaves are drawn, not single weights. Static.
      epsilon: what guards the division by the norm, > 0; the authors' program has 1e-7.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> def losses_fn(w, x):
      ...     return 0.5 * (w - x) ** 2
      >>> tx = optax.chain(flatopt.esam(rho=0.5), optax.sgd(0.1))
      >>> params, x = jnp.array(0.0), jnp.array([-3.0, 1.0])
      >>> losses = losses_fn(params, x)
      >>> grads = flatopt.make_grad_fn(lambda w, x: losses_fn(w, x).mean(), x)(params)
      >>> grad_fn = flatopt.make_selective_grad_fn(losses_fn, x, clean_losses=losses, share=0.5)
      >>> updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      -0.35

    References:
      Du et al. Efficient Sharpness-aware Minimization for Improved Training of Neural Networks.
      arXiv:2110.03141

    Notes:
      With a fixed batch shape the selection saves nothing: the gradient of the others is multiplied
      by zero. Place: as for `sam`. Gradient evaluations: one extra per sharp update, and one
      forward pass if examples are selected. State: one key, three integers; one temporary copy of
      the parameters.
    """
    _checks.check_number("rho", rho, low=0.0)
    perturbation: optax.GradientTransformation = scale_to_norm(rho, epsilon)
    if not (isinstance(beta, int | float) and beta == 1):
        perturbation = optax.chain(perturbation, drop_displacement(beta, key, per_tensor))
    return ascent_stage(rho, perturbation, start=start, every=every)


def _name(entry: Any) -> str:
    """Name of one step on the way to a leaf."""
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
