"""What users of averaging tools stumble over, one test each: here it works."""

from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatopt
from flatopt.linen import recompute_batch_stats
from tests import cases

AVERAGES = {
    "swa": lambda: flatopt.swa(start=3),
    "params_ema": lambda: flatopt.params_ema(0.9, start=3),
    "power_ema": lambda: flatopt.power_ema(2.0, start=3),
    "lawa": lambda: flatopt.lawa(2, start=3),
    "swag": lambda: flatopt.swag(2, start=3),
}
WRAPPERS = {
    "lookahead": lambda tx: flatopt.lookahead(tx, every=4),
    "lookahead-reset": lambda tx: flatopt.lookahead(tx, every=4, reset_state=True),
    "lookahead-pull_back": lambda tx: flatopt.lookahead(tx, every=4, pull_back=True),
    "periodic_swa": lambda tx: flatopt.periodic_swa(tx, 4),
}


def _differ(a: Any, b: Any) -> bool:
    return any(
        not np.allclose(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# Slow weights belong to the state


@pytest.mark.parametrize("name", [n for n in WRAPPERS if n.startswith("lookahead")])
def test_lookahead_takes_plain_parameters_and_keeps_the_slow_ones_itself(name: str):
    params = cases.init_params()
    tx = WRAPPERS[name](cases.sgd())
    trained, state = cases.run(tx, params, steps=6)
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    slow = flatopt.eval_params(state, trained)
    assert jax.tree.structure(slow) == jax.tree.structure(params)
    synchronised, _ = cases.run(tx, params, steps=4)
    cases.assert_close(slow, synchronised)
    assert _differ(slow, trained)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_hands_the_gradient_function_on(name: str):
    """Lookahead around SAM: every extra argument reaches who wants it."""
    tx = WRAPPERS[name](optax.chain(flatopt.sam(0.05), cases.sgd()))
    params, _ = cases.run(tx, steps=3)
    expected, _ = cases.run(optax.chain(flatopt.sam(0.05), cases.sgd()), steps=3)
    cases.assert_close(params, expected)
    plateau = optax.contrib.reduce_on_plateau()
    tx, start = WRAPPERS[name](optax.chain(cases.sgd(), plateau)), cases.init_params()
    grads = jax.grad(cases.loss_fn)(start, cases.make_batch())
    updates, _ = tx.update(grads, tx.init(start), start, value=1.0, nobody_expects=2.0)
    assert float(optax.tree.norm(updates)) > 0


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_lets_parameters_and_state_be_donated(name: str):
    tx, params = WRAPPERS[name](cases.sgd()), cases.init_params()
    step, state = jax.jit(cases.train_step(tx), donate_argnums=(0, 1)), tx.init(params)
    for i in range(5):
        params, state = step(params, state, cases.make_batch(i))
    cases.assert_close(params, cases.run(tx, steps=5)[0])


# Averages over devices


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_sharded_parameters_lies_where_they_lie(name: str):
    """No device has to be chosen: the average is computed shard by shard."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    params = jax.device_put(jnp.arange(16.0), sharding)
    tx = optax.chain(optax.sgd(0.1), AVERAGES[name]())
    step = jax.jit(lambda p, s: tx.update(p, s, p))
    state = tx.init(params)
    for _ in range(4):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    averaged = jax.jit(flatopt.eval_params)(state, params)
    assert averaged.sharding.is_equivalent_to(sharding, 1)
    text = step.lower(params, state).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
    assert _differ(averaged, params)


# Decay, precision


def test_a_very_slow_average_is_not_biased_towards_its_start():
    """Decay .99999: without debiasing, the first weights keep a share of .78 after 25000 steps."""

    def average(stage: Any) -> float:
        def step(state: Any, t: jax.Array) -> Any:
            weights = jnp.where(t == 0, 10.0, 1.0)  # The first weights are far off.
            return stage.update(jnp.zeros(()), state, weights)[1], None

        state, _ = jax.lax.scan(step, stage.init(jnp.zeros(())), jnp.arange(25_000))
        return float(flatopt.eval_params(state, jnp.zeros(())))

    np.testing.assert_allclose(average(flatopt.params_ema(0.99999)), 1.0, atol=2e-3)
    biased = average(flatopt.params_ema(0.99999, debias=False))
    np.testing.assert_allclose(biased, 1 + 9 * 0.99999**24_999, rtol=2e-3)
    warm = average(flatopt.params_ema(0.99999, debias=False, warmup_steps=10))
    np.testing.assert_allclose(warm, 1.0, atol=2e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_slow_average_of_half_precision_weights_moves(dtype: Any):
    """In bfloat16 an update of 1e-4 of the distance rounds to nothing."""
    stage, start = flatopt.params_ema(0.9999, debias=False), jnp.ones(2, dtype)
    _, state = stage.update(jnp.zeros_like(start), stage.init(start), start)
    update = jax.jit(lambda s: stage.update(jnp.zeros_like(start), s, start + 1)[1])
    for _ in range(1000):
        state = update(state)
    np.testing.assert_allclose(state.mean, 2 - 0.9999**1000, rtol=1e-4)
    averaged = flatopt.eval_params(state, start)
    assert averaged.dtype == dtype
    assert (averaged > start).all()
    # What an accumulator in the weights' own dtype would do.
    stuck = flatopt.params_ema(0.9999, debias=False, accumulator_dtype=jnp.bfloat16)
    _, state = stuck.update(jnp.zeros_like(start), stuck.init(start), start)
    for _ in range(100):
        _, state = stuck.update(jnp.zeros_like(start), state, start + 1)
    assert (state.mean == 1).all()


# BatchNorm and other collections


class _Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        return nn.Dense(2)(nn.relu(x))


def _train_batch_norm(steps: int = 12) -> tuple[Any, ...]:
    """A run whose optimiser averages the weights; returns variables, state and the batches."""
    model, batches = _Model(), [cases.make_batch(i, size=16) for i in range(4)]
    variables = model.init(jax.random.key(0), batches[0][0], train=True)
    tx = optax.chain(optax.sgd(0.2), flatopt.swa(start=3))
    params, stats = variables["params"], variables["batch_stats"]
    state = tx.init(params)

    @jax.jit
    def step(params: Any, stats: Any, state: Any, x: Any, y: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            out, new = model.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.mean((out - y) ** 2), new["batch_stats"]

        grads, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    for i in range(steps):
        params, stats, state = step(params, stats, state, *batches[i % 4])
    return model, params, stats, state, [x for x, _ in batches]


def test_any_collection_can_be_averaged_beside_the_weights():
    """Parameters and statistics in one tree; counters are copied, not averaged."""
    tree = {
        "params": jnp.array([1.0, 2.0]),
        "batch_stats": {"mean": jnp.array([0.0]), "count": jnp.array(0)},
    }
    stage = flatopt.swa()
    state = stage.init(tree)
    for i in (1, 2, 6):
        moved = jax.tree.map(lambda x, i=i: (x * 0 + i).astype(x.dtype), tree)
        _, state = stage.update(jax.tree.map(jnp.zeros_like, tree), state, moved)
    averaged = flatopt.eval_params(state, tree)
    np.testing.assert_allclose(averaged["params"], 3.0)
    np.testing.assert_allclose(averaged["batch_stats"]["mean"], 3.0)
    assert averaged["batch_stats"]["count"] == 6
    assert averaged["batch_stats"]["count"].dtype == tree["batch_stats"]["count"].dtype


def test_recomputed_statistics_are_an_exact_mean_and_training_is_untouched():
    model, params, stats, state, inputs = _train_batch_norm()
    before = jax.tree.map(np.array, (params, stats, state))
    averaged = flatopt.eval_params(state, params)
    variables = {"params": averaged, "batch_stats": stats}
    recomputed = recompute_batch_stats(model, variables, inputs, train=True)
    cases.assert_equal((params, stats, state), before)
    hidden = [x @ averaged["Dense_0"]["kernel"] + averaged["Dense_0"]["bias"][None] for x in inputs]
    expected = {
        "mean": sum(h.mean(0) for h in hidden) / 4,
        "var": sum(h.var(0) for h in hidden) / 4,
    }
    cases.assert_close(recomputed["BatchNorm_0"], expected, rtol=1e-4)
    assert _differ(recomputed, stats)


def test_averaging_the_statistics_themselves_is_the_other_way():
    """Beside the optimiser, a second averaging stage takes the statistics as its parameters."""
    stage = flatopt.swa()
    stats = [{"mean": jnp.array([float(i)])} for i in range(4)]
    state = stage.init(stats[0])
    for new in stats:
        _, state = stage.update(optax.tree.zeros_like(new), state, new)
    np.testing.assert_allclose(flatopt.eval_params(state, stats[0])["mean"], [1.5])


def test_evaluating_the_average_cannot_spoil_the_statistics_in_training():
    model, params, stats, state, inputs = _train_batch_norm()
    before = jax.tree.map(np.array, stats)
    averaged = flatopt.eval_params(state, params)
    own = recompute_batch_stats(
        model, {"params": averaged, "batch_stats": stats}, inputs, train=True
    )
    model.apply({"params": averaged, "batch_stats": own}, inputs[0], train=False)
    cases.assert_equal(stats, before)


# Checkpoints


@pytest.mark.parametrize("name", [*AVERAGES, *WRAPPERS])
def test_a_resumed_run_goes_on_from_the_raw_weights(name: str):
    """Raw and averaged weights are apart in the checkpoint, and both come back bit for bit."""
    if name in AVERAGES:
        tx = optax.chain(cases.sgd(), AVERAGES[name]())
    else:
        tx = WRAPPERS[name](cases.sgd())
    params, state = cases.run(tx, steps=6)
    averaged = flatopt.eval_params(state, params)
    assert _differ(averaged, params)
    like = cases.init_params(seed=9)
    saved = flax.serialization.to_bytes((params, state))
    restored = flax.serialization.from_bytes((like, tx.init(like)), saved)
    cases.assert_equal(flatopt.eval_params(restored[1], restored[0]), averaged)
    resumed = cases.run(tx, restored[0], opt_state=restored[1], first=6, steps=5)
    uninterrupted = cases.run(tx, steps=11)
    cases.assert_equal(resumed, uninterrupted)
    from_average, _ = cases.run(tx, averaged, opt_state=restored[1], first=6, steps=5)
    assert _differ(from_average, uninterrupted[0])


# Several optimisers, other averages


def test_each_partition_may_have_an_average_of_its_own():
    labels = {"hidden": "mean", "out": "ema", "temperature": "none"}
    tx = optax.partition(
        {
            "mean": optax.chain(cases.sgd(), flatopt.swa(start=2)),
            "ema": optax.chain(optax.adam(0.01), flatopt.params_ema(0.5)),
            "none": cases.sgd(),
        },
        labels,
    )
    points = [cases.run(tx, steps=n)[0] for n in (1, 2, 3)]
    params, state = cases.run(tx, steps=3)
    averaged = flatopt.eval_params(state, params)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, points[1]["hidden"], points[2]["hidden"])
    cases.assert_close(averaged["hidden"], expected)
    expected = jax.tree.map(
        lambda *p: (p[0] + 2 * p[1] + 4 * p[2]) / 7, *(p["out"] for p in points)
    )
    cases.assert_close(averaged["out"], expected)
    cases.assert_equal(averaged["temperature"], params["temperature"])


def test_swag_gives_a_mean_and_samples_around_it():
    tx = flatopt.msam(optax.chain(cases.sgd(), flatopt.swag(3)), 0.1)
    params, state = cases.run(tx, steps=6)
    swa_params, swa_state = cases.run(
        flatopt.msam(optax.chain(cases.sgd(), flatopt.swa()), 0.1), steps=6
    )
    mean = flatopt.eval_params(state, params)
    cases.assert_close(mean, flatopt.eval_params(swa_state, swa_params))
    keys = jax.random.split(jax.random.key(0), 4)
    samples = jax.vmap(lambda key: flatopt.sample_params(state, key, params=params))(keys)
    assert samples["out"]["kernel"].shape == (4, 8, 2)
    assert _differ(samples["out"]["kernel"][0], samples["out"]["kernel"][1])


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_is_a_pure_function_and_swaps_nothing(name: str):
    tx = optax.chain(cases.sgd(), AVERAGES[name]())
    params, state = cases.run(tx)
    before = jax.tree.map(np.array, (params, state))
    averaged = flatopt.eval_params(state, params)
    cases.assert_equal((params, state), before)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(averaged))
    plain, _ = cases.run(cases.sgd())
    cases.assert_close(params, plain)  # Averaging does not touch the training either.


# One way to get the weights to evaluate


def _nests(average: Any) -> dict[str, Any]:
    chain = optax.chain(optax.inject_hyperparams(optax.sgd)(0.05), average)
    return {
        "chain": chain,
        "multi_steps": optax.MultiSteps(chain, 1).gradient_transformation(),
        "masked": optax.masked(chain, lambda p: jax.tree.map(lambda _: True, p)),
        "apply_if_finite": optax.apply_if_finite(chain, 3),
        "named_chain": optax.named_chain(("sam", flatopt.sam(0.0)), ("rest", chain)),
        "lookahead": flatopt.lookahead(chain, every=100, slow_step_size=1.0),
    }


@pytest.mark.parametrize("name", AVERAGES)
def test_one_function_finds_every_average_in_every_nest(name: str):
    expected = None
    for nest in _nests(AVERAGES[name]()).values():
        params, state = cases.run(nest)
        averaged = flatopt.eval_params(state, params)
        expected = averaged if expected is None else expected
        cases.assert_close(averaged, expected)
        assert _differ(averaged, params)


@pytest.mark.parametrize("name", AVERAGES)
def test_before_averaging_begins_the_weights_are_those_in_training(name: str):
    nests = _nests(AVERAGES[name]())
    del nests["lookahead"]  # It has evaluation weights of its own.
    for nest in nests.values():
        params, state = cases.run(nest, steps=2)
        cases.assert_equal(flatopt.eval_params(state, params), params)


@pytest.mark.parametrize("name", AVERAGES)
def test_under_multi_steps_an_average_counts_whole_steps(name: str):
    chain = optax.chain(cases.sgd(), AVERAGES[name]())
    multi = optax.MultiSteps(chain, 2)
    params, state, whole = cases.init_params(), None, chain.init(cases.init_params())
    state, plain = multi.init(params), cases.init_params()
    gradient = jax.jit(jax.grad(cases.loss_fn))
    for i in range(5):
        halves = [gradient(params, cases.make_batch(2 * i + j)) for j in range(2)]
        for grads in halves:
            updates, state = multi.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
        updates, whole = chain.update(mean, whole, plain)
        plain = optax.apply_updates(plain, updates)
    cases.assert_close(flatopt.eval_params(state, params), flatopt.eval_params(whole, plain))


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_inside_msam_are_those_of_the_centres(name: str):
    tx = flatopt.msam(optax.chain(cases.sgd(), AVERAGES[name]()), 0.3)
    params, step = cases.init_params(), jax.jit(cases.train_step(tx))
    outside, state = AVERAGES[name](), tx.init(params)
    kept = outside.init(params)
    for i in range(6):
        params, state = step(params, state, cases.make_batch(i))
        centre = state.eval_params(params)
        _, kept = outside.update(optax.tree.zeros_like(params), kept, centre)
    expected = flatopt.eval_params(kept, params)
    cases.assert_close(flatopt.eval_params(state, params), expected, rtol=1e-4, atol=1e-5)
    assert _differ(expected, state.eval_params(params))


def test_hyperparameters_of_averages_can_be_injected():
    chain = optax.chain(
        cases.sgd(), optax.inject_hyperparams(flatopt.params_ema)(decay=0.9), optax.identity()
    )
    params, state = cases.run(chain)
    expected, other = cases.run(optax.chain(cases.sgd(), flatopt.params_ema(0.9)))
    cases.assert_close(flatopt.eval_params(state, params), flatopt.eval_params(other, expected))
    injected = optax.inject_hyperparams(flatopt.gadam)(learning_rate=0.05)
    params, state = cases.run(injected)
    expected, other = cases.run(flatopt.gadam(0.05))
    close = {"rtol": 1e-3, "atol": 1e-5}  # Adam's first steps magnify what is rounded.
    cases.assert_close(params, expected, **close)
    averages = (flatopt.eval_params(*pair) for pair in ((state, params), (other, expected)))
    cases.assert_close(*averages, **close)


def test_sam_and_averaging_are_one_line():
    tx = flatopt.wasam(cases.sgd(), rho=0.05, start=2)
    chain = optax.chain(flatopt.sam(0.05), cases.sgd(), flatopt.swa(start=2))
    cases.assert_equal(cases.run(tx), cases.run(chain))
    params, state = cases.run(tx)
    assert _differ(flatopt.eval_params(state, params), params)
