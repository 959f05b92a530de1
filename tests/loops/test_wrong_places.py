"""What the documentation says of stages in a wrong place, and of trees that are no parameters."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import flatopt
import flatopt.nnx
from tests import cases


def _train(tx: optax.GradientTransformation, steps: int = 40) -> tuple[Any, Any, list[jax.Array]]:
    """A run on |w|^2 / 2: the last parameters, the state, and all points."""
    tx = optax.with_extra_args_support(tx)
    params = jnp.array([3.0, 4.0])
    opt_state, visited = tx.init(params), [params]
    for _ in range(steps):
        updates, opt_state = tx.update(params, opt_state, params, grad_fn=lambda w, i: w)
        params = optax.apply_updates(params, updates)
        visited.append(params)
    return params, opt_state, visited


def test_an_average_before_the_learning_rate_holds_points_that_were_never_visited():
    wrong = optax.chain(optax.scale_by_adam(), flatopt.params_ema(0.9), optax.scale(-0.1))
    right = optax.chain(optax.scale_by_adam(), optax.scale(-0.1), flatopt.params_ema(0.9))
    (params, state, visited), (other, other_state, _) = _train(wrong, 5), _train(right, 5)
    cases.assert_equal(params, other)  # Training is the same.
    highest = jnp.max(jnp.stack(visited), axis=0)
    assert jnp.all(flatopt.eval_params(other_state, other) <= highest)
    assert jnp.all(flatopt.eval_params(state, params) > highest)


def test_msam_in_a_trainer_that_scales_afterwards_loses_its_centre():
    inside = flatopt.msam(optax.chain(optax.sgd(1.0, momentum=0.9), optax.scale(0.1)), rho=1.0)
    outside = optax.chain(flatopt.msam(optax.sgd(1.0, momentum=0.9), rho=1.0), optax.scale(0.1))
    lengths = []
    for tx in (inside, outside):
        params, state, _ = _train(tx, 200)
        lengths.append(float(jnp.linalg.norm(flatopt.eval_params(state, params))))
    assert lengths[0] < 0.2
    assert lengths[1] > 2 * lengths[0]


class Adapted(nnx.Module):
    """A frozen layer with a low-rank part that is trained."""

    def __init__(self) -> None:
        """Makes both parts."""
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(3, 3, rngs=rngs)
        self.lora = nnx.LoRA(3, 2, 3, base_module=self.base, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lora(x)


def _square(model: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - 1) ** 2)


def test_a_forgotten_wrt_says_so():
    model, x = Adapted(), jnp.ones((4, 3))
    tx = optax.chain(flatopt.sam(0.05), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    _, grads = flatopt.nnx.make_grad_fn(_square, model, x, wrt=nnx.LoRAParam).value_and_grad(model)
    with pytest.raises(ValueError, match=r"lora_a.*the same `wrt` as `nnx\.Optimizer`"):
        optimizer.update(model, grads, grad_fn=flatopt.nnx.make_grad_fn(_square, model, x))


def _whole_modules() -> dict[str, Any]:
    model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))
    arrays, x = eqx.filter(model, eqx.is_inexact_array), jnp.ones((4, 3))
    tx = optax.chain(flatopt.sam(0.05), optax.sgd(0.1), flatopt.swa())
    state, grad_fn = tx.init(arrays), flatopt.make_grad_fn(lambda m, x: jnp.sum(x), x)
    return {
        "value_and_grad": lambda: grad_fn.value_and_grad(model),
        "grad_fn": lambda: grad_fn(model, 0),
        "eval_params": lambda: flatopt.eval_params(state, model),
        "update": lambda: tx.update(arrays, state, model, grad_fn=grad_fn),
    }


@pytest.mark.parametrize("name", ["value_and_grad", "grad_fn", "eval_params", "update"])
def test_a_whole_module_in_place_of_its_arrays_says_what_to_pass(name: str):
    with pytest.raises(TypeError, match=r"params\S*activation.*no array.*eqx\.filter"):
        _whole_modules()[name]()


def test_a_grad_fn_of_one_argument_says_what_to_write():
    tx, params = flatopt.sam(0.05), jnp.ones(3)
    with pytest.raises(TypeError, match="lambda params, i"):
        tx.update(params, tx.init(params), params, grad_fn=lambda w: w)
