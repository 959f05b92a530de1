"""SGD that looks at its own Hessian."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._learning_rates.sgd_by_curvature import rates_at
from flatopt.measures._lanczos_rates import Rule
from tests import cases
from tests.replay import ATOL, RTOL, Golden, assert_agrees, mlp_loss, replay, replays

# What a replay starts from, and what is compared beside the trajectory.
BESIDE = ["lanczos_start", "learned_at_step", "momentum_t", "ritz_values", "ritz_weights"]
PROGRAMS = {
    "run_ssgd_fastanddirty.py": "median",
    "run_ssgdm_fastanddirty.py": "authors",
    "run_ssgdmn_fastanddirty.py": "normalised",
}


def _rule(golden: Golden) -> dict[str, Any]:
    hyper = golden.hyper
    mu = "median" if hyper.get("type") == "median" else "smallest"
    return {"num_steps": hyper["lanczos_iters"], "rule": PROGRAMS[hyper["script"]], "mu": mu}


def _starts(golden: Golden) -> Callable[[Any], dict[str, jax.Array]]:
    """The recorded start vector number i, as a tree."""
    starts = jnp.asarray(golden.arrays["lanczos_start"])
    shapes = {name: w.shape for name, w in golden.tree("p0").items()}  # In the file's order.
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])[:-1]

    def start(i: Any) -> dict[str, jax.Array]:
        parts = zip(shapes, jnp.split(starts[i], ends), strict=True)
        return {name: part.reshape(shapes[name]) for name, part in parts}

    return start


def _with_recorded_starts(
    golden: Golden, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """`tx` with the recorded start of Lanczos's process at each recorded step."""
    learned, start = jnp.asarray(golden.arrays["learned_at_step"]), _starts(golden)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        step, inner = state
        extra_args["start_vector"] = start(jnp.searchsorted(learned, step))
        updates, inner = tx.update(updates, inner, params, **extra_args)
        return updates, (step + 1, inner)

    def init(params: Any) -> Any:
        return jnp.zeros([], jnp.int32), tx.init(params)

    return optax.GradientTransformationExtraArgs(init, update)


def _assert_spectra_agree(golden: Golden, data: tuple[jax.Array, ...]) -> None:
    """Ritz values and their weights, at the recorded weights."""
    trajectory, start = golden.tree("traj"), _starts(golden)
    how = Rule(**_rule(golden))
    for i, step in enumerate(golden.arrays["learned_at_step"]):
        params = {name: jnp.asarray(x[step]) for name, x in trajectory.items()}
        grad_fn = flatopt.make_grad_fn(mlp_loss, *data)
        found = rates_at(how, grad_fn, params, start(i), jax.random.key(0))
        for name, x in (("ritz_values", found.curvatures), ("ritz_weights", found.weights)):
            np.testing.assert_allclose(x, golden.arrays[name][i], RTOL, ATOL, err_msg=name)


@replays("lanczos_lr")
def test_replays(golden: Golden) -> None:
    """The Hessian is of the first rows, of the loss alone; the decay is in the gradient."""
    hyper = golden.hyper
    rows = slice(hyper["curvature_rows"])
    data = tuple(jnp.asarray(golden.arrays[key])[rows] for key in ("X", "Y"))
    epoch = hyper["steps_per_epoch"]
    tx = flatopt.sgd_by_curvature(
        hyper["lr_init"],
        momentum=hyper["momentum"],
        start=hyper["warmstart"] * epoch,
        every=hyper["epochfreq"] * epoch,
        max_learning_rate=1e9,
        **_rule(golden),
    )
    tx = optax.chain(
        optax.add_decayed_weights(hyper["weight_decay"]), _with_recorded_starts(golden, tx)
    )
    replayed = replay(
        golden,
        tx,
        extra_grad=lambda _, point, __: jax.grad(mlp_loss)(point, *data),
        buffers={
            "rate": lambda s: {
                "lr_t": optax.tree.get(s, "learning_rate"),
                "momentum_t": optax.tree.get(s, "momentum"),
            }
        },
    )
    _assert_spectra_agree(golden, data)
    for name in ("lr_t", "momentum_t"):
        np.testing.assert_allclose(
            replayed[f"rate/{name}"], golden.arrays[name], RTOL, err_msg=name
        )
    assert_agrees(golden.results, replayed, ignore=BESIDE)


CURVATURES = jnp.geomspace(0.25, 4.0, 12)


def _bowl(w: jax.Array) -> jax.Array:
    return 0.5 * CURVATURES @ w**2


def _step(tx: Any, loss: Any, params: Any, state: Any) -> tuple[Any, Any]:
    grad_fn = flatopt.make_grad_fn(loss)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state


def _train(tx: Any, loss: Any, params: Any, steps: int) -> tuple[Any, Any]:
    step, state = jax.jit(lambda p, s: _step(tx, loss, p, s)), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_with_all_of_the_spectrum_it_is_heavy_ball_at_its_fastest():
    """Lanczos finds both ends of twelve eigenvalues in twelve products."""
    tx = flatopt.sgd_by_curvature(1.0, every=1000, num_steps=12, max_learning_rate=10.0)
    rate, momentum = (2 / (2.0 + 0.5)) ** 2, ((2.0 - 0.5) / (2.0 + 0.5)) ** 2
    by_hand = optax.sgd(rate, momentum=momentum)
    found, plain = (_train(t, _bowl, jnp.ones(12), 15)[0] for t in (_extra(by_hand), tx))
    np.testing.assert_allclose(found, plain, rtol=1e-3, atol=1e-5)
    assert _bowl(_train(tx, _bowl, jnp.ones(12), 60)[0]) < 1e-12


