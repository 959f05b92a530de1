"""What averages share: bytes of the state, accumulators, devices, counters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.averaging.feed import bytes_of, feed


@pytest.mark.parametrize(
    ("stage", "copies"),
    [
        (flatopt.swa(), 1),
        (flatopt.params_ema(0.99), 1),
        (flatopt.power_ema(2.0), 1),
        (flatopt.lawa(5), 5),
        (flatopt.snapshots(3), 3),
        (flatopt.swag(4), 2 + 4),
    ],
)
def test_bytes_of_the_state(stage: Any, copies: int):
    params = cases.init_params()
    assert bytes_of(stage.init(params)) - copies * bytes_of(params) in range(17)


@pytest.mark.parametrize(
    ("wrap", "copies"),
    [
        (lambda tx: flatopt.lookahead(tx), 1),
        (lambda tx: flatopt.lookahead(tx, reset_state=True), 1),
        (lambda tx: flatopt.lookahead(tx, pull_back=True), 2),  # SGD's momentum is the second.
        (lambda tx: flatopt.periodic_swa(tx, 10), 1),
    ],
)
def test_bytes_that_a_wrapper_adds(wrap: Any, copies: int):
    params = cases.init_params()
    extra = bytes_of(wrap(cases.sgd()).init(params)) - bytes_of(cases.sgd().init(params))
    assert extra - copies * bytes_of(params) in range(17)


def test_half_precision_parameters_have_a_float32_average_and_half_precision_snapshots():
    params = cases.init_params(jnp.bfloat16)
    assert bytes_of(flatopt.swa().init(params)) - 2 * bytes_of(params) in range(17)
    assert bytes_of(flatopt.lookahead(cases.sgd()).init(params).slow) == 2 * bytes_of(params)
    assert bytes_of(flatopt.lawa(3).init(params)) - 3 * bytes_of(params) in range(17)


def test_stacks_lie_over_the_devices_as_the_parameters_do():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("model")
    params = jax.device_put(jnp.ones([16, 2]), jax.sharding.NamedSharding(mesh, spec))
    expected = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    for stage, field in ((flatopt.snapshots(3), "ring"), (flatopt.swag(3), "deviations")):
        state = stage.init(params)
        assert getattr(state, field).sharding.is_equivalent_to(expected, 3)
        _, state = jax.jit(stage.update)(params, state, params)
        assert getattr(state, field).sharding.is_equivalent_to(expected, 3)


# When they act


STAGES = {
    "swa": flatopt.swa,
    "params_ema": lambda **when: flatopt.params_ema(0.5, **when),
    "power_ema": lambda **when: flatopt.power_ema(1.0, **when),
    "lawa": lambda **when: flatopt.lawa(3, **when),
    "snapshots": lambda **when: flatopt.snapshots(3, **when),
    "swag": lambda **when: flatopt.swag(3, **when),
}
WHOLE = {
    "wasam": lambda **when: flatopt.wasam(cases.sgd(), 0.0, **when),
    "gadam": lambda **when: flatopt.gadam(0.05, **when),
    "gadamx": lambda **when: flatopt.gadamx(0.05, **when),
    "lookahead": lambda **when: flatopt.lookahead(cases.sgd(), **when),
    "periodic_swa": lambda **when: flatopt.periodic_swa(cases.sgd(), 3 * when["every"], **when),
}


def _acts(tx: Any, updates: int = 13) -> list[int]:
    """The numbers of updates after which what is kept changes."""
    params, kept = jnp.zeros(2), []
    state = tx.init(params)
    update = jax.jit(tx.update)
    for number in range(1, updates + 1):
        before = _kept(state)
        moves, state = update(jnp.full(2, float(number)), state, params)
        params = optax.apply_updates(params, moves)
        if any((x != y).any() for x, y in zip(before, _kept(state), strict=True)):
            kept.append(number)
    return kept


def _kept(state: Any) -> list[jax.Array]:
    return [np.asarray(x) for x in jax.tree.leaves(_kept_trees(state))]


@pytest.mark.parametrize("name", [*STAGES, *WHOLE])
@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"every": 4}, [4, 8, 12]),
        ({"start": 0, "every": 4}, [4, 8, 12]),
        ({"start": 6, "every": 4}, [6, 10]),
        ({"start": 2, "every": 4}, [2, 6, 10]),
        ({"start": 2**31, "every": 4}, []),
        ({"start": 3, "every": 2**40}, [3]),
    ],
    ids=str,
)
def test_it_acts_after_start_and_each_period(name: str, when: Any, expected: list[int]):
    tx = (STAGES | WHOLE)[name](**when)
    acts = _acts(tx)
    if name == "lookahead" and when.get("start", 0) > when["every"]:
        begin = when["start"] - when["every"]  # Until then the slow weights are the fast ones.
        acts = [n for n in acts if n > begin]
    assert acts == expected


@pytest.mark.parametrize("name", STAGES)
def test_without_arguments_every_update_counts(name: str):
    assert _acts(STAGES[name](), updates=4) == [1, 2, 3, 4]
    assert _acts(STAGES[name](start=3), updates=4) == [3, 4]


@pytest.mark.parametrize("name", STAGES)
def test_counters_stop_at_the_end_of_their_range(name: str):
    stage, last = STAGES[name](), jnp.iinfo(jnp.int32).max
    state = feed(stage)._replace(step=jnp.int32(last))
    if hasattr(state, "number"):
        state = state._replace(number=jnp.int32(last))
    for _ in range(2):
        _, state = stage.update(jnp.float32(0), state, jnp.float32(1))
        assert state.step == last
        assert getattr(state, "number", last) == last
        assert np.isfinite(flatopt.eval_params(state, jnp.float32(0)))


def test_a_restart_late_in_a_run_stops_its_counters():
    tx, last = flatopt.periodic_swa(optax.sgd(1.0), 1), jnp.iinfo(jnp.int32).max
    state = tx.init(jnp.float32(0))._replace(restarts=jnp.int32(last))
    _, state = tx.update(jnp.float32(1), state, jnp.float32(0))
    assert (state.restarts, state.number) == (last, 0)
    long = flatopt.periodic_swa(optax.sgd(1.0), 2**40, stop=2**41)
    _, state = long.update(jnp.float32(1), long.init(jnp.float32(0)), jnp.float32(0))
    assert (state.restarts, state.number) == (0, 1)
    several = flatopt.periodic_swa(optax.sgd(1.0), [1, 2**40])
    _, state = several.update(jnp.float32(1), several.init(jnp.float32(0)), jnp.float32(0))
    assert state.restarts == 1


# What they add up in


@pytest.mark.parametrize("name", [*STAGES, *WHOLE])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_the_accumulator_has_the_dtype_that_was_asked_for(name: str, dtype: Any):
    with jax.enable_x64(dtype == jnp.float64):
        params = {"w": jnp.linspace(0, 1, 5, dtype=jnp.float32), "n": jnp.arange(3)}
        tx = (STAGES | WHOLE)[name](accumulator_dtype=dtype, every=1)
        if name in WHOLE:
            params = params["w"]
        state = tx.init(params)
        assert {x.dtype for x in _floats(_kept_trees(state))} == {jnp.dtype(dtype)}
        updates = optax.tree.zeros_like(params)
        for _ in range(2):
            _, new = tx.update(updates, state, params)
            assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
            state = new
        averaged = flatopt.eval_params(state, params)
        assert jax.tree.map(jnp.result_type, averaged) == jax.tree.map(jnp.result_type, params)
        cases.assert_close(averaged, params, rtol=1e-2)


def _kept_trees(state: Any) -> Any:
    """Means, slow weights and models, wherever they stand in the state."""
    fields = {"mean", "ring", "slow", "deviations"}

    def keeps(node: Any) -> bool:
        return bool(fields & set(getattr(node, "_fields", ())))

    found = [s for s in jax.tree.leaves(state, is_leaf=keeps) if keeps(s)]
    return [getattr(s, name) for s in found for name in fields & set(s._fields)]


def _floats(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize(
    "leaf",
    [jnp.array([True, False]), jnp.array([200, 3], jnp.uint8), jax.random.key(0)],
    ids=["bool", "uint8", "key"],
)
@pytest.mark.parametrize(
    "stage",
    [
        flatopt.swa(),
        flatopt.params_ema(0.9),
        flatopt.power_ema(2.0),
        flatopt.lawa(2),
        flatopt.snapshots(2),
        flatopt.swag(2),
    ],
    ids=["swa", "params_ema", "power_ema", "lawa", "snapshots", "swag"],
)
def test_what_has_no_mean_is_the_latest(stage, leaf):
    """Flags, counters and random keys beside the weights, as in the state of a whole module."""
    params = {"w": jnp.ones(2), "x": leaf}
    state = stage.init(params)
    still = None if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
    for _ in range(3):
        _, state = stage.update({"w": jnp.ones(2), "x": still}, state, params)
    assert (flatopt.eval_params(state, params)["x"] == leaf).all()
    np.testing.assert_array_equal(params["w"], 1.0)
