"""A run resumed from a checkpoint goes on bit for bit."""

import itertools

import flax.serialization
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

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
