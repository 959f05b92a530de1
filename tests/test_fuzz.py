"""The random chains of `benchmarks.fuzz`: a few of them, and that a broken rule is seen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from benchmarks import fuzz

# Chains of faults that were found: a compiled mask that leaves nothing, an argument misnamed.
FOUND = (100450, 2586)


@pytest.mark.parametrize("seed", [*range(1, 5), *FOUND])
def test_a_random_chain_keeps_every_rule(seed: int):
    result, said, _ = fuzz.try_seed(seed)
    assert result in ("passed", "refused"), said


def test_a_seed_draws_one_chain():
    first, again = (fuzz.draw_chain(np.random.default_rng(6)) for _ in range(2))
    assert first.names == again.names
    assert [drawn for _, drawn in first.flatopts] == [drawn for _, drawn in again.flatopts]
    lengths = {len(fuzz.draw_chain(np.random.default_rng(i)).names) for i in range(7, 40, 2)}
    assert lengths == {1, 2, 3, 4, 5}


def _updates(change: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda g, p: jax.tree.map(change, g))


@pytest.mark.parametrize(
    ("tx", "said"),
    [
        (_updates(lambda g: g / 0.0), "not finite"),
        (_updates(lambda g: jnp.stack([g, g])), "shapes"),
    ],
    ids=["inf", "shape"],
)
def test_a_broken_rule_is_seen(tx: Any, said: str):
    with pytest.raises((AssertionError, ValueError), match=said):
        fuzz.check_run(optax.with_extra_args_support(tx), {"w": jnp.ones((2, 3))}, 1)


def test_a_wrong_argument_that_is_taken_or_not_named_is_seen():
    with pytest.raises(AssertionError, match="a wrong rho was taken"):
        fuzz.expect_refusal(lambda: flatopt.sam(0.05), "rho")
    with pytest.raises(AssertionError, match="does not name every"):
        fuzz.expect_refusal(lambda: flatopt.sam(-1.0), "every")


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    path = tmp_path / "fuzz.json"
    for number in (2, 3):
        monkeypatch.setattr(
            "sys.argv", ["", "--first", "1", "--number", str(number), "--json", str(path)]
        )
        fuzz.main()
    tally = fuzz.load(path, 1)
    assert tally.chains == 3 == sum(tally.factories.values())
    assert fuzz.load(path, 2).chains == 0
    monkeypatch.setattr(fuzz, "check_run", lambda *_: 1 / 0)
    monkeypatch.setattr("sys.argv", ["", "--first", "1", "--number", "4", "--json", str(path)])
    with pytest.raises(SystemExit, match="1 chains broke a rule"):
        fuzz.main()
    assert "ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.undo()
    again = fuzz.load(path, 1)
    again.try_again()
    assert again.failures == []
    assert [entry["seed"] for entry in again.mended] == [4]
