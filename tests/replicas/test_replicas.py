"""Replicas and their barycentre."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt
from flatopt._core import rng
from tests import cases


# Making replicas and centres
def test_replicate_params():
    params = cases.init_params()
    equal = flatopt.replicate_params(params, 3)
    for replica in range(3):
        cases.assert_equal(jax.tree.map(lambda x, a=replica: x[a], equal), params)
    spread = flatopt.replicate_params(params, 3, std=0.1, key=2)
    cases.assert_equal(jax.tree.map(lambda x: x[0], spread), params)
    kernel = np.asarray(spread["hidden"]["kernel"])
    assert not np.allclose(kernel[1], kernel[2])
    wide = flatopt.replicate_params(jnp.zeros([50_000]), 2, std=0.1)
    np.testing.assert_allclose(np.std(wide[1]), 0.1, rtol=0.02)
    inits = flatopt.replicate_params(
        params, 3, key=2, init_fn=lambda key: optax.tree.random_like(key, params)
    )
    cases.assert_equal(jax.tree.map(lambda x: x[0], inits), params)
    assert not np.allclose(inits["hidden"]["kernel"][1], inits["hidden"]["kernel"][2])
    with pytest.raises(ValueError, match="number=0"):
        flatopt.replicate_params(params, 0)
    with pytest.raises(ValueError, match="std=-1"):
        flatopt.replicate_params(params, 2, std=-1.0)


def test_barycentre_keeps_dtypes_and_takes_the_largest_counter():
    replicas = {
        "half": jnp.array([[1.0], [1.0078125], [1.0078125]], jnp.bfloat16),
        "counter": jnp.array([3, 5, 4]),
        "flag": jnp.array([False, True, False]),
    }
    centre = flatopt.barycentre(replicas)
    assert {k: v.dtype for k, v in centre.items()} == {k: v.dtype for k, v in replicas.items()}
    assert centre["counter"] == 5
    assert bool(centre["flag"])
    assert centre["half"][0] == jnp.bfloat16(1.0052083)


def test_batch_norm_statistics_of_the_centre():
    """Averaged over the replicas, or recomputed at the centre: for one replica they agree."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(4)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.0)(x)
            return nn.Dense(1)(nn.tanh(x))

    model, x = Model(), jax.random.normal(jax.random.key(0), (64, 3))
    variables = model.init(jax.random.key(1), x, train=True)

    def statistics(params):
        _, changed = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return changed["batch_stats"]

    for std in (0.0, 0.3):
        params = flatopt.replicate_params(variables["params"], 3, std=std)
        averaged = flatopt.barycentre(jax.vmap(statistics)(params))
        centre = flatopt.barycentre(params)
        recomputed = statistics(centre)
        means = [s["BatchNorm_0"]["mean"] for s in (averaged, recomputed)]
        variances = [s["BatchNorm_0"]["var"] for s in (averaged, recomputed)]
        # The first layer is linear: means average exactly, variances only for equal replicas.
        np.testing.assert_allclose(*means, atol=1e-5)
        assert np.allclose(*variances, rtol=1e-3) == (std == 0.0)
        normalised = {"params": centre, "batch_stats": recomputed}
        _, kept = model.apply(
            normalised, x, train=False, capture_intermediates=True, mutable=["intermediates"]
        )
        output = kept["intermediates"]["BatchNorm_0"]["__call__"][0]
        scale = centre["BatchNorm_0"]["scale"]
        np.testing.assert_allclose(output.std(0), jnp.abs(scale), rtol=1e-2)


def test_the_centre_of_one_replica_is_that_replica():
    params = cases.init_params()
    cases.assert_equal(flatopt.barycentre(flatopt.replicate_params(params, 1)), params)


# Where replicas lie, and what they are made of
METHODS = {
    "couple": lambda: flatopt.couple_replicas(0.5),
    "couple_every": lambda: flatopt.couple_replicas(0.5, every=2),
    "couple_automatic": lambda: flatopt.couple_replicas(0.5, automatic=1),
    "parle": lambda: flatopt.parle(0.1, 0.1, 0.5, every=2),
    "gossip": lambda: flatopt.gossip(optax.sgd(0.1, momentum=0.9), "ring"),
    "gossip_full": lambda: flatopt.gossip(optax.sgd(0.1, momentum=0.9), "full"),
}


