"""Eight devices give what one device gives: sharded arrays, explicit axes, `shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatopt
from tests import cases
from tests.cases import Case

P = PartitionSpec
MODEL = {
    "hidden": {"kernel": P(None, "model"), "bias": P("model")},
    "out": {"kernel": P("model", None), "bias": P()},
    "temperature": P(),
}


def _mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def _place(mesh: jax.sharding.Mesh, specs, tree):
    return jax.tree.map(
        lambda s, x: jax.device_put(x, NamedSharding(mesh, s)),
        specs,
        tree,
        is_leaf=lambda s: isinstance(s, PartitionSpec),
    )


def _gathered_loss(params, batch):
    """Explicit axes want the sharding of each product said: gather the weights, as FSDP does."""
    return cases.loss_fn(jax.sharding.reshard(params, P()), batch)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


EXPLICIT = pytest.param(AxisType.Explicit, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("kind", [AxisType.Auto, EXPLICIT])
@pytest.mark.parametrize("case", cases.main_cases())
def test_sharded_parameters_equal_one_device(case: Case, kind: AxisType):
    """The norm is that of all shards together, and the state lies as the parameters lie."""
    tx, mesh, explicit = case.build(), _mesh(kind), kind == AxisType.Explicit
    with jax.set_mesh(mesh):
        params = _place(mesh, MODEL, cases.init_params())
        opt_state = tx.init(params)
        step = jax.jit(cases.train_step(tx, _gathered_loss if explicit else cases.loss_fn))
        for i in range(4):
            batch = _place(mesh, (P("data", None),) * 2, cases.make_batch(i))
            params, opt_state = step(params, opt_state, batch)
        evaluated = jax.jit(flatopt.eval_params)(opt_state, params)
    expected, state = cases.run(tx, steps=4)
    cases.assert_close(params, expected)
    cases.assert_close(evaluated, flatopt.eval_params(state, expected))
    kernels = [x for x in jax.tree.leaves(opt_state) if x.shape == (4, 8)]
    for kernel in kernels:
        assert kernel.sharding.is_equivalent_to(params["hidden"]["kernel"].sharding, 2)


@pytest.mark.parametrize("case", cases.main_cases())
def test_shardings_are_types_on_explicit_axes(case: Case):
    """Traced alone: there every array says where it lies, and a step changes nothing of it."""
    tx, mesh = case.build(), _mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = _place(mesh, MODEL, cases.init_params())
        batch = _place(mesh, (P("data", None),) * 2, cases.make_batch())
        before = params, tx.init(params)
        step = cases.train_step(tx, _gathered_loss)
        after = jax.eval_shape(step, *jax.eval_shape(step, *before, batch), batch)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert new.sharding.spec == jax.typeof(old).sharding.spec


@pytest.mark.parametrize("case", cases.cases(copies=lambda c: c.copies > 0))
def test_fresh_state_lies_as_the_parameters_lie(case: Case):
    mesh = _mesh(AxisType.Auto)
    params = _place(mesh, MODEL, cases.init_params())
    # Behind a leading axis, if the state holds several.
    kernels = [x for x in jax.tree.leaves(case.build().init(params)) if x.shape[-2:] == (4, 8)]
    assert kernels
    for kernel in kernels:
        spec = P(*[None] * (kernel.ndim - 2), *MODEL["hidden"]["kernel"])
        assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, spec), kernel.ndim)


@pytest.mark.parametrize("case", cases.main_cases(sees=lambda c: c.kind != "average"))
def test_shard_map_with_pmean_equals_the_whole_batch(case: Case):
    """`pmean` on both gradients: the method of the global batch."""
    tx = case.build()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(params, opt_state, batch):
        def grad(params, _=0):
            return jax.lax.pmean(jax.grad(cases.loss_fn)(params, batch), "data")

        def value(params):
            return jax.lax.pmean(cases.loss_fn(params, batch), "data")

        grad_fn = cases.GradientByHand(grad, value)
        updates, opt_state = tx.update(
            grad(params), opt_state, params, value=value(params), grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), opt_state

    mapped = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False
        )
    )
    params = cases.init_params()
    opt_state = tx.init(params)
    for i in range(4):
        params, opt_state = mapped(params, opt_state, cases.make_batch(i))
    cases.assert_close(params, cases.run(tx, steps=4)[0])


def test_where_pmean_stands_decides_m_sharpness():
    """Inside `grad_fn` only: each device ascends on its own examples, as in m-SAM."""
    stage = flatopt.sam(0.5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, batch = cases.init_params(), cases.make_batch(size=16)

    def step(params, batch):
        grads = jax.grad(cases.loss_fn)(params, batch)
        updates, _ = stage.update(
            grads,
            stage.init(params),
            params,
            grad_fn=lambda p, i: jax.lax.pmean(jax.grad(cases.loss_fn)(p, batch), "data"),
        )
        return updates

    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
    actual = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(params, batch)

    def shard_gradient(x, y):
        grads = jax.grad(cases.loss_fn)(params, (x, y))
        norm = optax.tree.norm(grads)
        return jax.grad(cases.loss_fn)(
            jax.tree.map(lambda p, g: p + 0.5 * g / norm, params, grads), (x, y)
        )

    groups = [x.reshape(8, 2, -1) for x in batch]
    expected = jax.tree.map(lambda g: jnp.mean(g, 0), jax.vmap(shard_gradient)(*groups))
    cases.assert_close(actual, expected)
    whole, _ = stage.update(
        jax.grad(cases.loss_fn)(params, batch),
        stage.init(params),
        params,
        grad_fn=flatopt.make_grad_fn(cases.loss_fn, batch),
    )
    difference = np.abs(whole["hidden"]["kernel"] - expected["hidden"]["kernel"]).max()
    assert difference > 1e-3  # Another method than SAM on the whole batch.
