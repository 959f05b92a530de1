"""Flax linen: a `TrainState` whose optimiser gets its extra arguments."""

import dataclasses
import functools
from typing import Any, cast

import optax
from flax import struct
from flax.training import train_state

from flatopt._eval import eval_params as _eval_params

# What a step computes, and so cannot be given.
_COMPUTED = ("step", "params", "opt_state")


class TrainState(train_state.TrainState, kw_only=True):
    r"""Flax's `TrainState` for optimisers that take `grad_fn`, with BatchNorm's statistics.

    .. math:: (u, s_+) = \texttt{tx.update}(g, s, w, \texttt{**extra}), \qquad w_+ = w + u

    Made by `TrainState.create(apply_fn=..., params=..., tx=..., batch_stats=...)`; subclass it to
    carry more, as Flax's own.

    Attributes:
      batch_stats: the collection of that name, or an empty dictionary for models without one.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import linen as nn
      >>> import flatopt, flatopt.linen
      >>> model, x = nn.Dense(1, kernel_init=nn.initializers.ones), jnp.array([[3.0, 4.0]])
      >>> tx = optax.chain(flatopt.sam(rho=0.05), optax.sgd(0.01), flatopt.swa())
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> state = flatopt.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> def loss_fn(params, x):
      ...     return jnp.sum(state.apply_fn({"params": params}, x) ** 2)
      >>> for _ in range(2):
      ...     grad_fn = flatopt.make_grad_fn(loss_fn, x)
      ...     loss, grads = grad_fn.value_and_grad(state.params)
      ...     state = state.apply_gradients(grads=grads, grad_fn=grad_fn)
      ...     print(f"{loss:.2f}")
      49.00
      10.42
      >>> print(f"{loss_fn(state.params, x):.2f} {loss_fn(state.eval_params, x):.2f}")
      2.01 5.39

    Notes:
      Gradient evaluations: those of `tx`. State: one copy of the statistics besides Flax's fields.
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
