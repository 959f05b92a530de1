"""The SAM family: each method equals SAM where it should, and does what only it does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import flatopt
from tests import cases

RHO = 0.05
SAM = flatopt.sam(RHO)
EVERYWHERE = functools.partial(jax.tree.map, lambda p: True)


def _train(stage, steps=6):
    return cases.run(optax.chain(stage, cases.sgd()), steps=steps)[0]


@pytest.mark.parametrize(
    "stage",
    [
        flatopt.looksam(RHO, every=1, alpha=0.5),
        flatopt.gsam(RHO, alpha=0.0),
        flatopt.gnp(RHO, alpha=1.0),
        flatopt.friendly_sam(RHO, sigma=0.0),
        flatopt.vasso(RHO, decay=0.0),
        flatopt.zsharp(RHO, quantile=0.0),
        flatopt.sparse_sam(RHO, mask=EVERYWHERE),
        flatopt.sam_on(RHO, mask=EVERYWHERE),
        flatopt.esam(RHO, beta=1.0),
        flatopt.gradient_at(flatopt.mask_by_fisher(flatopt.scale_to_norm(RHO), 0.0, every=2)),
        flatopt.gradient_at(flatopt.mask_at_random(flatopt.scale_to_norm(RHO), 0.0, every=2)),
    ],
    ids=lambda stage: stage.init.__qualname__.split(".")[0],
)
def test_is_sam_at_the_limit(stage):
    cases.assert_close(_train(stage), _train(SAM), rtol=1e-6, atol=1e-7)


def test_le_sam_is_sam_when_the_budget_is_no_limit():
    cases.assert_close(_train(flatopt.le_sam(budget=1e6, max_rho=RHO)), _train(SAM))


def test_le_sam_raises_the_linearised_loss_by_its_budget():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(12.0)}
    perturbation = flatopt.scale_to_loss_rise(budget=0.25, max_rho=10.0)
    displacement, _ = perturbation.update(grads, perturbation.init(grads))
    np.testing.assert_allclose(optax.tree.vdot(grads, displacement), 0.25, rtol=1e-6)


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


def test_gsam_leaves_the_perturbed_loss_to_the_perturbed_gradient():
    """What it adds is orthogonal to the gradient whose loss it must not change."""
    perturbed, clean = jnp.array([2.0, 1.0, 0.5]), jnp.array([1.0, -1.0, 3.0])
    for minimise_perturbed, kept in ((True, perturbed), (False, clean)):
        combiner = flatopt.surrogate_gap(0.7, minimise_perturbed=minimise_perturbed)
        mixed, _ = combiner.update(perturbed, combiner.init(clean), clean_updates=clean)
        np.testing.assert_allclose(jnp.vdot(mixed - kept, kept), 0.0, atol=1e-6)
        assert jnp.linalg.norm(mixed - kept) > 0.1


def test_combiners_say_where_they_belong():
    combiner = flatopt.mix_clean(0.5)
    with pytest.raises(ValueError, match=r"gradient_at\(perturbation, combiner=flatopt.mix_clean"):
        combiner.update(jnp.ones(2), combiner.init(jnp.ones(2)))


def test_proportional_rho_is_never_negative():
    """A warm-up that starts below the lowest rate would make the formula negative."""
    learning_rate = optax.linear_schedule(0.0, 0.1, 10)
    rho = flatopt.proportional_rho_schedule(learning_rate, 0.5, 0.1, 0.1, 0.09)
    values = jax.vmap(rho)(jnp.arange(11))
    assert values[0] == 0.0
    np.testing.assert_allclose(values[-1], 0.5, rtol=1e-6)
    assert flatopt.proportional_rho_schedule(learning_rate, 0.5, 0.1, 0.1, 0.1)(3) == 0.5


@pytest.mark.parametrize("layerwise", [False, True])
def test_looksam_reuses_what_the_sharp_gradient_added(layerwise):
    stage = flatopt.looksam(0.5, every=2, alpha=0.3, layerwise=layerwise)
    params, grad_fn = cases.init_params(), flatopt.make_grad_fn(cases.loss_fn, cases.make_batch())
    clean = grad_fn(params)
    _, state = stage.update(clean, stage.init(params), params, grad_fn=grad_fn)
    updates, _ = stage.update(clean, state, params, grad_fn=grad_fn)
    added = jax.tree.map(jnp.subtract, updates, clean)
    parts = zip(jax.tree.leaves(added), jax.tree.leaves(clean), strict=True)
    pairs = list(parts) if layerwise else [(added, clean)]
    for extra, gradient in pairs:
        if jnp.size(jax.tree.leaves(extra)[0]) > 1:  # A scalar has no orthogonal direction.
            size = 0.3 * optax.tree.norm(gradient)
            np.testing.assert_allclose(optax.tree.norm(extra), size, rtol=1e-4)
            np.testing.assert_allclose(optax.tree.vdot(extra, gradient), 0.0, atol=1e-3 * size)


@pytest.mark.parametrize(
    "stage",
    [
        flatopt.friendly_sam(RHO),
        flatopt.vasso(RHO),
        flatopt.looksam(RHO, every=2, alpha=0.5),
        flatopt.arwp(std=0.1, eta=1.0, decay=0.9),
        flatopt.gradient_at(flatopt.mask_by_fisher(flatopt.scale_to_norm(RHO), 0.5, every=2)),
        flatopt.sampa(cases.sgd(), RHO),
    ],
    ids=["friendly_sam", "vasso", "looksam", "arwp", "mask_by_fisher", "sampa"],
)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_memory_of_gradients_is_not_poisoned(stage, bad):
    """The stage stands outside `apply_if_finite`: what that rejects must leave no trace."""
    params = cases.init_params()
    good = flatopt.make_grad_fn(cases.loss_fn, cases.make_batch())
    _, state = stage.update(good(params), stage.init(params), params, grad_fn=good)
    poison = jax.tree.map(lambda p: jnp.full_like(p, bad), params)
    for _ in range(2):
        _, state = stage.update(poison, state, params, grad_fn=lambda p, i: poison)
    fresh = (
        state._replace(inner_state=stage.init(params).inner_state)
        if (hasattr(state, "inner_state"))
        else state
    )
    updates, _ = stage.update(good(params), fresh, params, grad_fn=good)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))


def _chosen(displacement):
    return np.concatenate([np.ravel(x != 0) for x in jax.tree.leaves(displacement)])


def test_fisher_mask_takes_the_largest_and_is_renewed():
    perturbation = flatopt.mask_by_fisher(flatopt.scale_to_norm(1.0), sparsity=0.6, every=2)
    rows = jnp.array([[5.0, 4.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 9.0, 8.0], [1.0, 1, 1, 9, 8]])
    state, masks = perturbation.init(rows[0]), []
    for grads in rows:
        displacement, state = perturbation.update(grads, state, rows[0])
        masks.append(_chosen(displacement).tolist())
    first, last = [True, True, False, False, False], [False, False, False, True, True]
    assert masks == [first, first, last]


def test_fisher_of_single_examples_can_be_handed_in():
    perturbation = flatopt.mask_by_fisher(flatopt.scale_to_norm(1.0), sparsity=0.5, every=1)
    tx = flatopt.gradient_at(perturbation)
    params, seen = jnp.array([1.0, 1.0]), []

    def grad_fn(point, i):
        del i
        seen.append(point)
        return point

    x = jnp.array([[0.0, 3.0], [0.0, -3.0]])  # The mean gradient of the second entry is zero.
    fisher = flatopt.empirical_fisher(lambda w, x: jnp.mean(x @ w), params, x)
    np.testing.assert_allclose(fisher, [0.0, 18.0])
    tx.update(jnp.array([5.0, 1.0]), tx.init(params), params, grad_fn=grad_fn, fisher=fisher)
    assert seen[0][0] == 1.0
    assert seen[0][1] > 1.0
    with pytest.raises(ValueError, match="args is empty"):
        flatopt.empirical_fisher(lambda w: w.sum(), params)


@pytest.mark.parametrize(("decay_steps", "moved_late"), [(None, True), (4, False)])
def test_random_mask_keeps_its_size_and_moves(decay_steps, moved_late):
    perturbation = flatopt.mask_at_random(
        flatopt.scale_to_norm(1.0), sparsity=0.7, every=2, decay_steps=decay_steps, key=3
    )
    grads = {"a": jnp.linspace(1.0, 2.0, 60).reshape(6, 10), "b": jnp.linspace(2.0, 3.0, 40)}
    state, masks = perturbation.init(grads), []
    for _ in range(9):
        displacement, state = perturbation.update(grads, state, grads)
        masks.append(_chosen(displacement))
    assert [m.sum() for m in masks] == [30] * 9
    assert (masks[0] == masks[1]).all()
    kept = (masks[1] & masks[2]).sum()
    assert kept >= 15
    assert not (masks[1] == masks[2]).all()
    # What stays are the live weights with the largest gradients.
    live = np.flatnonzero(masks[1])
    assert set(live[-15:]) <= set(np.flatnonzero(masks[2]))
    assert (masks[7] != masks[8]).any() == moved_late


def test_random_mask_keeps_its_size_where_gradients_are_not_finite():
    perturbation = flatopt.mask_at_random(flatopt.scale_to_norm(1.0), sparsity=0.7, every=1, key=3)
    params = jnp.ones(100)
    state = perturbation.init(params)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        _, state = perturbation.update(params.at[::2].set(bad), state, params)
        assert state.mask.sum() == 30
    _, state = perturbation.update(jnp.full(100, jnp.nan), state, params)
    assert state.mask.sum() == 30


def test_dropped_displacement_is_unbiased_and_whole_by_tensor():
    tree = {"a": jnp.ones(2000), "b": jnp.ones(2000)}
    drop = flatopt.drop_displacement(keep=0.25, key=1)
    displacement, _ = drop.update(tree, drop.init(tree))
    assert set(np.unique(displacement["a"])) == {0.0, 4.0}
    np.testing.assert_allclose(jnp.mean(displacement["a"]), 1.0, atol=4 * (3 / 2000) ** 0.5)
    by_tensor = flatopt.drop_displacement(keep=0.5, key=1, per_tensor=True)
    state, means = by_tensor.init(tree), []
    for _ in range(40):
        displacement, state = by_tensor.update(tree, state)
        assert len(np.unique(displacement["a"])) == 1
        means.append(float(displacement["a"][0]))
    assert set(means) == {0.0, 2.0}
    with pytest.raises(ValueError, match="keep=0 is out of range"):
        flatopt.drop_displacement(keep=0.0)


def test_selection_keeps_what_the_ascent_hurts_most():
    clean, perturbed = jnp.zeros(6), jnp.array([0.1, 0.6, 0.5, 0.4, 0.3, 0.2])
    select = functools.partial(flatopt.select_examples, clean, perturbed)
    assert select(0.5).tolist() == [False, True, True, True, False, False]
    assert select(0.5, strict=True).sum() == 2
    assert select(0.1).sum() == 1
    assert select(1.0, strict=True).all()
    with pytest.raises(ValueError, match=r"share=1\.5 is out of range"):
        select(1.5)
    with pytest.raises(ValueError, match="must be two vectors"):
        flatopt.select_examples(clean, perturbed[:3], 0.5)


def test_selection_is_jitted_and_ignores_the_nan_of_others():
    def losses_fn(w, x):
        return jnp.where(x > 0, w * x, jnp.log(-w * x))

    x = jnp.array([1.0, 2.0, 3.0, -1.0])
    clean = jnp.array([1.0, 2.0, 3.0, jnp.inf])
    grad_fn = flatopt.make_selective_grad_fn(losses_fn, x, clean_losses=clean, share=0.5)
    grads = jax.jit(lambda g, w: g(w, 0))(grad_fn, jnp.array(2.0))
    np.testing.assert_allclose(grads, 2.5)


def test_functional_sam_ignores_the_curvature_of_the_head():
    """A linear network has none of its own: the functional gradient is the clean one."""
    x = jax.random.normal(jax.random.key(0), (8, 3))
    y = jax.random.normal(jax.random.key(1), (8,))
    params = jnp.array([1.0, -2.0, 0.5])

    def head(outputs, y):
        return jnp.mean(jnp.exp(outputs - y))

    loss, grads, grad_fn = flatopt.functional_value_and_grad(lambda w, x: x @ w, head, params, x, y)
    np.testing.assert_allclose(loss, head(x @ params, y), rtol=1e-6)
    np.testing.assert_allclose(grad_fn(params + 1.0, 0), grads, rtol=1e-5)
    plain = flatopt.make_grad_fn(lambda w: head(x @ w, y))
    assert not np.allclose(plain(params + 1.0), grads, rtol=1e-2)


def test_functional_sam_is_sam_for_a_linear_head():
    params, (x, _) = cases.init_params(), cases.make_batch()

    def network(params, x):
        return jnp.tanh(x @ params["hidden"]["kernel"])

    _, grads, grad_fn = flatopt.functional_value_and_grad(network, jnp.sum, params, x)
    plain = flatopt.make_grad_fn(lambda params: jnp.sum(network(params, x)))
    cases.assert_close(grads, plain(params))
    away = jax.tree.map(lambda p: p + 0.1, params)
    cases.assert_close(jax.jit(lambda g, p: g(p, 0))(grad_fn, away), plain(away))


def test_normalization_layers_are_found():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x)))

    params = Net().init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    mask = flatopt.normalisation_mask(params)
    assert {k: all(jax.tree.leaves(v)) for k, v in mask.items()} == {
        "BatchNorm_0": True,
        "Dense_0": False,
        "LayerNorm_0": True,
    }

    class NnxNet(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.norm = nnx.LayerNorm(3, rngs=nnx.Rngs(0))

    nnx_params = nnx.state(NnxNet(), nnx.Param)
    mask = nnx.to_pure_dict(flatopt.normalisation_mask(nnx_params))
    assert [bool(x) for x in jax.tree.leaves(mask["norm"])] == [True, True]
    assert [bool(x) for x in jax.tree.leaves(mask["dense"])] == [False, False]
    with pytest.raises(ValueError, match="no leaf named 'scale'"):
        flatopt.normalisation_mask(cases.init_params())


def _flops(tx, has_grads=True):
    params, batch = cases.init_params(), cases.make_batch(size=512)

    def step(params, opt_state):
        grads = jax.grad(cases.loss_fn)(params, batch) if has_grads else params
        grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
        return tx.update(grads, opt_state, params, grad_fn=grad_fn)

    return jax.jit(step).lower(params, tx.init(params)).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("tx", "gradients"),
    [
        (optax.chain(flatopt.arwp(std=0.1, eta=1.0, decay=0.9), cases.sgd()), 1),
        (flatopt.sampa(cases.sgd(), RHO), 2),
    ],
    ids=["arwp", "sampa"],
)
def test_an_unused_clean_gradient_is_not_computed(tx, gradients):
    """Compiled, the loop's own gradient vanishes: ARWP costs one gradient, SAMPa two."""
    assert _flops(tx) <= 1.01 * _flops(tx, has_grads=False)
    assert gradients - 0.2 <= _flops(tx) / _flops(cases.sgd()) <= gradients + 0.2


