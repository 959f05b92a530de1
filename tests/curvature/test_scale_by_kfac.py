"""K-FAC and EKFAC: statistics of layers, their inverses, and the authors' runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._curvature.scale_by_kfac import KfacState
from tests import cases
from tests.replay import Golden, assert_agrees, problem, replay, replays, table


def _model(params, x):
    hidden = x @ params["fc1"]["kernel"] + params["fc1"]["bias"][None]
    hidden = jnp.tanh(flatopt.tap("fc1", x, hidden))
    out = hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"][None]
    return flatopt.tap("fc2", hidden, out)


def _params(*sizes: int):
    rng = np.random.default_rng(0)

    def layer(m, n):
        return {"kernel": jnp.asarray(rng.normal(size=(m, n))), "bias": jnp.zeros(n)}

    return {"fc1": layer(sizes[0], sizes[1]), "fc2": layer(sizes[1], sizes[2])}


X = jnp.asarray(np.random.default_rng(1).normal(size=(7, 3)))


def _gauss_newton(params, x):
    """The Fisher matrix of the last layer's kernel and bias, entry by entry."""
    flat, unravel = jax.flatten_util.ravel_pytree(params["fc2"])
    jacobian = jax.jacobian(lambda w: _model({**params, "fc2": unravel(w)}, x))(flat)
    p = jax.nn.softmax(_model(params, x))
    fisher = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    return jnp.einsum("nci,ncd,ndj->ij", jacobian, fisher, jacobian) / len(x)


def test_of_one_example_the_factors_are_the_fisher_matrix():
    params, x = _params(3, 4, 2), X[:1]
    found = flatopt.make_stats_fn(_model, x)(params)["fc2"]
    # Of ravelled leaves the bias is first; of the factors it is last.
    order = [*range(2, 10), 0, 1]
    expected = _gauss_newton(params, x)[np.ix_(order, order)]
    np.testing.assert_allclose(jnp.kron(found.a, found.g), expected, atol=1e-6)


def test_exact_damping_solves_with_the_damped_product():
    params = _params(3, 4, 2)
    stats_fn = flatopt.make_stats_fn(_model, X)
    tx = flatopt.scale_by_kfac(0.3, inverse="exact")
    updates, _ = tx.update(params, tx.init(params), params, stats_fn=stats_fn)
    found = stats_fn(params)["fc2"]
    matrix = jnp.kron(found.a, found.g) + 0.3 * jnp.eye(10)
    gradient = jnp.concatenate([params["fc2"]["kernel"].ravel(), params["fc2"]["bias"]])
    expected = jnp.linalg.solve(matrix, gradient)
    np.testing.assert_allclose(updates["fc2"]["kernel"].ravel(), expected[:8], rtol=1e-4)
    np.testing.assert_allclose(updates["fc2"]["bias"], expected[8:], rtol=1e-4)


def test_large_damping_is_a_shorter_gradient():
    params = _params(3, 4, 2)
    for inverse in ("factored", "exact", "eigen"):
        tx = flatopt.scale_by_kfac(1e8, inverse=inverse)
        stats_fn = flatopt.make_stats_fn(_model, X)
        updates, _ = tx.update(params, tx.init(params), params, stats_fn=stats_fn)
        cases.assert_close(jax.tree.map(lambda u: 1e8 * u, updates), params, rtol=1e-2, atol=1e-3)


def test_sampled_labels_have_the_exact_estimate_as_their_mean():
    params, stats = _params(3, 4, 2), {}
    for estimate in ("exact", "sampled"):
        x = jnp.tile(X, (3000, 1)) if estimate == "sampled" else X
        stats_fn = flatopt.make_stats_fn(_model, x, estimate=estimate, key=0)
        stats[estimate] = jax.jit(stats_fn.__call__)(params)
    cases.assert_close(stats["sampled"], stats["exact"], rtol=0.1, atol=0.02)


