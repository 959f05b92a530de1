"""XSAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import Golden, assert_agrees, replay, replays, torch_optimizer

RHO = 0.05


def _run(stage, **kwargs):
    return cases.run(optax.chain(stage, cases.sgd()), **kwargs)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_at_alpha_one_it_is_sam(num_steps: int):
    method, _ = _run(flatopt.xsam(RHO, alpha=1.0, num_steps=num_steps))
    sam = flatopt.gradient_at(flatopt.scale_to_norm(RHO), num_steps=num_steps)
    cases.assert_close(method, _run(sam)[0], rtol=1e-5, atol=1e-6)


def _gradients(num_steps: int):
    """Clean gradient, whole ascent and last gradient of a step of the test problem, by hand."""
    params, batch = cases.init_params(), cases.make_batch()
    grad = jax.grad(cases.loss_fn)
    clean = last = grad(params, batch)
    point = params
    for _ in range(num_steps):
        scale = RHO / optax.tree.norm(last)
        point = jax.tree.map(lambda w, g, s=scale: w + s * g, point, last)
        last = grad(point, batch)
    return params, clean, optax.tree.sub(point, params), last


def _emitted(stage, params, clean):
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, cases.make_batch())
    return stage.update(clean, stage.init(params), params, grad_fn=grad_fn)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_gradient_is_turned_in_its_plane_and_keeps_its_length(num_steps: int):
    """By `alpha` times the angle from the whole ascent to the last gradient."""
    params, clean, ascent, last = _gradients(num_steps)

    def angle(x, y):
        return float(jnp.arccos(optax.tree.vdot(x, y) / optax.tree.norm(x) / optax.tree.norm(y)))

    theta = angle(ascent, last)
    assert theta > 0.02
    for alpha in (0.5, 2.0, 3.5):
        turned, _ = _emitted(flatopt.xsam(RHO, alpha=alpha, num_steps=num_steps), params, clean)
        np.testing.assert_allclose(optax.tree.norm(turned), optax.tree.norm(last), rtol=1e-3)
        np.testing.assert_allclose(angle(ascent, turned), alpha * theta, rtol=0.02)
        np.testing.assert_allclose(angle(last, turned), abs(alpha - 1) * theta, rtol=0.02)


def test_the_estimate_is_the_place_of_the_highest_loss_on_the_arc():
    params, clean, *_ = _gradients(1)
    rho_max, alphas, batch = 0.5, np.linspace(0.0, 40.0, 11), cases.make_batch()

    def loss_at(alpha: float) -> float:
        turned, _ = _emitted(flatopt.xsam(RHO, alpha=float(alpha)), params, clean)
        scale = rho_max / optax.tree.norm(turned)
        point = jax.tree.map(lambda w, v: w + scale * v, params, turned)
        return float(cases.loss_fn(point, batch))

    losses = [loss_at(alpha) for alpha in alphas]
    best = alphas[np.argmax(losses)]
    assert 0 < np.argmax(losses) < len(alphas) - 1
    turned, state = _emitted(flatopt.xsam(RHO, rho_max, alphas=alphas), params, clean)
    np.testing.assert_allclose(state.combiner_state.alpha, best)
    cases.assert_close(turned, _emitted(flatopt.xsam(RHO, alpha=float(best)), params, clean)[0])


@pytest.mark.parametrize(("num_steps", "alpha_every"), [(1, 1), (3, 4), (1, None)])
def test_exact_numbers_of_gradients_and_forward_passes(num_steps: int, alpha_every: int | None):
    alphas, gradients, values = (0.0, 1.0, 2.0), [], []
    stage = flatopt.xsam(
        RHO, 0.1, alphas=alphas, num_steps=num_steps, alpha_every=alpha_every, start=2, every=2
    )
    params = {"w": jnp.arange(3.0)}

    @cases.GradientByHand
    def grad_fn(p, i):
        jax.debug.callback(gradients.append, i)
        return p

    def value(p):
        total = optax.tree.norm(p)
        jax.debug.callback(values.append, total)
        return total

    grad_fn = cases.GradientByHand(grad_fn.gradient, value)
    update = jax.jit(lambda s: stage.update(params, s, params, grad_fn=grad_fn)[1])
    state = stage.init(params)
    for _ in range(12):
        state = update(state)
    jax.effects_barrier()
    acts = 5  # With 2, 4, 6, 8 and 10 updates made.
    assert len(gradients) == acts * num_steps
    estimates = len(range(0, acts, alpha_every or 100))
    assert len(values) == estimates * len(alphas)


def test_between_estimates_alpha_stays():
    state = flatopt.xsam(RHO, 0.1, alpha_every=3).init(cases.init_params())
    assert state.combiner_state.alpha == 1
    tx = optax.chain(flatopt.xsam(RHO, 0.3, alpha_every=3), optax.sgd(0.5))
    params, opt_state, seen = cases.init_params(), None, []
    for i in range(9):
        params, opt_state = cases.run(tx, params, steps=1, opt_state=opt_state, first=i)
        seen.append(float(opt_state[0].combiner_state.alpha))
    for period in range(3):
        assert len(set(seen[3 * period : 3 * period + 3])) == 1
    assert len(set(seen)) > 1


def test_parallel_gradients_have_no_arc():
    """On a sphere's bowl both directions are one, and every alpha is SAM."""
    params = jnp.array([3.0, 4.0])
    for alpha in (0.0, 1.0, 7.0):
        stage = flatopt.xsam(0.5, alpha=alpha)
        turned, _ = stage.update(params, stage.init(params), params, grad_fn=lambda w, i: w)
        np.testing.assert_allclose(turned, [3.3, 4.4], rtol=1e-5)