def test_arwp_is_hold_perturbed_that_starts_displaced():
    """From the same displaced point on, both take the same gradients and damp with them."""
    std, eta, decay = 0.1, 5.0, 0.9
    draws = iter(np.random.default_rng(0).normal(size=(8, 6)))
    z = [jnp.asarray(next(draws), jnp.float32).reshape(2, 3) for _ in range(8)]

    def recorded(first):
        def update(updates, step, params=None):
            del updates, params
            return jnp.stack(z)[step], step + 1

        return optax.GradientTransformation(lambda _: jnp.array(first), update)

    w = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), jnp.float32)
    grad_fn = flatopt.make_grad_fn(lambda w: jnp.sum(jnp.sin(w) ** 2))
    stage = optax.chain(flatopt.arwp(std, eta=eta, decay=decay, noise=recorded(0)), optax.sgd(0.1))
    stage_params, stage_state = w, stage.init(w)
    noise = flatopt.adaptive_filter_noise(std, eta=eta, decay=decay, noise=recorded(1))
    hold = flatopt.hold_perturbed(optax.sgd(0.1), noise)
    offset = std * jnp.linalg.norm(w, axis=0, keepdims=True) * z[0]
    hold_params = w + offset
    hold_state = hold.init(w)._replace(offset=offset)
    for _ in range(5):
        updates, stage_state = stage.update(w, stage_state, stage_params, grad_fn=grad_fn)
        stage_params = optax.apply_updates(stage_params, updates)
        updates, hold_state = hold.update(grad_fn(hold_params), hold_state, hold_params)
        hold_params = optax.apply_updates(hold_params, updates)
        centre = flatopt.eval_params(hold_state, hold_params)
        np.testing.assert_allclose(stage_params, centre, rtol=1e-5, atol=1e-6)


