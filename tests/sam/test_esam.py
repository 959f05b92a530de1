"""ESAM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from tests import cases
from tests.replay import (
    Golden,
    Params,
    assert_agrees,
    mlp_losses,
    problem,
    replay,
    replays,
    torch_optimizer,
)

RHO = 0.05


def test_at_its_limit_it_is_sam():
    method = cases.run(optax.chain(flatopt.esam(RHO, beta=1.0), cases.sgd()))[0]
    sam = cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()))[0]
    cases.assert_close(method, sam, rtol=1e-6, atol=1e-7)


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
    with pytest.raises(ValueError, match=r"keep=0.0 is out of range: .* in \(0, 1\]"):
        flatopt.drop_displacement(keep=0.0)


def test_an_injected_share_of_one_is_sam_and_may_be_changed():
    tx = optax.chain(optax.inject_hyperparams(flatopt.esam)(rho=RHO, beta=1.0), cases.sgd())
    params, opt_state = cases.run(tx, steps=3)
    cases.assert_close(params, cases.run(optax.chain(flatopt.sam(RHO), cases.sgd()), steps=3)[0])
    changed = optax.tree.set(opt_state, beta=jnp.float32(0.5))
    cases.run(tx, params, steps=1, opt_state=changed)


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


def test_selection_does_not_hide_a_nan():
    clean, perturbed = jnp.array([0.0, 0.0, 0.0]), jnp.array([0.1, jnp.nan, 0.3])
    assert flatopt.select_examples(clean, perturbed, 0.4).tolist() == [False, True, False]
    grad_fn = flatopt.make_selective_grad_fn(
        lambda w, x: w * x, perturbed, clean_losses=clean, share=0.4
    )
    assert jnp.isnan(grad_fn(jnp.array(1.0)))


@pytest.mark.parametrize("per_tensor", [False, True])
def test_dropped_entries_do_not_hide_a_nan(per_tensor: bool):
    grads = {"a": jnp.array([jnp.nan, 1.0]), "b": jnp.array([1.0])}
    for key in range(8):
        drop = flatopt.drop_displacement(0.1, key=key, per_tensor=per_tensor)
        assert jnp.isnan(drop.update(grads, drop.init(grads))[0]["a"][0])


def test_schedules_are_refused_where_they_could_not_work():
    schedule = optax.constant_schedule(0.5)
    for make in (
        lambda: flatopt.esam(RHO, beta=schedule),
        lambda: flatopt.esam(RHO, epsilon=schedule),
        lambda: flatopt.drop_displacement(schedule),
        lambda: flatopt.select_examples(jnp.ones(2), jnp.ones(2), schedule),
    ):
        with pytest.raises(TypeError, match="A schedule is not taken here"):
            make()


@replays("esam")
def test_replays(golden: Golden) -> None:
    """The official selection is strict; from a share of 0.99 on it takes the whole batch."""
    hyper = golden.hyper
    assert hyper["beta"] == 1, "the official code draws its mask with Python's generator"
    share = 1.0 if hyper["gamma"] >= 0.99 else hyper["gamma"]

    def extra_grad(params: Params, point: Params, batch: tuple[jax.Array, ...]) -> Params:
        clean_losses = mlp_losses(params, *batch)
        grad_fn = flatopt.make_selective_grad_fn(
            mlp_losses, *batch, clean_losses=clean_losses, share=share, strict=True
        )
        return grad_fn(point, 0)

    stage = flatopt.esam(hyper["rho"], beta=hyper["beta"], epsilon=1e-7)
    tx = optax.chain(stage, torch_optimizer(hyper, golden.learning_rate))
    replayed = replay(golden, tx, extra_grad=extra_grad)
    _, batch = problem(golden)
    replayed["n_selected"] = np.array(
        [
            flatopt.select_examples(
                *(
                    mlp_losses({k: x[t] for k, x in golden.tree(field).items()}, *batch(t, 0))
                    for field in ("traj", "pert")
                ),
                share,
                strict=True,
            ).sum()
            for t in range(golden.steps)
        ]
    )
    assert_agrees(golden.results, replayed)
