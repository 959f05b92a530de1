"""What every method owes: purity, one compilation, exact costs, sane answers to odd gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.cases import Case

# These work on gradients and momentum alone.
NEED_NO_PARAMS = {"msam", "msam_sgd", "langevin", "record_cosine", "record_gradient_norm"}


def test_every_public_factory_has_a_case():
    assert set(cases.public_factories()) == {case.factory for case in cases.CASES}


@pytest.mark.parametrize("case", cases.main_cases())
def test_update_is_pure(case: Case):
    tx, params = case.build(), cases.init_params()
    opt_state = tx.init(params)
    before = jax.tree.map(np.array, (params, opt_state))
    again = cases.train_step(tx)(params, opt_state, cases.make_batch())
    cases.assert_equal(again, case.first_step)
    cases.assert_equal((params, opt_state), before)


@pytest.mark.parametrize("case", cases.main_cases())
def test_jit_equals_no_jit(case: Case):
    params, state = case.first_step
    eager = cases.run(case.build(), params, 2, lambda f: f, opt_state=state, first=1)
    cases.assert_close(cases.run(case.build(), steps=3), eager)


@pytest.mark.parametrize("case", cases.main_cases())
def test_one_compilation_over_steps_and_batches(case: Case):
    tx, params, traces = case.build(), cases.init_params(), []

    @jax.jit
    def step(params, opt_state, grad_fn):
        traces.append(1)
        value, grads = grad_fn.value_and_grad(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=value, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(tx.init)(params)
    for i in range(3):
        grad_fn = flatopt.make_grad_fn(cases.loss_fn, cases.make_batch(i))  # Crosses jit.
        params, opt_state = step(params, opt_state, grad_fn)
    assert len(traces) == 1
    assert step._cache_size() == 1


@pytest.mark.parametrize("case", cases.main_cases())
def test_state_is_a_stable_scan_carry(case: Case):
    """A loop that does not change shapes, dtypes or structure can be traced."""
    carry = cases.init_params(), case.build().init(cases.init_params())
    traced = jax.eval_shape(_scan(case), carry)
    cases.assert_equal(jax.tree.map(jnp.zeros_like, traced), optax.tree.zeros_like(carry))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", cases.main_cases())
def test_a_scan_is_the_loop(case: Case):
    params = cases.init_params()
    carry = jax.jit(_scan(case))((params, case.build().init(params)))
    cases.assert_close(carry, case.trained)


def _scan(case: Case):
    """Six steps as a function of parameters and state."""
    step = cases.train_step(case.build())
    batches = jax.tree.map(lambda *xs: jnp.stack(xs), *[cases.make_batch(i) for i in range(6)])
    return lambda carry: jax.lax.scan(lambda c, b: (step(*c, b), None), carry, batches)[0]


@pytest.mark.parametrize("case", cases.main_cases())
def test_init_under_jit_equals_init(case: Case):
    params = cases.init_params()
    cases.assert_equal(jax.jit(case.build().init)(params), case.build().init(params))


@pytest.mark.parametrize("case", cases.main_cases())
def test_unknown_extra_arguments_are_ignored(case: Case):
    tx, params = case.build(), cases.init_params()
    loss = cases.loss_fn(params, cases.make_batch())
    step = cases.train_step(tx, nobody_expects=1.0, value=loss if case.needs_value else 7.0)
    cases.assert_equal(step(params, tx.init(params), cases.make_batch()), case.first_step)


@pytest.mark.parametrize("case", cases.cases(needs=lambda c: c.needs_grad_fn))
def test_missing_grad_fn_says_which_line_to_add(case: Case):
    tx, params = case.build(), cases.init_params()
    with pytest.raises(ValueError, match=r"make_grad_fn\(loss_fn, batch\)\n.*grad_fn=grad_fn"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("case", cases.cases(needs=lambda c: c.needs_grad_fn))
def test_grad_fn_that_is_no_function_raises(case: Case):
    tx, params = case.build(), cases.init_params()
    with pytest.raises(TypeError, match="must be callable"):
        tx.update(params, tx.init(params), params, grad_fn=params)


@pytest.mark.parametrize("case", cases.cases(needs=lambda c: c.factory not in NEED_NO_PARAMS))
def test_missing_params_raise(case: Case):
    tx, params = case.build(), cases.init_params()
    grad_fn = cases.GradientByHand(lambda p, i: p)
    with pytest.raises(ValueError, match="`params` as third argument"):
        tx.update(params, tx.init(params), grad_fn=grad_fn, value=1.0)


@pytest.mark.parametrize("case", cases.cases(needs=lambda c: c.needs_value))
def test_a_missing_value_says_which_line_to_add(case: Case):
    tx, params = case.build(), cases.init_params()
    with pytest.raises(ValueError, match=r"value_and_grad\(loss_fn\)(.|\n)*value=loss\)"):
        tx.update(params, tx.init(params), params, grad_fn=lambda p, i: p)


@pytest.mark.parametrize("case", cases.cases())
def test_exact_number_of_gradient_evaluations(case: Case):
    """Counted at run time, so that a branch not taken counts for nothing."""
    tx, params, calls = case.build(), cases.init_params(), []

    @jax.jit
    def step(params, opt_state, batch):
        @cases.GradientByHand
        def grad_fn(params, i):
            jax.debug.callback(calls.append, i)
            return jax.grad(cases.loss_fn)(params, batch)

        value, grads = jax.value_and_grad(cases.loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=value, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for i in range(10):
        params, opt_state = step(params, opt_state, cases.make_batch(i))
    jax.block_until_ready(params)
    jax.effects_barrier()
    assert len(calls) == case.extra_evaluations


@pytest.mark.parametrize("case", cases.cases())
def test_state_holds_the_stated_copies(case: Case):
    params = {"kernel": jnp.ones([100, 100])}
    base = case.kwargs.get("optimizer", cases.sgd())
    extra = optax.tree.sum(jax.tree.map(lambda x: x.nbytes, case.build().init(params)))
    extra -= optax.tree.sum(jax.tree.map(lambda x: x.nbytes, base.init(params)))
    stated = case.copies * params["kernel"].nbytes
    assert stated - 1 <= extra <= stated + 40  # The rest: a few scalars.


@pytest.mark.parametrize("case", cases.main_cases())
def test_loss_goes_down(case: Case):
    loss = lambda params, batch: optax.tree.norm(params, squared=True)  # noqa: E731
    tx, params = case.build(), cases.init_params()
    step = jax.jit(cases.train_step(tx, loss))
    opt_state = tx.init(params)
    for _ in range(60):
        params, opt_state = step(params, opt_state, None)
    start, end = (loss(p, None) for p in (cases.init_params(), params))
    assert end < 0.1 * start
    assert loss(flatopt.eval_params(opt_state, params), None) < 0.5 * start


@pytest.mark.parametrize("case", cases.main_cases())
def test_zero_gradient_gives_a_finite_step(case: Case):
    tx, params = case.build(), cases.init_params()
    opt_state, zeros = tx.init(params), optax.tree.zeros_like(params)
    grad_fn = cases.GradientByHand(lambda p, i: zeros)
    update = jax.jit(lambda s, p: tx.update(zeros, s, p, value=0.5, grad_fn=grad_fn))
    for _ in range(3):
        updates, opt_state = update(opt_state, params)
        params = optax.apply_updates(params, updates)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, opt_state)))


@pytest.mark.parametrize("bad", [np.inf, pytest.param(np.nan, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("case", cases.main_cases())
def test_apply_if_finite_skips_a_bad_step_whole(case: Case, bad: float):
    """A non-finite gradient comes through as non-finite updates, never as a quiet wrong step."""
    tx, params = optax.apply_if_finite(case.build(), 3), cases.init_params()
    opt_state = tx.init(params)
    grads = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(bad), params)
    grad_fn = cases.GradientByHand(lambda p, i: grads)
    updates, new_state = tx.update(grads, opt_state, params, value=1.0, grad_fn=grad_fn)
    cases.assert_equal(optax.apply_updates(params, updates), params)
    cases.assert_equal(new_state.inner_state, opt_state.inner_state)
    assert new_state.total_notfinite == 1


@pytest.mark.parametrize("where", ["clean", "perturbed"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_apply_if_finite_after_sam_sees_both_passes(bad: float, where: str):
    """`apply_if_finite` looks at what comes in, so the place that sees both is after the stage."""
    tx, params = optax.chain(flatopt.sam(0.05), optax.apply_if_finite(cases.sgd(), 3)), jnp.ones(3)
    poison = jnp.array([0.0, bad, 0.0])
    updates, state = tx.update(
        params + poison if where == "clean" else params,
        tx.init(params),
        params,
        grad_fn=lambda p, i: p + poison if where == "perturbed" else p,
    )
    cases.assert_equal(updates, jnp.zeros(3))
    assert state[1].total_notfinite == 1


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_skipped_branch_poisons_nothing(bad: float):
    stage, params = flatopt.sam(0.05, start=2), jnp.ones(3)
    update = jax.jit(lambda g, s: stage.update(g, s, params, grad_fn=lambda p, i: jnp.full(3, bad)))
    state = stage.init(params)
    for _ in range(2):
        updates, state = update(jnp.ones(3), state)
        cases.assert_equal(updates, jnp.ones(3))
    updates, _ = update(jnp.ones(3), state)
    assert not jnp.isfinite(updates).any()


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", cases.main_cases(has=lambda c: c.hyperparameter is not None))
def test_constant_schedule_equals_constant(case: Case):
    value = case.kwargs[case.hyperparameter]
    scheduled = case.build(**{case.hyperparameter: optax.constant_schedule(value)})
    cases.assert_close(cases.run(scheduled), case.trained, rtol=1e-6)


@pytest.mark.parametrize("case", cases.main_cases(has=lambda c: c.hyperparameter is not None))
def test_schedule_sees_the_number_of_the_step(case: Case):
    """A schedule that changes at step 3 equals changing the number there."""
    value = case.kwargs[case.hyperparameter]
    late = 0.5 * value
    scheduled = case.build(**{case.hyperparameter: lambda step: jnp.where(step < 3, value, late)})
    params, state = cases.run(case.build(), steps=3)
    expected = cases.run(case.halved, params, opt_state=state, first=3, steps=4)
    cases.assert_close(cases.run(scheduled, steps=7), expected, rtol=1e-5)


@pytest.mark.parametrize("case", cases.cases(has=lambda c: c.off is not None))
def test_off_is_the_base_optimiser_bit_for_bit(case: Case):
    base = case.kwargs.get("optimizer", cases.sgd())
    params, state = cases.run(case.build(**{case.hyperparameter: case.off}))
    expected, _ = cases.run(base)
    cases.assert_equal(params, expected)
    cases.assert_equal(flatopt.eval_params(state, params), expected)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("case", cases.cases(has=lambda c: c.hyperparameter is not None))
def test_hyperparameter_out_of_range_raises(case: Case, bad: float):
    if case.factory in ("msam", "msam_sgd", "mix_clean", "follow_arc") and bad < 0:
        case.build(**{case.hyperparameter: bad})  # The ascent variant; an extrapolation.
        return
    with pytest.raises(ValueError, match=rf"{case.hyperparameter}=.* out of range"):
        case.build(**{case.hyperparameter: bad})
