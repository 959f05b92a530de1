"""Lookahead: the recorded runs, momenta kept, reset and pulled back, its variance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._averaging.lookahead import synchronise
from tests import cases
from tests.averaging.feed import noisy_run, sgd_variance
from tests.replay import (
    ATOL,
    Array,
    Golden,
    assert_agrees,
    compiled,
    problem,
    replay,
    replays,
    torch_optimizer,
)


@replays("lookahead")
def test_replays(golden: Golden) -> None:
    """Momentum kept, reset and pulled back.

    The official pull-back keeps no copy of the momentum to come back to, but the momentum itself.
    Where the file was recorded so, the recursion written by hand with that slip is held against the
    file, and flatopt against the same recursion without it.
    """
    hyper = golden.hyper
    kind = hyper["pullback"]
    base = torch_optimizer(hyper, golden.learning_rate, hyper["base"])
    tx = flatopt.lookahead(
        base,
        every=hyper["k"],
        slow_step_size=hyper["alpha"],
        reset_state=kind == "reset",
        pull_back=kind == "pullback",
    )
    replayed = replay(golden, tx)
    recorded = _with_slow_weights(golden)
    if kind != "pullback" or hyper.get("fix"):
        assert_agrees(recorded, replayed)
        return
    official = _pull_back_by_hand(golden, aliased=True)
    assert_agrees(recorded, official, ignore=["grad0"])
    corrected = _pull_back_by_hand(golden, aliased=False)
    assert_agrees(recorded | corrected, replayed)
    # The slip acts from the second synchronisation on, on what momentum there is.
    if golden.steps > 2 * hyper["k"] and 0 < hyper["alpha"] < 1 and hyper["momentum"] > 0:
        difference = [np.abs(corrected[k] - official[k]).max() for k in official]
        assert max(difference) > 1e5 * ATOL


@replays("lookahead_alphadl")
def test_replays_slow_weights_that_begin_late(golden: Golden) -> None:
    """These slow weights begin after the first step."""
    hyper = golden.hyper
    base = torch_optimizer(hyper, golden.learning_rate, hyper["base"])
    every = hyper["k"]
    tx = flatopt.lookahead(base, every=every, slow_step_size=hyper["alpha"], start=1 + every)
    assert_agrees(_with_slow_weights(golden), replay(golden, tx))


def _with_slow_weights(golden: Golden) -> dict[str, Array]:
    """The file's results, with the slow weights as those to evaluate."""
    results = golden.results
    for name, start in golden.tree("p0").items():
        results[f"eval/{name}"] = np.concatenate([start[None], results.pop(f"slow/{name}")])
    return results


def _pull_back_by_hand(golden: Golden, *, aliased: bool) -> dict[str, Array]:
    """Lookahead with pulled-back momentum in plain numpy; `aliased=True` copies the slip."""
    hyper, alpha = golden.hyper, golden.hyper["alpha"]
    loss_fn, batch = problem(golden)
    value_and_grad = compiled(jax.value_and_grad(loss_fn))
    rate = golden.learning_rate
    w = golden.tree("p0")
    slow, momentum = dict(w), {name: np.zeros_like(x) for name, x in w.items()}
    kept = dict(momentum)
    records = {f"{field}/{name}": [x] for field in ("traj", "eval") for name, x in w.items()}
    records["loss"] = []
    for t in range(golden.steps):
        loss, grads = value_and_grad({k: jnp.asarray(x) for k, x in w.items()}, *batch(t, 0))
        records["loss"].append(np.asarray(loss))
        lr = float(rate(t)) if callable(rate) else rate
        for k, g in grads.items():
            decayed = np.asarray(g) + hyper["weight_decay"] * w[k]
            momentum[k] = hyper["momentum"] * momentum[k] + decayed
            step = (
                decayed + hyper["momentum"] * momentum[k] if hyper.get("nesterov") else momentum[k]
            )
            w = w | {k: w[k] - lr * step}
        if (t + 1) % hyper["k"] == 0:
            for k in w:
                w = w | {k: alpha * w[k] + (1 - alpha) * slow[k]}
                slow[k] = w[k]
                momentum[k] = alpha * momentum[k]
                back = momentum[k] if aliased and t + 1 > hyper["k"] else kept[k]
                momentum[k] = momentum[k] + (1 - alpha) * back
                kept[k] = momentum[k]
        for k in w:
            records[f"traj/{k}"].append(w[k])
            records[f"eval/{k}"].append(slow[k])
    return {key: np.stack(values) for key, values in records.items()}


