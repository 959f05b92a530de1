"""What the averages hold: closed forms, memory, statistics, merging, ensembles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases

WEIGHTS = np.random.default_rng(0).normal(size=7)


def _feed(stage: Any, weights: Any = WEIGHTS, dtype: Any = jnp.float32) -> Any:
    """The state of an averaging stage that has seen these weights, one after another."""
    state = stage.init(jnp.zeros([], dtype))
    update = jax.jit(lambda s, w: stage.update(jnp.zeros([], dtype), s, w)[1])
    for w in weights:
        state = update(state, jnp.asarray(w, dtype))
    return state


def _evaluated(stage: Any, weights: Any = WEIGHTS) -> float:
    return float(flatopt.eval_params(_feed(stage, weights), jnp.asarray(weights[-1], "f")))


# Closed forms


@pytest.mark.parametrize("exponent", [0.0, 1.0, 6.94])
def test_power_ema_has_the_shares_of_its_closed_form(exponent: float):
    n = len(WEIGHTS)
    shares = np.ones(n)
    for i in range(2, n + 1):
        decay = (1 - 1 / i) ** (exponent + 1)
        shares[: i - 1] *= decay
        shares[i - 1] = 1 - decay
    np.testing.assert_allclose(_evaluated(flatopt.power_ema(exponent)), shares @ WEIGHTS, rtol=1e-5)
    if exponent == 0:
        np.testing.assert_allclose(shares, 1 / n)
        expected = _evaluated(flatopt.swa())
        np.testing.assert_allclose(_evaluated(flatopt.power_ema(0.0)), expected, rtol=1e-6)


def test_power_ema_keeps_its_precision_over_many_models():
    state = _feed(flatopt.power_ema(6.94), [1.0])
    state = state._replace(total_weight=jnp.float32(1e6), mean=jnp.float32(0.0))
    _, state = flatopt.power_ema(6.94).update(jnp.float32(0), state, jnp.float32(1.0))
    np.testing.assert_allclose(state.mean, 7.94e-6, rtol=1e-4)


def test_lawa_is_the_mean_of_the_latest():
    for n in range(1, 8):
        expected = WEIGHTS[max(0, n - 3) : n].mean()
        np.testing.assert_allclose(_evaluated(flatopt.lawa(3), WEIGHTS[:n]), expected, rtol=1e-5)
    every = flatopt.lawa(2, every=2, start=5)  # Models after updates 2, 4, 6; a mean from 6 on.
    for n, expected in [(1, WEIGHTS[0]), (5, WEIGHTS[4]), (6, WEIGHTS[[3, 5]].mean())]:
        np.testing.assert_allclose(_evaluated(every, WEIGHTS[:n]), expected, rtol=1e-5)


def test_snapshots_come_oldest_first_before_and_after_the_ring_is_full():
    for n in range(1, 8):
        stack, number = flatopt.snapshot_params(_feed(flatopt.snapshots(3), WEIGHTS[:n]))
        latest = WEIGHTS[max(0, n - 3) : n]
        assert number == len(latest)
        np.testing.assert_allclose(stack[:number], latest, rtol=1e-6)
    stack, number = flatopt.snapshot_params(_feed(flatopt.snapshots(4, start=2, every=2)))
    np.testing.assert_allclose(stack[:number], WEIGHTS[[1, 3, 5]], rtol=1e-6)


def test_snapshots_are_not_evaluation_weights_and_there_must_be_one_stage():
    tx = optax.chain(cases.sgd(), flatopt.snapshots(2))
    params, state = cases.run(tx)
    cases.assert_equal(flatopt.eval_params(state, params), params)
    with pytest.raises(ValueError, match="holds 0 states"):
        flatopt.snapshot_params(cases.sgd().init(params))
    with pytest.raises(ValueError, match="holds 2 states"):
        flatopt.snapshot_params((state, state))


def test_swag_has_numpys_mean_variance_and_deviations():
    state = _feed(flatopt.swag(rank=3))
    np.testing.assert_allclose(state.mean, WEIGHTS.mean(), rtol=1e-5)
    np.testing.assert_allclose(state.variance, WEIGHTS.var(), rtol=1e-5)
    deviations = [WEIGHTS[i] - WEIGHTS[: i + 1].mean() for i in range(7)]
    covariance = flatopt.swag_covariance(state)
    np.testing.assert_allclose(covariance.diagonal, WEIGHTS.var() / 2, rtol=1e-5)
    low_rank = np.sum(np.square(deviations[-3:])) / (2 * 2)
    np.testing.assert_allclose(covariance.marginal, WEIGHTS.var() / 2 + low_rank, rtol=1e-5)


def test_swag_variance_survives_float32():
    """The mean of squares less the square of the mean would be noise here."""
    weights = 100 + 1e-3 * WEIGHTS
    expected = np.float32(weights).astype(np.float64).var()
    np.testing.assert_allclose(_feed(flatopt.swag(rank=2), weights).variance, expected, rtol=2e-2)
    naive = np.mean(np.float32(weights) ** 2) - np.mean(np.float32(weights)) ** 2
    assert abs(naive - expected) > 10 * expected


def test_swag_samples_have_the_covariance_that_is_stated():
    params = cases.init_params()["hidden"]
    stage = flatopt.swag(rank=3)
    state = stage.init(params)
    keys = jax.random.split(jax.random.key(1), 6)
    for key in keys:
        noise = jax.tree.map(lambda p, key=key: 0.1 * jax.random.normal(key, p.shape), params)
        _, state = stage.update(noise, state, params)
    draws = 40_000
    keys = jax.random.split(jax.random.key(2), draws)
    samples = jax.vmap(lambda key: flatopt.sample_params((state,), key, params))(keys)
    flat = jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])(samples)
    covariance = flatopt.swag_covariance((state,))
    factors = jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])(covariance.factors)
    dense = np.diag(jax.flatten_util.ravel_pytree(covariance.diagonal)[0]) + factors.T @ factors
    np.testing.assert_allclose(
        np.diag(dense), jax.flatten_util.ravel_pytree(covariance.marginal)[0], rtol=1e-5
    )
    # The standard error of a covariance is sqrt((S_ii S_jj + S_ij^2) / draws).
    scale = np.sqrt((np.outer(np.diag(dense), np.diag(dense)) + dense**2) / draws)
    assert np.abs((np.cov(flat.T) - dense) / scale).max() < 5
    assert np.abs(dense - np.diag(np.diag(dense))).max() > 20 * scale.max()
    mean = jax.flatten_util.ravel_pytree(state.mean)[0]
    assert np.abs((flat.mean(0) - mean) / np.sqrt(np.diag(dense) / draws)).max() < 5
    cases.assert_close(flatopt.sample_params(state, keys[0], params, scale=0.0), state.mean)


def test_samples_before_the_first_model_and_in_half_precision():
    stage, params = flatopt.swag(rank=2, start=3), jnp.ones(4, jnp.bfloat16)
    state = stage.init(params)
    sample = flatopt.sample_params(state, jax.random.key(0), params)
    cases.assert_equal(sample, params)
    for _ in range(5):
        _, state = stage.update(params, state, params)
    assert flatopt.sample_params(state, jax.random.key(0), params).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="holds 0 states"):
        flatopt.sample_params((), jax.random.key(0))


# Memory


@pytest.mark.parametrize(
    ("stage", "copies"),
    [
        (flatopt.swa(), 1),
        (flatopt.params_ema(0.99), 1),
        (flatopt.power_ema(2.0), 1),
        (flatopt.lawa(5), 5),
        (flatopt.snapshots(3), 3),
        (flatopt.swag(4), 2 + 4),
    ],
)
def test_bytes_of_the_state(stage: Any, copies: int):
    params = cases.init_params()
    assert _bytes(stage.init(params)) - copies * _bytes(params) in range(17)


@pytest.mark.parametrize(
    ("wrap", "copies"),
    [
        (lambda tx: flatopt.lookahead(tx), 1),
        (lambda tx: flatopt.lookahead(tx, reset_state=True), 1),
        (lambda tx: flatopt.lookahead(tx, pull_back=True), 2),  # SGD's momentum is the second.
        (lambda tx: flatopt.periodic_swa(tx, 10), 1),
    ],
)
def test_bytes_that_a_wrapper_adds(wrap: Any, copies: int):
    params = cases.init_params()
    extra = _bytes(wrap(cases.sgd()).init(params)) - _bytes(cases.sgd().init(params))
    assert extra - copies * _bytes(params) in range(17)


def test_half_precision_parameters_have_a_float32_average_and_half_precision_snapshots():
    params = cases.init_params(jnp.bfloat16)
    assert _bytes(flatopt.swa().init(params)) - 2 * _bytes(params) in range(17)
    assert _bytes(flatopt.lookahead(cases.sgd()).init(params).slow) == 2 * _bytes(params)
    assert _bytes(flatopt.lawa(3).init(params)) - 3 * _bytes(params) in range(17)


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# Statistics of the noisy quadratic: gradient a (w - c) with c normal, one coordinate a sample


def _noisy_run(tx: Any, steps: int, curvature: float, samples: int = 20_000) -> Any:
    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        grads = curvature * (params - jax.random.normal(key, params.shape))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros(samples)
    keys = jax.random.split(jax.random.key(3), steps)
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((start, tx.init(start)))
    return params, state


def _sgd_variance(rate: float, curvature: float) -> float:
    contraction = 1 - rate * curvature
    return (rate * curvature) ** 2 / (1 - contraction**2)


@pytest.mark.parametrize(("alpha", "k"), [(0.5, 5), (0.8, 5), (0.3, 10)])
def test_lookahead_variance_on_a_noisy_quadratic(alpha: float, k: int):
    rate, curvature, samples = 0.2, 1.0, 20_000
    tx = flatopt.lookahead(optax.sgd(rate), every=k, slow_step_size=alpha)
    params, state = _noisy_run(tx, 40 * k, curvature, samples)
    contraction = 1 - rate * curvature
    decrease = alpha**2 * (1 - contraction ** (2 * k))
    ratio = decrease / (decrease + 2 * alpha * (1 - alpha) * (1 - contraction**k))
    slow = np.asarray(flatopt.eval_params(state, params))
    measured = np.mean(slow**2) / _sgd_variance(rate, curvature)
    # The relative standard error of a variance is sqrt(2 / samples): one in a hundred.
    np.testing.assert_allclose(measured, ratio, rtol=4 * np.sqrt(2 / samples))
    assert ratio < 0.9


@pytest.mark.parametrize("every", [1, 5])
def test_swa_variance_of_a_stationary_run(every: int):
    """The mean of n correlated points: V / n^2 (n + 2 sum over j of (n - j) phi^j)."""
    rate, curvature, samples, models = 0.2, 1.0, 20_000, 40
    tx = optax.chain(optax.sgd(rate), flatopt.swa(start=100, every=every))
    params, state = _noisy_run(tx, 100 + every * (models - 1), curvature, samples)
    phi = (1 - rate * curvature) ** every
    lags = np.arange(1, models)
    factor = (models + 2 * np.sum((models - lags) * phi**lags)) / models**2
    mean = np.asarray(flatopt.eval_params(state, params))
    last = np.mean(np.asarray(params) ** 2)
    tolerance = 4 * np.sqrt(2 / samples)
    np.testing.assert_allclose(last, _sgd_variance(rate, curvature), rtol=tolerance)
    expected = factor * _sgd_variance(rate, curvature)
    np.testing.assert_allclose(np.mean(mean**2), expected, rtol=tolerance)
    assert factor < 0.3


# Merging


@pytest.mark.parametrize("kernel", ["linear", "cosine", "1-sqrt", lambda x: (1 - x) ** 3])
@pytest.mark.parametrize("number", [1, 2, 7])
def test_merged_checkpoints_stand_in_for_a_decaying_rate(kernel: Any, number: int):
    """Fixed gradients: the merged weights are those of a run whose rate decays by the kernel."""
    weights = flatopt.merge_weights(kernel, number)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    assert (weights >= -1e-7).all()
    checkpoints = np.cumsum(np.random.default_rng(1).normal(size=(number, 3)), axis=0)
    named = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
        "1-sqrt": lambda x: 1 - np.sqrt(x),
    }
    decay = named.get(kernel, kernel) if isinstance(kernel, str) else kernel
    decayed = checkpoints[0].copy()
    for i in range(1, number):
        decayed += decay(i / number) * (checkpoints[i] - checkpoints[i - 1])
    stack = jnp.asarray(checkpoints, jnp.float32)
    np.testing.assert_allclose(flatopt.merge_params(stack, weights), decayed, rtol=1e-5, atol=1e-6)


def test_a_linear_kernel_is_the_latest_weight_average():
    stack, number = flatopt.snapshot_params(_feed(flatopt.snapshots(3)))
    weights = flatopt.merge_weights("linear", 3)
    merged = flatopt.merge_params(stack, weights)
    np.testing.assert_allclose(merged, _evaluated(flatopt.lawa(3)), rtol=1e-6)
    np.testing.assert_allclose(flatopt.merge_params(stack), merged, rtol=1e-6)
    assert number == 3


def test_merging_keeps_dtypes_copies_integers_and_is_summed_in_float32():
    stack = {"half": jnp.full([300, 2], 1.0, jnp.bfloat16), "steps": jnp.arange(300)}
    merged = flatopt.merge_params(stack, jnp.full(300, 1 / 300))
    assert merged["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(merged["half"], np.float32), 1.0)
    assert merged["steps"] == 299
    with pytest.raises(ValueError, match=r"weights has shape \(2,\): it must be \(300,\)"):
        flatopt.merge_params(stack, jnp.ones(2))
    with pytest.raises(ValueError, match="kernel='sqrt' is unknown"):
        flatopt.merge_weights("sqrt", 3)


def test_merging_weights_can_be_trained():
    stack = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])}
    target = jnp.array([0.25, 0.75])

    def loss(logits: jax.Array) -> jax.Array:
        return jnp.sum((flatopt.merge_params(stack, jax.nn.softmax(logits))["w"] - target) ** 2)

    logits, tx = jnp.zeros(3), optax.adam(0.1)
    state, gradient = tx.init(logits), jax.jit(jax.grad(loss))
    for _ in range(500):
        updates, state = tx.update(gradient(logits), state)
        logits = optax.apply_updates(logits, updates)
    np.testing.assert_allclose(jax.nn.softmax(logits), [0.25, 0.75, 0.0], atol=2e-2)


def test_greedy_soup_takes_what_helps_and_nothing_else():
    stack, calls = {"w": jnp.array([4.0, 1.5, jnp.nan, -3.0, 1.0])}, []

    def score(params: Any) -> float:
        calls.append(params)
        return -abs(float(params["w"]) - 1.2)

    soup, chosen = flatopt.greedy_soup(stack, score)
    # 1.0 is best (0.2 away); with 1.5 the mean is 1.25; 4.0 and -3.0 would spoil it.
    assert chosen == [4, 1]
    np.testing.assert_allclose(soup["w"], 1.25)
    assert len(calls) == 2 * 5 - 1
    alone, chosen = flatopt.greedy_soup({"w": jnp.array([2.0])}, score)
    assert (alone["w"], chosen) == (2.0, [0])
    with pytest.raises(ValueError, match="stack is empty"):
        flatopt.greedy_soup({}, score)


# Schedules


def test_constant_phase_start():
    schedule = flatopt.swa_schedule(0.1, 0.05, 20, 30, shape="linear")
    start = flatopt.constant_phase_start(schedule, 100)
    # Update number 51 is the first that the final rate makes: its count is 50.
    assert start == 51
    assert schedule(49) > schedule(50) == schedule(99)
    assert flatopt.constant_phase_start(optax.constant_schedule(0.1), 10) == 1
    cosine = optax.cosine_decay_schedule(0.1, 40, alpha=0.5)
    assert flatopt.constant_phase_start(cosine, 100) == 41
    with pytest.raises(ValueError, match="no constant phase within num_steps=40"):
        flatopt.constant_phase_start(cosine, 40)
    inside = jax.jit(lambda x: x + flatopt.constant_phase_start(schedule, 100))(0)
    assert inside == 51


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_swa_schedule_jumps_without_a_transition(shape: str):
    schedule = flatopt.swa_schedule(0.1, 0.05, 0, 3, shape)
    np.testing.assert_allclose([schedule(t) for t in (2, 3)], [0.1, 0.05])
    with pytest.raises(ValueError, match="shape='step' is unknown"):
        flatopt.swa_schedule(0.1, 0.05, 1, shape="step")
    with pytest.raises(ValueError, match="swa_value=-1 is out of range"):
        flatopt.swa_schedule(0.1, -1, 1)


def test_cyclic_triangle_schedule_of_an_odd_period():
    schedule = flatopt.cyclic_triangle_schedule(1.0, 0.0, 5)
    np.testing.assert_allclose(
        [schedule(t) for t in range(6)], [1, 0.6, 0.2, 0.2, 0.6, 1], atol=1e-6
    )


# Ensembles


def test_fast_geometric_ensemble_is_the_plain_loop():
    params, steps, period = cases.init_params(), 11, 4
    batches = [cases.make_batch(i) for i in range(steps)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    stack = flatopt.fast_geometric_ensemble(
        cases.loss_fn,
        params,
        (stacked,),
        period=period,
        max_learning_rate=0.1,
        min_learning_rate=0.01,
    )
    schedule = flatopt.cyclic_triangle_schedule(0.1, 0.01, period)
    tx, collected = optax.sgd(schedule, momentum=0.9), []
    state, step = tx.init(params), jax.jit(cases.train_step(optax.with_extra_args_support(tx)))
    for i, batch in enumerate(batches):
        params, state = step(params, state, batch)
        if i + 1 in (2, 6, 10):
            collected.append(params)
    cases.assert_close(stack, jax.tree.map(lambda *x: jnp.stack(x), *collected))

    def predict(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["hidden"]["kernel"])

    x = batches[0][0]
    expected = sum(predict(p, x) for p in collected) / 3
    cases.assert_close(flatopt.ensemble_predict(predict, stack, x), expected)
    first_two = sum(predict(p, x) for p in collected[:2]) / 2
    cases.assert_close(flatopt.ensemble_predict(predict, stack, x, number=2), first_two)


def test_ensembles_take_any_optimiser_and_say_what_is_wrong():
    batches = jax.tree.map(lambda *x: jnp.stack(x), *[cases.make_batch(i) for i in range(4)])
    options = {"period": 4, "max_learning_rate": 0.1, "min_learning_rate": 0.01}
    stack = flatopt.fast_geometric_ensemble(
        cases.loss_fn,
        cases.init_params(),
        (batches,),
        make_optimizer=lambda rate: optax.chain(flatopt.sam(0.05), optax.sgd(rate)),
        **options,
    )
    assert jax.tree.leaves(stack)[0].shape[0] == 1
    one = jax.tree.map(lambda x: x[:1], batches)
    with pytest.raises(ValueError, match="batches holds 1 steps"):
        flatopt.fast_geometric_ensemble(cases.loss_fn, cases.init_params(), (one,), **options)
    with pytest.raises(ValueError, match="one common number of steps"):
        flatopt.fast_geometric_ensemble(
            lambda w, x, y: w, jnp.ones(()), (jnp.ones(3), jnp.ones(4)), **options
        )
    with pytest.raises(ValueError, match=r"number=3 is out of range.*\[1, 2\]"):
        flatopt.ensemble_predict(lambda w: w, jnp.ones(2), number=3)


# Lookahead and periodic averaging


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


def test_lookahead_starts_its_slow_weights_late():
    tx = flatopt.lookahead(cases.sgd(), every=2, slow_step_size=0.5, start=3)
    plain, plain_state = cases.run(cases.sgd(), steps=4)
    params, state = cases.run(tx, steps=4)
    cases.assert_close(params, plain)
    begun, _ = cases.run(cases.sgd(), steps=3)
    cases.assert_close(flatopt.eval_params(state, params), begun)
    params, state = cases.run(tx, params, steps=1, opt_state=state, first=4)
    fast, _ = cases.run(cases.sgd(), plain, steps=1, opt_state=plain_state, first=4)
    cases.assert_close(params, jax.tree.map(lambda a, b: (a + b) / 2, begun, fast))
    cases.assert_close(flatopt.eval_params(state, params), params)


RESETS = [
    lambda tx: flatopt.lookahead(tx, every=4, reset_state=True),
    lambda tx: flatopt.periodic_swa(tx, 4),
]


@pytest.mark.parametrize("wrap", RESETS)
def test_a_reset_takes_the_momenta_and_lets_schedules_go_on(wrap: Any):
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    injected = optax.inject_hyperparams(optax.adam)(learning_rate=schedule)
    params, state = cases.run(wrap(optax.chain(optax.clip(1.0), injected)), steps=4)
    inner = state.inner_state[1]
    assert inner.count == 4
    np.testing.assert_allclose(inner.hyperparams["learning_rate"], 0.07, rtol=1e-5)
    adam = optax.tree.get(inner, "mu", filtering=lambda path, x: True)
    cases.assert_equal(adam, optax.tree.zeros_like(params))
    (moments,) = [s for s in jax.tree.leaves(inner, is_leaf=_is_adam_state) if _is_adam_state(s)]
    assert moments.count == 0  # It corrects the bias of the momenta, which start anew.
    scheduled, state = cases.run(wrap(optax.sgd(schedule, momentum=0.9)), steps=4)
    assert state.inner_state[1].count == 4
    cases.assert_equal(state.inner_state[0].trace, optax.tree.zeros_like(scheduled))


@pytest.mark.parametrize("wrap", RESETS)
def test_a_reset_reaches_into_partitions_and_single_arrays(wrap: Any):
    labels = {"hidden": "sgd", "out": "adam", "temperature": "sgd"}
    tx = optax.partition({"sgd": cases.sgd(), "adam": optax.adam(0.01)}, labels)
    _, state = cases.run(wrap(tx), steps=4)
    moving = [
        x for x in jax.tree.leaves(state.inner_state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert len(moving) == 3 + 2 * 2
    assert all(not x.any() for x in moving)

    tx, w = wrap(cases.sgd()), jnp.float32(1.0)  # A scalar is like a count, but for its dtype.
    state = tx.init(w)
    for _ in range(4):
        updates, state = tx.update(w, state, w)
        w = optax.apply_updates(w, updates)
    assert optax.tree.get(state.inner_state, "trace") == 0


def _is_adam_state(state: Any) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


def test_periodic_swa_restarts_stops_and_goes_on_averaging():
    grads, trajectory = jnp.array(-1.0), []
    tx = flatopt.periodic_swa(optax.sgd(1.0), period=2, start=1, stop=5)
    w, evaluated = jnp.array(0.0), []
    state = tx.init(w)
    for _ in range(8):
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
        trajectory.append(float(w))
        evaluated.append(float(flatopt.eval_params(state, w)))
    # Restarts after updates 3 (mean of 2, 3) and 5 (mean of 3.5, 4.5), then no more.
    assert trajectory == [1, 2, 2.5, 3.5, 4, 5, 6, 7]
    assert evaluated == [1, 2, 2.5, 3.5, 4, 5, 5.5, 6]
    assert state.restarts == 2


def test_double_and_triple_averaging_are_lists_of_periods():
    def run(period: Any, stop: int | None = None) -> Any:
        tx = flatopt.periodic_swa(cases.sgd(), period, start=1, stop=stop)
        return cases.run(tx, steps=7)

    cases.assert_equal(run([2]), run(2, stop=3))
    cases.assert_equal(run([2, 2]), run(2, stop=5))
    _, state = run([1, 3])
    assert (state.restarts, state.number) == (2, 2)


def test_wrong_arguments_say_so():
    with pytest.raises(ValueError, match="exclude each other"):
        flatopt.lookahead(cases.sgd(), reset_state=True, pull_back=True)
    with pytest.raises(ValueError, match="period=5 must be a multiple of every=2"):
        flatopt.periodic_swa(cases.sgd(), 5, every=2)
    with pytest.raises(ValueError, match=r"period=\[\] is empty"):
        flatopt.periodic_swa(cases.sgd(), [])
    with pytest.raises(ValueError, match="rank=1 is out of range"):
        flatopt.swag(1)
    with pytest.raises(ValueError, match="window=0 is out of range"):
        flatopt.lawa(0)
    with pytest.raises(ValueError, match=r"partial=0\.6 is out of range"):
        flatopt.gadamx(0.1, partial=0.6)


def test_gadam_is_adamw_with_an_average():
    tx = flatopt.gadam(0.05, weight_decay=0.1, start=2)
    chain = optax.chain(optax.adamw(0.05, weight_decay=0.1), flatopt.swa(start=2))
    params, state = cases.run(tx)
    expected, expected_state = cases.run(chain)
    cases.assert_close(params, expected)
    cases.assert_close(
        flatopt.eval_params(state, params), flatopt.eval_params(expected_state, expected)
    )


def test_stacks_lie_over_the_devices_as_the_parameters_do():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("model")
    params = jax.device_put(jnp.ones([16, 2]), jax.sharding.NamedSharding(mesh, spec))
    expected = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    for stage, field in ((flatopt.snapshots(3), "ring"), (flatopt.swag(3), "deviations")):
        state = stage.init(params)
        assert getattr(state, field).sharding.is_equivalent_to(expected, 3)
        _, state = jax.jit(stage.update)(params, state, params)
        assert getattr(state, field).sharding.is_equivalent_to(expected, 3)
