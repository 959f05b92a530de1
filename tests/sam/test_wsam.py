"""WSAM."""

import optax

import flatopt
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer

RHO = 0.05
SAM = flatopt.sam(RHO)


def _train(stage, steps=6):
    return cases.run(optax.chain(stage, cases.sgd()), steps=steps)[0]


def test_wsam_coupled_with_half_the_weight_is_sam():
    tx = flatopt.wsam(cases.sgd(), cases.LEARNING_RATE, rho=RHO, gamma=0.5, decouple=False)
    cases.assert_close(cases.run(tx)[0], _train(SAM))


def test_wsam_decoupled_adds_the_sharpness_outside_the_momentum():
    tx = flatopt.wsam(cases.sgd(), cases.LEARNING_RATE, rho=RHO, gamma=0.8)
    params, batch = cases.init_params(), cases.make_batch()
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
    clean = grad_fn(params)
    _, state = tx.update(clean, tx.init(params), params, grad_fn=grad_fn)
    plain = cases.sgd()
    _, plain_state = plain.update(clean, plain.init(params), params)
    cases.assert_close(state.inner_state, plain_state)


@replays("wsam")
def test_replays(golden: Golden) -> None:
    hyper, rate = golden.hyper, golden.learning_rate
    tx = flatopt.wsam(
        torch_optimizer(hyper, rate, hyper["base"]),
        rate,
        **{name: hyper[name] for name in ("rho", "gamma", "decouple", "adaptive", "max_norm")},
    )
    assert_agrees(golden.results, replay(golden, tx))
