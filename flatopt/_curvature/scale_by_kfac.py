"""K-FAC (Martens, Grosse, arXiv:1503.05671) and EKFAC (George et al., arXiv:1806.03884)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, kronecker, layers, registry, tree_math
from flatopt._core.layer_statistics import LayerStatistics
from flatopt._core.timing import Every, nonnegative_at

Matrices = dict[str, tuple[jax.Array, ...]]
_INVERSES = ("factored", "exact", "eigen")


class KfacState(NamedTuple):
    """State of `scale_by_kfac`.

    Attributes:
      step: int32 scalar, number of updates so far.
      weight: scalar, weight of the batches that are in the factors.
      factors: by layer, A and G.
      inverses: by layer, the inverses of the damped factors; with `inverse` "exact" or "eigen",
        their eigenvectors, and the curvature of each entry in that basis.
      fallback_state: state of `fallback`.
    """

    step: jax.Array
    weight: jax.Array
    factors: Matrices
    inverses: Matrices
    fallback_state: optax.OptState


def natural_gradient(d: jax.Array, inverses: tuple[jax.Array, ...], damping: Any) -> jax.Array:
    r"""The paper's step of one layer, :math:`A^{-1} D G^{-1}`, or a division in its basis."""
    if len(inverses) == 2:
        return inverses[0] @ d @ inverses[1]
    return kronecker.divide_in_basis(d, (inverses[0], inverses[1]), inverses[2], damping)


def kl_factor(inner_product: jax.Array, max_kl: Any, learning_rate: Any) -> jax.Array:
    r""":math:`\min(1, \sqrt{c / (\eta^2 \langle v, g \rangle)})`."""
    length = jnp.square(learning_rate) * inner_product
    return jnp.sqrt(max_kl / jnp.maximum(length, max_kl))


