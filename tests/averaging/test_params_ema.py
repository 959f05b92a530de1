"""Exponential averages: the recorded runs and the shares of their models."""

import optax

import flatopt
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer


@replays("ema_torch")
def test_replays(golden: Golden) -> None:
    """PyTorch's average starts from the first weights: no debiasing."""
    hyper = golden.hyper
    average = flatopt.params_ema(
        hyper["decay"], debias=False, start=hyper["start"], every=hyper["freq"]
    )
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), average)
    assert_agrees(golden.results, replay(golden, tx))
