"""A run resumed from a checkpoint goes on bit for bit."""

import itertools

import flax.serialization
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatopt
from tests import cases
from tests.cases import Case


@pytest.mark.parametrize("case", cases.main_cases())
def test_flax_msgpack(case: Case):
    tx = case.build()
    params, opt_state = cases.run(tx, steps=4)
    like = cases.init_params(seed=9)
    saved = flax.serialization.to_bytes((params, opt_state))
    restored = flax.serialization.from_bytes((like, tx.init(like)), saved)
    cases.assert_equal(restored, (params, opt_state))
    resumed = cases.run(tx, restored[0], opt_state=restored[1], first=4, steps=5)
    expected = cases.run(tx, steps=9)
    cases.assert_equal(resumed, expected)
    evaluated = flatopt.eval_params(resumed[1], resumed[0])
    cases.assert_equal(evaluated, flatopt.eval_params(expected[1], expected[0]))


def test_orbax(tmp_path):
    """The states of all methods in one checkpoint, with a template of shapes alone."""
    states = {case.name: case.build().init(cases.init_params()) for case in cases.CASES}
    # Not as they begin: every number another.
    numbers = itertools.count()
    states = jax.tree.map(lambda x: jnp.full_like(x, next(numbers) % 100), states)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", states)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, states)
        restored = checkpointer.restore(tmp_path / "checkpoint", abstract)
    cases.assert_equal(restored, states)


def _on_mesh(tree, number: int):
    """Cut over so many devices along the last axis, where that number divides it."""
    devices, kinds = jax.devices()[:number], (AxisType.Auto,)
    mesh = jax.make_mesh((number,), ("data",), axis_types=kinds, devices=devices)

    def place(x):
        cut = x.ndim > 0 and x.shape[-1] % number == 0
        spec = PartitionSpec(*[None] * (x.ndim - 1), "data") if cut else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


FEW = ("sam", "msam", "swa", "sparse_training", "arwp")


def _few_at_once(case: Case):
    marks = [] if case.name in FEW else [pytest.mark.exhaustive]
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [*map(_few_at_once, cases.CASES)])
def test_a_run_goes_on_with_another_number_of_devices(case: Case):
    """Two steps on eight devices, msgpack, two on one, two on four: as one device all along."""
    tx, params = case.build(), cases.init_params()
    opt_state, done = tx.init(params), 0
    for number in (8, 1, 4):
        params, opt_state = (_on_mesh(tree, number) for tree in (params, opt_state))
        params, opt_state = cases.run(tx, params, 2, opt_state=opt_state, first=done)
        done += 2
        saved = flax.serialization.to_bytes((params, opt_state))
        like = cases.init_params(seed=9)
        params, opt_state = flax.serialization.from_bytes((like, tx.init(like)), saved)
    expected = cases.run(tx, steps=done)
    size = max(float(jnp.abs(x).max(initial=1.0)) for x in jax.tree.leaves(expected[0]))
    cases.assert_close((params, opt_state), expected, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.exhaustive
def test_orbax_onto_other_numbers_of_devices(tmp_path):
    """The states of all methods, saved from eight devices, lie on two and on one as they were."""
    states = {case.name: case.build().init(cases.init_params()) for case in cases.CASES}
    numbers = itertools.count()
    states = jax.tree.map(lambda x: jnp.full_like(x, next(numbers) % 100), states)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", _on_mesh(states, 8))
        checkpointer.wait_until_finished()
        for number in (2, 1):
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _on_mesh(states, number))
            restored = checkpointer.restore(tmp_path / "checkpoint", like)
            cases.assert_equal(restored, states)
            sharded = jax.tree.leaves(restored["swa"])
            assert max(len(x.sharding.device_set) for x in sharded) == number


@pytest.mark.parametrize("other", ["swa", "msam"])
def test_the_state_of_another_method_says_that_it_does_not_fit(other: str):
    by_name = {case.name: case.build() for case in cases.CASES}
    params = cases.init_params()
    saved = flax.serialization.to_bytes(by_name["sam"].init(params))
    with pytest.raises(ValueError, match="do not match"):
        flax.serialization.from_bytes(by_name[other].init(params), saved)