def test_sampa_on_two_devices_is_sampa_on_one():
    params = cases.init_params()
    batches = jax.tree.map(lambda *x: jnp.stack(x), cases.make_batch(1), cases.make_batch(2))

    def run(tx):
        def step(params, opt_state):
            def grad_fn(point, i):
                return jax.grad(cases.loss_fn)(point, jax.tree.map(lambda x: x[i], batches))

            updates, opt_state = tx.update(params, opt_state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), opt_state

        return step, tx.init(params)

    step, state = run(flatopt.sampa(cases.sgd(), RHO))
    expected = params
    for _ in range(4):
        expected, state = step(expected, state)
    mesh = jax.make_mesh(
        (2,), ("pair",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Explicit,)
    )
    step, state = run(flatopt.sampa(cases.sgd(), RHO, axis_name="pair"))
    whole = jax.sharding.PartitionSpec()
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=whole, out_specs=whole))
    actual = params
    for _ in range(4):
        actual, state = step(actual, state)
    cases.assert_close(actual, expected)
    wide = jax.make_mesh(
        (4,), ("pair",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Explicit,)
    )
    step, state = run(flatopt.sampa(cases.sgd(), RHO, axis_name="pair"))
    with pytest.raises(ValueError, match="mesh axis of size 4"):
        jax.shard_map(step, mesh=wide, in_specs=whole, out_specs=whole)(params, state)