@pytest.mark.parametrize(("alpha", "k"), [(0.5, 5), (0.8, 5), (0.3, 10)])
def test_lookahead_variance_on_a_noisy_quadratic(alpha: float, k: int):
    rate, curvature, samples = 0.2, 1.0, 20_000
    tx = flatopt.lookahead(optax.sgd(rate), every=k, slow_step_size=alpha)
    params, state = noisy_run(tx, 40 * k, curvature, samples)
    contraction = 1 - rate * curvature
    decrease = alpha**2 * (1 - contraction ** (2 * k))
    ratio = decrease / (decrease + 2 * alpha * (1 - alpha) * (1 - contraction**k))
    slow = np.asarray(flatopt.eval_params(state, params))
    measured = np.mean(slow**2) / sgd_variance(rate, curvature)
    # The relative standard error of a variance is sqrt(2 / samples): one in a hundred.
    np.testing.assert_allclose(measured, ratio, rtol=4 * np.sqrt(2 / samples))
    assert ratio < 0.9


def _after_two_updates(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    @jax.jit
    def step(params: optax.Params, opt_state: optax.OptState) -> Any:
        grads = jax.tree.map(lambda p: jnp.sin(3 * p + 1), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step(*step(params, tx.init(params)))


def test_lookahead_lands_on_its_slow_weights_to_the_last_bit():
    params = {"w": jax.random.normal(jax.random.key(0), (1000,))}
    tx = flatopt.lookahead(cases.sgd(), every=2, slow_step_size=0.3)
    landed, opt_state = _after_two_updates(tx, params)
    np.testing.assert_array_equal(landed["w"], opt_state.slow["w"])


def test_lookahead_does_not_round_slow_weights_to_the_dtype_of_the_parameters():
    wide = {"w": jax.random.normal(jax.random.key(0), (1000,))}
    params = optax.tree.cast(wide, jnp.bfloat16)
    tx = flatopt.lookahead(cases.sgd(), every=2, slow_step_size=0.3)
    landed, opt_state = _after_two_updates(tx, params)
    slow = opt_state.slow["w"]
    assert slow.dtype == jnp.float32
    assert jnp.mean(slow != slow.astype(jnp.bfloat16).astype(jnp.float32)) > 0.9
    np.testing.assert_allclose(landed["w"].astype(jnp.float32), slow, rtol=2**-7, atol=2**-9)


def test_wrong_arguments_say_so():
    with pytest.raises(ValueError, match="exclude each other"):
        flatopt.lookahead(cases.sgd(), reset_state=True, pull_back=True)
    with pytest.raises(ValueError, match="every=0 is out of range"):
        flatopt.lookahead(cases.sgd(), every=0)


def test_lookahead_starts_its_slow_weights_late():
    tx = flatopt.lookahead(cases.sgd(), every=2, slow_step_size=0.5, start=5)
    plain, plain_state = cases.run(cases.sgd(), steps=4)
    params, state = cases.run(tx, steps=4)
    cases.assert_close(params, plain)
    begun, _ = cases.run(cases.sgd(), steps=3)
    cases.assert_close(flatopt.eval_params(state, params), begun)
    params, state = cases.run(tx, params, steps=1, opt_state=state, first=4)
    fast, _ = cases.run(cases.sgd(), plain, steps=1, opt_state=plain_state, first=4)
    cases.assert_close(params, jax.tree.map(lambda a, b: (a + b) / 2, begun, fast))
    cases.assert_close(flatopt.eval_params(state, params), params)


def test_slow_and_fast_weights_meet_a_share_of_the_way():
    slow, fast = {"w": jnp.array([0.0, 4.0])}, {"w": jnp.array([2.0, 0.0])}
    np.testing.assert_allclose(synchronise(slow, fast, 0.25)["w"], [0.5, 3.0])
    cases.assert_equal(synchronise(slow, fast, 0.0), slow)
    cases.assert_equal(synchronise(slow, fast, 1.0), fast)


def test_a_pull_back_takes_the_momentum_half_of_the_way_to_the_last_one():
    tx = flatopt.lookahead(cases.sgd(), every=2, slow_step_size=0.5, pull_back=True)
    _, state = cases.run(tx, steps=2)
    _, plain = cases.run(cases.sgd(), steps=2)
    half = jax.tree.map(lambda m: m / 2, plain[0].trace)  # The first are pulled towards zero.
    cases.assert_close(state.inner_state[0].trace, half)
    cases.assert_equal(state.slow_state[0].trace, state.inner_state[0].trace)
