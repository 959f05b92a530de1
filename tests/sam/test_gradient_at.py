"""The stage under the family, and what all its methods share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases

RHO = 0.05


def test_several_steps_climb_further():
    w, displacement = jnp.array([3.0, 4.0]), flatopt.scale_to_norm(0.5)
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
    for number in (1, 2, 3):
        stage = flatopt.gradient_at(displacement, num_steps=number)
        updates, _ = stage.update(w, stage.init(w), w, grad_fn=grad_fn)
        np.testing.assert_allclose(jnp.linalg.norm(updates), 5 + 0.5 * number, rtol=1e-6)


def test_combiners_say_where_they_belong():
    combiner = flatopt.mix_clean(0.5)
    with pytest.raises(ValueError, match=r"gradient_at\(perturbation, combiner=flatopt.mix_clean"):
        combiner.update(jnp.ones(2), combiner.init(jnp.ones(2)))


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


def test_keys_come_in_every_form():
    draws = [
        flatopt.standard_normal(key).update(jnp.zeros(3), flatopt.standard_normal(key).init(0.0))[0]
        for key in (7, jax.random.key(7), jax.random.key_data(jax.random.key(7)))
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(draws[0], draws[2])
    with pytest.raises(ValueError, match="key="):
        flatopt.standard_normal(0.5)


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


@pytest.mark.parametrize(
    "make",
    [flatopt.sam, flatopt.asam, lambda rho, **k: flatopt.gsam(rho, 0.0, **k)],
    ids=["sam", "asam", "gsam"],
)
def test_recorded_sharpness_is_the_rise_of_the_loss(make):
    params, batch = cases.init_params(), cases.make_batch()
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
    clean = grad_fn(params)
    stage = make(0.01, record=True)
    points = []

    def watched(point, i):
        points.append(point)
        return grad_fn(point, i)

    sharp, state = stage.update(clean, stage.init(params), params, grad_fn=watched)
    rise = cases.loss_fn(points[0], batch) - cases.loss_fn(params, batch)
    np.testing.assert_allclose(optax.tree.get(state, "sharpness"), rise, rtol=5e-3)
    flat = [jax.flatten_util.ravel_pytree(g)[0] for g in (clean, sharp)]
    between = flat[0] @ flat[1] / jnp.linalg.norm(flat[0]) / jnp.linalg.norm(flat[1])
    np.testing.assert_allclose(optax.tree.get(state, "gradient_cosine"), between, rtol=1e-6)
    plain = make(0.01).update(clean, make(0.01).init(params), params, grad_fn=grad_fn)[0]
    cases.assert_equal(sharp, plain)


def test_of_several_steps_the_whole_rise_is_recorded():
    stage = flatopt.gradient_at(flatopt.scale_to_norm(0.5), num_steps=3, record=True)
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
    w = jnp.array([3.0, 4.0])
    _, state = stage.update(grad_fn(w), stage.init(w), w, grad_fn=grad_fn)
    assert float(optax.tree.get(state, "sharpness")) == pytest.approx((6.5**2 - 5**2) / 2)


def test_what_is_recorded_stays_where_an_update_is_skipped():
    tx = flatopt.sam(0.5, every=2, record=True)
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
    w = jnp.array([3.0, 4.0])
    state, seen = tx.init(w), []
    for scale in (1.0, 2.0, 3.0):
        point = scale * w
        _, state = tx.update(grad_fn(point), state, point, grad_fn=grad_fn)
        seen.append(float(optax.tree.get(state, "sharpness")))
    np.testing.assert_allclose(seen, [2.625, 2.625, (15.5**2 - 15**2) / 2])


@pytest.mark.parametrize(
    "tx",
    [
        flatopt.sam(optax.linear_schedule(0.0, 0.4, 4)),
        flatopt.msam(optax.sgd(0.1, momentum=0.9), optax.linear_schedule(0.0, 0.4, 4)),
        flatopt.sampa(optax.sgd(0.1), optax.linear_schedule(0.0, 0.4, 4)),
        flatopt.looksam(optax.linear_schedule(0.0, 0.4, 4), every=1, alpha=0.1),
    ],
    ids=["sam", "msam", "sampa", "looksam"],
)
def test_the_radius_in_use_is_told(tx):
    grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
    w = jnp.array([3.0, 4.0])
    state, seen = tx.init(w), []
    for _ in range(4):
        _, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        seen.append(float(optax.tree.get(state, "rho")))
    np.testing.assert_allclose(seen, [0.0, 0.1, 0.2, 0.3], atol=1e-7)


def test_a_number_is_told_before_the_first_update_and_an_injected_one_only_once():
    w = jnp.ones(2)
    assert optax.tree.get(flatopt.sam(0.05).init(w), "rho") == jnp.float32(0.05)
    injected = optax.inject_hyperparams(flatopt.sam)(rho=0.05)
    assert optax.tree.get(injected.init(w), "rho") == jnp.float32(0.05)
