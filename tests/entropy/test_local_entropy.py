"""Local entropy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._entropy import entropy_sgd, local_entropy
from tests import cases

# The steps of the loops, by the dampening.
STEPS = {
    "plain": lambda damp: None,
    "python": lambda damp: functools.partial(local_entropy.momentum_step, damp=damp),
    "python_heavy_ball": lambda damp: functools.partial(entropy_sgd.heavy_ball_step, damp=damp),
    "lua": lambda damp: entropy_sgd.lua_step,
    "pittorino": lambda damp: entropy_sgd.pittorino_step,
}
WALKERS = 20_000  # Coordinates of one quadratic: as many independent Langevin loops.


# Curvature, gamma, temperature.
TRIPLES = [(1.0, 0.5, 0.1), (3.0, 1.0, 1.0), (0.2, 2.0, 0.01), (0.0, 1.0, 0.5), (-0.5, 2.0, 0.2)]


def _emit(curvature, gamma, temperature, *, rate, steps, averaging, seed=0, **kwargs):
    """`w - mu` of one loop at w = 1 in the loss `curvature |w|^2 / 2`."""
    stage = flatopt.local_entropy(
        steps,
        gamma,
        inner_learning_rate=rate,
        noise=np.sqrt(temperature),
        averaging=averaging,
        key=seed,
        **kwargs,
    )
    w = jnp.ones([WALKERS])
    grad_fn = lambda w, i: curvature * w  # noqa: E731
    update = jax.jit(lambda g, s: stage.update(g, s, w, grad_fn=grad_fn)[0])
    return np.asarray(update(grad_fn(w, 0), stage.init(w)))


@pytest.mark.parametrize(("curvature", "gamma", "temperature"), TRIPLES)
def test_stationary_law_is_the_gaussian(curvature, gamma, temperature):
    """Mean gamma / (gamma + curvature) and variance T / (gamma + curvature).

    The last point of the loop, `averaging=0`, is a draw for each coordinate. At a finite step the
    variance is that of an autoregression, known in closed form, and near the Gaussian's.
    """
    stiffness = gamma + curvature
    rate = 0.05 / stiffness
    point = 1 - _emit(curvature, gamma, temperature, rate=rate, steps=300, averaging=0.0)
    variance = temperature / (stiffness * (1 - rate * stiffness / 2))
    np.testing.assert_allclose(variance, temperature / stiffness, rtol=0.03)
    error = np.sqrt(variance / WALKERS)
    assert abs(point.mean() - gamma / stiffness) < 4 * error
    assert abs(point.var() - variance) < 4 * variance * np.sqrt(2 / WALKERS)
    # Normal: the fourth cumulant vanishes.
    kurtosis = ((point - point.mean()) ** 4).mean() / point.var() ** 2
    assert abs(kurtosis - 3) < 4 * np.sqrt(24 / WALKERS)


@pytest.mark.parametrize(("curvature", "gamma", "temperature"), TRIPLES)
def test_gradient_of_the_local_entropy(curvature, gamma, temperature):
    """The mean of the loop gives the gradient gamma curvature / (gamma + curvature) w."""
    stiffness = gamma + curvature
    grads = _emit(
        curvature,
        gamma,
        temperature,
        rate=0.1 / stiffness,
        steps=400,
        averaging=0.95,
        scale_by_gamma=True,
    )
    error = grads.std() / np.sqrt(WALKERS)
    assert error > 0
    assert abs(grads.mean() - gamma * curvature / stiffness) < 4 * error


def test_covariance_of_a_coupled_quadratic():
    """T (H + gamma)^-1, off the diagonal too."""
    hessian = jnp.array([[2.0, 0.8], [0.8, 0.5]])
    gamma, temperature = 1.0, 0.3
    stage = flatopt.local_entropy(
        400, gamma, inner_learning_rate=0.02, noise=np.sqrt(temperature), averaging=0.0
    )
    w = jnp.tile(jnp.array([1.0, -2.0]), (WALKERS, 1))
    grad_fn = lambda w, i: w @ hessian  # noqa: E731
    grads, _ = stage.update(grad_fn(w, 0), stage.init(w), w, grad_fn=grad_fn)
    points = np.asarray(w - grads)
    inverse = np.linalg.inv(np.asarray(hessian) + gamma * np.eye(2))
    covariance = temperature * inverse
    np.testing.assert_allclose(np.cov(points.T), covariance, rtol=0.06)
    errors = np.sqrt(np.diag(covariance) / WALKERS)
    assert (np.abs(points.mean(0) - gamma * inverse @ [1.0, -2.0]) < 5 * errors).all()


def test_two_updates_use_fresh_noise():
    stage = flatopt.local_entropy(3, 1.0, noise=1.0)
    w = jnp.zeros([5])
    grad_fn = lambda w, i: w  # noqa: E731
    first, state = stage.update(w, stage.init(w), w, grad_fn=grad_fn)
    second, _ = stage.update(w, state, w, grad_fn=grad_fn)
    assert not np.allclose(first, second)
    other = flatopt.local_entropy(3, 1.0, noise=1.0, key=jax.random.key(5))
    third, _ = other.update(w, other.init(w), w, grad_fn=grad_fn)
    assert not np.allclose(first, third)


# Limits
def test_large_gamma_gives_the_gradient_of_the_loss():
    params, batch = cases.init_params(), cases.make_batch()
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
    grads = grad_fn(params)
    distances = []
    for gamma in (1e1, 1e2, 1e3):
        stage = flatopt.local_entropy(
            30,
            gamma,
            inner_learning_rate=0.5 / gamma,
            noise=0.0,
            averaging=0.5,
            scale_by_gamma=True,
        )
        emitted, _ = stage.update(grads, stage.init(params), params, grad_fn=grad_fn)
        distances.append(float(optax.tree.norm(optax.tree.sub(emitted, grads))))
    assert distances[2] < 1e-2 * float(optax.tree.norm(grads))
    # And in the end it comes closer as 1 / gamma.
    assert distances[0] > 3 * distances[1]
    np.testing.assert_allclose(distances[1] / distances[2], 10, rtol=0.2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 100.0])
def test_one_step_is_a_multiple_of_the_gradient(gamma: float):
    """The first step starts at the centre, where the spring does not pull."""
    params, batch = cases.init_params(), cases.make_batch()
    grads = jax.grad(cases.loss_fn)(params, batch)
    stage = flatopt.local_entropy(1, gamma, inner_learning_rate=0.2, noise=0.0, averaging=0.75)
    emitted, _ = stage.update(grads, stage.init(params), params)  # It needs no gradient either.
    cases.assert_close(emitted, optax.tree.scale(0.2 * 0.25, grads), rtol=1e-5)


def test_no_steps_pass_the_gradient_on():
    params = cases.init_params()
    stage = flatopt.local_entropy(0, 0.5)
    emitted, _ = stage.update(params, stage.init(params), params)
    cases.assert_equal(emitted, params)


def test_wide_and_narrow_valleys():
    """Two minima of equal depth: the local entropy between them points to the wide one."""
    wide, narrow = (-1.0, 1.0), (1.0, 50.0)  # Place, curvature.

    def loss(w):
        wells = [0.5 * c * (w - at) ** 2 for at, c in (wide, narrow)]
        return -jnp.log(sum(jnp.exp(-well / 0.3) for well in wells)) * 0.3

    walkers = jnp.full([4000], 0.4)
    grad_fn = lambda w, i: jax.vmap(jax.grad(loss))(w)  # noqa: E731
    stage = flatopt.local_entropy(
        600, 0.3, inner_learning_rate=0.01, noise=np.sqrt(0.3), averaging=0.99, scale_by_gamma=True
    )
    grads, _ = jax.jit(lambda w: stage.update(grad_fn(w, 0), stage.init(w), w, grad_fn=grad_fn))(
        walkers
    )
    # The plain gradient goes uphill from the wide side's point of view: to the narrow well or not,
    # the local entropy says left, by many standard errors.
    assert grads.mean() > 10 * grads.std() / np.sqrt(len(grads))


# Costs
@pytest.mark.parametrize(("initial", "expected"), [(True, [0, 1, 2]), (False, [0, 1, 2, 3])])
def test_evaluations_are_numbered(initial: bool, expected: list[int]):
    seen = []

    def grad_fn(params, i):
        jax.debug.callback(seen.append, i)
        return params

    stage = flatopt.local_entropy(4, 0.1, initial_gradient=initial)
    w = jnp.ones([2])
    jax.jit(lambda w: stage.update(w, stage.init(w), w, grad_fn=grad_fn))(w)
    jax.effects_barrier()
    assert sorted(int(i) for i in seen) == expected


def test_incoming_gradient_is_ignored_unless_it_is_the_first():
    w = jnp.ones([2])
    for initial in (True, False):
        stage = flatopt.local_entropy(3, 0.1, initial_gradient=initial)
        one, two = (
            stage.update(g * w, stage.init(w), w, grad_fn=lambda w, i: w)[0] for g in (1.0, 2.0)
        )
        assert np.allclose(one, two) == (not initial)


@pytest.mark.parametrize(("momentum", "copies"), [(0.0, 2), (0.9, 3)])
def test_memory(momentum: float, copies: int):
    """No copy of the parameters in the state; in the loop y, its mean and, perhaps, a buffer.

    To what a loop over bare gradient steps takes, the stage adds no more than that.
    """
    params = {"w": jnp.zeros([512, 512])}
    size = 4 * 512 * 512
    stage = flatopt.local_entropy(5, 0.1, noise=0.0, momentum=momentum)
    assert optax.tree.size(stage.init(params)) <= 8

    def temporary(function):
        compiled = jax.jit(function).lower(params, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    grad_fn = lambda p, i: jax.tree.map(jnp.tanh, p)  # noqa: E731
    found = temporary(
        lambda g, p: stage.update(g, stage.init(p), p, grad_fn=grad_fn)[0],
    )
    assert size <= found <= (copies + 1.1) * size  # One more for what a step computes.


# Options
@pytest.mark.parametrize("name", sorted(STEPS))
def test_adds_what_it_says_step_by_step(name: str):
    """Against the recursions written by hand: what the momentum of each published loop filters."""
    rng = np.random.default_rng(0)
    w, draws, scale = rng.normal(size=3), rng.normal(size=(4, 3)), rng.uniform(1, 2, size=3)
    h, gamma, decay, beta, past = 0.1, 0.7, 0.05, 0.8, 0.6
    damp = 0.2 if "python" in name else 0.0
    filters = {"python": "gd", "python_heavy_ball": "gdpn", "lua": "g", "pittorino": "gdp"}
    over = filters.get(name, "gd")

    def noise_update(updates, state, params=None, *, step, inner_step, **_):
        del params, step
        return updates + jnp.asarray(draws)[inner_step], state

    y, mu, v = w.copy(), w.copy(), np.zeros(3)
    for xi in draws:
        terms = {"g": -h * scale * y, "d": -h * decay * y, "p": -h * gamma * (y - w), "n": xi}
        damped = {k: (1 - damp) * x if k in "gd" else x for k, x in terms.items()}
        v = beta * v + sum(damped[k] for k in over)
        inside = v if name == "python_heavy_ball" else sum(terms[k] for k in over) + beta * v
        y = y + inside + sum(x for k, x in terms.items() if k not in over)
        mu = past * mu + (1 - past) * y

    with jax.enable_x64(True):
        stage = flatopt.local_entropy(
            4,
            gamma,
            inner_learning_rate=h,
            noise=optax.GradientTransformationExtraArgs(optax.init_empty_state, noise_update),
            momentum=beta,
            averaging=past,
            weight_decay=decay,
            inner_step=STEPS[name](damp),
        )
        point = jnp.asarray(w)
        grads = scale * point
        found, _ = stage.update(grads, stage.init(point), point, grad_fn=lambda w, i: scale * w)
        np.testing.assert_allclose(found, w - mu, rtol=1e-12)


def test_without_momentum_every_published_loop_is_the_plain_one():
    w = jnp.array([1.0, -2.0])
    run = lambda **kwargs: flatopt.local_entropy(  # noqa: E731
        6, 0.3, weight_decay=0.1, noise=0.0, **kwargs
    ).update(w, tx.init(w), w, grad_fn=lambda w, i: w)[0]
    tx = flatopt.local_entropy(6, 0.3, noise=0.0)
    for step in STEPS.values():
        np.testing.assert_allclose(run(inner_step=step(0.0)), run(), rtol=1e-5)


def test_automatic_gamma():
    """The unit is the loss over half the squared distance that a free loop has travelled."""
    w = jnp.array([1.0, -2.0])
    grad_fn = lambda w, i: w  # noqa: E731
    arguments = {"noise": 0.0, "scale_by_gamma": True}
    schedule = flatopt.exponential_scoping(1.0, 1.0)
    stage = flatopt.local_entropy(5, schedule, automatic=2, **arguments)
    free = flatopt.local_entropy(5, 0.0, noise=0.0)
    away, _ = free.update(w, free.init(w), w, grad_fn=grad_fn)
    state = stage.init(w)
    for step, value in enumerate((3.0, 2.5)):
        emitted, state = stage.update(w, state, w, value=value, grad_fn=grad_fn)
        unit = value / (0.5 * float(jnp.sum(away**2)))
        np.testing.assert_allclose(state.unit, unit, rtol=1e-5)
        np.testing.assert_allclose(emitted, 2**step * unit * away, rtol=1e-5)
    # Afterwards the unit stays, and the spring pulls.
    emitted, state = stage.update(w, state, w, value=99.0, grad_fn=grad_fn)
    np.testing.assert_allclose(state.unit, unit, rtol=1e-5)
    plain = flatopt.local_entropy(5, 4 * unit, **arguments)
    expected, _ = plain.update(w, plain.init(w), w, grad_fn=grad_fn)
    np.testing.assert_allclose(emitted, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="value=loss"):
        stage.update(w, state, w, grad_fn=grad_fn)


def test_automatic_gamma_of_a_loop_that_goes_nowhere():
    stage = flatopt.local_entropy(3, 1.0, noise=0.0, automatic=1)
    w = jnp.zeros([2])
    emitted, state = stage.update(w, stage.init(w), w, value=1.0, grad_fn=lambda w, i: w)
    assert state.unit == 0
    np.testing.assert_array_equal(emitted, w)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_steps": -1},
        {"gamma": -0.1},
        {"inner_learning_rate": float("nan")},
        {"noise": -1.0},
        {"momentum": 1.0},
        {"averaging": 1.0},
        {"weight_decay": -1.0},
        {"automatic": 0},
    ],
)
def test_out_of_range(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"{name}="):
        flatopt.local_entropy(**{"num_steps": 3, "gamma": 0.1, **bad})


# Scoping
def test_exponential_scoping():
    schedule = flatopt.exponential_scoping(0.1, 0.5, every=3, max_value=0.3)
    values = np.array([schedule(t) for t in range(12)])
    expected = np.minimum(0.1 * 1.5 ** (np.arange(12) // 3), 0.3)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    traced = jax.jit(jax.vmap(functools.partial(schedule)))(jnp.arange(12))
    np.testing.assert_allclose(traced, expected, rtol=1e-6)
    for bad in ({"init_value": -1.0}, {"rate": -0.1}, {"every": 0}, {"max_value": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            flatopt.exponential_scoping(**{"init_value": 1.0, "rate": 0.1, **bad})
