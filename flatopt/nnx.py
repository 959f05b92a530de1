"""Flax nnx: `grad_fn`, evaluation weights and statistics for modules that hold their own."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('flatopt.nnx needs "flatopt[flax]".', name=error.name) from error

from flatopt._averaging.batch_stats import arguments_of, average_over
from flatopt._averaging.batch_stats import unbiased as _unbiased
from flatopt._core import batches as _batches
from flatopt._core import grad_fn as _grad_fn
from flatopt._core.eval_params import eval_params

Model = TypeVar("Model", bound=nnx.Module)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pure"],
    meta_fields=["wrt", "has_aux", "held"],
)
@dataclasses.dataclass(frozen=True)
class GradFn:
    """The gradient of a loss of a module, at any parameters; a pytree.

    Made by `make_grad_fn`. It holds everything of the module that is no parameter as it was then:
    random state, BatchNorm's statistics. Each evaluation starts from there and leaves no trace.

    Attributes:
      pure: the gradient as a function of the parameters alone. Traced.
      wrt: which variables are parameters. Static.
      has_aux: whether the loss returns `(loss, aux)`. Static.
      held: name and object of every other nnx object that the loss is given. Static.
    """

    pure: _grad_fn.GradFn
    wrt: Any = nnx.Param
    has_aux: bool = False
    held: tuple[tuple[str, Any], ...] = ()

    def __call__(self, params: optax.Params, i: jax.typing.ArrayLike = 0) -> optax.Updates:
        """Returns the gradient at `params`; no module changes, `i` is ignored."""
        return self.pure(params, i)

    def value(self, params: optax.Params) -> jax.Array:
        """Returns the loss at `params`, by a forward pass; no module changes."""
        return self.pure.value(params)

    def value_and_grad(self, model: nnx.Module) -> tuple[Any, optax.Updates]:
        """Returns `(loss, grads)`, or `((loss, aux), grads)` with `has_aux`, at `model`.

        The clean pass of the training loop, in the place of `nnx.value_and_grad(loss_fn)(model,
        ...)`, and like it the one that moves `model`'s statistics and random state on.
        """
        (loss, (aux, (rest, left))), grads = self.pure.value_and_grad(nnx.state(model, self.wrt))
        nnx.update(model, rest)
        for name, own in self.held:
            nnx.update(own, left[name])
        return ((loss, aux) if self.has_aux else loss), grads


def make_grad_fn(
    loss_fn: Callable[..., Any],
    model: nnx.Module,
    *args: Any,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    microbatches: int | None = None,
    weights: jax.Array | None = None,
    **kwargs: Any,
) -> GradFn:
    r"""Makes the `grad_fn` of one training step of a module. Call it before the forward pass.

    .. math:: \texttt{grad\_fn}(w, i) = \nabla_w \texttt{loss\_fn}(\texttt{model}(w), *args)

    Args:
      loss_fn: scalar loss `loss_fn(model, *args, **kwargs)`; the same object at every step.
      model: the module, before the clean pass of this step. It is not changed.
      *args: of the loss; nnx objects among them are split and moved on as the model.
      **kwargs: of the loss, likewise.
      wrt: filter of the variables that are trained; the same as for `nnx.Optimizer`. Static.
      has_aux, microbatches, weights: see `flatopt.make_grad_fn`.

    Returns:
      A `GradFn`, a registered pytree. `grad_fn.value_and_grad(model)` is the clean pass, and
      `optimizer.update(model, grads, grad_fn=grad_fn)` the step; both work in `nnx.jit`.

    Examples:
      >>> import jax.numpy as jnp, flatopt.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
      >>> loss_fn, x = lambda model, x: jnp.sum(model(x) ** 2), jnp.array([[3.0, 4.0]])
      >>> print(flatopt.nnx.make_grad_fn(loss_fn, model, x).value_and_grad(model)[0])
      49.0

    Cost: 1 gradient an evaluation; 0 copies.
    """
    graphdef, params, rest = _split(model, wrt)
    named = {str(i): arg for i, arg in enumerate(args)} | kwargs
    held = tuple((name, arg) for name, arg in named.items() if isinstance(arg, nnx.Pytree))
    graphdefs, states = {}, {}
    for name, own in held:
        graphdefs[name], states[name], _ = _split(own, ...)
    pure = _grad_fn.make_grad_fn(
        _PureLoss(
            loss_fn,
            graphdef,
            jax.tree.structure(params),
            wrt,
            has_aux,
            tuple(graphdefs.items()),
        ),
        *(arg for i, arg in enumerate(args) if str(i) not in graphdefs),
        has_aux=True,
        microbatches=microbatches,
        weights=weights,
        rest=(rest, states),
        kwargs={name: arg for name, arg in kwargs.items() if name not in graphdefs},
    )
    return GradFn(pure, wrt, has_aux, held)


def apply_eval_params(optimizer: nnx.Optimizer, model: Model) -> Model:
    r"""Returns a copy of a module with the weights to evaluate; `model` goes on training.

    .. math:: w \leftarrow \texttt{flatopt.eval\_params}(\texttt{opt\_state}, w)

    Args:
      optimizer: the optimiser of `model`, with or without flatopt parts.
      model: the module in training.

    Returns:
      A module of its own: `.eval()` on it, or running it, leaves `model` as it is. BatchNorm's
      statistics are copies of the training ones. Works in `nnx.jit`.

    Examples:
      >>> import jax.numpy as jnp, optax, flatopt.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(1, 1, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.swa())
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> for slope in (1.0, 2.0):  # The kernel is 1, then 3.
      ...     grads = nnx.grad(lambda model: -slope * jnp.sum(model.kernel[...]))(model)
      ...     _ = optimizer.update(model, grads)
      >>> print(model.kernel[...], flatopt.nnx.apply_eval_params(optimizer, model).kernel[...])
      [[3.]] [[2.]]

    Cost: 0 extra gradients; 1 copy of the module.
    """
    graphdef, params, rest = _split(model, optimizer.wrt)
    params = eval_params(_values(optimizer.opt_state), params)
    # Copies, so that a training step that donates its buffers leaves the result alone.
    return nnx.merge(graphdef, *jax.tree.map(jnp.copy, (params, rest)))


def recompute_batch_stats(
    model: Model,
    batches: Iterable[Any],
    *,
    sample_weighted: bool = True,
    unbiased: bool = False,
    weights: _batches.Weights = None,
    **kwargs: Any,
) -> Model:
    r"""A copy of a model with the BatchNorm statistics of its weights: their mean over batches.

    .. math:: \bar s = \sum_b n_b \, s_b \Big/ \sum_b n_b

    Args:
      model: the module, with the weights to evaluate, in any mode. It is not changed.
      batches, sample_weighted, unbiased, weights: see `flatopt.linen.recompute_batch_stats`.
      **kwargs: further arguments of the model's call, which is in training mode.

    Returns:
      A new model that differs in its `nnx.BatchNorm` layers alone: call its `eval()` before use.

    Examples:
      >>> import jax.numpy as jnp, flatopt.nnx
      >>> from flax import nnx
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0]])]
      >>> new = flatopt.nnx.recompute_batch_stats(model, batches)
      >>> print(f"{new.mean[...][0]:.4f} {new.var[...][0]:.4f} {model.mean[...][0]:.4f}")
      3.0000 0.6667 0.0000

    References:
      As for `swa`.

    Cost: 0 gradients; 1 forward pass a batch, compiled once for each of their shapes.
    """
    working, paths = _ready_to_measure(model)
    graphdef, state = nnx.split(working)

    @jax.jit
    def measure(state: nnx.State, args: tuple[Any, ...]) -> dict[Any, jax.Array]:
        one = nnx.merge(graphdef, state)
        inputs = _keep_inputs(one)
        one(*args, **kwargs)
        stats = nnx.to_flat_state(nnx.state(one, nnx.BatchStat))
        seen = {path: stat[...] for path, stat in stats if path[:-1] in paths}
        for path, (shape, axis) in inputs.items() if unbiased else ():
            seen[*path, "var"] = _unbiased(seen[*path, "var"], shape, axis, path)
        return seen

    _, arguments = arguments_of(batches)
    mean = average_over(
        functools.partial(measure, state),
        arguments,
        sample_weighted=sample_weighted,
        weights=weights,
    )
    result = nnx.clone(model)
    for path, module in nnx.iter_modules(result):
        if isinstance(module, nnx.BatchNorm):
            module.mean[...], module.var[...] = mean[*path, "mean"], mean[*path, "var"]
    return result


def _ready_to_measure(model: Model) -> tuple[Model, set[Any]]:
    """A copy whose BatchNorm layers store what the last batch showed them, and their paths."""
    working = nnx.clone(model)
    working.train()
    paths = set()
    for path, layer in nnx.iter_modules(working):
        if isinstance(layer, nnx.BatchNorm):
            paths.add(path)
            layer.momentum = 0.0
            for stored in (layer.mean, layer.var):
                stored[...] = jnp.zeros_like(stored[...])
    if not paths:
        raise ValueError("model has no nnx.BatchNorm layer: there are no statistics to recompute.")
    return working, paths


def _keep_inputs(model: nnx.Module) -> dict[Any, Any]:
    """Shape of what each BatchNorm layer is given, and axis of its channels: a call fills it."""
    inputs: dict[Any, Any] = {}

    def keep(path: Any, axis: Any, promote: Any, arrays: Any, **kwargs: Any) -> Any:
        inputs[path] = jnp.shape(arrays[0]), axis
        return promote(arrays, **kwargs)

    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.BatchNorm):  # Its function of all that it computes with.
            promote = layer.promote_dtype
            layer.promote_dtype = functools.partial(keep, path, layer.axis, promote)
    return inputs


@dataclasses.dataclass(frozen=True)
class _PureLoss:
    """The loss as a function of parameters; equal for equal modules, so that programs are shared.

    Returns `(loss, (aux, rest))`, with the rest of the module, and the states of the other nnx
    objects, as the forward pass left them.
    """

    loss_fn: Callable[..., Any]
    graphdef: Any
    structure: Any  # Of the parameters.
    wrt: Any
    has_aux: bool
    held: tuple[tuple[str, Any], ...]

    def __call__(self, params: Any, *args: Any, rest: Any, kwargs: dict[str, Any]) -> Any:
        # Variables of its own: those of the caller's objects belong to an outer trace.
        self._require_own(params)
        own_rest, states = rest
        model = nnx.merge(self.graphdef, params, own_rest)
        held = {name: nnx.merge(graphdef, states[name]) for name, graphdef in self.held}
        positional = list(args)
        for name in (name for name in held if name.isdigit()):  # In ascending order.
            positional.insert(int(name), held[name])
        named = {name: own for name, own in held.items() if not name.isdigit()}
        out = self.loss_fn(model, *positional, **kwargs, **named)
        loss, aux = out if self.has_aux else (out, None)
        left = {name: _split(own, ...)[1] for name, own in held.items()}
        return loss, (aux, (_split(model, self.wrt)[2], left))

    def _require_own(self, params: Any) -> None:
        """Raises unless `params` are the variables that `wrt` selected."""
        if jax.tree.structure(_values(params)) == self.structure:
            return
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
        raise ValueError(
            f"grad_fn differentiates the variables that wrt={self.wrt!r} selects and is asked for "
            f"the gradient of others: {', '.join(names)}. Give `flatopt.nnx.make_grad_fn(loss_fn, "
            "model, ..., wrt=...)` the same `wrt` as `nnx.Optimizer`."
        )


def _split(model: Any, wrt: Any) -> tuple[Any, Any, Any]:
    """The structure of an nnx object, its variables of the kind `wrt`, and the rest, as arrays."""
    graphdef, *states = nnx.split(model, wrt, ...)
    params, rest = map(_values, states)
    return graphdef, params, rest


def _values(tree: Any) -> Any:
    """`tree` with arrays in the place of variables."""

    def leaf(x: Any) -> Any:
        return x[...] if isinstance(x, nnx.Variable) else x

    return jax.tree.map(leaf, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