def _run(tx, params, steps: int = 3, init=None):
    """On the loss |params|^2 / 2 of each replica."""
    state, step = (init or tx.init)(params), jax.jit(tx.update)
    updates = params
    for _ in range(steps):
        updates, state = step(params, state, params, value=jnp.ones([]))
        params = optax.apply_updates(
            params, jax.tree.map(lambda u: (u / 8).astype(u.dtype), updates)
        )
    return params, state, updates


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_replicas_on_an_explicit_axis_of_the_mesh(name: str, compiled: bool):
    """The state of each replica lies where the replica does, whoever made it."""
    tx = METHODS[name]()
    start = {
        "kernel": jax.random.normal(jax.random.key(0), (4, 8, 2)),
        "scale": jnp.arange(4.0),
    }
    expected, _, _ = _run(tx, start)
    mesh = jax.make_mesh((4, 2), ("replica", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        specs = {"kernel": P("replica", "model"), "scale": P("replica")}
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        params = jax.tree.map(place, start, specs)
        init = jax.jit(tx.init) if compiled else tx.init
        params, state, updates = _run(tx, params, init=init)
    cases.assert_close(params, expected)
    assert {x.sharding.spec[0] for x in jax.tree.leaves((updates, state))} == {"replica"}
    assert updates["kernel"].sharding.spec[1] == "model"


def test_the_centre_of_replicas_on_an_explicit_axis():
    mesh = jax.make_mesh((4,), ("replica",), axis_types=(AxisType.Explicit,))
    replicas = {"w": jnp.arange(12.0).reshape(4, 3), "scale": jnp.arange(4.0)}
    with jax.set_mesh(mesh):
        placed = jax.device_put(replicas, NamedSharding(mesh, P("replica")))
        for barycentre in (flatopt.barycentre, jax.jit(flatopt.barycentre)):
            cases.assert_equal(barycentre(placed), flatopt.barycentre(replicas))


def test_replicas_are_made_without_holding_the_parameters_as_constants():
    """As a constant, an array that spans several processes could not be compiled."""
    params = jnp.ones([1000])
    name = "jax_captured_constants_warn_bytes"
    before = getattr(jax.config, name)
    jax.config.update(name, 100)
    try:
        flatopt.replicate_params(params, 3, std=0.5)  # A warning is an error here.
        flatopt.replicated_sgd(optax.sgd(0.1), 3, 0.5).init(params)
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_generator(generator: str):
    key = jax.random.key(3, impl=generator)
    drawn = flatopt.replicate_params(jnp.zeros(3), 3, std=1.0, key=key)
    assert not np.array_equal(drawn[1], drawn[2])
    tx = flatopt.replicated_sgd(optax.sgd(0.1), 3, 0.5, std=1.0, key=key)
    cases.assert_equal(tx.init(jnp.zeros(3)).others, drawn[1:])
    cases.assert_equal(drawn[1], rng.normal_like(jax.random.split(key, 3)[1], jnp.zeros(3)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("name", [*METHODS, "hold"])
def test_dtypes_of_updates_and_states_are_kept(name: str, dtype: str):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        start = {
            "w": jnp.linspace(0.5, 1.5, 12, dtype=dtype).reshape(4, 3),
            "scale": jnp.linspace(-1, 1, 4, dtype=dtype),
        }
        if name == "hold":
            tx = flatopt.replicated_sgd(optax.sgd(0.1, momentum=0.9), 3, 0.5, std=0.1)
            update = functools.partial(tx.update, grad_fn=lambda p, i: p)
            tx = optax.GradientTransformationExtraArgs(tx.init, update)
        else:
            tx = METHODS[name]()
        params, state, updates = _run(tx, start)
        expected = jax.tree.map(lambda x: x.dtype, tx.init(start))
        assert jax.tree.map(lambda x: x.dtype, state) == expected
        for tree in (params, updates, flatopt.barycentre(params)):
            assert {x.dtype.name for x in jax.tree.leaves(tree)} == {dtype}
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state, updates)))
        assert not np.array_equal(params["w"], start["w"])


@pytest.mark.parametrize("name", METHODS)
def test_counters_and_flags_stay(name: str):
    """They have no mean: no spring pulls them, no neighbour mixes them, no step moves them."""
    tx = METHODS[name]()
    start = {
        "w": jnp.linspace(0.0, 1.0, 4),
        "count": jnp.array([3, 7, 5, 1]),
        "flag": jnp.array([True, False, True, False]),
    }
    state = tx.init(start)
    grads = jax.tree.map(jnp.zeros_like, start)
    params = start
    for _ in range(2):
        updates, state = tx.update(grads, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    for leaf in ("count", "flag"):
        assert params[leaf].dtype == start[leaf].dtype
        cases.assert_equal(params[leaf], start[leaf])
    assert not np.array_equal(params["w"], start["w"])


def test_counters_and_flags_of_new_replicas_are_copied():
    params = {"w": jnp.zeros(2), "count": jnp.array(7), "flag": jnp.array(True)}
    replicas = flatopt.replicate_params(params, 3, std=100.0)
    assert replicas["count"].tolist() == [7, 7, 7]
    assert replicas["flag"].tolist() == [True, True, True]
    assert not np.array_equal(replicas["w"][0], replicas["w"][1])
    tx = flatopt.replicated_sgd(optax.sgd(0.1), 3, 0.5, std=100.0)
    cases.assert_equal(tx.init(params).others["count"], jnp.array([7, 7]))


def test_large_counters_are_compared_as_they_are():
    assert int(flatopt.barycentre(jnp.array([2**31 + 5, 3], jnp.uint32))) == 2**31 + 5


@pytest.mark.parametrize(
    "make",
    [
        lambda tx: flatopt.gossip(tx, "ring"),
        lambda tx: flatopt.hold_replicas(tx, 2),
        lambda tx: flatopt.replicated_sgd(tx, 2, 0.5),
    ],
)
def test_what_is_no_optimiser_is_refused_by_name(make):
    with pytest.raises(TypeError, match=r"optimizer=0.1 must be an optax transformation"):
        make(0.1)


def test_a_schedule_of_the_noise_is_refused():
    schedule = optax.constant_schedule(0.1)
    for make in (flatopt.replicate_params, lambda p, n, std: flatopt.hold_replicas(p, n, std=std)):
        with pytest.raises(TypeError, match="A schedule is not taken here"):
            make(optax.sgd(0.1), 2, std=schedule)


@pytest.mark.parametrize("inner", ["couple_every", "couple_automatic", "parle", "gossip_full"])
def test_held_replicas_of_explicitly_sharded_parameters(inner: str):
    """The mapped axis is not that of the mesh, and the mean of it not sharded."""
    make = {
        "couple_every": lambda: flatopt.couple_replicas(0.5, every=2, axis_name="replicas"),
        "couple_automatic": lambda: flatopt.couple_replicas(0.5, automatic=1, axis_name="replicas"),
        "parle": lambda: flatopt.parle(0.1, 0.1, 0.5, every=2, axis_name="replicas"),
        "gossip_full": lambda: flatopt.gossip(optax.sgd(0.1), "full", axis_name="replicas"),
    }[inner]
    held = flatopt.hold_replicas(make(), 3, std=0.1)
    update = functools.partial(held.update, grad_fn=lambda p, i: p)
    tx = optax.GradientTransformationExtraArgs(held.init, update)
    start = {"kernel": jnp.arange(8.0).reshape(4, 2), "scale": jnp.array(2.0)}
    expected, _, _ = _run(tx, start)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        specs = {"kernel": P("data", "model"), "scale": P()}
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        params, state, _ = _run(tx, jax.tree.map(place, start, specs))
        flatopt.eval_params(state, params)
    cases.assert_close(params, expected)
    assert state.others["kernel"].sharding.spec == P(None, "data", "model")


@pytest.mark.parametrize("name", ["couple_every", "couple_automatic", "parle", "gossip_full"])
def test_one_replica_a_device_with_checked_replication(name: str):
    """`jax.shard_map` follows what differs between devices, and a loop must keep to it."""
    make = {
        "couple_every": lambda axis: flatopt.couple_replicas(0.5, every=2, axis_name=axis),
        "couple_automatic": lambda axis: flatopt.couple_replicas(0.5, automatic=1, axis_name=axis),
        "parle": lambda axis: flatopt.parle(0.1, 0.1, 0.5, every=2, axis_name=axis),
        "gossip_full": lambda axis: flatopt.gossip(optax.sgd(0.1), "full", axis_name=axis),
    }[name]
    start = {"w": jax.random.normal(jax.random.key(0), (8, 3))}
    mesh = jax.make_mesh((8,), ("replicas",), axis_types=(AxisType.Auto,))
    tx = make("replicas")

    def mapped(function):
        def one(*trees):
            result = function(*jax.tree.map(lambda x: x[0], trees))
            return jax.tree.map(lambda x: x[None], result)

        return jax.jit(
            jax.shard_map(one, mesh=mesh, in_specs=P("replicas"), out_specs=P("replicas"))
        )

    update = lambda u, s, p: tx.update(u, s, p, value=jnp.ones([]))  # noqa: E731
    params, state, step = start, mapped(tx.init)(start), mapped(update)
    for _ in range(3):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: u / 8, updates))
    cases.assert_close(params, _run(make(None), start)[0])


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_tree_of_replicas(name: str):
    tx = METHODS[name]()
    params, state, _ = _run(tx, {})
    assert params == {}
    assert jax.tree.structure(state) == jax.tree.structure(tx.init({}))


def test_the_centre_of_nothing_and_of_random_keys():
    assert flatopt.barycentre({}) == {}
    replicas = {"w": jnp.array([1.0, 3.0]), "key": jax.random.split(jax.random.key(0, impl="rbg"))}
    centre = flatopt.barycentre(replicas)
    assert centre["w"] == 2.0
    assert centre["key"] == replicas["key"][0]
    stage = flatopt.couple_replicas(0.5)
    updates, _ = stage.update(replicas, stage.init(replicas), replicas)
    assert (updates["key"] == replicas["key"]).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: flatopt.replicate_params(jnp.zeros(2), None),
        lambda: flatopt.hold_replicas(optax.sgd(0.1), None),
        lambda: flatopt.mixing_matrix("ring", None),
        lambda: flatopt.strength_schedule("linear", 1.0, 2.0, None),
    ],
)
def test_a_number_that_is_missing_is_refused_by_name(make):
    with pytest.raises(TypeError, match=r"(number|steps)=None must be a Python int"):
        make()
