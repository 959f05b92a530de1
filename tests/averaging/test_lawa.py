"""LAWA: the recorded runs, and the mean of the latest."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests.averaging.feed import WEIGHTS, evaluated
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer


@replays("lawa")
def test_replays(golden: Golden) -> None:
    """The official average holds the first weights until its start, while it collects already."""
    hyper = golden.hyper
    average = flatopt.lawa(hyper["k"], every=hyper["freq"])
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), average)
    results, replayed = golden.results, replay(golden, tx)
    first = max(1, -(-hyper["start_steps"] // hyper["freq"])) * hyper["freq"]
    for name in golden.tree("traj"):
        average_there = results[f"eval/{name}"]
        np.testing.assert_array_equal(
            average_there[1:first], average_there[:1].repeat(first - 1, 0)
        )
        average_there[:first] = replayed[f"eval/{name}"][:first]
    assert_agrees(results, replayed)


def test_lawa_is_the_mean_of_the_latest():
    for n in range(1, 8):
        expected = WEIGHTS[max(0, n - 3) : n].mean()
        np.testing.assert_allclose(evaluated(flatopt.lawa(3), WEIGHTS[:n]), expected, rtol=1e-5)
    late = flatopt.lawa(2, start=3, every=2)  # Models after updates 3, 5, 7.
    held = {1: WEIGHTS[0], 2: WEIGHTS[1], 3: WEIGHTS[2], 4: WEIGHTS[2]}
    held |= {5: WEIGHTS[[2, 4]].mean(), 6: WEIGHTS[[2, 4]].mean(), 7: WEIGHTS[[4, 6]].mean()}
    for n, expected in held.items():
        np.testing.assert_allclose(evaluated(late, WEIGHTS[:n]), expected, rtol=1e-5)


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="window=0 is out of range"):
        flatopt.lawa(0)


@pytest.mark.parametrize(("made", "used"), [(3, 5), (5, 3)])
@pytest.mark.parametrize(
    ("name", "argument"), [("lawa", "window"), ("snapshots", "number"), ("swag", "rank")]
)
def test_a_state_of_another_size_is_refused(name: str, argument: str, made: int, used: int):
    """A checkpoint without shapes restores it silently; the new size would be ignored."""
    make = getattr(flatopt, name)
    params = jnp.zeros(2)
    state = make(made).init(params)
    error = rf"{name}\({argument}={used}\) was given a state that was made with {argument}={made}"
    with pytest.raises(ValueError, match=error):
        make(used).update(params, state, params)
    make(made).update(params, state, params)
