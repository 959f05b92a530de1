"""What averages share: bytes of the state, accumulators, devices, counters."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import flatopt
from tests import cases
from tests.averaging.feed import bytes_of


@pytest.mark.parametrize(
    ("stage", "copies"),
    [
        (flatopt.swa(), 1),
        (flatopt.params_ema(0.99), 1),
        (flatopt.power_ema(2.0), 1),
        (flatopt.lawa(5), 5),
        (flatopt.snapshots(3), 3),
        (flatopt.swag(4), 2 + 4),
    ],
)
def test_bytes_of_the_state(stage: Any, copies: int):
    params = cases.init_params()
    assert bytes_of(stage.init(params)) - copies * bytes_of(params) in range(17)


@pytest.mark.parametrize(
    ("wrap", "copies"),
    [
        (lambda tx: flatopt.lookahead(tx), 1),
        (lambda tx: flatopt.lookahead(tx, reset_state=True), 1),
        (lambda tx: flatopt.lookahead(tx, pull_back=True), 2),  # SGD's momentum is the second.
        (lambda tx: flatopt.periodic_swa(tx, 10), 1),
    ],
)
def test_bytes_that_a_wrapper_adds(wrap: Any, copies: int):
    params = cases.init_params()
    extra = bytes_of(wrap(cases.sgd()).init(params)) - bytes_of(cases.sgd().init(params))
    assert extra - copies * bytes_of(params) in range(17)


def test_half_precision_parameters_have_a_float32_average_and_half_precision_snapshots():
    params = cases.init_params(jnp.bfloat16)
    assert bytes_of(flatopt.swa().init(params)) - 2 * bytes_of(params) in range(17)
    assert bytes_of(flatopt.lookahead(cases.sgd()).init(params).slow) == 2 * bytes_of(params)
    assert bytes_of(flatopt.lawa(3).init(params)) - 3 * bytes_of(params) in range(17)


def test_stacks_lie_over_the_devices_as_the_parameters_do():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("model")
    params = jax.device_put(jnp.ones([16, 2]), jax.sharding.NamedSharding(mesh, spec))
    expected = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    for stage, field in ((flatopt.snapshots(3), "ring"), (flatopt.swag(3), "deviations")):
        state = stage.init(params)
        assert getattr(state, field).sharding.is_equivalent_to(expected, 3)
        _, state = jax.jit(stage.update)(params, state, params)
        assert getattr(state, field).sharding.is_equivalent_to(expected, 3)
