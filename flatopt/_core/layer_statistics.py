"""Kronecker factors of a model's layers, from one pass: second moments of inputs and gradients."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, layers, rng, taps, tree_math

Bases = Mapping[str, tuple[jax.Array, jax.Array]]


class LayerStatistics(NamedTuple):
    """Statistics of one layer on one batch.

    Attributes:
      a: second moment of the inputs, with a 1 appended last where the layer has a bias.
      g: second moment of the gradients at the output.
      scales: `[rows, columns]`, mean square of each entry of an example's gradient in the bases
        that were asked for; None if none were.
    """

    a: jax.Array
    g: jax.Array
    scales: jax.Array | None = None


class StatisticsFunction(Protocol):
    """What `stats_fn` must be: a callable from parameters to statistics of layers.

    Results are already averaged over devices, as `jax.lax.pmean(stats_fn(params), "data")` does.
    """

    def __call__(
        self, params: optax.Params, bases: Bases | None = None, /
    ) -> dict[str, LayerStatistics]:
        """Returns the statistics by path; those of `bases`, by path, with `scales` in them."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["args", "labels", "key"],
    meta_fields=["model", "loss", "estimate", "sharing"],
)
@dataclasses.dataclass(frozen=True)
class StatsFn:
    """The statistics of a model on given data; a pytree, so that it crosses `jax.jit`.

    Made by `make_stats_fn`.

    Attributes:
      model: the model with its taps, `model(params, *args)`. Static.
      loss: "softmax", "squared", or a function of outputs and labels. Static.
      estimate: "exact", "sampled" or "empirical". Static.
      sharing: "expand" or "reduce". Static.
      args: the batch. Traced.
      labels: of the empirical estimate, or None. Traced.
      key: of the sampled estimate, or None. Traced.
    """

    model: Callable[..., jax.Array]
    loss: Any
    estimate: str
    sharing: str
    args: tuple[Any, ...] = ()
    labels: Any = None
    key: Any = None

    def __call__(
        self, params: optax.Params, bases: Bases | None = None
    ) -> dict[str, LayerStatistics]:
        """Returns the statistics at `params`."""
        checks.require_arrays("params", params)
        zeros = jax.tree.map(
            lambda like: jnp.zeros(like.shape, like.dtype),
            jax.eval_shape(lambda params: self._forward(params, {})[1][1], params),
        )
        outputs, pull, (inputs, _) = jax.vjp(
            lambda z: self._forward(params, z), zeros, has_aux=True
        )
        number = outputs.size // outputs.shape[-1]  # Of terms in the mean of the loss.
        gradients = jax.vmap(lambda column: pull(column)[0])(self._columns(outputs))
        found = layers.find_layers(params)
        unknown = sorted(set(inputs) - set(found))
        if unknown:
            raise ValueError(
                f"name={unknown[0]!r} of a tap is no layer of the parameters, which are "
                f"{', '.join(found)}. A layer's leaves are called kernel and bias, or w and b."
            )
        return {
            name: _statistics(
                _with_ones(x, found[name]),
                gradients[name],
                number,
                self.sharing,
                (bases or {}).get(name),
            )
            for name, x in inputs.items()
        }

    def _forward(self, params: Any, zeros: Any) -> tuple[jax.Array, Any]:
        with taps.record(zeros) as seen:
            outputs = self.model(params, *self.args)
        return outputs, (seen.inputs, seen.outputs)

    def _columns(self, outputs: jax.Array) -> jax.Array:
        """Gradients at the output, `[draws, ...]`, whose second moments are those of the loss."""
        outputs = jax.lax.stop_gradient(outputs)
        if self.estimate == "empirical":
            loss = {"softmax": _cross_entropy, "squared": _half_squared}.get(self.loss, self.loss)
            return jax.grad(lambda y: jnp.sum(loss(y, self.labels)))(outputs)[None]
        if self.estimate == "sampled":
            key = self.key
            if self.loss == "squared":
                return jax.random.normal(key, outputs.shape, outputs.dtype)[None]
            drawn = jax.nn.one_hot(
                jax.random.categorical(key, outputs), outputs.shape[-1], dtype=outputs.dtype
            )
            return (jax.nn.softmax(outputs) - drawn)[None]
        if outputs.ndim != 2:
            raise ValueError(
                f"estimate='exact' takes outputs [batch, classes], not {outputs.shape}: gradients "
                "of several outputs of one example would mix. Use estimate='sampled'."
            )
        eye = jnp.eye(outputs.shape[-1], dtype=outputs.dtype)[:, None, :]
        if self.loss == "squared":
            return jnp.broadcast_to(eye, (len(eye), *outputs.shape))
        p = jax.nn.softmax(outputs)
        return jnp.sqrt(p).T[:, :, None] * (eye - p[None])