@registry.method("stage", needs=("stats_fn",))
def scale_by_kfac(
    damping: optax.ScalarOrSchedule,
    *,
    decay: float = 0.95,
    inverse: str = "factored",
    every: int | None = None,
    inverse_every: int | None = None,
    max_kl: float | None = None,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    layers: Callable[[str], bool] | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC and EKFAC: each layer's gradient, divided by its Fisher matrix in two factors.

    .. math:: U = (A + \sqrt\lambda \pi I)^{-1} \, D \, (G + \sqrt\lambda / \pi I)^{-1}

    Args:
      damping: :math:`\lambda` > 0: a number, a traced array, or a schedule.
      decay: of the means of A and G, in [0, 1); they are without bias from the first step on.
      inverse: "factored"; "exact", of :math:`A \otimes G + \lambda I`; "eigen" is EKFAC. Static.
      every, inverse_every: periods of statistics (None: 1) and inverses (None: 5). Static.
      max_kl, learning_rate: bound on the squared length of a step in the metric; its rate.
      layers: whether a layer is one, by its path; None: all, "kernel" and "bias" side by side.
      fallback: for leaves of no layer; None leaves them as they are.

    Returns:
      A stage, followed by momentum and a learning rate; `update` needs `params` and `stats_fn`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> w, tx = {"kernel": jnp.ones([1, 1])}, flatopt.scale_by_kfac(1.0)
      >>> model = lambda w, x: flatopt.tap("", x, x @ w["kernel"])
      >>> stats_fn = flatopt.make_stats_fn(model, jnp.array([[3.0]]), loss="squared")
      >>> print(tx.update(w, tx.init(w), w, stats_fn=stats_fn)[0]["kernel"])  # 1 / (9 + 1)
      [[0.1]]

    Cost: 0 extra gradients, 1 pass of statistics in `every` updates; 4 copies of square layers.
    """
    _check(damping, decay, inverse, max_kl, learning_rate)
    kfac = _Kfac(
        damping=damping,
        decay=decay,
        inverse=inverse,
        when=Every.before_update(None, every),
        when_inverse=Every.before_update(None, 5 if inverse_every is None else inverse_every),
        max_kl=max_kl,
        learning_rate=learning_rate,
        choose=layers,
        fallback=optax.identity() if fallback is None else fallback,
    )
    return optax.GradientTransformationExtraArgs(kfac.init, kfac.update)


@dataclasses.dataclass(frozen=True)
class _Kfac:
    """The arguments of `scale_by_kfac`, and what is done with them."""

    damping: optax.ScalarOrSchedule
    decay: float
    inverse: str
    when: Every
    when_inverse: Every
    max_kl: float | None
    learning_rate: optax.ScalarOrSchedule
    choose: Callable[[str], bool] | None
    fallback: optax.GradientTransformation

    def _rest(self) -> optax.GradientTransformationExtraArgs:
        """The fallback, which sees the leaves of no layer alone."""
        checks.as_transformation("fallback", self.fallback)

        def mask(tree: Any) -> Any:
            found = layers.find_layers(tree, self.choose).values()
            taken = {number for layer in found for number in layer.leaves}
            leaves, structure = jax.tree.flatten(tree)
            return jax.tree.unflatten(structure, [i not in taken for i in range(len(leaves))])

        return optax.with_extra_args_support(optax.masked(self.fallback, mask))

    def init(self, params: optax.Params) -> KfacState:
        found, leaves = layers.find_layers(params, self.choose), jax.tree.leaves(params)
        factors: Matrices = {}
        inverses: Matrices = {}
        for name, layer in found.items():
            matrix = layers.join(layer, leaves)
            dtype, zero = matrix.dtype, jnp.zeros_like(matrix[:1, :1])
            sizes = layer.rows, layer.outputs
            # Laid out as their successors, which are made of the parameters' own numbers.
            factors[name] = tuple(zero + jnp.zeros([n, n], dtype) for n in sizes)
            inverses[name] = tuple(zero + jnp.eye(n, dtype=dtype) for n in sizes)
            if self.inverse != "factored":
                inverses[name] += (jnp.ones_like(matrix),)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(factors))
        step, weight = jnp.zeros([], jnp.int32), jnp.zeros([], dtype)
        return KfacState(step, weight, factors, inverses, self._rest().init(params))

    def update(
        self,
        updates: optax.Updates,
        state: KfacState,
        params: optax.Params | None = None,
        *,
        stats_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KfacState]:
        checks.require_params("scale_by_kfac", params)
        found = layers.find_layers(params, self.choose)
        rest, fallback_state = self._rest().update(
            updates, state.fallback_state, params, **extra_args
        )
        if not found:
            step = optax.safe_increment(state.step)
            return rest, state._replace(step=step, fallback_state=fallback_state)
        _require_stats_fn(stats_fn)
        carry = state.weight, state.factors, state.inverses
        carry = self.when.branch(state.step, lambda c: self._take_in(c, stats_fn, params), carry)
        weight, factors, inverses = carry
        damping = nonnegative_at(self.damping, state.step)
        inverses = self.when_inverse.branch(
            state.step, lambda _: self._invert(factors, damping), inverses
        )
        leaves, structure = jax.tree.flatten(rest)
        steps = self._steps(found, jax.tree.leaves(updates), inverses, damping, state.step)
        for name, layer in found.items():
            layers.put_back(layer, steps[name], leaves)
        step = optax.safe_increment(state.step)
        new = KfacState(step, weight, factors, inverses, fallback_state)
        return jax.tree.unflatten(structure, leaves), new

    def _take_in(self, carry: Any, stats_fn: Any, params: Any) -> Any:
        """The means with this batch in them; as they were if its statistics are not finite."""
        (weight, factors, inverses), eigen = carry, self.inverse == "eigen"
        seen = stats_fn(params, {k: v[:2] for k, v in inverses.items()} if eigen else None)
        new = {name: _of_layer(seen, name, factors[name]) for name in factors}
        new_weight = self.decay * weight + 1
        finite = jnp.isfinite(optax.tree.sum(new))
        share = jnp.where(finite, 1 / new_weight, 0)

        def towards(old: jax.Array, value: Any) -> jax.Array:
            return jnp.where(finite, old + share * (value - old), old).astype(old.dtype)

        factors = {k: (towards(a, new[k].a), towards(g, new[k].g)) for k, (a, g) in factors.items()}
        if eigen:
            inverses = {k: (*v[:2], towards(v[2], new[k].scales)) for k, v in inverses.items()}
        return jnp.where(finite, new_weight, weight), factors, inverses

    def _invert(self, factors: Matrices, damping: Any) -> Matrices:
        """Inverses of the damped factors, or their eigenvectors and products of eigenvalues."""
        if self.inverse == "factored":
            return {k: kronecker.factored_inverses(a, g, damping) for k, (a, g) in factors.items()}
        inverses: Matrices = {}
        for name, (a, g) in factors.items():
            (values_a, vectors_a), (values_g, vectors_g) = kronecker.eigh(a), kronecker.eigh(g)
            inverses[name] = vectors_a, vectors_g, jnp.outer(values_a, values_g)
        return inverses

    def _steps(
        self, found: Any, leaves: list[jax.Array], inverses: Matrices, damping: Any, step: jax.Array
    ) -> dict[str, jax.Array]:
        """The steps of the layers, cut to `max_kl` together."""
        gradients = {name: layers.join(layer, leaves) for name, layer in found.items()}
        steps = {k: natural_gradient(d, inverses[k], damping) for k, d in gradients.items()}
        if self.max_kl is None:
            return steps
        rate = nonnegative_at(self.learning_rate, step)
        factor = kl_factor(tree_math.vdot(steps, gradients), self.max_kl, rate)
        return tree_math.scale(factor, steps)


def _of_layer(seen: Any, name: str, factors: tuple[jax.Array, ...]) -> LayerStatistics:
    """The statistics of one layer; raises where they are missing, or of another shape."""
    found = seen.get(name)
    if found is None or (found.a.shape, found.g.shape) != tuple(x.shape for x in factors):
        what = "nothing" if found is None else f"A {found.a.shape} and G {found.g.shape}"
        raise ValueError(
            f"stats_fn gives {what} for the layer {name!r}, whose factors are "
            f"{factors[0].shape} and {factors[1].shape}. Mark it in the model with "
            f"`flatopt.tap({name!r}, inputs, outputs)`, or leave it to `fallback` with "
            f"`layers=lambda name: name != {name!r}`."
        )
    return LayerStatistics(*found)


def _require_stats_fn(stats_fn: Any) -> None:
    if not callable(stats_fn):
        raise ValueError(
            "flatopt.scale_by_kfac needs the statistics of the layers. Add\n"
            "    stats_fn = flatopt.make_stats_fn(model, x)\n"
            "    updates, opt_state = tx.update(grads, opt_state, params, stats_fn=stats_fn)"
        )


def _check(damping: Any, decay: Any, inverse: str, max_kl: Any, learning_rate: Any) -> None:
    checks.check_number("damping", damping, low=0.0, low_allowed=False)
    checks.check_number("decay", decay, low=0.0, high=1.0, high_allowed=False)
    checks.check_choice("inverse", inverse, _INVERSES)
    checks.check_number("learning_rate", learning_rate, low=0.0)
    if max_kl is not None:
        checks.check_number("max_kl", max_kl, low=0.0, low_allowed=False, schedule_allowed=False)
