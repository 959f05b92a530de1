"""No method gathers a parameter: what each compiled step, fully sharded, sends between devices."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests import cases
from tests.cases import Case

P = PartitionSpec
DEVICES = 8
# They multiply whole matrices, as Muon does, whose step gathers them too.
OF_WHOLE_MATRICES = ("scale_to_spectral_norm", "scale_by_kfac")
# Each leaf is cut over all devices, along its first or its last axis.
SHAPES = {"kernel": ((16, 24), P("data")), "out": ((24, 16), P(None, "data"))}
SHAPES |= {"bias": ((24,), P("data")), "scale": ((), P())}
SMALLEST = 24  # Numbers of the smallest leaf that is cut.
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\("
)


def _step(tx):
    """A step on half the square norm: its own gradient asks nothing of other devices."""
    grad_fn = cases.GradientByHand(lambda p, i: jax.tree.map(lambda x: 0.5 * x, p))

    tx = optax.with_extra_args_support(tx)

    def step(params, opt_state):
        extra = {"grad_fn": grad_fn, "value": jnp.float32(1)}
        updates, opt_state = tx.update(grad_fn(params, 0), opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    return step


def collectives(tx) -> list[tuple[str, int]]:
    """Kind and number of entries of what a compiled step sends."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    params = {
        name: jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        for name, (shape, spec) in SHAPES.items()
    }
    text = jax.jit(_step(tx)).lower(params, tx.init(params)).compile().as_text()
    return [(kind, _entries(shape)) for shape, kind in _COLLECTIVE.findall(text)]


def _entries(shapes: str) -> int:
    """Of the largest array."""
    found = re.findall(r"\w+\[([\d,]*)\]", shapes)
    return max(math.prod(int(n) for n in shape.split(",") if n) for shape in found)


def test_what_is_sent_is_seen():
    """A sort gathers, a norm does not: else these tests could not fail."""
    sort = optax.stateless(lambda g, _: jax.tree.map(lambda x: jnp.sort(x, 0) if x.ndim else x, g))
    assert any(size >= SMALLEST for kind, size in collectives(sort) if kind != "all-reduce")
    assert collectives(cases.sgd()) == []
    assert set(collectives(optax.contrib.muon(0.1))) >= {("all-gather", 384)}


def _spreads(case: Case) -> bool:
    return case.factory not in OF_WHOLE_MATRICES


@pytest.mark.parametrize("case", cases.main_cases(spreads=_spreads))
def test_no_parameter_is_gathered(case: Case):
    """Sums alone go between devices: of a leaf one number, or one a unit of its layer."""
    for kind, size in collectives(case.build()):
        assert kind == "all-reduce"
        assert size <= SMALLEST


@pytest.mark.parametrize("name", ["sam", "msam", "msam_sgd"])
def test_the_norm_is_all_that_is_sent(name: str):
    """The second sum is that of the branch for huge and tiny gradients."""
    case = next(c for c in cases.CASES if c.name == name)
    assert collectives(case.build()) == [("all-reduce", 1)] * 2
