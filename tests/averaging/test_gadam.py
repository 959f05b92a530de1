"""Gadam: the recorded runs, and AdamW with an average."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._averaging.gadam import scale_by_padam
from tests import cases
from tests.averaging.feed import first_recorded
from tests.replay import Golden, assert_agrees, replay, replays


@replays("gadam")
def test_replays(golden: Golden) -> None:
    hyper = golden.hyper
    b1, b2 = hyper.get("betas", (0.9, 0.999))
    shared = {
        "weight_decay": hyper["weight_decay"],
        "start": first_recorded(golden, "avg_at_step"),
        "every": hyper["freq"],
    }
    shared |= {"b1": b1, "b2": b2, "eps": hyper.get("eps", 1e-8)}
    if hyper["opt"] == "Gadam":
        tx = flatopt.gadam(hyper["lr"], **shared)
    else:
        tx = flatopt.gadamx(hyper["lr"], partial=hyper["partial"], **shared)
    assert_agrees(golden.results, replay(golden, tx))


def test_gadam_is_adamw_with_an_average():
    tx = flatopt.gadam(0.05, weight_decay=0.1, start=2)
    chain = optax.chain(optax.adamw(0.05, weight_decay=0.1), flatopt.swa(start=2))
    params, state = cases.run(tx)
    expected, expected_state = cases.run(chain)
    cases.assert_close(params, expected)
    cases.assert_close(
        flatopt.eval_params(state, params), flatopt.eval_params(expected_state, expected)
    )


def test_more_than_adaptive_is_refused():
    with pytest.raises(ValueError, match=r"partial=0\.6 is out of range"):
        flatopt.gadamx(0.1, partial=0.6)


@pytest.mark.parametrize("partial", [0.5, 0.125, 0.0])
def test_the_partial_step_is_between_amsgrad_and_momentum(partial: float):
    step, b1, b2 = scale_by_padam(b1=0.9, b2=0.99, eps=0.1, partial=partial), 0.9, 0.99
    grads, m, v, top = np.random.default_rng(0).normal(size=(5, 3)), 0.0, 0.0, 0.0
    state = step.init(jnp.zeros(3))
    for t, g in enumerate(grads, 1):
        updates, state = step.update(jnp.asarray(g, jnp.float32), state)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        top = np.maximum(top, v)
        correction = np.sqrt(1 - b2**t) / (1 - b1**t)
        expected = correction * m / (np.sqrt(top) + 0.1) ** (2 * partial)
        np.testing.assert_allclose(updates, expected, rtol=1e-5)
