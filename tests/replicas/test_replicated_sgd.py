"""Replicated SGD as a recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replicas.layouts import METHODS, make_batches, make_replicas, sgd, train_leading


# A loop that knows of one model
@pytest.mark.parametrize("evaluation", ["unrolled", "loop", "vmap"])
def test_recipe_equals_replicas_on_a_leading_axis(evaluation: str):
    """Each replica with its own batch, by the number of the evaluation."""
    number = 3
    tx = flatopt.replicated_sgd(sgd(), number, 0.5, std=0.3, key=1, evaluation=evaluation)
    params = cases.init_params()
    opt_state = tx.init(params)
    for i in range(4):
        batches = make_batches(i, number)
        one = lambda a, batches=batches: jax.tree.map(lambda x: x[a], batches)  # noqa: E731
        grads = jax.grad(cases.loss_fn)(params, one(0))
        grad_fn = lambda p, i, one=one: jax.grad(cases.loss_fn)(p, one(i + 1))  # noqa: E731
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    expected = train_leading(METHODS["couple"](None), make_replicas(number))
    cases.assert_close(params, jax.tree.map(lambda x: x[0], expected))
    cases.assert_close(opt_state.others, jax.tree.map(lambda x: x[1:], expected))
    cases.assert_close(flatopt.eval_params(opt_state, params), flatopt.barycentre(expected))


# Schedules
@pytest.mark.parametrize("kind", ["exponential", "linear", "cosine"])
def test_strength_schedule(kind: str):
    schedule = flatopt.strength_schedule(kind, 0.5, 8.0, steps=20, every=5)
    values = np.array([schedule(t) for t in range(30)])
    np.testing.assert_allclose(values[[0, 20, 29]], [0.5, 8.0, 8.0], rtol=1e-5)
    assert (np.diff(values) >= 0).all()
    assert len(set(values.round(5))) == 5  # Four periods and the end.
    middle = {"exponential": 2.0, "linear": 4.25, "cosine": 4.25}[kind]
    np.testing.assert_allclose(values[10], middle, rtol=1e-5)
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(30))
    np.testing.assert_allclose(traced, values, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quadratic", 1.0, 2.0, 5), "must be one of"),
        (("linear", -1.0, 2.0, 5), "init_value=-1"),
        (("linear", 1.0, 0.5, 5), "end_value=0.5"),
        (("linear", 1.0, 2.0, 0), "steps=0"),
        (("exponential", 0.0, 2.0, 5), "above 0"),
    ],
)
def test_unfit_strength_schedule(arguments, words: str):
    with pytest.raises(ValueError, match=words):
        flatopt.strength_schedule(*arguments)


@pytest.mark.parametrize("values", [(optax.constant_schedule(1.0), 2.0), (1.0, lambda step: 2.0)])
def test_a_schedule_of_the_ends_of_a_schedule_is_refused(values):
    with pytest.raises(TypeError, match=r"(init|end)_value=.*A schedule is not taken here"):
        flatopt.strength_schedule("linear", *values, steps=5)
