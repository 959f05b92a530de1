"""Curvature of whole layers in Kronecker factors: solves and spectra for one pass over the data."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, kronecker, layers, rng, tree_math
from flatopt._core.layer_statistics import LayerStatistics, StatisticsFunction

Scales = dict[str, jax.Array]


class KfacCurvature(NamedTuple):
    r"""The Gauss-Newton matrix of each layer in two factors, and what it does to a tree.

    .. math:: F + \lambda I = \mathrm{diag}_l \; (Q_A \otimes Q_G) (S + \lambda) (Q_A \otimes Q_G)^T

    Trees are like the parameters, float32 at least in results, and zero in leaves of no layer.
    It is a pytree; `_replace(damping=...)` changes the damping for nothing.

    Attributes:
      bases: by layer, the eigenvectors of A and of G.
      scales: by layer, `[rows, columns]`, S: the curvature along each pair of them.
      damping: :math:`\lambda`, in all that follows.
    """

    bases: dict[str, kronecker.Factors]
    scales: Scales
    damping: jax.Array

    def matvec(self, vector: optax.Params) -> optax.Params:
        r"""Returns :math:`(F + \lambda I) v`."""
        return self._apply(vector, lambda scales: scales + self.damping)

    def solve(self, vector: optax.Params) -> optax.Params:
        r"""Returns :math:`(F + \lambda I)^{-1} v`."""
        return self._apply(vector, lambda scales: 1 / (scales + self.damping))

    def sample(self, key: rng.KeyLike, params: optax.Params, examples: float = 1) -> optax.Params:
        r"""Returns a draw of Laplace's :math:`N(w, (F + \lambda I)^{-1} / n)`, n being `examples`.

        Leaves of no layer stay as they are.
        """
        noise = optax.tree.random_like(rng.as_key(key), _widen(params), jax.random.normal)
        moved = self._apply(noise, lambda scales: jax.lax.rsqrt(examples * (scales + self.damping)))
        return optax.tree.cast_like(optax.tree.add(_widen(params), moved), params)

    def eigenvalues(self) -> jax.Array:
        """Returns all eigenvalues of all layers, the largest first."""
        found = [jnp.ravel(scales) for scales in self.scales.values()]
        return jnp.sort(jnp.concatenate(found), descending=True) + self.damping

    def trace(self) -> jax.Array:
        """Returns the sum of the eigenvalues."""
        return jnp.sum(self.eigenvalues())

    def logdet(self) -> jax.Array:
        """Returns the sum of the logarithms of the eigenvalues."""
        return jnp.sum(jnp.log(self.eigenvalues()))

    def _apply(
        self, vector: optax.Params, function: Callable[[jax.Array], jax.Array]
    ) -> optax.Params:
        """Multiplies by the matrix whose eigenvalues are `function` of the scales."""
        leaves, structure = jax.tree.flatten(_widen(vector))
        found, results = layers.find_layers(vector), [jnp.zeros_like(x) for x in leaves]
        for name, (q_a, q_g) in self.bases.items():
            layer = found.get(name)
            if layer is None or (layer.rows, layer.outputs) != self.scales[name].shape:
                raise ValueError(
                    f"vector has no layer {name!r} of {self.scales[name].shape[0]} rows, its bias "
                    f"included, and {self.scales[name].shape[1]} columns: it must be a tree like "
                    "the parameters."
                )
            inside = function(self.scales[name]) * (q_a.T @ layers.join(layer, leaves) @ q_g)
            layers.put_back(layer, q_a @ inside @ q_g.T, results)
        return jax.tree.unflatten(structure, results)


def kfac_curvature(
    stats_fn: StatisticsFunction | Sequence[StatisticsFunction],
    params: optax.Params,
    *,
    damping: float = 0.0,
    scales: str = "product",
) -> KfacCurvature:
    r"""Curvature of a model's layers in Kronecker factors: solves, determinant, all eigenvalues.

    .. math:: F = \mathrm{diag}_l \; A_l \otimes G_l

    Args:
      stats_fn: of `make_stats_fn(model, x)`; or one a batch, in a list, whose mean is taken.
      params, damping: where to take it; :math:`\lambda` >= 0, added to each eigenvalue.
      scales: "product" of eigenvalues of the factors, K-FAC; "measured" on examples, EKFAC. Static.

    Returns:
      A `KfacCurvature`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> model = lambda w, x: flatopt.tap("", x, x @ w["kernel"])
      >>> stats_fn = flatopt.make_stats_fn(model, jnp.array([[3.0, 4.0]]), loss="squared")
      >>> found = flatopt.measures.kfac_curvature(stats_fn, {"kernel": jnp.ones([2, 1])})
      >>> print(found.eigenvalues())
      [25.  0.]

    References:
      Martens, Grosse. Optimizing Neural Networks with Kronecker-factored Approximate Curvature.
      arXiv:1503.05671. George et al. (EKFAC). arXiv:1806.03884

    Cost: 1 pass of statistics over the data, "measured" 2, and the eigenvectors of the factors.
    """
    checks.check_number("damping", damping, low=0.0, schedule_allowed=False)
    checks.check_choice("scales", scales, ("product", "measured"))
    functions = [stats_fn] if callable(stats_fn) else list(stats_fn)
    if not functions or not all(map(callable, functions)):
        raise ValueError(
            "stats_fn must be a function of the parameters, or several in a list, such as "
            "[flatopt.make_stats_fn(model, x) for x in batches]."
        )
    mean = _mean([function(params) for function in functions])
    found = {name: (kronecker.eigh(x.a), kronecker.eigh(x.g)) for name, x in mean.items()}
    bases = {name: (a[1], g[1]) for name, (a, g) in found.items()}
    if scales == "product":
        sizes = {name: jnp.outer(a[0], g[0]) for name, (a, g) in found.items()}
    else:
        seen = _mean([function(params, bases) for function in functions])
        sizes = {name: jnp.asarray(seen[name].scales) for name in bases}
    dtype = jnp.result_type(*sizes.values())
    return KfacCurvature(bases, sizes, jnp.asarray(damping, dtype))


def _mean(seen: list[dict[str, LayerStatistics]]) -> dict[str, LayerStatistics]:
    return optax.tree.scale(1 / len(seen), jax.tree.map(lambda *each: sum(each), *seen))


def _widen(tree: Any) -> Any:
    def widen(x: Any) -> jax.Array:
        return jnp.asarray(x).astype(tree_math.accumulator_dtype(jnp.result_type(x)))

    return jax.tree.map(widen, tree)
