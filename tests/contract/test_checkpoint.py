"""A run resumed from a checkpoint goes on bit for bit."""

import flax.serialization
import jax
import orbax.checkpoint as ocp
import pytest

import flatopt
from tests import cases
from tests.cases import Case


def _assert_resumes(case: Case, save_and_restore) -> None:
    tx = case.build()
    params, opt_state = cases.run(tx, steps=4)
    like = cases.init_params(seed=9)
    restored = save_and_restore((params, opt_state), (like, tx.init(like)))
    cases.assert_equal(restored, (params, opt_state))
    resumed = cases.run(tx, restored[0], opt_state=restored[1], first=4, steps=5)
    expected = cases.run(tx, steps=9)
    cases.assert_equal(resumed, expected)
    evaluated = flatopt.eval_params(resumed[1], resumed[0])
    cases.assert_equal(evaluated, flatopt.eval_params(expected[1], expected[0]))


@pytest.mark.parametrize("case", cases.main_cases())
def test_flax_msgpack(case: Case):
    def save_and_restore(tree, like):
        return flax.serialization.from_bytes(like, flax.serialization.to_bytes(tree))

    _assert_resumes(case, save_and_restore)


@pytest.mark.parametrize("case", cases.main_cases())
def test_orbax(case: Case, tmp_path):
    def save_and_restore(tree, like):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "checkpoint", tree)
            checkpointer.wait_until_finished()
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            return checkpointer.restore(tmp_path / "checkpoint", abstract)

    _assert_resumes(case, save_and_restore)
