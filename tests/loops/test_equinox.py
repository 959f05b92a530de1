"""Equinox's own loop with one argument more, against a SAM loop by hand."""

import difflib
import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from sklearn.datasets import load_digits

import flatopt.equinox
from tests import cases


class Net(eqx.Module):
    """Digits by an MLP with BatchNorm and dropout, whose statistics are an `eqx.nn.State`."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    second: eqx.nn.Linear

    def __init__(self, key: jax.Array):  # noqa: D107
        k1, k2 = jax.random.split(key)
        self.first = eqx.nn.Linear(64, 16, key=k1)
        self.norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.2)
        self.second = eqx.nn.Linear(16, 10, key=k2)

    def __call__(self, x: jax.Array, state: eqx.nn.State, key: jax.Array) -> Any:
        x, state = self.norm(self.first(x), state)
        return self.second(self.dropout(jax.nn.relu(x), key=key)), state


def loss_fn(model: Net, x: jax.Array, y: jax.Array, state: eqx.nn.State, keys: jax.Array) -> Any:
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    logits, state = batched(x, state, keys)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state


def plain(tx: Any, model: Net, state: eqx.nn.State, batches: Any) -> Any:
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, opt_state, x, y, keys):
        (loss, new), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(
            model, x, y, state, keys
        )
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), new, opt_state, loss

    for x, y, keys in batches:
        model, state, opt_state, loss = step(model, state, opt_state, x, y, keys)
    return model, state, opt_state, loss


def with_flatopt(tx: Any, model: Net, state: eqx.nn.State, batches: Any) -> Any:
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, opt_state, x, y, keys):
        (loss, new), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(
            model, x, y, state, keys
        )
        grad_fn = flatopt.equinox.make_grad_fn(loss_fn, model, x, y, state, keys, has_aux=True)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return eqx.apply_updates(model, updates), new, opt_state, loss

    for x, y, keys in batches:
        model, state, opt_state, loss = step(model, state, opt_state, x, y, keys)
    return model, state, opt_state, loss


def by_hand(tx: Any, model: Net, state: eqx.nn.State, batches: Any, rho: float) -> Any:
    """SAM written out: up along the gradient, and down with the gradient from there."""
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn, has_aux=True))
    for x, y, keys in batches:
        (loss, new), grads = gradient(model, x, y, state, keys)
        ascent = optax.tree.scale(rho / (optax.tree.norm(grads) + 1e-12), grads)
        above = eqx.apply_updates(model, ascent)
        _, grads = gradient(above, x, y, state, keys)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        model, state = eqx.apply_updates(model, updates), new
    return model, state, opt_state, loss


@pytest.fixture(scope="module")
def start() -> tuple[Net, eqx.nn.State, list[Any]]:
    x, y = load_digits(return_X_y=True)
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    batches = []
    for n in range(4):
        rows, keys = slice(32 * n, 32 * n + 32), jax.random.split(jax.random.key(n), 32)
        batches.append((jnp.asarray(x[rows] / 16, jnp.float32), jnp.asarray(y[rows]), keys))
    return model, state, batches


def _arrays(model: Net, state: eqx.nn.State) -> Any:
    return eqx.filter(model, eqx.is_inexact_array), jax.tree.leaves(state)


def test_sam_in_equinoxs_loop_equals_sam_by_hand(start):
    model, state, batches = start
    own = with_flatopt(
        optax.chain(flatopt.sam(0.1), optax.sgd(0.1, momentum=0.9)), model, state, batches
    )
    reference = by_hand(optax.sgd(0.1, momentum=0.9), model, state, batches, 0.1)
    cases.assert_close(_arrays(*own[:2]), _arrays(*reference[:2]), rtol=1e-4, atol=1e-5)
    assert float(own[3]) == pytest.approx(float(reference[3]), rel=1e-5)


def test_averages_need_no_change_of_the_loop(start):
    model, state, batches = start
    tx = optax.chain(optax.sgd(0.1), flatopt.swa())
    trained, _, opt_state, _ = plain(tx, model, state, batches)
    averaged = flatopt.equinox.eval_params(opt_state, trained)
    assert isinstance(averaged, Net)
    assert not jnp.allclose(averaged.first.weight, trained.first.weight)
    params = eqx.filter(trained, eqx.is_inexact_array)
    expected = flatopt.eval_params(opt_state, params)
    cases.assert_equal(eqx.filter(averaged, eqx.is_inexact_array), expected)


def test_sam_changes_at_most_three_lines():
    texts = [inspect.getsource(f).splitlines()[1:] for f in (plain, with_flatopt)]
    changed = [x for x in difflib.ndiff(*texts) if x.startswith("+")]
    assert len(changed) <= 3


def test_the_value_and_the_gradient_are_equinoxs(start):
    model, state, ((x, y, keys), *_) = start
    grad_fn = flatopt.equinox.make_grad_fn(loss_fn, model, x, y, state, keys, has_aux=True)
    (loss, _), grads = grad_fn.value_and_grad(model)
    (expected, _), reference = eqx.filter_value_and_grad(loss_fn, has_aux=True)(
        model, x, y, state, keys
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(grad_fn.value(model)) == pytest.approx(float(expected), rel=1e-6)
    cases.assert_close(jax.tree.leaves(grads), jax.tree.leaves(reference))
    cases.assert_close(jax.tree.leaves(grad_fn(model)), jax.tree.leaves(reference))


def test_a_grad_fn_crosses_a_jitted_step_without_compiling_anew():
    model = eqx.nn.MLP(4, 1, width_size=8, depth=1, key=jax.random.key(0))
    traced = []

    def loss(model, x):
        traced.append(None)
        return jnp.mean(jax.vmap(model)(x) ** 2)

    step = jax.jit(lambda grad_fn, params: grad_fn(params))
    params = eqx.filter(model, eqx.is_inexact_array)
    for n in range(3):
        step(flatopt.equinox.make_grad_fn(loss, model, n * jnp.ones((8, 4))), params)
    assert len(traced) == 1


def test_microbatches_are_those_of_the_whole_batch():
    model = eqx.nn.MLP(4, 1, width_size=8, depth=1, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 4))

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    whole = flatopt.equinox.make_grad_fn(loss, model, x)(model)
    parts = flatopt.equinox.make_grad_fn(loss, model, x, microbatches=4)(model)
    cases.assert_close(jax.tree.leaves(parts), jax.tree.leaves(whole))
