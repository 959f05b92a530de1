"""Coupled replicas, in every layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flatopt
from flatopt._replicas.couple_replicas import balancing_strength
from tests import cases
from tests.replay import Golden, assert_agrees, replay_replicas, replays, torch_optimizer
from tests.replicas.layouts import (
    METHODS,
    make_batches,
    make_replicas,
    one_step,
    sgd,
    train_leading,
    train_sharded,
    train_vmapped,
)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_leading_axis_equals_named_axis_equals_eight_devices(name: str):
    """For gossip this also says that the dense product is `ppermute` after `ppermute`."""
    start = make_replicas()
    leading = train_leading(METHODS[name](None), start)
    assert not np.allclose(leading["hidden"]["kernel"], start["hidden"]["kernel"])
    cases.assert_close(train_vmapped(METHODS[name]("replicas"), start), leading)
    cases.assert_close(train_sharded(METHODS[name]("replicas"), start), leading)


def test_replicas_over_devices_and_within():
    """Two on each of four devices: the axis is a tuple of names."""
    start = make_replicas()
    tx = METHODS["couple"](("devices", "local"))
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": P("devices"), "out_specs": P("devices"), "check_vma": False}

    def mapped(function):
        local = jax.vmap(function, axis_name="local")
        return jax.jit(jax.shard_map(local, mesh=mesh, **specs))

    params, opt_state = start, mapped(tx.init)(start)
    step = mapped(functools.partial(one_step, tx))
    for i in range(4):
        params, opt_state = step(params, opt_state, make_batches(i))
    cases.assert_close(params, train_leading(METHODS["couple"](None), start))


def test_pull_is_the_gradient_of_the_springs():
    params, strength = make_replicas(3), 0.7

    def springs(params):
        away = jax.tree.map(lambda w, m: w - m[None], params, flatopt.barycentre(params))
        return 0.5 * strength * optax.tree.norm(away, squared=True)

    stage = flatopt.couple_replicas(strength)
    zeros = optax.tree.zeros_like(params)
    pull, _ = stage.update(zeros, stage.init(params), params)
    cases.assert_close(pull, jax.grad(springs)(params))
    # Springs among the replicas move no centre.
    cases.assert_close(flatopt.barycentre(pull), optax.tree.zeros_like(cases.init_params()))


# Limits
@pytest.mark.parametrize("axis", [None, "replicas"])
def test_strength_zero_is_independent_training_bit_for_bit(axis):
    start = make_replicas()
    train = train_leading if axis is None else train_vmapped
    coupled = train(optax.chain(flatopt.couple_replicas(0.0, axis_name=axis), sgd()), start)
    cases.assert_equal(coupled, train(sgd(), start))


def test_strength_zero_on_eight_devices_bit_for_bit():
    start = make_replicas()
    coupled = optax.chain(flatopt.couple_replicas(0.0, axis_name="replicas"), sgd())
    cases.assert_equal(train_sharded(coupled, start), train_sharded(sgd(), start))


def test_a_schedule_that_is_zero_is_independent_training():
    start = make_replicas()
    tx = optax.chain(flatopt.couple_replicas(lambda step: 0.0 * step), sgd())
    cases.assert_close(train_leading(tx, start), train_leading(sgd(), start))


def test_one_replica_is_plain_sgd():
    start = make_replicas(1)
    expected = train_leading(sgd(), start)
    for tx in (METHODS["couple"](None), flatopt.gossip(sgd(), "ring")):
        cases.assert_equal(train_leading(tx, start), expected)
    alone, _ = cases.run(sgd())
    recipe = flatopt.replicated_sgd(sgd(), 1, 0.5)
    params, state = cases.run(recipe)
    cases.assert_equal(params, alone)
    cases.assert_equal(flatopt.eval_params(state, params), alone)


def test_every_multiplies_the_pull():
    params = make_replicas(3)
    stage = flatopt.couple_replicas(0.2, every=3)
    zeros, state = optax.tree.zeros_like(params), stage.init(params)
    for _ in range(2):
        pull, state = stage.update(zeros, state, params)
        cases.assert_equal(pull, zeros)
    pull, _ = stage.update(zeros, state, params)
    plain = flatopt.couple_replicas(0.6)
    cases.assert_close(pull, plain.update(zeros, plain.init(params), params)[0])


def test_strong_coupling_makes_the_replicas_collapse():
    tx = optax.chain(flatopt.couple_replicas(10.0), optax.sgd(0.05))
    params = train_leading(tx, make_replicas(), steps=12)
    centre = flatopt.barycentre(params)
    for replica, mean in zip(jax.tree.leaves(params), jax.tree.leaves(centre), strict=True):
        assert float(jnp.abs(replica - mean[None]).max()) < 0.05
    assert float(jnp.std(make_replicas()["hidden"]["kernel"], axis=0).min()) > 0.05


@pytest.mark.parametrize("axis", [None, "replicas"])
def test_automatic_strength(axis):
    """The unit: the mean loss over the mean half squared distance, in the first updates."""
    params = {"w": jnp.array([[1.0], [3.0]])}
    stage = flatopt.couple_replicas(lambda step: 2.0, axis_name=axis, automatic=2)
    update = stage.update
    init = stage.init
    if axis is not None:
        init = jax.vmap(init, axis_name=axis)
        update = jax.vmap(lambda u, s, p, value: stage.update(u, s, p, value=value), axis_name=axis)
    zeros, state = optax.tree.zeros_like(params), init(params)

    def call(state, value):
        if axis is None:
            return update(zeros, state, params, value=jnp.array(value))
        return update(zeros, state, params, jnp.array(value))

    for value in ([1.0, 5.0], [2.0, 8.0]):
        pull, state = call(state, value)
        cases.assert_equal(pull, zeros)  # Uncoupled while it measures.
        np.testing.assert_allclose(state.unit, np.mean(value) / 0.5)
    pull, _ = call(state, [7.0, 7.0])
    np.testing.assert_allclose(pull["w"], 2.0 * 10.0 * np.array([[-1.0], [1.0]]))


def test_automatic_strength_needs_the_loss():
    stage = flatopt.couple_replicas(1.0, automatic=1)
    params = make_replicas(2)
    with pytest.raises(ValueError, match="value=loss"):
        stage.update(params, stage.init(params), params)


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_unfit_strength(bad: float):
    with pytest.raises(ValueError, match="strength="):
        flatopt.couple_replicas(bad)
    with pytest.raises(ValueError, match="strength="):
        flatopt.replicated_sgd(sgd(), 3, bad)


@replays("rsgd")
def test_replays_rsgd(golden: Golden) -> None:
    """The penalty is `g |w - mean|^2`, without the half.

    The loss there is the mean over y replicas, and the learning rate y times as large to make up
    for it: that also multiplies the decay, which had not been divided.
    """
    hyper = golden.hyper
    decay = hyper["y"] * hyper["weight_decay"]
    strength = flatopt.exponential_scoping(2 * hyper["g"], hyper["grate"], every=golden.epoch_len)
    optimizer = torch_optimizer(
        {**hyper, "nesterov": True, "weight_decay": decay}, golden.learning_rate
    )
    tx = optax.chain(flatopt.couple_replicas(strength), optimizer)
    replayed = replay_replicas(golden, tx)
    replayed["g_t"] = np.asarray([strength(t) / 2 for t in range(golden.steps)])
    # The penalty of each step, from its weights.
    points = [v[:-1] for k, v in replayed.items() if k.startswith("traj/")]
    squares = [((x - x.mean(1, keepdims=True)) ** 2).reshape(*x.shape[:2], -1) for x in points]
    replayed["coupling_loss"] = replayed["g_t"] * sum(s.sum(-1) for s in squares).mean(1)
    assert_agrees(golden.results, replayed)


def test_balanced_springs_weigh_as_much_as_the_loss():
    params, losses = make_replicas(3), jnp.array([1.0, 2.0, 6.0])
    measure = lambda value, w: balancing_strength(value, w, "replicas")  # noqa: E731
    strength = jax.vmap(measure, axis_name="replicas")(losses, params)[0]
    away = jax.tree.map(lambda w, m: w - m[None], params, flatopt.barycentre(params))
    springs = 0.5 * strength * optax.tree.norm(away, squared=True)
    np.testing.assert_allclose(springs, losses.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["couple_every", "parle"])
def test_between_two_pulls_nothing_is_computed(name: str):
    """On a leading axis one branch serves all replicas: an overflow there goes nowhere."""
    tx, params = METHODS[name](None), make_replicas(3)
    text = str(jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p))(params))
    assert "while[" in text or "cond[" in text
    assert "select_n" not in text.split("while[")[-1]