def test_sampa_takes_its_two_gradients_at_once():
    """One batched evaluation: neither gradient waits for the other."""
    traced = []

    def grad_fn(point, i):
        traced.append(i)
        return jax.grad(cases.loss_fn)(point, cases.make_batch())

    tx, params = flatopt.sampa(cases.sgd(), RHO), cases.init_params()
    tx.update(params, tx.init(params), params, grad_fn=grad_fn)
    assert len(traced) == 1


def test_keys_come_in_every_form():
    draws = [
        flatopt.standard_normal(key).update(jnp.zeros(3), flatopt.standard_normal(key).init(0.0))[0]
        for key in (7, jax.random.key(7), jax.random.key_data(jax.random.key(7)))
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(draws[0], draws[2])
    with pytest.raises(ValueError, match="key="):
        flatopt.standard_normal(0.5)


def test_looksam_has_no_direction_for_a_single_parameter():
    """The two gradients are parallel: what rounding leaves must not be blown up to length 1."""
    stage = flatopt.looksam(0.1, every=2, alpha=0.5)
    grad_fn = flatopt.make_grad_fn(lambda w: jnp.cosh(1.7 * w))
    w = jnp.array(0.3)
    _, state = stage.update(grad_fn(w), stage.init(w), w, grad_fn=grad_fn)
    updates, _ = stage.update(grad_fn(w), state, w, grad_fn=grad_fn)
    np.testing.assert_array_equal(updates, grad_fn(w))


# Momentum-SAM whose old momentum is computed back


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_msam_sgd_is_msam_on_sgd(decay: float):
    txs = flatopt.msam_sgd(0.05, 0.2, momentum=decay), flatopt.msam(optax.sgd(0.05, decay), 0.2)
    states = [cases.run(tx, steps=20) for tx in txs]
    cases.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, float("nan")])