def make_stats_fn(
    model: Callable[..., jax.Array],
    *args: Any,
    loss: Any = "softmax",
    estimate: str = "exact",
    labels: Any = None,
    key: rng.KeyLike | None = None,
    sharing: str = "expand",
) -> StatsFn:
    r"""Makes the `stats_fn` of one training step, which `scale_by_kfac` asks when it is due.

    .. math:: A = E[a a^T], \qquad G = E[g g^T], \quad g = \partial \ell / \partial y

    Args:
      model: `model(params, *args)`, with `flatopt.tap` after its layers; the same at every step.
      *args: the inputs of the model.
      loss: "softmax", "squared" (half the squared error), or a function (outputs, labels).
      estimate: "exact", a backward pass a class; "sampled", one, of labels drawn from the model;
        "empirical", one, of the true labels. Static.
      labels: of the empirical estimate.
      key: of the sampled one: another each step.
      sharing: of weights over positions: "expand", each an example, or "reduce", their mean.

    Returns:
      A `StatsFn`, a registered pytree that can be made outside or inside `jax.jit`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> model = lambda w, x: flatopt.tap("out", x, x @ w["out"]["kernel"])
      >>> stats_fn = flatopt.make_stats_fn(model, jnp.array([[1.0], [3.0]]), loss="squared")
      >>> print(stats_fn({"out": {"kernel": jnp.ones([1, 1])}})["out"].a)
      [[5.]]

    Cost: 1 forward pass and 1 backward pass, of gradients at outputs, a column; 0 copies.
    """
    checks.check_choice("estimate", estimate, ("exact", "sampled", "empirical"))
    checks.check_choice("sharing", sharing, ("expand", "reduce"))
    if not (callable(loss) and estimate == "empirical"):
        checks.check_choice("loss", loss, ("softmax", "squared"))
    needed = {"empirical": ("labels", labels), "sampled": ("key", key)}.get(estimate)
    if needed is not None and needed[1] is None:
        raise ValueError(f"{needed[0]}=None: estimate={estimate!r} needs {needed[0]}=.")
    typed = None if key is None else rng.as_key(key)
    return StatsFn(model, loss, estimate, sharing, args, labels, typed)


def _statistics(
    x: jax.Array, g: jax.Array, number: int, sharing: str, bases: Any
) -> LayerStatistics:
    """`x` is `[batch, positions, rows]`, `g` `[draws, batch, ..., columns]`."""
    g = g.reshape(len(g), *x.shape[:2], -1).astype(x.dtype)
    if sharing == "reduce":
        x, g = jnp.mean(x, 1, keepdims=True), jnp.sum(g, 2, keepdims=True)
    a = jnp.einsum("nti,ntj->ij", x, x) / (x.shape[0] * x.shape[1])
    second = jnp.einsum("cnti,cntj->ij", g, g) / number
    if bases is None:
        return LayerStatistics(a, second)
    gradients = jnp.einsum("nti,cntj->cnij", x @ bases[0], g @ bases[1])
    return LayerStatistics(a, second, jnp.sum(jnp.square(gradients), (0, 1)) / number)


def _with_ones(x: jax.Array, layer: layers.Layer) -> jax.Array:
    """Inputs as `[batch, positions, rows]`, in float32 at least."""
    if x.size % (len(x) * layer.inputs):
        raise ValueError(f"inputs of shape {x.shape} do not fit a layer of {layer.inputs} inputs.")
    x = x.reshape(len(x), -1, layer.inputs).astype(tree_math.accumulator_dtype(x.dtype))
    if layer.bias is None:
        return x
    return jnp.concatenate([x, jnp.ones_like(x[:, :, :1])], 2)


def _cross_entropy(outputs: jax.Array, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def _half_squared(outputs: jax.Array, labels: Any) -> jax.Array:
    return 0.5 * jnp.square(outputs - labels)
