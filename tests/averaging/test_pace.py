"""PACE: the recorded runs, AdamW without the pull, and what the pull does."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._averaging.pace import newest_share, pull
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays


@replays("pace")
def test_replays(golden: Golden) -> None:
    """The mean is recorded after every step."""
    hyper = golden.hyper
    b1, b2 = hyper["betas"]
    powers = {"gamma": hyper["ema_gamma"], "offset": hyper["ema_rho"]}
    if hyper["ema_kappa"] is None:
        powers |= {"decay": 1 - hyper["beta_ema"]}
    else:
        powers |= {"kappa": hyper["ema_kappa"]}
    tx = flatopt.pace(
        golden.learning_rate,
        hyper["lambda_pullback"],
        clip=hyper["clamp_pullback"],
        every=hyper["ema_update_freq"],
        b1=b1,
        b2=b2,
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        **powers,
    )
    results = golden.results
    for name, start in golden.tree("p0").items():
        results[f"eval/{name}"] = np.concatenate([start[None], results.pop(f"ema/{name}")])
    assert_agrees(results, replay(golden, tx))


def test_without_strength_it_is_adamw_evaluated_at_a_mean():
    adamw = optax.adamw(0.05, weight_decay=0.1)
    average = flatopt.params_ema(0.9, debias=False, initial=True)
    expected, state = cases.run(optax.chain(adamw, average))
    mean = flatopt.eval_params(state, expected)
    tx = flatopt.pace(0.05, 0.0, decay=0.9, weight_decay=0.1)
    params, state = cases.run(tx)
    cases.assert_close(params, expected, rtol=1e-6)
    cases.assert_close(flatopt.eval_params(state, params), mean, rtol=1e-5)


def test_with_strength_the_weights_stay_closer_to_their_mean():
    def distance(strength):
        params, state = cases.run(flatopt.pace(0.05, strength), steps=30)
        return optax.tree.norm(optax.tree.sub(params, flatopt.eval_params(state, params)))

    assert distance(10.0) < 0.8 * distance(0.0)


def test_no_entry_is_pulled_beyond_the_mean():
    mean, params, nu = jnp.array([1.0, 1.0]), jnp.zeros(2), jnp.array([0.0, 4.0])
    np.testing.assert_allclose(pull(mean, params, nu, 0.5, 1e-8, clip=True), [1.0, 0.25])
    assert pull(mean, params, nu, 0.5, 1e-8, clip=False)[0] > 1e6


def test_the_share_of_the_newest_weights():
    shares = [newest_share(jnp.int32(t), kappa=0.5, gamma=1.0, offset=2.0) for t in (1, 2, 5)]
    np.testing.assert_allclose(shares, [1.0, 1.0, 0.5])
    late = newest_share(jnp.int32(2**31 - 1), kappa=0.9, gamma=1.0, offset=0.0)
    np.testing.assert_allclose(late, 1e-4)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kappa": -0.1},
        {"gamma": -1.0},
        {"offset": -1.0},
        {"decay": 1.0},
        {"b1": 1.0},
        {"eps": -1},
        {"every": 0},
        {"weight_decay": -0.1},
        {"strength": float("nan")},
    ],
)
def test_arguments_out_of_range_raise(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"{name}=.* out of range"):
        flatopt.pace(0.1, **kwargs)