def test_scales_are_the_mean_squares_of_examples_gradients():
    params, labels = _params(3, 4, 2), jnp.arange(7) % 2
    kwargs = {"estimate": "empirical", "labels": labels}
    bases = {"fc2": (jnp.eye(5), jnp.eye(2))}
    found = flatopt.make_stats_fn(_model, X, **kwargs)(params, bases)["fc2"].scales

    def loss(params, x, y):
        logits = _model(params, x[None])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[None])[0]

    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, X, labels)["fc2"]
    squares = jnp.mean(jnp.square(grads["kernel"]), 0), jnp.mean(jnp.square(grads["bias"]), 0)
    np.testing.assert_allclose(found[:-1], squares[0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found[-1], squares[1], rtol=1e-4, atol=1e-7)


def test_positions_that_share_weights_count_as_examples_or_as_their_mean():
    def model(params, x):
        y = flatopt.tap("fc", x, x @ params["fc"]["kernel"])
        return jnp.sum(y, 1)

    x, params = X.reshape(7, 3, 1) * jnp.ones([7, 3, 2]), {"fc": {"kernel": jnp.ones([2, 2])}}
    expand, reduce = (
        flatopt.make_stats_fn(model, x, loss="squared", sharing=sharing)(params)["fc"]
        for sharing in ("expand", "reduce")
    )
    np.testing.assert_allclose(expand.a, jnp.einsum("nti,ntj->ij", x, x) / 21, rtol=1e-5)
    np.testing.assert_allclose(expand.g, 3 * jnp.eye(2), rtol=1e-6)
    mean = x.mean(1)
    np.testing.assert_allclose(reduce.a, mean.T @ mean / 7, rtol=1e-5)
    np.testing.assert_allclose(reduce.g, 9 * jnp.eye(2), rtol=1e-6)


def test_statistics_are_computed_only_when_due():
    calls, params = [], _params(3, 4, 2)
    tx = flatopt.scale_by_kfac(0.3, every=4, inverse_every=8)

    @jax.jit
    def step(state, x):
        stats_fn = flatopt.make_stats_fn(_model, x)

        def counted(params, bases=None):
            jax.debug.callback(calls.append, 1)
            return stats_fn(params, bases)

        return tx.update(params, state, params, stats_fn=counted)[1]

    state = tx.init(params)
    for _ in range(10):
        state = step(state, X)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(calls) == 3
    assert step._cache_size() == 1


def test_what_is_not_due_is_in_a_branch_that_the_compiler_leaves_alone():
    """Out of a loop, even one of no turns, XLA takes all that does not change in it."""
    params, tx = _params(3, 4, 2), flatopt.scale_by_kfac(0.3, every=5, inverse_every=10)

    def update(params, state):
        return tx.update(params, state, params, stats_fn=flatopt.make_stats_fn(_model, X))

    text = jax.jit(update).lower(params, tx.init(params)).compile().as_text()
    whole, main = text.count("potrf"), text[text.index("ENTRY") :]
    assert whole >= 4  # Decompositions, two of each layer,
    assert "potrf" not in main  # none of them outside the branch,
    assert main.count("tanh") == 0  # nor the model, which the statistics alone ask for.


def test_statistics_of_shards_average_to_those_of_the_batch():
    params, x = _params(3, 4, 2), jnp.tile(X, (8, 1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def mean(params, x):
        return jax.lax.pmean(flatopt.make_stats_fn(_model, x)(params), "data")

    spec = jax.sharding.PartitionSpec
    specs = {"in_specs": (spec(), spec("data")), "out_specs": spec(), "check_vma": False}
    found = jax.jit(jax.shard_map(mean, mesh=mesh, **specs))(params, x)
    cases.assert_close(found, flatopt.make_stats_fn(_model, X)(params))


def test_statistics_that_are_not_finite_are_not_taken_in():
    params, tx = _params(3, 4, 2), flatopt.scale_by_kfac(0.3)
    state = tx.init(params)
    for x in (X, jnp.nan * X):
        before = state
        stats_fn = flatopt.make_stats_fn(_model, x)
        _, state = tx.update(params, state, params, stats_fn=stats_fn)
    cases.assert_equal((state.weight, state.factors), (before.weight, before.factors))


def test_leaves_of_no_layer_go_to_the_fallback():
    params = {"fc1": _params(3, 4, 2)["fc1"], "scale": jnp.ones(2)}
    tx = flatopt.scale_by_kfac(0.3, layers=lambda name: name != "fc1", fallback=optax.scale(2.0))
    updates, _ = tx.update(params, tx.init(params), params)
    cases.assert_equal(updates, jax.tree.map(lambda p: 2 * p, params))


def test_sam_in_the_metric_of_the_factors():
    params, stats_fn = _params(3, 4, 2), flatopt.make_stats_fn(_model, X)
    ascent = optax.chain(flatopt.scale_by_kfac(0.3), flatopt.scale_to_norm(0.05))
    tx = flatopt.gradient_at(ascent)
    grad_fn = flatopt.make_grad_fn(lambda p: jnp.sum(_model(p, X) ** 2))
    grads = grad_fn(params)
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn, stats_fn=stats_fn)
    displacement, _ = ascent.update(grads, ascent.init(params), params, stats_fn=stats_fn)
    cases.assert_close(updates, grad_fn(optax.apply_updates(params, displacement)), rtol=1e-4)


def test_errors_name_the_mend():
    params, tx = _params(3, 4, 2), flatopt.scale_by_kfac(0.3)
    with pytest.raises(ValueError, match=r"make_stats_fn\(model, x\)"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=r"flatopt.tap\('fc1', inputs, outputs\)"):
        tx.update(params, tx.init(params), params, stats_fn=lambda p, bases: {})
    with pytest.raises(ValueError, match="needs labels="):
        flatopt.make_stats_fn(_model, X, estimate="empirical")
    with pytest.raises(ValueError, match="tapped twice"):
        flatopt.make_stats_fn(lambda p, x: _model(p, x) + _model(p, x), X)(params)
    with pytest.raises(ValueError, match="estimate='sampled'"):
        flatopt.make_stats_fn(lambda p, x: _model(p, x)[None], X)(params)
    wrong = flatopt.make_stats_fn(lambda p, x: flatopt.tap("fc9", x, x), X)
    with pytest.raises(ValueError, match="'fc9' of a tap is no layer"):
        wrong(params)


LAYERS = ("fc1", "fc2")


def _as_layers(flat):
    """Weights of the files, (out, in), as layers."""
    return {k: {"kernel": flat[f"{k}.weight"].T, "bias": flat[f"{k}.bias"]} for k in LAYERS}


def _as_flat(tree):
    kernels = {f"{k}.weight": tree[k]["kernel"].T for k in LAYERS}
    return kernels | {f"{k}.bias": tree[k]["bias"] for k in LAYERS}


def _on_layers(tx, stats_fn_at, prepare=lambda state: state):
    """`tx` on the layers of a flat tree, with the statistics of each step."""

    def update(updates, state, params=None, **extra_args):
        del extra_args
        t, inner = state
        trees = _as_layers(updates), inner, _as_layers(params)
        stats_fn = stats_fn_at(t, trees[2])
        steps, inner = tx.update(*trees, stats_fn=stats_fn)
        return _as_flat(steps), (t + 1, inner)

    def init(flat):
        return jnp.zeros([], jnp.int32), prepare(tx.init(_as_layers(flat)))

    return optax.GradientTransformationExtraArgs(init, update)


def _factors(number):
    def get(state):
        (kfac,) = [
            s
            for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, KfacState))
            if isinstance(s, KfacState)
        ]
        return {name: pair[number] for name, pair in kfac.factors.items()}

    return get


