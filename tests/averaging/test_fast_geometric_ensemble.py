"""FGE: its schedule, the plain loop, and the mean of predictions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases


def test_cyclic_triangle_schedule_of_an_odd_period():
    schedule = flatopt.cyclic_triangle_schedule(1.0, 0.0, period=5)
    np.testing.assert_allclose(
        [schedule(t) for t in range(6)], [1, 0.6, 0.2, 0.2, 0.6, 1], atol=1e-6
    )


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
    schedule = flatopt.cyclic_triangle_schedule(0.1, 0.01, period=period)
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