def test_msam_momentum_out_of_range(decay: float):
    with pytest.raises(ValueError, match="momentum="):
        flatopt.msam_sgd(0.1, 0.2, momentum=decay)


@pytest.mark.parametrize(
    "make",
    [
        lambda rho: optax.chain(flatopt.sam(rho, every=2), optax.sgd(0.1)),
        lambda rho: optax.chain(flatopt.looksam(rho, every=2, alpha=0.5), optax.sgd(0.1)),
        lambda rho: flatopt.alternate(optax.sgd(0.1), flatopt.scale_to_norm(rho)),
    ],
    ids=["sam", "looksam", "alternate"],
)
def test_forward_mode_goes_through_what_is_done_once_in_a_while(make):
    """The derivative of the loss after four steps by the radius, beside a difference quotient."""
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * w**2))

    @jax.jit
    def final_loss(rho):
        tx, params = make(rho), jnp.ones(2)
        opt_state = tx.init(params)
        for _ in range(4):
            grads = grad_fn(params)
            updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
        return grad_fn.value_and_grad(params)[0]

    quotient = (final_loss(0.11) - final_loss(0.09)) / 0.02
    assert abs(quotient) > 0.1
    np.testing.assert_allclose(jax.jacfwd(final_loss)(0.1), quotient, rtol=1e-2)