def test_an_arc_on_which_the_loss_is_not_finite_leaves_alpha():
    params = jnp.array([3.0, 1.0])
    stage = flatopt.xsam(0.5, 1.0, alpha_every=1)
    grad_fn = cases.GradientByHand(lambda w, i: w * jnp.array([1.0, 4.0]), lambda w: jnp.nan * w[0])
    turned, state = stage.update(grad_fn(params, 0), stage.init(params), params, grad_fn=grad_fn)
    assert state.combiner_state.alpha == 1
    assert jnp.isfinite(turned).all()


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_a_perturbed_gradient_that_is_not_finite_shows(bad):
    params = jnp.array([3.0, 1.0])
    stage = flatopt.xsam(0.5, alpha=2.0)
    grad_fn = lambda w, i: w.at[0].set(bad)  # noqa: E731
    turned, _ = stage.update(params, stage.init(params), params, grad_fn=grad_fn)
    assert not jnp.isfinite(turned).any()


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_it_knows_gradients_of_every_size(size: float):
    """Their squares leave the range of float32."""
    params, slopes = jnp.array([3.0, 1.0]), jnp.array([1.0, 4.0])
    stage = flatopt.xsam(0.5, alpha=2.0)

    def turned(size):
        grad_fn = lambda w, i: size * slopes * w  # noqa: E731
        return stage.update(grad_fn(params, 0), stage.init(params), params, grad_fn=grad_fn)[0]

    finite = turned(size)
    assert jnp.isfinite(finite).all()
    if size > 1:  # Below the guard of the norm the ascent is none.
        np.testing.assert_allclose(finite / size, turned(1.0), rtol=1e-5)


def test_what_it_needs_is_said():
    params = jnp.ones(2)
    stage = flatopt.xsam(0.5, 1.0)
    with pytest.raises(ValueError, match=r"follow_arc compares losses.*make_grad_fn"):
        stage.update(params, stage.init(params), params, grad_fn=lambda w, i: w)
    with pytest.raises(ValueError, match=r"rho_max=None.*a number as alpha"):
        flatopt.xsam(0.5)
    combiner = flatopt.follow_arc(1.0)
    with pytest.raises(ValueError, match=r"gradient_at\(perturbation, combiner=flatopt.follow_arc"):
        combiner.update(params, combiner.init(params), params)
    for alphas in ((), (0.0, np.nan), "abc", ((1.0,), (2.0,))):
        with pytest.raises(ValueError, match=r"alphas=.*finite numbers"):
            flatopt.xsam(0.5, 1.0, alphas=alphas)
    with pytest.raises(ValueError, match="rho_max=-1"):
        flatopt.xsam(0.5, -1.0)


@replays("xsam")
def test_replays(golden: Golden) -> None:
    """The authors' search starts from a highest loss of 0: these losses are all above it."""
    hyper = golden.hyper
    stage = flatopt.xsam(
        hyper["rho"],
        hyper["rho_max"],
        alphas=np.arange(0, hyper["alpha_max"] + 1e-5, hyper["alpha_delta"]),
        alpha_every=hyper["update_alpha_every"],
        num_steps=hyper["steps"],
    )
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    buffers = {"alpha": lambda s: {"t": optax.tree.get(s, "alpha")}}
    replayed = replay(golden, tx, buffers=buffers)
    replayed["alpha_t"] = replayed.pop("alpha/t")
    assert_agrees(golden.results, replayed)
