"""WASAM: the recorded runs, and what it is made of."""

import jax
import optax

import flatopt
from tests import cases
from tests.replay import Golden, assert_sam_agrees, replays, torch_optimizer


@replays("wasam")
def test_replays(golden: Golden) -> None:
    hyper, epoch_len = golden.hyper, golden.epoch_len
    base = torch_optimizer(hyper, golden.learning_rate)
    start = hyper["swa_start_epoch"] * epoch_len
    tx = flatopt.wasam(base, hyper["rho"], start=start, every=epoch_len)
    assert_sam_agrees(golden, tx)


def test_without_a_radius_it_is_the_optimiser_and_its_average():
    tx = flatopt.wasam(cases.sgd(), 0.0, start=2)
    params, state = cases.run(tx)
    expected, other = cases.run(optax.chain(cases.sgd(), flatopt.swa(start=2)))
    cases.assert_equal(params, expected)
    cases.assert_equal(flatopt.eval_params(state, params), flatopt.eval_params(other, expected))


def test_the_mean_lies_between_the_iterates_of_sam():
    points = [cases.run(flatopt.wasam(cases.sgd(), 0.05), steps=n)[0] for n in (1, 2, 3)]
    params, state = cases.run(flatopt.wasam(cases.sgd(), 0.05, start=2), steps=3)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *points[1:])
    cases.assert_close(flatopt.eval_params(state, params), mean)
