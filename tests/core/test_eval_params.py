"""`eval_params` on what is a state, and on what is none."""

import flax.serialization
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases

TX = optax.chain(optax.sgd(1.0), flatopt.params_ema(0.9))
PARAMS = jnp.zeros(1)


def test_a_state_that_came_back_as_plain_dicts_is_refused_with_the_mend():
    plain = flax.serialization.to_state_dict(TX.init(PARAMS))
    with pytest.raises(TypeError, match="from_state_dict"):
        flatopt.eval_params(plain, PARAMS)
    restored = flax.serialization.from_state_dict(TX.init(PARAMS), plain)
    np.testing.assert_array_equal(flatopt.eval_params(restored, PARAMS), PARAMS)


def test_swapped_arguments_are_refused():
    with pytest.raises(TypeError, match=r"eval_params\(opt_state, params\)"):
        flatopt.eval_params(PARAMS, TX.init(PARAMS))


def test_no_state_is_refused():
    with pytest.raises(TypeError, match="opt_state is None"):
        flatopt.eval_params(None, PARAMS)


def test_named_chains_are_dicts_that_hold_states():
    tx = optax.named_chain(("sgd", optax.sgd(1.0)), ("mean", flatopt.swa()))
    params, state = cases.run(tx, steps=3)
    assert flatopt.holds_eval_params(state)
    flatopt.eval_params(state, params)


def test_a_state_says_whether_it_holds_evaluation_weights():
    assert flatopt.holds_eval_params(TX.init(PARAMS))
    assert not flatopt.holds_eval_params(optax.adam(0.1).init(PARAMS))


def test_optax_schedule_free_is_known():
    tx = optax.contrib.schedule_free_sgd(0.1)
    params, state = cases.run(tx)
    expected = optax.contrib.schedule_free_eval_params(state, params)
    cases.assert_equal(flatopt.eval_params(state, params), expected)


def test_optax_lookahead_is_known():
    params = optax.LookaheadParams.init_synced(jnp.ones(2))
    tx = optax.lookahead(optax.sgd(0.1), 3, 0.5)
    state = tx.init(params)
    updates, state = tx.update(jnp.ones(2), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(flatopt.eval_params(state, params).fast, params.slow)


def test_a_protocol_is_enough_for_a_state_of_ones_own():
    class Doubled(tuple):
        def eval_params(self, params):
            return params * 2

    np.testing.assert_array_equal(flatopt.eval_params((Doubled(),), jnp.ones(2)), 2 * jnp.ones(2))
