"""Every method inside and around optax's own wrappers, vmapped and donated."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import flatopt
from tests import cases
from tests.cases import Case

HIDDEN = {"hidden": True, "out": False, "temperature": False}


@pytest.mark.parametrize("case", cases.main_cases())
def test_inside_a_chain_with_extra_arguments(case: Case):
    """A neighbour that needs `value=` gets it, and the method does not mind."""
    plateau = optax.contrib.reduce_on_plateau()
    tx, params = optax.chain(case.build(), plateau), cases.init_params()
    opt_state = tx.init(params)
    loss, grads = jax.value_and_grad(cases.loss_fn)(params, cases.make_batch())
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, cases.make_batch())
    updates, _ = tx.update(grads, opt_state, params, value=loss, grad_fn=grad_fn)
    cases.assert_equal(optax.apply_updates(params, updates), case.first_step[0])


@pytest.mark.parametrize("case", cases.main_cases())
def test_inside_the_wrappers_of_optax(case: Case):
    """`conditionally_transform` in `named_chain` in `MultiSteps` of one."""
    inner = optax.conditionally_transform(case.build(), lambda step: step >= 0)
    named = optax.named_chain(("method", inner))
    params, state = cases.run(optax.MultiSteps(named, 1).gradient_transformation())
    expected, expected_state = case.trained
    cases.assert_close(params, expected)
    cases.assert_close(
        flatopt.eval_params(state, params), flatopt.eval_params(expected_state, expected)
    )


@pytest.mark.parametrize("case", cases.main_cases())
def test_inside_masked_works_or_says_what_to_do(case: Case):
    tx = optax.masked(case.build(), HIDDEN)
    if case.needs_grad_fn:
        with pytest.raises(ValueError, match="mask_displacement"):
            cases.run(tx, steps=1)
        return
    elsewhere = optax.masked(optax.sgd(cases.LEARNING_RATE), {k: not v for k, v in HIDDEN.items()})
    params, state = cases.run(optax.chain(tx, elsewhere), steps=3)
    evaluated = flatopt.eval_params(state, params)
    cases.assert_equal(evaluated["out"], params["out"])
    part = cases.init_params()["hidden"]
    # The same steps on the marked part alone, with plain SGD elsewhere.
    whole, part_tx = cases.init_params(), case.build()
    part_state = part_tx.init(part)
    for i in range(3):
        loss_and_grad = jax.value_and_grad(cases.loss_fn)
        loss, grads = loss_and_grad({**whole, "hidden": part}, cases.make_batch(i))
        updates, part_state = part_tx.update(grads["hidden"], part_state, part, value=loss)
        part = optax.apply_updates(part, updates)
        rest = jax.tree.map(lambda g: -cases.LEARNING_RATE * g, grads)
        whole = optax.apply_updates(whole, rest)
    cases.assert_close(params["hidden"], part)
    cases.assert_close(evaluated["hidden"], flatopt.eval_params(part_state, part))


@pytest.mark.parametrize("case", cases.main_cases(inner=lambda c: c.kind == "stage"))
def test_before_a_partition(case: Case):
    """Different optimisers for different leaves stand after the stage."""
    tx = optax.partition(
        {"train": cases.sgd(), "freeze": optax.set_to_zero()},
        {"hidden": "train", "out": "freeze", "temperature": "freeze"},
    )
    stage = getattr(flatopt, case.factory)(**case.kwargs)
    params, _ = cases.run(optax.chain(stage, tx))
    start = cases.init_params()
    cases.assert_equal(params["out"], start["out"])
    assert not jnp.allclose(params["hidden"]["kernel"], start["hidden"]["kernel"])


@pytest.mark.parametrize("case", cases.main_cases(has=lambda c: c.hyperparameter is not None))
def test_inject_hyperparams_needs_no_static_args(case: Case):
    tx = case.build_injected()
    params, state = cases.run(tx)
    cases.assert_close(params, case.trained[0])
    (hyperparams,) = [v for _, v in optax.tree.get_all_with_path(state, "hyperparams")]
    assert hyperparams[case.hyperparameter] == jnp.float32(case.kwargs[case.hyperparameter])
    # The state's number is what acts.
    changed = jax.tree.map(lambda x: x, state)
    value = 0.5 * case.kwargs[case.hyperparameter]
    path = {case.hyperparameter: jnp.float32(value)}
    changed = optax.tree.set(changed, None, **path)
    actual = cases.run(tx, params, opt_state=changed, first=6, steps=5)[0]
    unchanged = cases.run(tx, params, opt_state=state, first=6, steps=5)[0]
    if case.kind != "average":
        assert not jnp.allclose(actual["hidden"]["kernel"], unchanged["hidden"]["kernel"])


@pytest.mark.parametrize("case", cases.main_cases())
def test_vmap_over_replicas(case: Case):
    tx = case.build()
    seeds = [cases.init_params(seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *seeds)
    step = jax.jit(jax.vmap(cases.train_step(tx), in_axes=(0, 0, None)))
    params, opt_state = stacked, jax.vmap(tx.init)(stacked)
    for i in range(4):
        params, opt_state = step(params, opt_state, cases.make_batch(i))
    evaluated = jax.vmap(flatopt.eval_params)(opt_state, params)
    for s, start in enumerate(seeds):
        expected, state = cases.run(tx, start, steps=4)
        one = functools.partial(jax.tree.map, lambda x, s=s: x[s])
        cases.assert_close(one(params), expected)
        cases.assert_close(one(evaluated), flatopt.eval_params(state, expected))


@pytest.mark.parametrize("case", cases.main_cases(has=lambda c: c.hyperparameter is not None))
def test_vmap_over_the_hyperparameter(case: Case):
    value = case.kwargs[case.hyperparameter]
    values = jnp.float32(value) * jnp.array([1.0, 0.5])

    def train(value: jax.Array):
        tx = case.build(**{case.hyperparameter: value})
        params, step = cases.init_params(), cases.train_step(tx)
        batches = jax.tree.map(lambda *xs: jnp.stack(xs), *[cases.make_batch(i) for i in range(3)])
        carry, _ = jax.lax.scan(
            lambda c, b: (step(*c, b), None), (params, tx.init(params)), batches
        )
        return carry[0], flatopt.eval_params(carry[1], carry[0])

    results = jax.jit(jax.vmap(train))(values)
    for i, tx in enumerate((case.build(), case.halved)):
        params, state = cases.run(tx, steps=3)
        expected = params, flatopt.eval_params(state, params)
        cases.assert_close(jax.tree.map(lambda x, i=i: x[i], results), expected)


@pytest.mark.parametrize("case", cases.main_cases())
def test_no_array_is_twice_in_what_a_loop_donates(case: Case):
    """Neither before the first step nor after it."""
    params = cases.init_params()
    begun = params, case.build().init(params)
    give_away = jax.jit(lambda tree: jax.tree.map(lambda x: x, tree), donate_argnums=0)
    for tree in (begun, cases.run(case.build(), steps=1)):
        give_away(jax.tree.map(lambda x: x, tree))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", cases.main_cases())
def test_parameters_and_state_can_be_donated(case: Case):
    tx, params = case.build(), cases.init_params()
    step = jax.jit(cases.train_step(tx), donate_argnums=(0, 1))
    opt_state = tx.init(params)
    for i in range(3):
        params, opt_state = step(params, opt_state, cases.make_batch(i))
    cases.assert_close(params, cases.run(tx, steps=3)[0])
