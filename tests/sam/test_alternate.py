"""`alternate`: two calls with one gradient each are one step of `gradient_at`."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases

RHO = 0.05
OPTIMIZERS = {
    "sgd": cases.sgd(),
    "adamw on a schedule": optax.adamw(optax.linear_schedule(0.1, 0.0, 6), weight_decay=0.1),
    "clip and decay": optax.chain(
        optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), cases.sgd()
    ),
}
PERTURBATIONS = {
    "sam": flatopt.scale_to_norm(RHO),
    "asam": flatopt.scale_to_adaptive_norm(0.5),
    "scheduled": flatopt.scale_to_norm(lambda step: 0.02 * step),
}


def _step(tx, donate=False):
    """A loop's step that knows of no `grad_fn`."""

    def step(params, opt_state, batch):
        updates, opt_state = tx.update(jax.grad(cases.loss_fn)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


def _pairs(tx, steps, donate=False):
    """Each batch twice; the parameters after every second call, and the state."""
    params = cases.init_params()
    opt_state, step, after = tx.init(params), _step(tx, donate), []
    for i in range(steps):
        for _ in range(2):
            params, opt_state = step(params, opt_state, cases.make_batch(i))
        after.append(jax.tree.map(np.array, params))
    return after, opt_state


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_second_call_equals_gradient_at(perturbation: str, optimizer: str):
    p, o = PERTURBATIONS[perturbation], OPTIMIZERS[optimizer]
    after, state = _pairs(flatopt.alternate(o, p), 6)
    whole = optax.chain(flatopt.gradient_at(p), o)
    for i, params in enumerate(after):
        cases.assert_close(params, cases.run(whole, steps=i + 1)[0])
    # The inner state too: counters and schedules advance once a pair.
    cases.assert_close(state.inner_state, cases.run(whole, steps=6)[1][1])
    assert int(state.step) == 6


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_way_back_has_one_rounding(dtype: str):
    """The displacement, a thousand times the step, leaves no trace in the parameters."""
    with jax.enable_x64(dtype == "float64"):
        params = jnp.linspace(1.0, 2.0, 50, dtype=dtype)
        tx = flatopt.alternate(optax.sgd(0.5), flatopt.scale_to_norm(1.0))
        opt_state = tx.init(params)
        updates, opt_state = tx.update(params, opt_state, params)
        displaced = optax.apply_updates(params, updates)
        assert float(jnp.abs(displaced - params).min()) > 0.05
        grads = jnp.full_like(params, 2e-4)
        updates, _ = tx.update(grads, opt_state, displaced)
        cases.assert_equal(optax.apply_updates(displaced, updates), params - 0.5 * grads)


def test_the_clean_point_is_evaluated_at_the_displaced_one():
    tx = flatopt.alternate(cases.sgd(), flatopt.scale_to_norm(RHO))
    params = cases.init_params()
    opt_state, step = tx.init(params), _step(tx)
    cases.assert_equal(flatopt.eval_params(opt_state, params), params)
    displaced, opt_state = step(params, opt_state, cases.make_batch())
    np.testing.assert_allclose(optax.tree.norm(optax.tree.sub(displaced, params)), RHO, rtol=1e-5)
    cases.assert_equal(jax.jit(flatopt.eval_params)(opt_state, displaced), params)
    params, opt_state = step(displaced, opt_state, cases.make_batch())
    cases.assert_equal(flatopt.eval_params(opt_state, params), params)


def test_averages_inside_see_clean_points_only():
    p, inner = flatopt.scale_to_norm(RHO), optax.chain(cases.sgd(), flatopt.swa())
    tx = flatopt.alternate(inner, p)
    after, opt_state = _pairs(tx, 4)
    expected = jax.tree.map(lambda *ws: sum(ws) / len(ws), *after)
    cases.assert_close(flatopt.eval_params(opt_state, after[-1]), expected)
    displaced, opt_state = _step(tx)(after[-1], opt_state, cases.make_batch(9))
    cases.assert_close(flatopt.eval_params(opt_state, displaced), expected)


def test_scan_over_calls():
    tx = flatopt.alternate(optax.adam(0.05), flatopt.scale_to_norm(RHO))
    batches = [cases.make_batch(i // 2) for i in range(8)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)

    def body(carry, batch):
        return _step(tx)(*carry, batch), None

    params = cases.init_params()
    (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), stacked)
    cases.assert_close(params, _pairs(tx, 4)[0][-1])


def test_donated_buffers():
    tx = flatopt.alternate(cases.sgd(), flatopt.scale_to_norm(RHO))
    cases.assert_close(_pairs(tx, 3, donate=True)[0], _pairs(tx, 3)[0])


def test_resumes_in_the_middle_of_a_pair_bit_for_bit():
    tx = flatopt.alternate(optax.adam(0.05), flatopt.scale_to_norm(RHO))
    step, params = _step(tx), cases.init_params()
    opt_state = tx.init(params)
    for i in range(3):
        params, opt_state = step(params, opt_state, cases.make_batch(i // 2))
    assert bool(opt_state.perturbed)
    like = cases.init_params(seed=9)
    saved = flax.serialization.to_bytes((params, opt_state))
    restored = flax.serialization.from_bytes((like, tx.init(like)), saved)
    for i in range(3, 6):
        params, opt_state = step(params, opt_state, cases.make_batch(i // 2))
        restored = step(*restored, cases.make_batch(i // 2))
    cases.assert_equal(restored, (params, opt_state))


@pytest.mark.parametrize("bad", ["clean", "perturbed"])
def test_a_call_that_is_not_finite_is_left_out(bad: str):
    """`apply_if_finite` around it sees both gradients; the missing half is the next call's."""
    tx = optax.apply_if_finite(flatopt.alternate(optax.sgd(0.5), flatopt.scale_to_norm(0.1)), 3)
    params = jnp.array([3.0, -4.0])
    opt_state = tx.init(params)
    poison = jnp.array([0.0, jnp.nan])
    calls = ["bad", "good", "good"] if bad == "clean" else ["good", "bad", "good"]
    for call in calls:
        grads = params + (poison if call == "bad" else 0.0)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    start = jnp.array([3.0, -4.0])
    expected = start - 0.5 * (start + 0.1 * start / 5.0)
    np.testing.assert_allclose(params, expected, rtol=1e-6)
    assert opt_state.total_notfinite == 1


def test_the_optimiser_never_sees_the_clean_gradient():
    """A branch, not a blend: what stands in the other half poisons nothing."""
    poisoned = optax.GradientTransformation(
        lambda params: jnp.zeros([]), lambda updates, state, params=None: (updates * jnp.nan, state)
    )
    tx, params = flatopt.alternate(poisoned, flatopt.scale_to_norm(0.5)), jnp.array([3.0, 4.0])
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates, [0.3, 0.4], rtol=1e-6)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))


def test_multi_steps_around_it_is_sam_on_the_mean_of_its_batches():
    """First all micro-batches at the clean point, then all of them at the displaced one."""
    k, p = 4, flatopt.scale_to_norm(0.5)
    tx = optax.MultiSteps(flatopt.alternate(cases.sgd(), p), k).gradient_transformation()
    params = cases.init_params()
    opt_state, step = tx.init(params), _step(tx)
    batches = [cases.make_batch(i, size=4 * k) for i in range(3)]
    for batch in batches:
        parts = [jax.tree.map(lambda x, j=j: x[4 * j : 4 * j + 4], batch) for j in range(k)]
        for part in (*parts, *parts):
            params, opt_state = step(params, opt_state, part)
    whole = optax.chain(flatopt.gradient_at(p), cases.sgd())
    expected = cases.init_params()
    state = whole.init(expected)
    for batch in batches:
        expected, state = jax.jit(cases.train_step(whole))(expected, state, batch)
    cases.assert_close(params, expected)


def test_a_fresh_batch_every_call_takes_half_as_many_steps():
    """Ascent on one batch, descent on the next: what the loop decides, the wrapper does."""
    tx = flatopt.alternate(cases.sgd(), flatopt.scale_to_norm(RHO))
    params, clean = cases.init_params(), cases.init_params()
    opt_state, state, step = tx.init(params), cases.sgd().init(clean), _step(tx)
    for i in range(4):
        params, opt_state = step(params, opt_state, cases.make_batch(i))
        if i % 2:
            ascent = jax.grad(cases.loss_fn)(clean, cases.make_batch(i - 1))
            scale = RHO / optax.tree.norm(ascent)
            displaced = jax.tree.map(lambda w, g, s=scale: w + s * g, clean, ascent)
            grads = jax.grad(cases.loss_fn)(displaced, cases.make_batch(i))
            updates, state = cases.sgd().update(grads, state, clean)
            clean = optax.apply_updates(clean, updates)
    cases.assert_close(params, clean)


def test_both_arguments_are_transformations():
    with pytest.raises(TypeError, match=r"optimizer=0\.1 must be an optax transformation"):
        flatopt.alternate(0.1, flatopt.scale_to_norm(RHO))
    with pytest.raises(TypeError, match=r"perturbation=0\.05 must be an optax transformation"):
        flatopt.alternate(cases.sgd(), RHO)