BUFFERS = {"A": _factors(0), "G": _factors(1)}


@replays("kfac")
def test_replays_kfac_jax(golden: Golden):
    """Its search for damping, rate and momentum is not flatopt's: these are read."""
    hyper, (_, batch) = golden.hyper, problem(golden)
    rate, momentum, damping = (
        table(golden.arrays[f"{name}_t"]) for name in ("lr", "momentum", "damping")
    )
    l2, kl = hyper["l2"], hyper["norm_constraint"]
    kfac = flatopt.scale_by_kfac(
        lambda t: damping(t) + l2,
        decay=hyper["curvature_ema"],
        inverse="exact" if hyper["exact_inverses"] else "factored",
        inverse_every=hyper["inverse_period"],
        max_kl=kl,
        learning_rate=rate,
    )

    def velocity_update(updates, state, params=None, **extra_args):
        del params, extra_args
        t, velocity = state
        velocity = jax.tree.map(lambda v, u: momentum(t) * v - rate(t) * u, velocity, updates)
        return velocity, (t + 1, velocity)

    def velocity_init(params):
        return jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)

    tx = optax.chain(
        optax.add_decayed_weights(l2),
        _on_layers(kfac, lambda t, params: flatopt.make_stats_fn(_model, batch(t, 0)[0])),
        optax.GradientTransformationExtraArgs(velocity_init, velocity_update),
    )
    buffers = BUFFERS | {"velocity": lambda state: state[2][1]}
    actual = replay(golden, tx, buffers=buffers)
    weight, weights = 0.0, []
    for _ in range(golden.steps):
        weight = hyper["curvature_ema"] * weight + 1
        weights.append(weight)
    actual["factor_weight"] = np.array(weights)
    ignore = ["damping_t", "momentum_t"] + (["loss", "grad0"] if l2 else [])
    assert_agrees(golden.results, actual, ignore=ignore)


@replays("kfac_torch")
def test_replays_the_pytorch_program(golden: Golden):
    """Its means begin at the identity, as if it were 1 / (1 - decay) batches."""
    hyper, (_, batch) = golden.hyper, problem(golden)
    assert hyper["weight_decay"] == 0
    sampled = jnp.asarray(golden.arrays["sampled_labels"])

    def stats_fn_at(t, params):
        del params
        labels = sampled[t // hyper["TCov"]]
        return flatopt.make_stats_fn(_model, batch(t, 0)[0], estimate="empirical", labels=labels)

    def begin(state):
        eyes = jax.tree.map(lambda x: jnp.eye(len(x)), state.factors)
        return state._replace(weight=jnp.ones([]) / (1 - hyper["stat_decay"]), factors=eyes)

    kfac = flatopt.scale_by_kfac(
        hyper["damping"],
        decay=hyper["stat_decay"],
        inverse="exact",
        every=hyper["TCov"],
        inverse_every=hyper["TInv"],
        max_kl=hyper["kl_clip"],
        learning_rate=hyper["lr"],
    )
    tx = optax.chain(
        _on_layers(kfac, stats_fn_at, begin), optax.sgd(hyper["lr"], momentum=hyper["momentum"])
    )
    actual = replay(golden, tx, buffers=BUFFERS)
    assert_agrees(golden.results, actual, ignore=["sampled_at", "sampled_labels"])
