"""SAM-ON (Müller et al., arXiv:2306.04226): the ascent moves the normalisation layers only."""

from typing import Any

import jax
import optax

from flatopt._core import checks, registry
from flatopt._sam.ascent import mask_displacement, scale_to_norm
from flatopt._sam.gradient_at import ascent_stage


@registry.method("stage", needs=("grad_fn",))
def sam_on(
    rho: optax.ScalarOrSchedule,
    *,
    mask: Any = None,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM-ON: the ascent moves the normalisation layers only.

    .. math:: g \leftarrow \nabla L(w + \rho \, (m \circ g) / \|m \circ g\|)

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule; see `sam`.
      mask: what moves; see `mask_displacement`. None: `normalisation_mask`. Static.
      start, every: when it acts; see `gradient_at`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.sam_on(rho=0.5)
      >>> w = {"dense": {"kernel": jnp.array([3.0])}, "norm": {"scale": jnp.array([1.0])}}
      >>> grads, _ = tx.update(w, tx.init(w), w, grad_fn=lambda w, i: w)
      >>> print(grads["dense"]["kernel"], grads["norm"]["scale"])
      [3.] [1.5]

    References:
      Müller, Vlaar, Rolnick, Hein. Normalization Layers Are All That Sharpness-Aware Minimization
      Needs. arXiv:2306.04226

    Cost: 1 extra gradient; 0 copies (+1 temporary).
    """
    checks.check_number("rho", rho, low=0.0)
    chosen = mask_displacement(normalisation_mask if mask is None else mask)
    perturbation = optax.chain(chosen, scale_to_norm(rho))
    return ascent_stage(rho, perturbation, start=start, every=every)


def normalisation_mask(params: optax.Params) -> Any:
    r"""Marks the weights of normalisation layers: every leaf called `scale`, and those beside it.

    .. math:: m_i = 1 \iff i \text{ stands in one dict with a leaf named } scale

    Args:
      params: parameters as nested mappings or objects, as of Flax or Haiku.

    Returns:
      A tree of bools with the structure of `params`; an error if there is no such leaf.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> params = {"dense": {"bias": jnp.ones(2)}, "norm": {"bias": 0.0, "scale": 1.0}}
      >>> print(flatopt.normalisation_mask(params))
      {'dense': {'bias': False}, 'norm': {'bias': True, 'scale': True}}

    References:
      Müller, Vlaar, Rolnick, Hein. Normalization Layers Are All That Sharpness-Aware Minimization
      Needs. arXiv:2306.04226

    Cost: 0 gradients.
    """
    paths, structure = jax.tree.flatten_with_path(params)
    names = [[_name(entry) for entry in path] for path, _ in paths]
    # A leaf of flax.nnx.State is called `value` or nothing below its own name.
    layers = {tuple(path[: path.index("scale")]) for path in names if "scale" in path}
    if not layers:
        raise ValueError(
            "normalisation_mask found no leaf named 'scale' in params: pass `mask=`, a tree of "
            "bools that marks the weights of the normalisation layers."
        )
    marks = [any(tuple(path[: len(layer)]) == layer for layer in layers) for path in names]
    return jax.tree.unflatten(structure, marks)


def _name(entry: Any) -> str:
    """Name of one step on the way to a leaf."""
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
