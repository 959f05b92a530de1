"""Replicas: one implementation for a leading axis and for named axes, and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flatopt
from tests import cases

NUMBER = 8
TOPOLOGIES = ("ring", "exponential", "torus", "full")


def _replicas(number: int = NUMBER):
    return flatopt.replicate_params(cases.init_params(), number, std=0.3, key=1)


def _batches(step: int, number: int = NUMBER):
    """One batch for each replica."""
    batches = [cases.make_batch(100 * step + a) for a in range(number)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *batches)


def _one_step(tx, params, opt_state, batch):
    grads = jax.grad(cases.loss_fn)(params, batch)
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), opt_state


def _train_leading(tx, params, steps: int = 4):
    """The optimiser sees the whole stack of replicas."""
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batches):
        grads = jax.vmap(jax.grad(cases.loss_fn))(params, batches)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(steps):
        params, opt_state = step(params, opt_state, _batches(i, _size(params)))
    return params


def _train_vmapped(tx, params, steps: int = 4):
    """The optimiser sees one replica, inside a mapped axis."""
    opt_state = jax.vmap(tx.init, axis_name="replicas")(params)
    step = jax.jit(jax.vmap(functools.partial(_one_step, tx), axis_name="replicas"))
    for i in range(steps):
        params, opt_state = step(params, opt_state, _batches(i, _size(params)))
    return params


def _train_sharded(tx, params, steps: int = 4):
    """One replica on each of eight devices."""
    mesh = jax.make_mesh((NUMBER,), ("replicas",), axis_types=(AxisType.Auto,))

    def squeezed(function):
        def local(*args):
            result = function(*jax.tree.map(lambda x: x[0], args))
            return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

        specs = {"in_specs": P("replicas"), "out_specs": P("replicas"), "check_vma": False}
        return jax.jit(jax.shard_map(local, mesh=mesh, **specs))

    opt_state = squeezed(tx.init)(params)
    step = squeezed(functools.partial(_one_step, tx))
    for i in range(steps):
        params, opt_state = step(params, opt_state, _batches(i))
    return params


def _size(params) -> int:
    return len(jax.tree.leaves(params)[0])


def _sgd():
    return optax.sgd(0.05, momentum=0.9)


METHODS = {
    "couple": lambda axis: optax.chain(flatopt.couple_replicas(0.5, axis_name=axis), _sgd()),
    "couple_schedule": lambda axis: optax.chain(
        flatopt.couple_replicas(flatopt.exponential_scoping(0.1, 0.5), axis_name=axis), _sgd()
    ),
    "couple_every": lambda axis: optax.chain(
        flatopt.couple_replicas(0.5, axis_name=axis, every=2), _sgd()
    ),
    "parle": lambda axis: flatopt.parle(0.05, 0.1, 0.5, every=2, axis_name=axis),
    **{
        f"gossip_{topology}": lambda axis, topology=topology: flatopt.gossip(
            _sgd(), topology, axis_name=axis
        )
        for topology in TOPOLOGIES
    },
    "gossip_matrix": lambda axis: flatopt.gossip(
        _sgd(), flatopt.mixing_matrix("exponential", NUMBER), axis_name=axis
    ),
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_leading_axis_equals_named_axis_equals_eight_devices(name: str):
    """For gossip this also says that the dense product is `ppermute` after `ppermute`."""
    start = _replicas()
    leading = _train_leading(METHODS[name](None), start)
    assert not np.allclose(leading["hidden"]["kernel"], start["hidden"]["kernel"])
    cases.assert_close(_train_vmapped(METHODS[name]("replicas"), start), leading)
    cases.assert_close(_train_sharded(METHODS[name]("replicas"), start), leading)


def test_replicas_over_devices_and_within():
    """Two on each of four devices: the axis is a tuple of names."""
    start = _replicas()
    tx = METHODS["couple"](("devices", "local"))
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": P("devices"), "out_specs": P("devices"), "check_vma": False}

    def mapped(function):
        local = jax.vmap(function, axis_name="local")
        return jax.jit(jax.shard_map(local, mesh=mesh, **specs))

    params, opt_state = start, mapped(tx.init)(start)
    step = mapped(functools.partial(_one_step, tx))
    for i in range(4):
        params, opt_state = step(params, opt_state, _batches(i))
    cases.assert_close(params, _train_leading(METHODS["couple"](None), start))


def test_pull_is_the_gradient_of_the_springs():
    params, strength = _replicas(3), 0.7

    def springs(params):
        away = jax.tree.map(lambda w, m: w - m[None], params, flatopt.barycentre(params))
        return 0.5 * strength * optax.tree.norm(away, squared=True)

    stage = flatopt.couple_replicas(strength)
    zeros = optax.tree.zeros_like(params)
    pull, _ = stage.update(zeros, stage.init(params), params)
    cases.assert_close(pull, jax.grad(springs)(params))
    # Springs among the replicas move no centre.
    cases.assert_close(flatopt.barycentre(pull), optax.tree.zeros_like(cases.init_params()))


# Limits


@pytest.mark.parametrize("axis", [None, "replicas"])
def test_strength_zero_is_independent_training_bit_for_bit(axis):
    start = _replicas()
    train = _train_leading if axis is None else _train_vmapped
    coupled = train(optax.chain(flatopt.couple_replicas(0.0, axis_name=axis), _sgd()), start)
    cases.assert_equal(coupled, train(_sgd(), start))


def test_strength_zero_on_eight_devices_bit_for_bit():
    start = _replicas()
    coupled = optax.chain(flatopt.couple_replicas(0.0, axis_name="replicas"), _sgd())
    cases.assert_equal(_train_sharded(coupled, start), _train_sharded(_sgd(), start))


def test_a_schedule_that_is_zero_is_independent_training():
    start = _replicas()
    tx = optax.chain(flatopt.couple_replicas(lambda step: 0.0 * step), _sgd())
    cases.assert_close(_train_leading(tx, start), _train_leading(_sgd(), start))


def test_one_replica_is_plain_sgd():
    start = _replicas(1)
    expected = _train_leading(_sgd(), start)
    for tx in (METHODS["couple"](None), flatopt.gossip(_sgd(), "ring")):
        cases.assert_equal(_train_leading(tx, start), expected)
    alone, _ = cases.run(_sgd())
    recipe = flatopt.replicated_sgd(_sgd(), 1, 0.5)
    params, state = cases.run(recipe)
    cases.assert_equal(params, alone)
    cases.assert_equal(flatopt.eval_params(state, params), alone)


def test_every_multiplies_the_pull():
    params = _replicas(3)
    stage = flatopt.couple_replicas(0.2, every=3)
    zeros, state = optax.tree.zeros_like(params), stage.init(params)
    for _ in range(2):
        pull, state = stage.update(zeros, state, params)
        cases.assert_equal(pull, zeros)
    pull, _ = stage.update(zeros, state, params)
    plain = flatopt.couple_replicas(0.6)
    cases.assert_close(pull, plain.update(zeros, plain.init(params), params)[0])


def test_strong_coupling_makes_the_replicas_collapse():
    tx = optax.chain(flatopt.couple_replicas(10.0), optax.sgd(0.05))
    params = _train_leading(tx, _replicas(), steps=12)
    centre = flatopt.barycentre(params)
    for replica, mean in zip(jax.tree.leaves(params), jax.tree.leaves(centre), strict=True):
        assert float(jnp.abs(replica - mean[None]).max()) < 0.05
    assert float(jnp.std(_replicas()["hidden"]["kernel"], axis=0).min()) > 0.05


@pytest.mark.parametrize("axis", [None, "replicas"])
def test_automatic_strength(axis):
    """The unit: the mean loss over the mean half squared distance, in the first updates."""
    params = {"w": jnp.array([[1.0], [3.0]])}
    stage = flatopt.couple_replicas(lambda step: 2.0, axis_name=axis, automatic=2)
    update = stage.update
    init = stage.init
    if axis is not None:
        init = jax.vmap(init, axis_name=axis)
        update = jax.vmap(lambda u, s, p, value: stage.update(u, s, p, value=value), axis_name=axis)
    zeros, state = optax.tree.zeros_like(params), init(params)

    def call(state, value):
        if axis is None:
            return update(zeros, state, params, value=jnp.array(value))
        return update(zeros, state, params, jnp.array(value))

    for value in ([1.0, 5.0], [2.0, 8.0]):
        pull, state = call(state, value)
        cases.assert_equal(pull, zeros)  # Uncoupled while it measures.
        np.testing.assert_allclose(state.unit, np.mean(value) / 0.5)
    pull, _ = call(state, [7.0, 7.0])
    np.testing.assert_allclose(pull["w"], 2.0 * 10.0 * np.array([[-1.0], [1.0]]))


def test_automatic_strength_needs_the_loss():
    stage = flatopt.couple_replicas(1.0, automatic=1)
    params = _replicas(2)
    with pytest.raises(ValueError, match="value=loss"):
        stage.update(params, stage.init(params), params)


# A loop that knows of one model


@pytest.mark.parametrize("evaluation", ["unrolled", "loop", "vmap"])
def test_recipe_equals_replicas_on_a_leading_axis(evaluation: str):
    """Each replica with its own batch, by the number of the evaluation."""
    number = 3
    tx = flatopt.replicated_sgd(_sgd(), number, 0.5, std=0.3, key=1, evaluation=evaluation)
    params = cases.init_params()
    opt_state = tx.init(params)
    for i in range(4):
        batches = _batches(i, number)
        one = lambda a, batches=batches: jax.tree.map(lambda x: x[a], batches)  # noqa: E731
        grads = jax.grad(cases.loss_fn)(params, one(0))
        grad_fn = lambda p, i, one=one: jax.grad(cases.loss_fn)(p, one(i + 1))  # noqa: E731
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    expected = _train_leading(METHODS["couple"](None), _replicas(number))
    cases.assert_close(params, jax.tree.map(lambda x: x[0], expected))
    cases.assert_close(opt_state.others, jax.tree.map(lambda x: x[1:], expected))
    cases.assert_close(flatopt.eval_params(opt_state, params), flatopt.barycentre(expected))


@pytest.mark.parametrize(("evaluation", "models"), [("unrolled", 4), ("loop", 1), ("vmap", 1)])
def test_how_often_the_other_replicas_are_compiled(evaluation: str, models: int):
    tx = flatopt.replicated_sgd(_sgd(), 5, 0.5, evaluation=evaluation)
    params = cases.init_params()
    traced = 0

    def grad_fn(params, i):
        nonlocal traced
        del i
        traced += 1
        return jax.grad(cases.loss_fn)(params, cases.make_batch())

    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, grad_fn=grad_fn), params)
    assert traced == models


@pytest.mark.parametrize(
    ("tx", "gradients"),
    [
        (flatopt.replicated_sgd(_sgd(), 4, 0.5), 4),
        (optax.chain(flatopt.rwp(0.1), _sgd()), 2),
    ],
    ids=["replicated_sgd", "rwp"],
)
def test_independent_gradients_wait_for_one_another(tx, gradients: int):
    """Else XLA may interleave them, with the activations of all in memory at the same time."""
    params, batch = cases.init_params(), cases.make_batch()

    def update(params, opt_state):
        grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
        return tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)

    text = jax.jit(update).lower(params, tx.init(params)).as_text()
    barrier = "stablehlo.optimization_barrier"
    assert text.count(barrier) >= gradients - 1
    # Between two of them there is a whole gradient: something is multiplied.
    parts = text.split(barrier)
    assert sum("stablehlo.dot_general" in part for part in parts) >= gradients


def test_evaluation_is_the_centre_of_the_replicas_own_averages():
    inner = optax.chain(_sgd(), flatopt.swa())
    tx = flatopt.replicated_sgd(inner, 3, 0.0, std=0.3, key=1)
    params, state = cases.run(tx)
    averages = [
        flatopt.eval_params(*reversed(cases.run(inner, jax.tree.map(lambda x, a=a: x[a], start))))
        for start in [_replicas(3)]
        for a in range(3)
    ]
    expected = jax.tree.map(lambda *xs: sum(xs) / 3, *averages)
    cases.assert_close(flatopt.eval_params(state, params), expected)


def test_sam_per_replica():
    """Inside a mapped axis, and in a wrapper: each replica ascends along its own gradient."""
    number, start = 3, _replicas(3)
    tx = lambda axis: optax.chain(  # noqa: E731
        flatopt.sam(0.2), flatopt.couple_replicas(0.5, axis_name=axis), optax.sgd(0.1)
    )
    batches = _batches(0, number)
    mapped = _train_vmapped(tx("replicas"), start, steps=1)

    def by_hand(params, batch):
        grads = jax.grad(cases.loss_fn)(params, batch)
        scale = 0.2 / optax.tree.norm(grads)
        return jax.grad(cases.loss_fn)(optax.tree.add_scale(params, scale, grads), batch)

    grads = jax.vmap(by_hand)(start, batches)
    centre = flatopt.barycentre(start)
    expected = jax.tree.map(
        lambda w, g, m: w - 0.1 * (g + 0.5 * (w - m[None])), start, grads, centre
    )
    cases.assert_close(mapped, expected)

    held = flatopt.hold_replicas(tx("replicas"), number, std=0.3, key=1)
    params = cases.init_params()
    seen = []

    def grad_fn(params, i):
        jax.debug.callback(seen.append, i)
        # Evaluations 0 and 1 are replicas 1 and 2; 2, 3, 4 the ascents of replicas 0, 1, 2.
        replica = jnp.where(i < number - 1, i + 1, i - (number - 1))
        return jax.grad(cases.loss_fn)(params, jax.tree.map(lambda x: x[replica], batches))

    grads = jax.grad(cases.loss_fn)(params, jax.tree.map(lambda x: x[0], batches))
    updates, state = held.update(grads, held.init(params), params, grad_fn=grad_fn)
    jax.effects_barrier()
    assert sorted(int(i) for i in seen) == [0, 1, 2, 3, 4]
    new = optax.apply_updates(params, updates)
    cases.assert_close(new, jax.tree.map(lambda x: x[0], expected))
    cases.assert_close(state.others, jax.tree.map(lambda x: x[1:], expected))


@pytest.mark.parametrize("method", ["parle", "gossip", "local_entropy"])
def test_the_other_methods_in_a_loop_that_knows_of_one_model(method: str):
    inner = {
        "parle": flatopt.parle(0.05, 0.1, 0.5, every=2, axis_name="replicas"),
        "gossip": flatopt.gossip(_sgd(), "ring", axis_name="replicas"),
        "local_entropy": optax.chain(
            flatopt.local_entropy(3, 0.1, noise=0.0),
            flatopt.couple_replicas(0.5, axis_name="replicas"),
            optax.sgd(0.5),
        ),
    }[method]
    tx = flatopt.hold_replicas(inner, 3, std=0.1)
    params, state = cases.run(tx, steps=20)
    start = cases.loss_fn(cases.init_params(), cases.make_batch())
    assert cases.loss_fn(flatopt.eval_params(state, params), cases.make_batch()) < 0.8 * start


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


# Mixing


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 8, 9, 12, 16])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_mixing_matrices_are_doubly_stochastic(topology: str, number: int):
    matrix = flatopt.mixing_matrix(topology, number)
    assert (matrix >= 0).all()
    assert (np.diag(matrix) > 0).all()
    np.testing.assert_allclose(matrix.sum(0), 1, rtol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-12)
    if topology != "exponential":
        np.testing.assert_array_equal(matrix, matrix.T)
    eigenvalues = np.sort(np.abs(np.linalg.eigvals(matrix)))
    if number > 1:
        assert eigenvalues[-2] < 1 - 1e-9  # Connected: mixing again and again gives the mean.


def test_mixing_matrices_have_the_right_neighbours():
    assert (flatopt.mixing_matrix("ring", 6)[0] > 0).nonzero()[0].tolist() == [0, 1, 5]
    assert (flatopt.mixing_matrix("exponential", 8)[0] > 0).nonzero()[0].tolist() == [0, 1, 2, 4]
    # A grid of three by four: 0 1 2 3 / 4 5 6 7 / 8 9 10 11.
    assert (flatopt.mixing_matrix("torus", 12)[5] > 0).nonzero()[0].tolist() == [1, 4, 5, 6, 9]
    np.testing.assert_allclose(flatopt.mixing_matrix("full", 4), 0.25)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gossip_keeps_the_centre_and_reaches_consensus(topology: str):
    params = _replicas()
    tx = flatopt.gossip(optax.sgd(0.1), topology)
    zeros, state = optax.tree.zeros_like(params), tx.init(params)
    mixed = params
    for _ in range(40):
        updates, state = tx.update(zeros, state, mixed)
        mixed = optax.apply_updates(mixed, updates)
    centre = flatopt.barycentre(params)
    cases.assert_close(flatopt.barycentre(mixed), centre)
    spread = max(float(jnp.abs(x - x[:1]).max()) for x in jax.tree.leaves(mixed))
    assert spread < 0.05


def test_full_gossip_with_the_same_gradients_is_centralised_sgd():
    start = flatopt.replicate_params(cases.init_params(), NUMBER)
    params = _train_leading(flatopt.gossip(optax.sgd(0.1), "full"), start)
    # Mixing comes first: after the last step the replicas differ by that step alone.
    centre, expected = flatopt.barycentre(params), cases.init_params()
    for i in range(1):
        grads = jax.vmap(jax.grad(cases.loss_fn), (None, 0))(expected, _batches(i))
        expected = optax.tree.add_scale(expected, -0.1, jax.tree.map(lambda g: g.mean(0), grads))
    one_step = flatopt.barycentre(_train_leading(flatopt.gossip(optax.sgd(0.1), "full"), start, 1))
    cases.assert_close(one_step, expected)
    assert cases.loss_fn(centre, cases.make_batch()) < cases.loss_fn(
        cases.init_params(), cases.make_batch()
    )


@pytest.mark.parametrize(
    ("mixing", "words"),
    [
        ("star", "must be one of ring"),
        (np.ones([2, 3]), "square"),
        (np.array([[0.5, 0.5], [0.9, 0.1]]), "doubly stochastic"),
        (np.array([[1.5, -0.5], [-0.5, 1.5]]), "without negatives"),
    ],
)
def test_unfit_mixing(mixing, words: str):
    with pytest.raises(ValueError, match=words):
        flatopt.gossip(_sgd(), mixing)


def test_matrix_of_another_size():
    params = _replicas(3)
    tx = flatopt.gossip(_sgd(), np.full([2, 2], 0.5))
    with pytest.raises(ValueError, match="there are 3 replicas"):
        tx.update(params, tx.init(params), params)


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


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_unfit_strength(bad: float):
    with pytest.raises(ValueError, match="strength="):
        flatopt.couple_replicas(bad)
    with pytest.raises(ValueError, match="strength="):
        flatopt.replicated_sgd(_sgd(), 3, bad)


def test_unfit_evaluation():
    with pytest.raises(ValueError, match=r"evaluation='map' must be one of unrolled, loop, vmap"):
        flatopt.replicated_sgd(_sgd(), 3, 0.1, evaluation="map")


def test_parle_with_one_update_a_round_by_hand():
    """N = 2, L = 1, against the recursion in numpy."""
    lr, gamma, rho, beta, past = 0.1, 0.3, 0.7, 0.9, 0.75
    tx = flatopt.parle(lr, gamma, rho, every=1, momentum=beta, averaging=past)
    start = np.array([[1.0, -2.0], [3.0, 0.5]])
    y, x, z = start.copy(), start.copy(), start.copy()
    v, big = np.zeros_like(y), np.zeros_like(y)
    with jax.enable_x64(True):
        params = jnp.asarray(start)
        state = tx.init(params)
        for _ in range(5):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
            d = y + gamma * (y - x)
            v = beta * v + d
            y = y - lr * (d + v)
            z = past * z + (1 - past) * y
            pull = (x - z) + rho * (x - z.mean(0))
            big = beta * big + pull
            y = y - lr * (pull + big)
            x = y.copy()
        np.testing.assert_allclose(params, y, rtol=1e-10)


def test_the_centre_of_one_replica_is_that_replica():
    params = cases.init_params()
    cases.assert_equal(flatopt.barycentre(flatopt.replicate_params(params, 1)), params)
