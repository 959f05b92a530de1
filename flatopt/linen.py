"""Flax linen: a `TrainState` for optimisers with extra arguments; statistics for averages."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

try:
    import flax
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('flatopt.linen needs "flatopt[flax]".', name=error.name) from error

from flax import linen as nn
from flax import struct
from flax.training import train_state

from flatopt._averaging.batch_stats import arguments_of, average_over
from flatopt._averaging.batch_stats import unbiased as _unbiased
from flatopt._core import batches as _batches
from flatopt._core import taps, tree_math, unfolding
from flatopt._core.eval_params import eval_params as _eval_params

_Path = tuple[str, ...]

# What a step computes, and so cannot be given.
_COMPUTED = ("step", "params", "opt_state")


class TrainState(train_state.TrainState, kw_only=True):
    r"""Flax's `TrainState` for optimisers that take `grad_fn`, with BatchNorm's statistics.

    .. math:: (u, s_+) = \texttt{tx.update}(g, s, w, \texttt{**extra}), \qquad w_+ = w + u

    Made by `TrainState.create(apply_fn=..., params=..., tx=..., batch_stats=...)`.

    Attributes:
      batch_stats: the collection of that name, or an empty dictionary for models without one.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import linen as nn
      >>> import flatopt.linen
      >>> model, x = nn.Dense(1, kernel_init=nn.initializers.ones), jnp.array([[3.0, 4.0]])
      >>> tx = optax.chain(flatopt.sam(rho=0.05), optax.sgd(0.01))
      >>> w = model.init(jax.random.key(0), x)["params"]
      >>> state = flatopt.linen.TrainState.create(apply_fn=model.apply, params=w, tx=tx)
      >>> grad_fn = flatopt.make_grad_fn(lambda w: jnp.sum(model.apply({"params": w}, x) ** 2))
      >>> loss, grads = grad_fn.value_and_grad(state.params)
      >>> state = state.apply_gradients(grads=grads, grad_fn=grad_fn)
      >>> print(f"{loss:.2f} {grad_fn.value_and_grad(state.params)[0]:.2f}")
      49.00 10.42

    Cost: 0 extra gradients beside those of `tx`; 1 copy of the statistics.
    """

    batch_stats: Any = struct.field(default_factory=dict)

    def apply_gradients(self, *, grads: optax.Updates, **kwargs: Any) -> "TrainState":
        """Returns the state after one step of `tx`.

        Args:
          grads: the gradient at `params`.
          **kwargs: names of fields, such as `batch_stats`, are replaced; all others (`grad_fn`,
            `value`, ...) are handed to `tx.update`. An optimiser that takes no extra arguments gets
            none, so that SAM and SGD share one loop.

        Raises:
          ValueError: if `step`, `params` or `opt_state` is given: the step computes them.
        """
        computed = [name for name in _COMPUTED if name in kwargs]
        if computed:
            raise ValueError(
                f"apply_gradients computes {', '.join(computed)} itself. To set fields by hand, "
                "call state.replace(...)."
            )
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: value for name, value in kwargs.items() if name in names}
        extra_args = {name: value for name, value in kwargs.items() if name not in names}
        tx = optax.with_extra_args_support(self.tx)
        bound = optax.GradientTransformation(tx.init, functools.partial(tx.update, **extra_args))
        # Flax's own method does the step, with an optimiser that has its extra arguments already.
        state = super(TrainState, self.replace(tx=bound)).apply_gradients(grads=grads)
        return cast(TrainState, state.replace(**{"tx": self.tx, **fields}))

    @property
    def eval_params(self) -> optax.Params:
        """The weights to evaluate: `flatopt.eval_params(opt_state, params)`."""
        return _eval_params(self.opt_state, self.params)


def recompute_batch_stats(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    sample_weighted: bool = True,
    unbiased: bool = False,
    weights: _batches.Weights = None,
    **kwargs: Any,
) -> Any:
    r"""BatchNorm statistics that belong to given weights: their exact mean over given batches.

    .. math:: \bar s = \sum_b n_b \, s_b \Big/ \sum_b n_b

    Args:
      model, variables: the module; its `params` to evaluate, any `batch_stats`, and what it needs.
      batches: the inputs, or tuples of positional arguments, with examples on the first axis.
      sample_weighted, weights: whether examples or batches count the same; or a number a batch.
      unbiased: whether variances of n values are n / (n - 1) times those that the layers use. With
        `sample_weighted=False` both are as in PyTorch's `update_bn`.
      **kwargs: those of `model.apply` in training: `train=True`, `rngs={"dropout": key}`.

    Returns:
      A new `batch_stats` collection. Leaves that are not of a `nn.BatchNorm` are those given.

    Examples:
      >>> import flatopt.linen, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, batches = nn.BatchNorm(), [jnp.array([[1.0], [3.0]]), jnp.array([[5.0]])]
      >>> w = model.init(jax.random.key(0), batches[0], use_running_average=True)
      >>> s = flatopt.linen.recompute_batch_stats(model, w, batches, use_running_average=False)
      >>> print(f"{s['mean'][0]:.4f} {s['var'][0]:.4f}")
      3.0000 0.6667

    Cost: 0 gradients; 1 forward pass a batch, compiled once for each of their shapes.
    """
    original = variables["batch_stats"]
    leaves = flax.traverse_util.flatten_dict(original)

    def apply(leaves: Any, args: tuple[Any, ...]) -> Any:
        stats = flax.traverse_util.unflatten_dict(leaves)
        return model.apply(
            {**variables, "batch_stats": stats},
            *args,
            mutable=flax.core.DenyList("params"),
            **kwargs,
        )[1]["batch_stats"]

    first, arguments = arguments_of(batches)
    momenta = _momenta(lambda: apply(leaves, first))
    keep = {path: momenta[path[:-1]] for path in leaves if path[:-1] in momenta}
    # From zero, what a layer stores after one batch is (1 - momentum) times what it saw there.
    zeroed = leaves | {
        path: jnp.zeros_like(leaves[path], tree_math.accumulator_dtype(leaves[path].dtype))
        for path in keep
    }

    measure = functools.partial(_measure, functools.partial(apply, zeroed), keep, unbiased)
    mean = average_over(
        jax.jit(measure), arguments, sample_weighted=sample_weighted, weights=weights
    )
    new = leaves | {path: mean[path].astype(leaves[path].dtype) for path in keep}
    result = flax.traverse_util.unflatten_dict(new)
    return flax.core.freeze(result) if isinstance(original, flax.core.FrozenDict) else result


def _measure(
    apply: Callable[[tuple[Any, ...]], Any],
    momenta: Mapping[_Path, float],
    unbiased: bool,
    args: tuple[Any, ...],
) -> dict[_Path, jax.Array]:
    """What the layers saw in one batch, from what they stored of it."""
    inputs: dict[_Path, Any] = {}
    with nn.intercept_methods(functools.partial(_keep_inputs, inputs)):
        stored = flax.traverse_util.flatten_dict(apply(args))
    seen = {path: stored[path] / (1 - momentum) for path, momentum in momenta.items()}
    for path, (shape, axis) in inputs.items() if unbiased else ():
        seen[*path, "var"] = _unbiased(seen[*path, "var"], shape, axis, path)
    return seen


def _keep_inputs(
    inputs: dict[_Path, Any],
    call: Any,
    args: Any,
    call_kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    """Notes the shape of what each BatchNorm layer is given, and the axis of its channels."""
    layer = context.module
    if isinstance(layer, nn.BatchNorm) and context.method_name == "__call__":
        x = args[0] if args else call_kwargs["x"]
        inputs[layer.path] = jnp.shape(x), layer.axis
    return call(*args, **call_kwargs)


def _momenta(apply: Any) -> dict[_Path, float]:
    """Path and momentum of each BatchNorm layer that `apply` calls; computes nothing."""
    momenta: dict[_Path, float] = {}

    def watch(call: Any, args: Any, call_kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if isinstance(layer, nn.BatchNorm) and context.method_name == "__call__":
            flag = call_kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
            if layer.use_running_average if flag is None else flag:
                raise ValueError(
                    f"the BatchNorm layer at {'/'.join(layer.path) or 'the top'} uses its running "
                    "averages: pass the arguments with which the model trains, such as train=True."
                )
            if layer.momentum == 1:
                raise ValueError(
                    f"the BatchNorm layer at {'/'.join(layer.path) or 'the top'} has momentum=1 "
                    "and shows none of what it sees: it must be below 1."
                )
            momenta[layer.path] = layer.momentum
        return call(*args, **call_kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(apply)
    if not momenta:
        raise ValueError("model has no nn.BatchNorm layer: there are no statistics to recompute.")
    return momenta


@dataclasses.dataclass(frozen=True)
class _Tapped:
    """A function of linen modules with taps in their layers; equal for equal functions."""

    function: Callable[..., jax.Array]
    layers: Callable[[str], bool] | None

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        inside: list[str] = []
        with nn.intercept_methods(functools.partial(self._intercept, inside)):
            return self.function(*args, **kwargs)

    def _intercept(
        self,
        inside: list[str],
        call: Any,
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Calls, in the place of a layer, a copy that computes with a tap."""
        layer = context.module
        name = "/".join(layer.path)
        if (
            inside  # The copy itself.
            or not taps.is_recording()
            or context.method_name != "__call__"
            or not isinstance(layer, nn.Dense | nn.DenseGeneral | nn.Conv)
            or not (self.layers is None or self.layers(name))
        ):
            return call(*args, **kwargs)
        inside.append(name)
        try:
            return _with_tap(layer, name).apply(layer.variables, *args, **kwargs)
        finally:
            inside.pop()


