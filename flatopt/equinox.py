"""Equinox: `grad_fn` and evaluation weights for whole modules, in the idiom of its own loops."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

try:
    import equinox as eqx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'flatopt.equinox needs "flatopt[equinox]".', name=error.name
    ) from error

from flatopt._core import grad_fn as _grad_fn
from flatopt._core.eval_params import eval_params as _eval_params

Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True)
class _LossOfArrays:
    """A loss of a module as one of its trained arrays; `rest` are its other arrays."""

    loss_fn: Callable[..., Any]
    static: Any

    def __call__(self, params: Any, *args: Any, rest: Any, kwargs: dict[str, Any]) -> Any:
        return self.loss_fn(eqx.combine(params, rest, self.static), *args, **kwargs)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pure"], meta_fields=["filter_spec"]
)
@dataclasses.dataclass(frozen=True)
class GradFn:
    """The gradient of a loss of a module, at any of its trained arrays; a pytree.

    Made by `make_grad_fn`. It holds all else of the module as it was then.

    Attributes:
      pure: the gradient as a function of the trained arrays alone. Traced.
      filter_spec: which leaves are trained. Static.
    """

    pure: _grad_fn.GradFn
    filter_spec: Any = eqx.is_inexact_array

    def __call__(self, params: optax.Params, i: jax.typing.ArrayLike = 0) -> optax.Updates:
        """Returns the gradient at `params`, the module's arrays or the module; `i` is ignored."""
        return self.pure(eqx.filter(params, self.filter_spec), i)

    def value_and_grad(self, model: Any) -> tuple[Any, optax.Updates]:
        """Returns `(loss, grads)`, or `((loss, aux), grads)`, as `eqx.filter_value_and_grad`."""
        return self.pure.value_and_grad(eqx.filter(model, self.filter_spec))

    def value(self, model: Any) -> jax.Array:
        """Returns the loss alone, by a forward pass; auxiliary output is dropped."""
        return self.pure.value(eqx.filter(model, self.filter_spec))


def make_grad_fn(
    loss_fn: Callable[..., Any],
    model: Any,
    *args: Any,
    filter_spec: Any = eqx.is_inexact_array,
    has_aux: bool = False,
    microbatches: int | None = None,
    weights: jax.Array | None = None,
    **kwargs: Any,
) -> GradFn:
    r"""Makes the `grad_fn` of one training step of a whole module.

    .. math:: \texttt{grad\_fn}(w, i) = \nabla_w \texttt{loss\_fn}(\texttt{model}(w), *args)

    Args:
      loss_fn: scalar loss `loss_fn(model, *args, **kwargs)`, as for `eqx.filter_value_and_grad`.
      model: the module, whole.
      args, kwargs: of the loss; an `eqx.nn.State` by name, for it has no batch axis.
      filter_spec: which leaves are trained, as in `optimizer.init(eqx.filter(model, ...))`. Static.
      has_aux, microbatches, weights: see `flatopt.make_grad_fn`.

    Returns:
      A `GradFn`. `grad_fn.value_and_grad(model)` is the clean pass, and the step is
      `optimizer.update(grads, opt_state, eqx.filter(model, filter_spec), grad_fn=grad_fn)`.

    Examples:
      >>> import equinox as eqx, jax, jax.numpy as jnp, flatopt.equinox
      >>> model = eqx.nn.Linear(2, 1, use_bias=False, key=jax.random.key(0))
      >>> model = eqx.tree_at(lambda m: m.weight, model, jnp.ones((1, 2)))
      >>> loss_fn, x = lambda model, x: jnp.sum(model(x) ** 2), jnp.array([3.0, 4.0])
      >>> print(flatopt.equinox.make_grad_fn(loss_fn, model, x).value_and_grad(model)[0])
      49.0

    Cost: 1 gradient an evaluation; 0 copies.
    """
    _, others = eqx.partition(model, filter_spec)
    rest, static = eqx.partition(others, eqx.is_array)
    pure = _grad_fn.make_grad_fn(
        _LossOfArrays(loss_fn, static),
        *args,
        has_aux=has_aux,
        microbatches=microbatches,
        weights=weights,
        rest=rest,
        kwargs=kwargs,
    )
    return GradFn(pure, filter_spec)


def eval_params(
    opt_state: optax.OptState, model: Model, *, filter_spec: Any = eqx.is_inexact_array
) -> Model:
    r"""The module with the weights to evaluate; `model` goes on training.

    .. math:: w \leftarrow \texttt{flatopt.eval\_params}(\texttt{opt\_state}, w)

    Args:
      opt_state, model: the module in training, and the state of its optimiser.
      filter_spec: which leaves are trained; see `make_grad_fn`.

    Returns:
      A module like `model`; an `eqx.nn.State` is none of its part, and stays that of training.

    Examples:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax, flatopt.equinox
      >>> model = eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(0))
      >>> model = eqx.tree_at(lambda m: m.weight, model, jnp.zeros((1, 1)))
      >>> tx = optax.chain(optax.sgd(1.0), flatopt.swa())
      >>> opt_state = tx.init(eqx.filter(model, eqx.is_array))
      >>> for slope in (1.0, 2.0):  # The weight is 1, then 3.
      ...     grads = eqx.filter_grad(lambda m: -slope * jnp.sum(m.weight))(model)
      ...     updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_array))
      ...     model = eqx.apply_updates(model, updates)
      >>> print(model.weight, flatopt.equinox.eval_params(opt_state, model).weight)
      [[3.]] [[2.]]

    Cost: 0 extra gradients; 0 copies.
    """
    params, others = eqx.partition(model, filter_spec)
    evaluated: Model = eqx.combine(_eval_params(opt_state, params), others)
    return evaluated
