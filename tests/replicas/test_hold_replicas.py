"""Replicas in the state of one optimiser."""

import jax
import jax.numpy as jnp
import optax
import pytest

import flatopt
from flatopt._replicas.hold_replicas import evaluation_number
from tests import cases
from tests.replicas.layouts import make_batches, make_replicas, sgd, train_vmapped


@pytest.mark.parametrize(("evaluation", "models"), [("unrolled", 4), ("loop", 1), ("vmap", 1)])
def test_how_often_the_other_replicas_are_compiled(evaluation: str, models: int):
    tx = flatopt.replicated_sgd(sgd(), 5, 0.5, evaluation=evaluation)
    params = cases.init_params()
    traced = 0

    def grad_fn(params, i):
        nonlocal traced
        del i
        traced += 1
        return jax.grad(cases.loss_fn)(params, cases.make_batch())

    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, grad_fn=grad_fn), params)
    assert traced == models


@pytest.mark.parametrize(
    ("tx", "gradients"),
    [
        (flatopt.replicated_sgd(sgd(), 4, 0.5), 4),
        (optax.chain(flatopt.rwp(0.1), sgd()), 2),
    ],
    ids=["replicated_sgd", "rwp"],
)
def test_independent_gradients_wait_for_one_another(tx, gradients: int):
    """Else XLA may interleave them, with the activations of all in memory at the same time."""
    params, batch = cases.init_params(), cases.make_batch()

    def update(params, opt_state):
        grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
        return tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)

    text = jax.jit(update).lower(params, tx.init(params)).as_text()
    barrier = "stablehlo.optimization_barrier"
    assert text.count(barrier) >= gradients - 1
    # Between two of them there is a whole gradient: something is multiplied.
    parts = text.split(barrier)
    assert sum("stablehlo.dot_general" in part for part in parts) >= gradients


def test_evaluation_is_the_centre_of_the_replicas_own_averages():
    inner = optax.chain(sgd(), flatopt.swa())
    tx = flatopt.replicated_sgd(inner, 3, 0.0, std=0.3, key=1)
    params, state = cases.run(tx)
    averages = [
        flatopt.eval_params(*reversed(cases.run(inner, jax.tree.map(lambda x, a=a: x[a], start))))
        for start in [make_replicas(3)]
        for a in range(3)
    ]
    expected = jax.tree.map(lambda *xs: sum(xs) / 3, *averages)
    cases.assert_close(flatopt.eval_params(state, params), expected)


def test_sam_per_replica():
    """Inside a mapped axis, and in a wrapper: each replica ascends along its own gradient."""
    number, start = 3, make_replicas(3)
    tx = lambda axis: optax.chain(  # noqa: E731
        flatopt.sam(0.2), flatopt.couple_replicas(0.5, axis_name=axis), optax.sgd(0.1)
    )
    batches = make_batches(0, number)
    mapped = train_vmapped(tx("replicas"), start, steps=1)

    def by_hand(params, batch):
        grads = jax.grad(cases.loss_fn)(params, batch)
        scale = 0.2 / optax.tree.norm(grads)
        return jax.grad(cases.loss_fn)(optax.tree.add_scale(params, scale, grads), batch)

    grads = jax.vmap(by_hand)(start, batches)
    centre = flatopt.barycentre(start)
    expected = jax.tree.map(
        lambda w, g, m: w - 0.1 * (g + 0.5 * (w - m[None])), start, grads, centre
    )
    cases.assert_close(mapped, expected)

    held = flatopt.hold_replicas(tx("replicas"), number, std=0.3, key=1)
    params = cases.init_params()
    seen = []

    def grad_fn(params, i):
        jax.debug.callback(seen.append, i)
        # Evaluations 0 and 1 are replicas 1 and 2; 2, 3, 4 the ascents of replicas 0, 1, 2.
        replica = jnp.where(i < number - 1, i + 1, i - (number - 1))
        return jax.grad(cases.loss_fn)(params, jax.tree.map(lambda x: x[replica], batches))

    grads = jax.grad(cases.loss_fn)(params, jax.tree.map(lambda x: x[0], batches))
    updates, state = held.update(grads, held.init(params), params, grad_fn=grad_fn)
    jax.effects_barrier()
    assert sorted(int(i) for i in seen) == [0, 1, 2, 3, 4]
    new = optax.apply_updates(params, updates)
    cases.assert_close(new, jax.tree.map(lambda x: x[0], expected))
    cases.assert_close(state.others, jax.tree.map(lambda x: x[1:], expected))


@pytest.mark.parametrize("method", ["parle", "gossip", "local_entropy"])
def test_the_other_methods_in_a_loop_that_knows_of_one_model(method: str):
    inner = {
        "parle": flatopt.parle(0.05, 0.1, 0.5, every=2, axis_name="replicas"),
        "gossip": flatopt.gossip(sgd(), "ring", axis_name="replicas"),
        "local_entropy": optax.chain(
            flatopt.local_entropy(3, 0.1, noise=0.0),
            flatopt.couple_replicas(0.5, axis_name="replicas"),
            optax.sgd(0.5),
        ),
    }[method]
    tx = flatopt.hold_replicas(inner, 3, std=0.1)
    params, state = cases.run(tx, steps=20)
    start = cases.loss_fn(cases.init_params(), cases.make_batch())
    assert cases.loss_fn(flatopt.eval_params(state, params), cases.make_batch()) < 0.8 * start


def test_unfit_evaluation():
    with pytest.raises(ValueError, match=r"evaluation='map' must be one of unrolled, loop, vmap"):
        flatopt.replicated_sgd(sgd(), 3, 0.1, evaluation="map")


def test_each_extra_gradient_has_a_number_of_its_own():
    number = 3
    own = [evaluation_number(j, a, number) for j in range(4) for a in range(number)]
    assert own == list(range(number - 1, number - 1 + 4 * number))