def _with_tap(layer: Any, name: str) -> nn.Module:
    """A copy of a layer, without parameters, that computes with a tap."""
    if isinstance(layer, nn.Conv):
        given, given_class = layer.conv_general_dilated, layer.conv_general_dilated_cls
        plain = given_class() if given_class else given or jax.lax.conv_general_dilated
        tapped = unfolding.tap_convolution(name, plain)
        return layer.clone(parent=None, name=None, conv_general_dilated_cls=lambda: tapped)
    given, given_class = layer.dot_general, layer.dot_general_cls
    plain = given_class() if given_class else given or jax.lax.dot_general
    tapped = unfolding.tap_dot_general(name, plain)
    return layer.clone(parent=None, name=None, dot_general_cls=lambda: tapped)


def tap_layers(
    function: Callable[..., jax.Array], *, layers: Callable[[str], bool] | None = None
) -> Callable[..., jax.Array]:
    r"""A function of an unchanged linen model, for `flatopt.make_stats_fn`: `tap` in each layer.

    .. math:: y = W a + b + z, \qquad z = 0, \quad \partial L / \partial z = \partial L / \partial y

    Args:
      function: outputs from parameters and a batch, calling `model.apply`; the same at every step.
      layers: whether a layer is tapped, by its path in the parameters; None: each `nn.Dense`,
        `nn.DenseGeneral` (the projections of attention) and `nn.Conv` without groups.

    Returns:
      The function with taps.

    Examples:
      >>> import flax.linen as nn, flatopt.linen, jax.numpy as jnp
      >>> model, x = nn.Dense(1), jnp.array([[1.0], [3.0]])
      >>> logits_fn = flatopt.linen.tap_layers(lambda w, x: model.apply({"params": w}, x))
      >>> stats_fn = flatopt.make_stats_fn(logits_fn, x, loss="squared")
      >>> print(stats_fn({"kernel": jnp.ones([1, 1]), "bias": jnp.ones(1)})[""].a)
      [[5. 2.]
       [2. 1.]]

    Cost: 0 gradients; 0 copies; patches of the inputs of a convolution.
    """
    return _Tapped(function, layers)
