"""ScheduleFree+: the recorded runs, its three points, and what Polyak's step says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._averaging.schedule_free_plus import polyak_step
from tests import cases
from tests.replay import Golden, assert_agrees, problem, replay, replays, table

SETTINGS = [{}, {"r": 2.0, "norm_decay": 0.7, "weight_decay": 0.5, "start": 3}]


@replays("schedule_free_plus")
def test_replays(golden: Golden) -> None:
    """The iterate z and the size of each step are recorded besides x and y."""
    hyper = golden.hyper
    b1, b2 = hyper["betas"]
    beta, steps = hyper["sf_beta1"], hyper.get("sf_beta1_anneal_steps", 0)
    if steps:
        progress = np.minimum(np.arange(golden.steps) / steps, 1)
        beta = table(1 - (1 - beta) ** (1 - progress) * (1 - hyper["sf_beta1_max"]) ** progress)
    tx = flatopt.schedule_free_plus(
        optax.scale_by_adam(b1, b2, eps=hyper.get("eps", 1e-8)),
        learning_rate=_learning_rate(golden),
        beta=beta,
        r=hyper.get("r", 0.0),
        p=hyper.get("weight_lr_power", 2.0),
        norm_decay=hyper.get("polyak_beta", 0.0),
        weight_decay=hyper.get("weight_decay", 0.0),
        start=hyper.get("c_warmup", 0) + 1,
    )
    buffers = {"z_iterate": lambda s: s.z, "lr_used": lambda s: {"": s.rate}}
    replayed = replay(golden, tx, buffers=buffers)
    replayed["lr_used"] = replayed.pop("lr_used/")
    for name, start in golden.tree("p0").items():
        later = replayed[f"z_iterate/{name}"]
        replayed[f"z_iterate/{name}"] = np.concatenate([start[None], later])
    assert_agrees(golden.results, replayed)


def _learning_rate(golden: Golden) -> optax.ScalarOrSchedule:
    """The rate, times what the official program's slip in the mean of the norms makes of it.

    It keeps the mean after the correction of its bias, and corrects that again at the next step.
    The gradients of the recorded trajectory tell by how much its steps are wrong.
    """
    rate, decay = golden.learning_rate, golden.hyper.get("polyak_beta", 0.0)
    if decay == 0:
        return rate
    assert not callable(rate)
    loss_fn, batch = problem(golden)
    grad = jax.jit(jax.grad(loss_fn))
    right, slipped, factors = 0.0, 0.0, []
    for t in range(golden.steps):
        params = {name: jnp.asarray(y[t]) for name, y in golden.tree("traj").items()}
        norm = sum(float(jnp.abs(g).sum()) for g in grad(params, *batch(t, 0)).values())
        right = decay * right + (1 - decay) * norm
        slipped = (decay * slipped + (1 - decay) * norm) / (1 - decay ** (t + 1))
        factors.append(right / (1 - decay ** (t + 1)) / slipped)
    if golden.steps > 1:  # The first mean is the same.
        assert np.abs(np.array(factors) - 1).max() > 1e-3
    return table(rate * np.array(factors))


def _run(tx: optax.GradientTransformationExtraArgs, steps: int) -> tuple[list, list]:
    """Points and states of a run on the small problem of the tests."""
    params = cases.init_params()
    points, states = [params], [tx.init(params)]
    step = jax.jit(cases.train_step(tx))
    for i in range(steps):
        params, state = step(points[-1], states[-1], cases.make_batch(i))
        points.append(params)
        states.append(state)
    return points, states


@pytest.mark.parametrize("kwargs", SETTINGS)
def test_the_parameters_lie_between_the_average_and_the_iterate(kwargs):
    points, states = _run(flatopt.schedule_free_plus(beta=0.8, **kwargs), 6)
    for y, state in zip(points[1:], states[1:], strict=True):
        between = jax.tree.map(lambda x, z: 0.8 * x + 0.2 * z, state.x, state.z)
        cases.assert_close(y, between, rtol=1e-5)
        cases.assert_equal(flatopt.eval_params(state, y), state.x)


def test_the_average_weighs_by_the_largest_step_so_far():
    start, r, p = 3, 2.0, 1.5
    _, states = _run(flatopt.schedule_free_plus(r=r, p=p, start=start), 6)
    iterates = np.stack([np.asarray(s.z["out"]["kernel"], float) for s in states])
    largest = np.maximum.accumulate([float(s.rate) for s in states])
    for t, state in enumerate(states[1:], start=1):
        if t < start:
            cases.assert_close(state.x, state.z)
            continue
        own = np.arange(start, t + 1)
        weights = own**r * largest[own] ** p
        mean = np.tensordot(weights / weights.sum(), iterates[own], 1)
        np.testing.assert_allclose(state.x["out"]["kernel"], mean, rtol=1e-4, atol=1e-6)


def test_with_beta_zero_the_gradient_is_that_of_the_iterate():
    points, states = _run(flatopt.schedule_free_plus(beta=0.0), 4)
    for y, state in zip(points, states, strict=True):
        cases.assert_close(y, state.z)


def test_polyak_s_step_reaches_the_minimum_of_a_cone_at_once():
    """Of L = c |w|_1, all entries equal: the step is w, but for the root of pi / 2."""
    w = jnp.full(5, 3.0)
    grads = jnp.full(5, 0.7)
    step = polyak_step(0.7 * jnp.abs(w).sum(), grads, w, w, beta=0.9, norm=jnp.abs(grads).sum())
    np.testing.assert_allclose(step * jnp.sqrt(jnp.pi / 2), 3.0, rtol=1e-6)


def test_a_loss_below_zero_makes_no_step():
    tx = flatopt.schedule_free_plus(weight_decay=1.0)
    w = jnp.ones(3)
    updates, state = tx.update(w, tx.init(w), w, value=jnp.float32(-1.0))
    cases.assert_equal(updates, jnp.zeros(3))
    assert state.rate == 0


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1e15])
def test_losses_in_other_units_make_the_same_run(size: float):
    """Polyak's step divides the loss by its gradient; Adam's direction has no units."""
    tx = flatopt.schedule_free_plus(optax.scale_by_adam(0.9, 0.95, eps=0.0), norm_decay=0.5)

    def run(unit):
        step = jax.jit(cases.train_step(tx, lambda p, batch: unit * cases.loss_fn(p, batch)))
        params = cases.init_params()
        state = tx.init(params)
        for i in range(3):
            params, state = step(params, state, cases.make_batch(i))
        return params

    if size == 1e-20:  # Its square is below float32's range, in Adam.
        tx = flatopt.schedule_free_plus(optax.scale_by_sign(), norm_decay=0.5)
    cases.assert_close(run(size), run(1.0), rtol=1e-4)


def test_a_missing_value_says_which_line_to_add():
    tx, w = flatopt.schedule_free_plus(), jnp.ones(2)
    with pytest.raises(ValueError, match=r"needs the loss(.|\n)*params, value=loss\)"):
        tx.update(w, tx.init(w), w)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_shows(bad: float):
    tx, w = flatopt.schedule_free_plus(), jnp.ones(2)
    assert not jnp.isfinite(tx.update(w, tx.init(w), w, value=bad)[0]).any()


def test_half_precision_parameters_have_an_average_in_float32():
    tx, w = flatopt.schedule_free_plus(), jnp.ones(4, jnp.bfloat16)
    updates, state = tx.update(w, tx.init(w), w, value=jnp.float32(0.5))
    assert updates.dtype == jnp.bfloat16
    assert state.x.dtype == state.z.dtype == jnp.float32


@pytest.mark.parametrize(
    "kwargs",
    [
        {"r": -1.0},
        {"p": -1.0},
        {"norm_decay": 1.0},
        {"weight_decay": -1.0},
        {"start": -1},
        {"learning_rate": -0.1},
        {"beta": 1.1},
    ],
)
def test_arguments_out_of_range_raise(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"{name}=.* out of range"):
        flatopt.schedule_free_plus(**kwargs)


def test_the_direction_is_a_transformation():
    with pytest.raises(TypeError, match=r"direction=0\.1 must be an optax transformation"):
        flatopt.schedule_free_plus(0.1)
