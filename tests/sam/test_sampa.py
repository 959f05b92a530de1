"""SAMPa."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import (
    Golden,
    Params,
    assert_agrees,
    logits,
    problem,
    replay,
    replays,
    table,
    torch_optimizer,
)

RHO = 0.05


def test_sampa_on_two_devices_is_sampa_on_one():
    params = cases.init_params()
    batches = jax.tree.map(lambda *x: jnp.stack(x), cases.make_batch(1), cases.make_batch(2))

    def run(tx):
        def step(params, opt_state):
            def grad_fn(point, i):
                return jax.grad(cases.loss_fn)(point, jax.tree.map(lambda x: x[i], batches))

            updates, opt_state = tx.update(params, opt_state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), opt_state

        return step, tx.init(params)

    step, state = run(flatopt.sampa(cases.sgd(), RHO))
    expected = params
    for _ in range(4):
        expected, state = step(expected, state)
    mesh = jax.make_mesh(
        (2,), ("pair",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Explicit,)
    )
    step, state = run(flatopt.sampa(cases.sgd(), RHO, axis_name="pair"))
    whole = jax.sharding.PartitionSpec()
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=whole, out_specs=whole))
    actual = params
    for _ in range(4):
        actual, state = step(actual, state)
    cases.assert_close(actual, expected)
    wide = jax.make_mesh(
        (4,), ("pair",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Explicit,)
    )
    step, state = run(flatopt.sampa(cases.sgd(), RHO, axis_name="pair"))
    with pytest.raises(ValueError, match="mesh axis of size 4"):
        jax.shard_map(step, mesh=wide, in_specs=whole, out_specs=whole)(params, state)


def test_sampa_takes_its_two_gradients_at_once():
    """One batched evaluation: neither gradient waits for the other."""
    traced = []

    def grad_fn(point, i):
        traced.append(i)
        return jax.grad(cases.loss_fn)(point, cases.make_batch())

    tx, params = flatopt.sampa(cases.sgd(), RHO), cases.init_params()
    tx.update(params, tx.init(params), params, grad_fn=grad_fn)
    assert len(traced) == 1


def _smoothed_loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy with 0.1 of the label spread over the wrong classes."""
    log_p = jax.nn.log_softmax(logits(params, x))
    classes = log_p.shape[-1]
    right = jax.nn.one_hot(y, classes)
    target = 0.9 * right + 0.1 / (classes - 1) * (1 - right)
    return -jnp.mean(jnp.sum(target * log_p, axis=-1))


@replays("sampa")
def test_replays(golden: Golden) -> None:
    """The ascent gradient is taken on the batch before; the loss smooths its labels."""
    hyper = golden.hyper
    epoch = np.arange(golden.steps) // hyper["steps"]
    rate = table(0.5 * hyper["lr"] * (1 + np.cos(np.pi * epoch / hyper["epochs"])))
    tx = flatopt.sampa(torch_optimizer(hyper, rate), hyper["rho"], mix=hyper["og"])

    def previous_first(t: Any, i: Any) -> tuple[Any, int]:
        return jnp.where(i == 0, jnp.maximum(t - 1, 0), t), 0

    replayed = replay(golden, tx, loss_fn=_smoothed_loss, extra_batch=previous_first)
    # `grad0` is that of the loss without smoothing.
    loss_fn, batch = problem(golden)
    grads = jax.grad(loss_fn)(golden.params, *batch(0, 0))
    replayed |= {f"grad0/{name}": np.asarray(g) for name, g in grads.items()}
    assert_agrees(golden.results, replayed)


def test_the_optimiser_is_a_transformation():
    with pytest.raises(TypeError, match=r"optimizer=0\.1 must be an optax transformation"):
        flatopt.sampa(0.1, RHO)
