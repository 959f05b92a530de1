"""WASAM: the recorded runs."""

import flatopt
from tests.golden_sam import assert_sam_agrees
from tests.replay import Golden, replays, torch_optimizer


@replays("wasam")
def test_replays(golden: Golden) -> None:
    hyper, epoch_len = golden.hyper, golden.epoch_len
    base = torch_optimizer(hyper, golden.learning_rate)
    start = hyper["swa_start_epoch"] * epoch_len
    tx = flatopt.wasam(base, hyper["rho"], start=start, every=epoch_len)
    assert_sam_agrees(golden, tx)