def _extra(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(tx)


@pytest.mark.parametrize("curvature", [-1.0, 0.0])
def test_where_nothing_curves_upwards_the_rates_stay(curvature: float):
    tx = flatopt.sgd_by_curvature(0.1, momentum=0.5, every=1, num_steps=2)
    params, state = _train(tx, lambda w: 0.5 * curvature * w @ w + w[0], jnp.ones(3), 2)
    np.testing.assert_allclose(state.learning_rate, 0.1, rtol=1e-6)
    np.testing.assert_allclose(state.momentum, 0.5, rtol=1e-6)
    assert jnp.isfinite(params).all()


def test_a_rate_is_cut_to_the_highest():
    tx = flatopt.sgd_by_curvature(0.1, every=1, num_steps=12, max_learning_rate=0.3)
    _, state = _train(tx, _bowl, jnp.ones(12), 1)
    np.testing.assert_allclose(state.learning_rate, 0.3, rtol=1e-6)


def test_a_curvature_that_is_not_a_number_shows():
    tx = flatopt.sgd_by_curvature(0.1, every=1, num_steps=2)
    loss = lambda w: jnp.sum(w**1.5 + 0.1 * w)  # noqa: E731
    params, state = _train(tx, loss, jnp.array([0.0, 1.0, 2.0]), 1)
    assert jnp.isnan(state.learning_rate)
    assert jnp.isnan(params).any()


def test_between_two_estimates_rates_stay_and_no_products_are_taken():
    calls: list[int] = []
    tx = flatopt.sgd_by_curvature(0.1, start=2, every=3, num_steps=4)

    def loss(w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.cosh(w) + 0.1 * w**4)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def grad_fn(point: Any, _: Any) -> Any:
            jax.debug.callback(lambda: calls.append(1))
            return jax.grad(loss)(point)

        updates, state = tx.update(jax.grad(loss)(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params, rates = jnp.linspace(1.0, 2.0, 6), []
    state = tx.init(params)
    for _ in range(9):
        params, state = step(params, state)
        rates.append(float(state.learning_rate))
    jax.block_until_ready(params)
    jax.effects_barrier()
    assert rates[0] == rates[1] == pytest.approx(0.1)
    assert rates[2] == rates[3] == rates[4] != rates[1]
    assert rates[5] == rates[6] == rates[7] != rates[4]
    assert len(calls) == 3 * 4


def test_complex_weights_are_two_real_ones():
    """A gradient to be followed is the conjugate of JAX's."""
    spread, together = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 1.5, 2.5])

    def loss(z: jax.Array) -> jax.Array:
        return 0.5 * (spread @ z.real**2 + together @ z.imag**2)

    tx = flatopt.sgd_by_curvature(0.1, every=1, num_steps=6, max_learning_rate=10.0)
    params = jnp.array([1 + 1j, 2 - 1j, 1 + 3j], jnp.complex64)
    grad_fn = lambda z, i: jax.grad(loss)(z).conj()  # noqa: E731
    _, state = tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn)
    expected = (2 / (np.sqrt(3.0) + np.sqrt(0.5))) ** 2
    np.testing.assert_allclose(state.learning_rate, expected, rtol=1e-4)


def test_it_trains_a_network():
    # Uncut, the rate that one batch's Hessian asks for can be too high for the next batches.
    kwargs = {"every": 5, "num_steps": 6, "mu": "median", "max_learning_rate": 0.3}
    tx = flatopt.sgd_by_curvature(0.05, **kwargs)
    start = cases.init_params()
    params, _ = cases.run(tx, steps=40)
    before, after = (np.mean([cases.loss_fn(p, cases.make_batch(i)) for i in range(40)])
                     for p in (start, params))  # fmt: skip
    assert after < 0.7 * before


def test_wrong_arguments_say_so():
    for kwargs, message in [
        ({"learning_rate": -1.0}, "learning_rate=-1.0 is out of range"),
        ({"momentum": 1.5}, "momentum=1.5 is out of range"),
        ({"max_learning_rate": 0.0}, "max_learning_rate=0.0 is out of range"),
        ({"every": 0}, "every=0 is out of range"),
        ({"num_steps": 0}, "num_steps=0 is out of range"),
        ({"rule": "newton"}, "rule='newton' must be one of polyak, median, authors, normalised"),
        ({"mu": "mean"}, "mu='mean' must be one of smallest, median"),
    ]:
        with pytest.raises(ValueError, match=message):
            flatopt.sgd_by_curvature(**({"learning_rate": 0.1, "every": 1} | kwargs))
    with pytest.raises(TypeError, match="every=None must be a Python int"):
        flatopt.sgd_by_curvature(0.1, every=None)  # type: ignore[arg-type]
