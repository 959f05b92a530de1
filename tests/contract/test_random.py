"""What every method that draws random numbers owes: any generator, and no device touched early."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import flatopt
from tests import cases

RANDOM = list(
    {
        case.factory: case
        for case in reversed(cases.CASES)
        if "key" in inspect.signature(getattr(flatopt, case.factory)).parameters
        and case.kwargs.get("number") != 1  # A single replica has no noise.
        and case.kwargs.get("num_steps") != 0
    }.values()
)
by_name = pytest.mark.parametrize("case", RANDOM, ids=lambda case: case.name)


GENERATORS = ["rbg"] + [
    pytest.param(name, marks=pytest.mark.exhaustive) for name in ("threefry2x32", "unsafe_rbg")
]


@by_name
@pytest.mark.parametrize("generator", GENERATORS)
def test_keys_of_every_generator(case: cases.Case, generator: str):
    key = jax.random.key(3, impl=generator)
    tx = case.build(key=key)
    params, opt_state = cases.run(tx, steps=2)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
    # Raw data in the state, which every checkpoint format can hold.
    leaves = jax.tree.leaves(opt_state)
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves)
    # Another key draws something else, be it for weights in the state.
    other = cases.run(case.build(key=jax.random.key(4, impl=generator)), steps=2)
    pairs = zip(jax.tree.leaves((params, opt_state)), jax.tree.leaves(other), strict=True)
    assert any((x != y).any() for x, y in pairs if jnp.issubdtype(x.dtype, jnp.floating))


@by_name
def test_raw_data_of_a_key_are_the_key(case: cases.Case):
    """So is an int seed: the state begins with the same data."""
    key, params = jax.random.key(5), cases.init_params()
    typed, raw, seed = (
        case.build(key=form).init(params) for form in (key, jax.random.key_data(key), 5)
    )
    cases.assert_equal(raw, typed)
    cases.assert_equal(seed, typed)


@pytest.mark.exhaustive
@by_name
def test_raw_data_of_a_key_draw_what_the_key_draws(case: cases.Case):
    key = jax.random.key(5)
    typed, _ = cases.run(case.build(key=key), steps=2)
    raw, _ = cases.run(case.build(key=jax.random.key_data(key)), steps=2)
    seed, _ = cases.run(case.build(key=5), steps=2)
    cases.assert_equal(raw, typed)
    cases.assert_equal(seed, typed)


def test_making_an_optimiser_does_not_set_up_the_devices():
    """So that a module may hold one before `jax.distributed.initialize`."""
    code = """
import jax, flatopt
from tests import cases
from tests.contract.test_random import RANDOM
for case in RANDOM:
    case.build()
assert not jax._src.xla_bridge.backends_are_initialized(), "a device has been set up"
print(len(RANDOM))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == str(len(RANDOM)), result.stderr[-500:]
