"""The doors to Flax: a `TrainState` that forwards, modules that are split before the pass."""

from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, struct

import flatopt
import flatopt.linen
import flatopt.nnx
from tests import cases

X, Y = cases.make_batch(size=16)
SGD = cases.sgd()


class Linen(nn.Module):
    """BatchNorm and dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def _linen_state(tx: Any, cls: Any = flatopt.linen.TrainState, **kwargs: Any) -> Any:
    model = Linen()
    variables = model.init(jax.random.key(0), X)
    return cls.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
        **kwargs,
    )


def _linen_loss(state: Any) -> Any:
    def loss_fn(params: Any, batch_stats: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        out, new = state.apply_fn(
            {"params": params, "batch_stats": batch_stats},
            x,
            True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return jnp.mean(jnp.square(out - y)), new["batch_stats"]

    return loss_fn


def _linen_step(state: Any, key: jax.Array, **extra: Any) -> Any:
    loss_fn = _linen_loss(state)
    grad_fn = flatopt.make_grad_fn(loss_fn, state.batch_stats, X, Y, key, has_aux=True)
    (_, stats), grads = grad_fn.value_and_grad(state.params)
    return state.apply_gradients(grads=grads, grad_fn=grad_fn, batch_stats=stats, **extra)


def test_train_state_equals_the_loop_by_hand():
    tx, key = optax.chain(flatopt.sam(0.1), SGD), jax.random.key(1)
    state = _linen_state(tx)
    params, stats, opt_state = state.params, state.batch_stats, state.opt_state
    loss_fn = _linen_loss(state)
    for _ in range(3):
        state = jax.jit(_linen_step)(state, key)
        grad_fn = flatopt.make_grad_fn(loss_fn, stats, X, Y, key, has_aux=True)
        (_, new_stats), grads = grad_fn.value_and_grad(params)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        params, stats = optax.apply_updates(params, updates), new_stats
    cases.assert_close((state.params, state.batch_stats), (params, stats))
    cases.assert_close(state.opt_state, opt_state)
    assert int(state.step) == 3
    assert state.tx is tx


def test_train_state_forwards_value_to_whom_it_concerns():
    tx = optax.chain(flatopt.sam(0.1), SGD, optax.contrib.reduce_on_plateau())
    state = _linen_step(_linen_state(tx), jax.random.key(1), value=jnp.array(0.5))
    assert optax.tree.get(state.opt_state, "best_value") == 0.5


def test_train_state_with_an_optimiser_that_takes_no_extra_arguments():
    """SAM and SGD share one loop."""
    state = _linen_step(_linen_state(SGD), jax.random.key(1))
    grads = jax.grad(_linen_loss(state), has_aux=True)
    start = _linen_state(SGD)
    grads, stats = grads(start.params, start.batch_stats, X, Y, jax.random.key(1))
    cases.assert_close(state.params, start.apply_gradients(grads=grads).params)
    cases.assert_close(state.batch_stats, stats)


@pytest.mark.parametrize("name", ["step", "params", "opt_state"])
def test_train_state_says_what_it_computes_itself(name: str):
    state = _linen_state(SGD)
    with pytest.raises(ValueError, match=rf"computes {name} itself.*state\.replace"):
        state.apply_gradients(grads=state.params, **{name: 0})


def test_train_state_without_grad_fn_says_which_line_to_add():
    state = _linen_state(optax.chain(flatopt.sam(0.1), SGD))
    with pytest.raises(ValueError, match=r"make_grad_fn\(loss_fn, batch\)"):
        state.apply_gradients(grads=state.params)


def test_train_state_can_carry_more():
    class State(flatopt.linen.TrainState):
        noise_key: jax.Array
        label: str = struct.field(pytree_node=False, default="a")

    state = _linen_state(optax.chain(flatopt.sam(0.1), SGD), State, noise_key=jax.random.key(1))
    new = jax.jit(_linen_step)(state.replace(label="b"), jax.random.key(1))
    new = _linen_step(new, jax.random.key(1), noise_key=jax.random.key(2))
    assert isinstance(new, State)
    assert new.label == "b"
    assert new.noise_key == jax.random.key(2)


def test_train_state_without_batch_norm():
    state = flatopt.linen.TrainState.create(
        apply_fn=None, params=cases.init_params(), tx=optax.chain(flatopt.sam(0.05), SGD)
    )
    assert state.batch_stats == {}
    for i in range(3):
        grad_fn = flatopt.make_grad_fn(cases.loss_fn, cases.make_batch(i))
        state = state.apply_gradients(grads=grad_fn(state.params), grad_fn=grad_fn)
    cases.assert_close(state.params, cases.run(optax.chain(flatopt.sam(0.05), SGD), steps=3)[0])


def test_train_state_evaluates_averages_and_centres():
    tx = flatopt.msam(optax.chain(SGD, flatopt.swa()), 0.1)
    state = _linen_step(_linen_step(_linen_state(tx), jax.random.key(1)), jax.random.key(1))
    cases.assert_equal(state.eval_params, flatopt.eval_params(state.opt_state, state.params))
    assert not np.allclose(
        state.eval_params["Dense_0"]["kernel"], state.params["Dense_0"]["kernel"]
    )


def test_train_state_resumes_from_bytes_bit_for_bit():
    tx = optax.chain(flatopt.sam(0.1), SGD, flatopt.params_ema(0.9))
    start = _linen_state(tx)
    state = _linen_step(start, jax.random.key(1))
    restored = flax.serialization.from_bytes(start, flax.serialization.to_bytes(state))
    cases.assert_equal(
        _linen_step(restored, jax.random.key(2)), _linen_step(state, jax.random.key(2))
    )


class Module(nnx.Module):
    """BatchNorm and dropout."""

    def __init__(self, rngs: nnx.Rngs):
        """Makes the layers."""
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


def _loss(model: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model(x) - y))


def _loss_and_aux(model: nnx.Module, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = model(x)
    return jnp.mean(jnp.square(out - y)), out


def test_nnx_clean_pass_is_that_of_nnx():
    """Same loss, gradient, statistics and random state as `nnx.value_and_grad`."""
    ours, theirs = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    loss, grads = flatopt.nnx.make_grad_fn(_loss, ours, X, Y).value_and_grad(ours)
    expected, expected_grads = nnx.value_and_grad(_loss)(theirs, X, Y)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    cases.assert_close(grads, expected_grads)
    cases.assert_close(_arrays(ours), _arrays(theirs))
    assert nnx.state(ours, nnx.RngCount)["dropout"]["rngs"]["count"][...] == 1


def _arrays(model: nnx.Module) -> Any:
    return nnx.state(model, (nnx.Param, nnx.BatchStat, nnx.RngCount))


def test_nnx_grad_fn_leaves_no_trace_and_repeats_the_dropout_mask():
    model = Module(nnx.Rngs(0))
    grad_fn = flatopt.nnx.make_grad_fn(_loss, model, X, Y)
    before = jax.tree.map(np.array, _arrays(model))
    params = nnx.state(model, nnx.Param)
    first = grad_fn(params, 0)
    cases.assert_equal(grad_fn(params, 1), first)
    value = grad_fn.value(params)
    cases.assert_equal(_arrays(model), before)
    # The mask is that of the clean pass to come, and the next step has another.
    loss, grads = nnx.value_and_grad(_loss)(model, X, Y)
    cases.assert_close(grads, first)
    cases.assert_close(value, loss)
    later = flatopt.nnx.make_grad_fn(_loss, model, X, Y)(params)
    assert not np.allclose(later["second"]["kernel"][...], first["second"]["kernel"][...])


@pytest.mark.parametrize("clean", ["ours", "theirs"])
def test_nnx_step_in_jit_compiles_once(clean: str):
    traces = []

    @nnx.jit
    def step(model, optimizer, x, y):
        traces.append(1)
        grad_fn = flatopt.nnx.make_grad_fn(_loss, model, x, y)
        if clean == "ours":
            loss, grads = grad_fn.value_and_grad(model)
        else:
            loss, grads = nnx.value_and_grad(_loss)(model, x, y)
        optimizer.update(model, grads, grad_fn=grad_fn)
        return loss

    model = Module(nnx.Rngs(0))
    tx = optax.chain(flatopt.sam(0.1, every=2), SGD)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(step(model, optimizer, X, Y)) for _ in range(40)]
    assert len(traces) == 1
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert nnx.state(model, nnx.RngCount)["dropout"]["rngs"]["count"][...] == 40


def test_nnx_grad_fn_crosses_jit_without_recompiling():
    traces = []

    @jax.jit
    def norm(grad_fn, params):
        traces.append(1)
        return optax.tree.norm(grad_fn(params))

    for seed in range(3):
        model = Module(nnx.Rngs(seed))
        x, y = cases.make_batch(seed, size=16)
        norm(flatopt.nnx.make_grad_fn(_loss, model, x, y), nnx.state(model, nnx.Param))
    assert len(traces) == 1


def test_nnx_aux_is_handed_out_by_the_clean_pass():
    model, other = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    grad_fn = flatopt.nnx.make_grad_fn(_loss_and_aux, model, X, Y, has_aux=True)
    (loss, out), grads = grad_fn.value_and_grad(model)
    plain_loss, plain = flatopt.nnx.make_grad_fn(_loss, other, X, Y).value_and_grad(other)
    assert out.shape == (16, 2)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    cases.assert_close(grads, plain)


def test_nnx_microbatches_equal_the_whole_batch_where_statistics_do_not_matter():
    model, other = (nnx.Linear(4, 2, rngs=nnx.Rngs(0)) for _ in range(2))
    whole = flatopt.nnx.make_grad_fn(_loss, model, X, Y).value_and_grad(model)
    parts = flatopt.nnx.make_grad_fn(_loss, other, X, Y, microbatches=4).value_and_grad(other)
    cases.assert_close(parts, whole, rtol=1e-6)


def test_nnx_microbatches_average_the_statistics_of_the_parts():
    model, by_hand = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    flatopt.nnx.make_grad_fn(_loss, model, X, Y, microbatches=2).value_and_grad(model)
    graphdef, state = nnx.split(by_hand)
    means = []
    for half in (slice(0, 8), slice(8, 16)):
        part = nnx.merge(graphdef, state, copy=True)
        part(X[half])
        means.append(part.norm.mean[...])
    np.testing.assert_allclose(model.norm.mean[...], sum(means) / 2, rtol=1e-5, atol=1e-7)
    assert nnx.state(model, nnx.RngCount)["dropout"]["rngs"]["count"][...] == 1


def test_nnx_part_of_the_parameters_is_trained():
    """`wrt` as for `nnx.Optimizer`: the norm is that of what is trained, the rest stays."""
    first = nnx.All(nnx.Param, nnx.PathContains("first"))
    model = Module(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(flatopt.sam(0.1), SGD), wrt=first)
    before = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    grad_fn = flatopt.nnx.make_grad_fn(_loss, model, X, Y, wrt=first)
    _, grads = grad_fn.value_and_grad(model)
    assert set(grads) == {"first"}
    optimizer.update(model, grads, grad_fn=grad_fn)
    cases.assert_equal(nnx.state(model.second, nnx.Param), before["second"])
    assert not np.allclose(model.first.kernel[...], before["first"]["kernel"][...])


def test_nnx_apply_eval_params_gives_a_module_of_its_own():
    model = Module(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(SGD, flatopt.swa()), wrt=nnx.Param)
    kernels = []
    for _ in range(3):
        grad_fn = flatopt.nnx.make_grad_fn(_loss, model, X, Y)
        _, grads = grad_fn.value_and_grad(model)
        optimizer.update(model, grads, grad_fn=grad_fn)
        kernels.append(np.array(model.first.kernel[...]))
    before = jax.tree.map(np.array, _arrays(model))
    evaluated = flatopt.nnx.apply_eval_params(optimizer, model)
    np.testing.assert_allclose(evaluated.first.kernel[...], np.mean(kernels, 0), rtol=1e-5)
    np.testing.assert_array_equal(evaluated.norm.mean[...], model.norm.mean[...])
    evaluated(X)  # Moves its own statistics and random state.
    evaluated.eval()
    np.testing.assert_array_equal(evaluated(X), evaluated(X))
    cases.assert_equal(_arrays(model), before)
    assert not model.dropout.deterministic


def test_nnx_apply_eval_params_without_averages_gives_the_parameters():
    model = Module(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    evaluated = flatopt.nnx.apply_eval_params(optimizer, model)
    cases.assert_equal(_arrays(evaluated), _arrays(model))
    for theirs, ours in zip(
        jax.tree.leaves(_arrays(evaluated)), jax.tree.leaves(_arrays(model)), strict=True
    ):
        assert theirs.unsafe_buffer_pointer() != ours.unsafe_buffer_pointer()


def test_nnx_alternate_needs_no_grad_fn():
    """The two-call form in a loop that only knows `optimizer.update(model, grads)`."""
    model, other = (nnx.Linear(4, 2, rngs=nnx.Rngs(0)) for _ in range(2))
    two_calls = flatopt.alternate(SGD, flatopt.scale_to_norm(0.1))
    optimizer = nnx.Optimizer(model, two_calls, wrt=nnx.Param)
    one_call = nnx.Optimizer(other, optax.chain(flatopt.sam(0.1), SGD), wrt=nnx.Param)
    for _ in range(3):
        for _ in range(2):
            optimizer.update(model, nnx.grad(_loss)(model, X, Y))
        grad_fn = flatopt.nnx.make_grad_fn(_loss, other, X, Y)
        one_call.update(other, grad_fn.value_and_grad(other)[1], grad_fn=grad_fn)
    cases.assert_close(_arrays(model), _arrays(other))


@pytest.mark.parametrize("by_name", [False, True])
def test_other_nnx_objects_beside_the_model(by_name: bool):
    """Random streams and a second network: as `nnx.value_and_grad` takes them, moved on once."""

    def build():
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        return model, nnx.BatchNorm(2, rngs=nnx.Rngs(1)), nnx.Rngs(2)

    drop = nnx.Dropout(0.5)
    x = jax.random.normal(jax.random.key(0), (8, 3))

    def loss_fn(model, x, norm, rngs):
        return jnp.mean(norm(drop(model(x), rngs=rngs)) ** 2 * jnp.arange(2)[None])

    @nnx.jit
    def step(model, optimizer, norm, rngs):
        others = {"norm": norm, "rngs": rngs}
        if by_name:
            grad_fn = flatopt.nnx.make_grad_fn(loss_fn, model, x, **others)
        else:
            grad_fn = flatopt.nnx.make_grad_fn(loss_fn, model, x, *others.values())
        loss, grads = grad_fn.value_and_grad(model)
        again = grad_fn(nnx.state(model, nnx.Param))  # The same streams in every pass.
        optimizer.update(model, grads, grad_fn=grad_fn)
        return loss, grads, again

    model, norm, rngs = build()
    optimizer = nnx.Optimizer(model, optax.chain(flatopt.sam(0.05), optax.sgd(0.1)), wrt=nnx.Param)
    other, other_norm, other_rngs = build()
    expected_loss, expected = nnx.value_and_grad(loss_fn)(other, x, other_norm, other_rngs)
    loss, grads, again = step(model, optimizer, norm, rngs)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    cases.assert_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected))
    cases.assert_close(nnx.to_pure_dict(again), nnx.to_pure_dict(expected))
    np.testing.assert_allclose(norm.mean[...], other_norm.mean[...], rtol=1e-5)
    assert rngs.default.count[...] == other_rngs.default.count[...] == 1
    second, _, _ = step(model, optimizer, norm, rngs)
    assert np.isfinite(second)
    assert second != loss
