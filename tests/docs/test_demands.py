"""What users of other implementations stumble over, one test each: here it works."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import flatopt
from tests import cases

START = jnp.array([3.0, -4.0])


def _loss(w, batch=None):
    offset = 0.0 if batch is None else jnp.mean(batch)
    return 0.5 * jnp.sum(jnp.square(w - offset) * jnp.array([1.0, 2.0]))


def _points(tx, steps, params=START):
    """Trains and records the points at which gradients are taken, clean ones first."""
    points, opt_state = [], tx.init(params)

    def grad_fn(w, i):
        del i
        points.append(w)
        return jax.grad(_loss)(w)

    for _ in range(steps):
        updates, opt_state = tx.update(grad_fn(params, 0), opt_state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    return points, params


def _lengths(points):
    """Lengths of the displacements in points that alternate between clean and perturbed."""
    pairs = zip(points[::2], points[1::2], strict=True)
    return [float(jnp.linalg.norm(perturbed - clean)) for clean, perturbed in pairs]


def test_a_schedule_for_rho_is_followed():
    schedule = optax.linear_schedule(0.0, 0.5, 5)
    points, _ = _points(optax.chain(flatopt.sam(schedule), optax.sgd(0.1)), 6)
    lengths = [
        float(jnp.linalg.norm(b - a)) for a, b in zip(points[::2], points[1::2], strict=True)
    ]
    np.testing.assert_allclose(lengths, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], atol=1e-6)


def test_a_schedule_that_goes_negative_counts_as_zero():
    points, _ = _points(optax.chain(flatopt.sam(lambda step: step - 1.0), optax.sgd(0.1)), 3)
    lengths = [
        float(jnp.linalg.norm(b - a)) for a, b in zip(points[::2], points[1::2], strict=True)
    ]
    np.testing.assert_allclose(lengths, [0.0, 0.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("kwargs", [{"every": 2}, {"num_steps": 2}, {"start": 1}])
def test_a_schedule_counts_steps_also_with_every_start_and_num_steps(kwargs: dict[str, int]):
    """The radius is that of the step, however often the perturbation has run before."""
    stage = flatopt.gradient_at(flatopt.scale_to_norm(lambda step: 0.1 * step), **kwargs)
    state, points = stage.init(START), []

    def grad_fn(w, i):
        jax.debug.callback(lambda w, i: points.append((int(i), np.array(w))), w, i)
        return w

    for _ in range(5):
        _, state = stage.update(START, state, START, grad_fn=grad_fn)
    jax.effects_barrier()
    lengths = [np.linalg.norm(w - START) for i, w in points if i == 0]
    expected = [0.0, 0.2, 0.4] if "every" in kwargs else [0.0, 0.1, 0.2, 0.3, 0.4]
    np.testing.assert_allclose(lengths, expected[kwargs.get("start", 0) :], atol=1e-6)


def test_inject_hyperparams_under_jit_shows_rho():
    tx = optax.chain(optax.inject_hyperparams(flatopt.sam)(rho=0.05), optax.sgd(0.1))
    _, state = cases.run(tx)
    np.testing.assert_allclose(optax.tree.get(state, "rho"), 0.05)


def test_multi_steps_around_sam_descends_with_the_last_microbatch_only():
    """The documented trap: grad_fn belongs to the last micro-batch. The two right forms follow."""
    batches = [jnp.array([-1.0]), jnp.array([5.0])]
    tx = optax.MultiSteps(optax.chain(flatopt.sam(0.1), optax.sgd(1.0)), 2)
    state = tx.init(START)
    for batch in batches:
        grad_fn = flatopt.make_grad_fn(_loss, batch)
        updates, state = tx.update(grad_fn(START), state, START, grad_fn=grad_fn)
    mean = jax.tree.map(lambda *g: sum(g) / 2, *[jax.grad(_loss)(START, b) for b in batches])
    last_only = jax.grad(_loss)(START + 0.1 * mean / jnp.linalg.norm(mean), batches[-1])
    np.testing.assert_allclose(updates, -last_only, rtol=1e-6)


def test_microbatches_give_the_step_of_the_whole_batch():
    tx = optax.chain(flatopt.sam(0.1), cases.sgd())
    params, batch = cases.init_params(), cases.make_batch(size=12)
    results = []
    for microbatches in (None, 3):
        grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch, microbatches=microbatches)
        loss, grads = grad_fn.value_and_grad(params)
        updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
        results.append((loss, updates))
    cases.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_multi_steps_after_sam_averages_the_perturbed_gradients():
    batches = [jnp.array([-1.0]), jnp.array([5.0])]
    multi = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    tx = optax.chain(flatopt.sam(0.1), multi)
    state, expected = tx.init(START), []
    for batch in batches:
        grad_fn = flatopt.make_grad_fn(_loss, batch)
        grads = grad_fn(START)
        updates, state = tx.update(grads, state, START, grad_fn=grad_fn)
        expected.append(grad_fn(START + 0.1 * grads / jnp.linalg.norm(grads)))
    np.testing.assert_allclose(updates, -sum(expected) / 2, rtol=1e-6)


def test_rho_zero_takes_no_second_gradient():
    tx, calls = optax.chain(flatopt.sam(0.0), optax.sgd(0.1)), []
    tx.update(START, tx.init(START), START, grad_fn=lambda w, i: calls.append(w) or w)
    assert not calls


def test_a_new_rho_or_learning_rate_does_not_recompile():
    """Hyperparameters are leaves of the state, and `tx` is no static argument."""
    tx = optax.chain(
        optax.inject_hyperparams(flatopt.sam)(rho=0.05),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    )
    step, params = jax.jit(cases.train_step(tx)), cases.init_params()
    opt_state, results = tx.init(params), []
    for rho, learning_rate in ((0.05, 0.1), (0.5, 0.1), (0.5, 0.02)):
        new = optax.tree.set(
            opt_state, rho=jnp.float32(rho), learning_rate=jnp.float32(learning_rate)
        )
        results.append(step(params, new, cases.make_batch())[0])
        expected = optax.chain(flatopt.sam(rho), optax.sgd(learning_rate))
        cases.assert_close(results[-1], cases.run(expected, steps=1)[0])
    assert step._cache_size() == 1


@pytest.mark.parametrize("case", cases.cases())
def test_states_can_be_pickled(case: cases.Case):
    state = case.build().init(cases.init_params())
    cases.assert_equal(pickle.loads(pickle.dumps(state)), state)


def test_one_update_a_batch_is_one_step_of_sam():
    """No second call, no closure: gradient, displacement and descent in a single `update`."""
    tx, batch = optax.chain(flatopt.sam(0.05), optax.sgd(0.1)), cases.make_batch()
    params = cases.init_params()
    grads = jax.grad(cases.loss_fn)(params, batch)
    scale = 0.05 / optax.tree.norm(grads)
    point = jax.tree.map(lambda w, g: w + scale * g, params, grads)
    sharp = jax.grad(cases.loss_fn)(point, batch)
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, sharp)
    actual, _ = cases.train_step(tx)(params, tx.init(params), batch)
    cases.assert_close(actual, expected)


def test_zero_gradient_then_training_goes_on():
    tx = optax.chain(flatopt.sam(0.05), optax.sgd(0.1))
    points, params = _points(tx, 3, params=jnp.zeros(2))
    assert all(bool(jnp.isfinite(p).all()) for p in points)
    cases.assert_equal(params, jnp.zeros(2))


def test_a_perturbation_with_a_typed_random_key_in_its_state():
    def update(updates, state, params=None):
        del params
        key, subkey = jax.random.split(state)
        return optax.tree.random_like(subkey, updates), key

    noise = optax.GradientTransformation(lambda params: jax.random.key(0), update)
    for kwargs in ({}, {"every": 2}, {"num_steps": 2}):
        tx = optax.chain(flatopt.gradient_at(noise, **kwargs), cases.sgd())
        params, _ = cases.run(tx, steps=3)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_masked_around_sam_says_to_mask_the_perturbation(wrap: str):
    stage = flatopt.sam(0.05)
    mask = {"hidden": True, "out": False, "temperature": False}
    if wrap == "masked":
        around = optax.masked(stage, mask)
    else:
        labels = {k: str(v) for k, v in mask.items()}
        around = optax.partition({"True": stage, "False": optax.identity()}, labels)
    with pytest.raises(ValueError, match=r"mask the perturbation instead.*mask_displacement"):
        cases.run(optax.chain(around, cases.sgd()), steps=1)


def test_masked_perturbation_moves_the_chosen_leaves_only():
    mask = {"hidden": True, "out": False, "temperature": False}
    perturbation = optax.chain(flatopt.mask_displacement(mask), flatopt.scale_to_norm(0.5))
    stage, params, seen = flatopt.gradient_at(perturbation), cases.init_params(), []
    grads = jax.grad(cases.loss_fn)(params, cases.make_batch())
    stage.update(grads, stage.init(params), params, grad_fn=lambda p, i: seen.append(p) or grads)
    moved = jax.tree.map(lambda a, b: a - b, seen[0], params)
    cases.assert_equal(
        (seen[0]["out"], seen[0]["temperature"]), (params["out"], params["temperature"])
    )
    np.testing.assert_allclose(optax.tree.norm(moved), 0.5, rtol=1e-5)


def test_clipping_after_sam_bounds_the_update_and_before_it_is_void():
    clip = optax.clip_by_global_norm(1e-3)
    grad_fn = flatopt.make_grad_fn(_loss)

    def update(tx):
        return tx.update(grad_fn(START), tx.init(START), START, grad_fn=grad_fn)[0]

    after = update(optax.chain(flatopt.sam(0.05), clip, optax.sgd(1.0)))
    before = update(optax.chain(clip, flatopt.sam(0.05), optax.sgd(1.0)))
    neither = update(optax.chain(flatopt.sam(0.05), optax.sgd(1.0)))
    np.testing.assert_allclose(jnp.linalg.norm(after), 1e-3, rtol=1e-5)
    np.testing.assert_allclose(before, neither, rtol=1e-5)


def test_freezing_after_sam_freezes():
    freeze = optax.partition(
        {"train": optax.identity(), "freeze": optax.set_to_zero()},
        {"hidden": "train", "out": "freeze", "temperature": "freeze"},
    )
    params, _ = cases.run(optax.chain(flatopt.sam(0.05), cases.sgd(), freeze))
    cases.assert_equal(params["out"], cases.init_params()["out"])


def test_weight_decay_after_sam_leaves_the_perturbation_alone():
    tx = optax.chain(flatopt.sam(0.1), optax.add_decayed_weights(0.5), optax.sgd(0.1))
    points, _ = _points(tx, 4)
    lengths = [
        float(jnp.linalg.norm(b - a)) for a, b in zip(points[::2], points[1::2], strict=True)
    ]
    np.testing.assert_allclose(lengths, [0.1] * 4, rtol=1e-5)


def test_the_reported_loss_is_at_the_clean_point():
    tx, params, seen = optax.chain(flatopt.sam(0.1), cases.sgd()), cases.init_params(), []
    opt_state = tx.init(params)
    for i in range(3):
        grad_fn = flatopt.make_grad_fn(cases.loss_fn, cases.make_batch(i))
        loss, grads = grad_fn.value_and_grad(params)
        seen.append((loss, cases.loss_fn(params, cases.make_batch(i))))
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    for reported, clean in seen:
        np.testing.assert_allclose(reported, clean, rtol=1e-6)


def test_an_inner_optimiser_that_needs_the_loss_value():
    """Wrappers and stages hand `value=` on to whom it concerns."""
    params = cases.init_params()
    loss, grads = jax.value_and_grad(cases.loss_fn)(params, cases.make_batch())
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, cases.make_batch())
    polyak = optax.polyak_sgd(max_learning_rate=0.1)
    for tx in (
        optax.chain(flatopt.sam(0.05), polyak),
        flatopt.wasam(polyak, 0.05),
        flatopt.hold_perturbed(polyak, flatopt.scale_to_norm(0.05)),
        flatopt.msam(optax.chain(optax.trace(0.9), polyak), 0.05),
    ):
        updates, _ = tx.update(grads, tx.init(params), params, value=loss, grad_fn=grad_fn)
        assert float(optax.tree.norm(updates)) > 0


def test_nnx_optimizer_with_split_and_merge():
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    model = Model(nnx.Rngs(0))
    x, y = cases.make_batch()
    graphdef, params = nnx.split(model, nnx.Param)

    def loss_fn(params, x, y):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(x) - y))

    optimizer = nnx.Optimizer(model, optax.chain(flatopt.sam(0.1), optax.sgd(0.1)), wrt=nnx.Param)
    before = loss_fn(params, x, y)
    for _ in range(3):
        params = nnx.state(model, nnx.Param)
        grad_fn = flatopt.make_grad_fn(loss_fn, x, y)
        optimizer.update(model, grad_fn(params), grad_fn=grad_fn)
    assert loss_fn(nnx.state(model, nnx.Param), x, y) < before


def test_linen_with_batch_norm_takes_statistics_from_the_clean_pass():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
            return nn.Dense(2)(x)

    model, (x, y) = Model(), cases.make_batch(size=16)
    variables = model.init(jax.random.key(0), x, train=True)
    tx = optax.chain(flatopt.sam(0.5), optax.sgd(0.1))
    params, stats = variables["params"], variables["batch_stats"]

    def loss_fn(params, stats, x, y):
        out, new = model.apply(
            {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.square(out - y)), new["batch_stats"]

    grad_fn = flatopt.make_grad_fn(loss_fn, stats, x, y, has_aux=True)
    (_, new_stats), grads = grad_fn.value_and_grad(params)
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    _, clean = loss_fn(params, stats, x, y)
    cases.assert_close(new_stats, clean)
    assert float(optax.tree.norm(updates)) > 0


def test_a_parameter_ema_averages_parameters_where_optax_ema_averages_updates():
    params = jnp.array(10.0)
    ours = optax.chain(optax.sgd(0.0), flatopt.params_ema(0.9))
    state = ours.init(params)
    for _ in range(5):
        _, state = ours.update(jnp.array(1.0), state, params)
    np.testing.assert_allclose(flatopt.eval_params(state, params), 10.0, rtol=1e-6)


def test_debiased_and_warmed_up_averages_equal_their_closed_forms():
    weights = np.random.default_rng(0).normal(size=6)

    def average(stage):
        state = stage.init(jnp.array(0.0))
        for w in weights:
            _, state = stage.update(jnp.array(0.0), state, jnp.float32(w))
        return flatopt.eval_params(state, jnp.array(0.0))

    d = 0.8
    shares = d ** np.arange(5, -1, -1)
    np.testing.assert_allclose(
        average(flatopt.params_ema(d)), shares @ weights / shares.sum(), rtol=1e-5
    )
    for debias in (False, True):
        mean, total = 0.0, 0.0
        for n, w in enumerate(weights):
            decay = min(d, (1 + n) / (3 + n))
            if not debias and n == 0:
                decay = 0.0
            mean, total = decay * mean + (1 - decay) * w, decay * total + (1 - decay)
        expected = mean / total if debias else mean
        stage = flatopt.params_ema(d, debias=debias, warmup_steps=3)
        np.testing.assert_allclose(average(stage), expected, rtol=1e-5)


def test_home_made_momentum_sam_conforms_to_the_reference_signs():
    """One global norm, displaced along the coming step, offset taken back before the step."""
    tx, grads = flatopt.msam(optax.sgd(0.1, momentum=0.9), 0.5), {"a": START, "b": jnp.ones(3)}
    updates, state = tx.update(grads, tx.init(grads), grads)
    params = optax.apply_updates(grads, updates)
    centre = flatopt.eval_params(state, params)
    cases.assert_close(centre, jax.tree.map(lambda g: 0.9 * g, grads))
    offset = optax.tree.sub(params, centre)
    np.testing.assert_allclose(optax.tree.norm(offset), 0.5, rtol=1e-5)
    cosine = optax.tree.vdot(offset, grads) / (0.5 * optax.tree.norm(grads))
    np.testing.assert_allclose(cosine, -1.0, rtol=1e-5)


def test_msam_finds_its_momentum_through_wrappers_and_says_where_it_looked():
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
    params = cases.init_params()
    for optimizer in (
        optax.chain(optax.clip_by_global_norm(1.0), inner),
        optax.MultiSteps(inner, 1).gradient_transformation(),
        optax.apply_if_finite(inner, 2),
        optax.chain(optax.ema(0.9), optax.scale(-0.1)),
        optax.adamw(0.01),
        optax.lion(0.01),
    ):
        _, state = cases.run(flatopt.msam(optimizer, 0.1), params, steps=2)
        assert float(state.scale) > 0
    with pytest.raises(ValueError, match=r"no momentum.*`trace`, `mu`.*ScaleByRmsState"):
        flatopt.msam(optax.rmsprop(0.1), 0.1).init(params)
    with pytest.raises(ValueError, match="2 momentum buffers"):
        flatopt.msam(optax.chain(optax.trace(0.9), optax.scale_by_adam()), 0.1).init(params)


def test_msam_over_a_partition_leaves_frozen_leaves_alone():
    optimizer = optax.partition(
        {"sgd": cases.sgd(), "adam": optax.adam(0.01), "freeze": optax.set_to_zero()},
        {"hidden": "sgd", "out": "adam", "temperature": "freeze"},
    )
    params, state = cases.run(flatopt.msam(optimizer, 0.1))
    centre = flatopt.eval_params(state, params)
    assert params["temperature"] == centre["temperature"] == 1.0
    offset = optax.tree.sub(params, centre)
    np.testing.assert_allclose(optax.tree.norm(offset), 0.1, rtol=1e-4)
    assert float(jnp.abs(offset["out"]["kernel"]).max()) > 0


def test_msam_around_swa_returns_the_average_of_the_centres():
    tx = flatopt.msam(optax.chain(cases.sgd(), flatopt.swa()), 0.3)
    params, centres = cases.init_params(), []
    state = tx.init(params)
    step = jax.jit(cases.train_step(tx))
    for i in range(4):
        params, state = step(params, state, cases.make_batch(i))
        centres.append(state.eval_params(params))
    expected = jax.tree.map(lambda *c: sum(c) / len(c), *centres)
    cases.assert_close(flatopt.eval_params(state, params), expected)


def test_two_averages_on_one_level_raise():
    tx = optax.chain(cases.sgd(), flatopt.swa(), flatopt.params_ema(0.9))
    params, state = cases.run(tx)
    with pytest.raises(ValueError, match="twice on one level, in AverageState and AverageState"):
        flatopt.eval_params(state, params)


def test_averages_of_two_partitions_are_put_together():
    def part(learning_rate):
        return optax.chain(optax.sgd(learning_rate), flatopt.swa(start=2))

    labels = {"hidden": "a", "out": "b", "temperature": "b"}
    tx = optax.partition({"a": part(0.1), "b": part(0.05)}, labels)
    params, state = cases.run(tx, steps=3)
    second, _ = cases.run(tx, steps=2)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, second, params)
    cases.assert_close(flatopt.eval_params(state, params), expected)


def test_evaluation_before_averaging_begins_gives_the_parameters():
    tx = optax.chain(cases.sgd(), flatopt.swa(start=100))
    params, state = cases.run(tx, steps=3)
    cases.assert_equal(flatopt.eval_params(state, params), params)
    cases.assert_equal(flatopt.eval_params(optax.sgd(0.1).init(params), params), params)


def test_evaluation_weights_are_found_through_every_wrapper():
    inner = optax.chain(optax.inject_hyperparams(optax.sgd)(0.05), flatopt.swa())
    expected = None
    for wrap in (
        lambda tx: tx,
        lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.named_chain(("sam", flatopt.sam(0.0)), ("rest", tx)),
        lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
        lambda tx: optax.chain(optax.clip(10.0), tx),
    ):
        params, state = cases.run(wrap(inner))
        evaluated = flatopt.eval_params(state, params)
        expected = evaluated if expected is None else expected
        cases.assert_close(evaluated, expected)
        assert not jnp.allclose(evaluated["out"]["kernel"], params["out"]["kernel"])


def test_sam_and_averaging_are_one_line():
    tx = flatopt.wasam(cases.sgd(), rho=0.05, start=2)
    chain = optax.chain(flatopt.sam(0.05), cases.sgd(), flatopt.swa(start=2))
    cases.assert_equal(cases.run(tx), cases.run(chain))


def test_batch_norm_statistics_in_training_are_untouched_by_evaluation():
    """Evaluating the average is a pure function: nothing in training can be corrupted."""
    tx = optax.chain(cases.sgd(), flatopt.swa())
    params, state = cases.run(tx)
    before = jax.tree.map(np.array, (params, state))
    flatopt.eval_params(state, params)
    cases.assert_equal((params, state), before)
