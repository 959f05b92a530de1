"""Methods beside the least that their formulas need (`benchmarks.bare`): the same cost."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import bare, by_hand
from flatopt._core import tree_math

WIDTHS = (256, 256, 256, 10)
BATCH = 128  # So that products, not single entries, make up the operations.

# Bytes over those of the bare program, where they are more than 1.05. `vasso` and `sampa` hold what
# they had, too, until the new gradient is known to be finite. Replicas are joined into arrays, for
# `vmap` and meshes, and cut again for their gradients.
MORE_BYTES = {
    "vasso": 1.15,
    "sampa": 1.22,
    "replicated_sgd 3 replicas": 1.40,
}


def _params() -> Any:
    rng = np.random.default_rng(0)
    return [
        {
            "kernel": jnp.asarray(rng.normal(size=(m, n)) / np.sqrt(m), jnp.float32),
            "bias": jnp.zeros([n]),
        }
        for m, n in itertools.pairwise(WIDTHS)
    ]


def _loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _batch() -> Any:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(BATCH, WIDTHS[0])), jnp.float32)
    return x, jnp.asarray(rng.integers(0, 10, BATCH))


def _rarely(quantity: str) -> float:
    """What XLA counts for the branch of a norm that ordinary numbers never take."""
    plain, whole = (
        jax.jit(norm).lower(_params()).compile().cost_analysis()[quantity]
        for norm in (lambda tree: jnp.sqrt(tree_math.vdot(tree, tree)), tree_math.norm)
    )
    return whole - plain


def _norms(text: str) -> int:
    """How many norms a program takes: each has one such branch."""
    return text.count(" conditional(")


@pytest.mark.parametrize("program", bare.PROGRAMS, ids=lambda program: program.method)
def test_costs_what_the_bare_program_costs(program: bare.Bare):
    forms = by_hand.variants([program.method, f"{program.method}, bare"])
    ours, least = (
        by_hand.compiled(step(_loss)).lower(init(_params()), _batch()).compile()
        for step, init in forms.values()
    )
    norms = _norms(ours.as_text())
    for quantity, limit in (
        ("flops", 1.05),
        ("bytes accessed", MORE_BYTES.get(program.method, 1.05)),
    ):
        cost = ours.cost_analysis()[quantity] - norms * _rarely(quantity)
        assert cost <= limit * least.cost_analysis()[quantity]
