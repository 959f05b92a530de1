"""Adapters: how each recorded averaging method is built from flatopt."""

from collections.abc import Callable

import optax

import flatopt
from tests.golden_problems import Golden, assert_agrees, replay, torch_optimizer
from tests.golden_sam import assert_sam_agrees


def replay_swa_torch(golden: Golden) -> None:
    hyper = golden.hyper
    average = flatopt.swa(start=hyper["start"], every=hyper["freq"])
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), average)
    assert_agrees(golden.results, replay(golden, tx))


def replay_ema_torch(golden: Golden) -> None:
    """PyTorch's average starts from the first weights: no debiasing."""
    hyper = golden.hyper
    average = flatopt.params_ema(
        hyper["decay"], debias=False, start=hyper["start"], every=hyper["freq"]
    )
    tx = optax.chain(torch_optimizer(hyper, golden.learning_rate), average)
    assert_agrees(golden.results, replay(golden, tx))


def replay_swa_repo(golden: Golden) -> None:
    """The SWA authors count epochs from 1 and average after each one that is due.

    Their start is a float, and an epoch is due at a whole distance from it: none is when the start
    is not whole.
    """
    hyper, epoch_len = golden.hyper, golden.epoch_len
    tx = torch_optimizer(hyper, golden.learning_rate)
    if hyper.get("swa", True) and float(hyper["swa_start"]).is_integer():
        start, every = int(hyper["swa_start"]), int(hyper["swa_c_epochs"])
        tx = optax.chain(tx, flatopt.swa(start=start * epoch_len, every=every * epoch_len))
    assert_agrees(golden.results, replay(golden, tx))


def replay_wasam(golden: Golden) -> None:
    hyper, epoch_len = golden.hyper, golden.epoch_len
    base = torch_optimizer(hyper, golden.learning_rate)
    start = hyper["swa_start_epoch"] * epoch_len
    tx = flatopt.wasam(base, hyper["rho"], start=start, every=epoch_len)
    assert_sam_agrees(golden, tx)


ADAPTERS: dict[str, Callable[[Golden], None]] = {
    "swa_repo": replay_swa_repo,
    "swa_torch": replay_swa_torch,
    "ema_torch": replay_ema_torch,
    "wasam": replay_wasam,
}
