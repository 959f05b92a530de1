"""The gradient contract: `grad_fn(params, i)` gives the gradient anywhere the optimiser asks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from flatopt._core import checks, tree_math


class GradientFunction(Protocol):
    """What `grad_fn` must be: a callable from parameters to gradients.

    The second argument numbers the extra evaluations inside one `update`, from 0. Use it to pick a
    minibatch or to fold it into a random key; ignore it to evaluate everything on one batch. The
    result is the gradient alone, already averaged over devices as the training loop wants it.
    A stage that compares losses also asks for a method `value(params)`, which `GradFn` has.
    """

    def __call__(self, params: optax.Params, i: jax.typing.ArrayLike, /) -> optax.Updates:
        """Returns the gradient at `params` for extra evaluation number `i`."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["args", "kwargs", "weights"],
    meta_fields=["loss_fn", "has_aux", "microbatches"],
)
@dataclasses.dataclass(frozen=True)
class GradFn:
    """The gradient of a loss on given data; a pytree, so that it crosses `jax.jit`.

    Made by `make_grad_fn`. Two instances with the same `loss_fn` and flags differ in their arrays
    only and share one compiled program.

    Attributes:
      loss_fn: the loss, `loss_fn(params, *args, **kwargs)`. Static.
      args: positional arguments of the loss: the batch. Traced.
      kwargs: keyword arguments of the loss. Traced.
      has_aux: whether the loss returns `(loss, aux)`. Static.
      microbatches: number of equal parts to split `args` into, or None. Static.
      weights: of the examples in the loss, `[batch]`, or None. Traced.
    """

    loss_fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has_aux: bool = False
    microbatches: int | None = None
    weights: Any = None

    def __call__(self, params: optax.Params, i: jax.typing.ArrayLike = 0) -> optax.Updates:
        """Returns the gradient at `params`; auxiliary output is dropped, `i` is ignored."""
        del i
        return self.value_and_grad(params)[1]

    def value_and_grad(self, params: optax.Params) -> tuple[Any, optax.Updates]:
        """Returns `(loss, grads)`, or `((loss, aux), grads)` with `has_aux`, at `params`.

        The clean pass of the training loop. With `microbatches`, losses and gradients are averaged
        (gradients in float32 at least); of `aux`, floating-point leaves are averaged and others are
        the last microbatch's.
        """
        checks.require_arrays("params", params)
        function = jax.value_and_grad(self.loss_fn, has_aux=self.has_aux)
        value, grads = self._mean(function, params)
        return value, grads if self.microbatches is None else tree_math.cast_like(grads, params)

    def value(self, params: optax.Params) -> jax.Array:
        """Returns the loss alone, by a forward pass at `params`; auxiliary output is dropped."""

        def loss(params: optax.Params, *args: Any, **kwargs: Any) -> Any:
            value = self.loss_fn(params, *args, **kwargs)
            return value[0] if self.has_aux else value

        return self._mean(loss, params)

    def _mean(self, function: Callable[..., Any], params: optax.Params) -> Any:
        """`function` of the batch, or its mean over the microbatches."""
        if self.microbatches is None:
            return function(params, *self.args, **self.kwargs)
        arrays = (self.weights, *self.args)
        mean = optax.microbatching.microbatch(
            self._share_of_the_mean(function),
            argnums=tuple(range(1, 1 + len(arrays))),
            microbatch_size=_microbatch_size(arrays, self.microbatches),
            accumulator=_mean_accumulator(self.microbatches),
        )
        return mean(params, *arrays, **self.kwargs)

    def _share_of_the_mean(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of a microbatch, times its weight over the mean weight of a microbatch."""
        if self.weights is None:
            return lambda params, _, *args, **kwargs: function(params, *args, **kwargs)
        mean_weight = jnp.sum(self.weights) / (self.microbatches or 1)

        def weighted(params: Any, weights: jax.Array, *args: Any, **kwargs: Any) -> Any:
            share = jnp.sum(weights) / mean_weight

            def leaf(x: jax.Array) -> jax.Array:
                # A part without weight has no mean, and adds nothing, not even its NaN.
                scaled = jnp.where(share > 0, share * x, 0)
                return scaled.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x

            return jax.tree.map(leaf, function(params, *args, **kwargs))

        return weighted


def make_grad_fn(
    loss_fn: Callable[..., Any],
    *args: Any,
    has_aux: bool = False,
    microbatches: int | None = None,
    weights: jax.Array | None = None,
    **kwargs: Any,
) -> GradFn:
    r"""Makes the `grad_fn` of one training step from its loss and its data.

    .. math:: \texttt{grad\_fn}(w, i) = \nabla_w \texttt{loss\_fn}(w, *args, **kwargs)

    Args:
      loss_fn: scalar loss `loss_fn(params, *args, **kwargs)`; the same object at every step.
      *args: the batch: pytrees of arrays, with a common leading axis if `microbatches` is given.
      has_aux: whether `loss_fn` returns `(loss, aux)`. `grad_fn` drops `aux`. Static.
      microbatches: number of equal parts of the batch, over which gradients are averaged in a
        `lax.scan`; None: the batch is whole. Static.
      weights: `[batch]`, of the examples in a loss that is a weighted mean, such as over tokens.
      **kwargs: whole for each part: random keys; no flags, for `jax.jit` traces them.

    Returns:
      A `GradFn`, a registered pytree that can be made outside or inside `jax.jit`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> loss_fn = lambda w, x: jnp.mean((x * w - 1.0) ** 2)
      >>> grad_fn = flatopt.make_grad_fn(loss_fn, jnp.arange(4.0), microbatches=2)
      >>> print(grad_fn(jnp.array(1.0), 0), *grad_fn.value_and_grad(jnp.array(1.0)))
      4.0 1.5 4.0

    Cost: 1 gradient an evaluation, in the memory of one part; 0 copies.
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn={loss_fn!r} must be callable as loss_fn(params, *args, **kwargs)."
        )
    checks.check_count("microbatches", microbatches, 1)
    if weights is not None and jnp.ndim(weights) != 1:
        raise ValueError(
            f"weights of shape {jnp.shape(weights)} must be one number an example, [batch]."
        )
    return GradFn(loss_fn, args, kwargs, has_aux, microbatches, weights)


def _microbatch_size(args: tuple[Any, ...], microbatches: int) -> int:
    """Number of examples in one microbatch."""
    sizes = {x.shape[0] if jnp.ndim(x) else None for x in jax.tree.leaves(args)}
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None:
        raise ValueError(
            f"microbatches={microbatches} splits the leading axis of every positional argument, "
            "so all need one of equal length. Pass what has no batch axis by name."
        )
    if size % microbatches:
        raise ValueError(f"microbatches={microbatches} must divide the batch size {size}.")
    return size // microbatches


def _mean_accumulator(microbatches: int) -> optax.microbatching.Accumulator:
    """Mean of floating-point leaves in float32 at least; the last value of the others."""

    def map_floats(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
        def leaf(x: Any, *others: Any) -> Any:
            return function(x, *others) if jnp.issubdtype(x.dtype, jnp.inexact) else x

        return jax.tree.map(leaf, tree, *rest)

    return optax.microbatching.Accumulator(
        init=lambda like: jax.tree.map(
            lambda x: jnp.zeros(x.shape, tree_math.accumulator_dtype(x.dtype)), like
        ),
        update=lambda total, value, _: map_floats(lambda v, t: t + v, value, total),
        finalize=lambda total: map_floats(lambda t: t / microbatches, total),
        aggregate=lambda values: values,
    )
