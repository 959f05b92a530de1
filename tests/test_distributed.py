"""Two processes of four devices each give what one process of eight gives."""

import numpy as np
import pytest

import flatopt
from examples import distributed
from tests import cases

STEPS = 14  # Into the mean of the weights, which begins after ten.


def test_two_processes_give_what_one_gives(tmp_path, monkeypatch, capfd):
    losses = []
    params, opt_state = distributed.train(STEPS, lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert {len(leaf.sharding.device_set) for leaf in params.values()} == {8}
    assert params["first"].addressable_shards[0].data.size == params["first"].size / 8
    # The flag of the tests says eight devices a process.
    monkeypatch.delenv("XLA_FLAGS")
    path = tmp_path / "mean.npz"
    distributed.main(["--processes", "2", "--steps", str(STEPS), "--save", str(path)])
    assert f"8 devices, 2 processes: loss {losses[-1]:.4f}" in capfd.readouterr().out
    with np.load(path) as saved:
        cases.assert_close(dict(saved), flatopt.eval_params(opt_state, params), atol=1e-6)


def test_processes_must_divide_devices():
    with pytest.raises(SystemExit):
        distributed.main(["--processes", "3"])


def test_processes_that_fail_are_tried_again_and_said(monkeypatch, capfd):
    monkeypatch.setattr(distributed.sys, "executable", "false")
    with pytest.raises(SystemExit, match="did not finish"):
        distributed.launch(2, 8, [])
    assert capfd.readouterr().err.count("the processes ended with") == distributed.ATTEMPTS
