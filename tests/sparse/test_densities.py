"""How many weights live in which leaf: the recorded cases, the budget, what is left out."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatopt
from flatopt._sparse.densities import number_alive, uniform_sparsities
from tests.replay import RTOL, Golden, replays

SHAPES = {
    "conv": jax.ShapeDtypeStruct((3, 3, 16, 32), jnp.float32),
    "dense": jax.ShapeDtypeStruct((512, 10), jnp.float32),
    "bias": jax.ShapeDtypeStruct((10,), jnp.float32),
}


@replays("erk")
def test_replays(golden: Golden) -> None:
    """The distributions that the authors' functions computed, layer by layer."""
    cases = json.loads(str(golden.arrays["meta"]))["cases"]
    assert cases
    for i, case in enumerate(cases):
        names = case["names"]
        shapes = map(tuple, case["shapes"])
        params = {
            k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in zip(names, shapes, strict=True)
        }
        custom = {k: (case["custom"] or {}).get(k) for k in names}
        found = flatopt.erk_sparsities(
            params, case["sparsity"], mask=True, custom=custom, power=case["power"]
        )
        recorded = golden.arrays[f"case{i}/sparsities"]
        np.testing.assert_allclose([found[k] for k in names], recorded, RTOL, 1e-12)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_all_leaves_together_keep_their_budget(sparsity: float, power: float):
    found = flatopt.erk_sparsities(SHAPES, sparsity, power=power)
    sizes = {k: math.prod(SHAPES[k].shape) for k in ("conv", "dense")}
    budget = sum(number_alive(sparsity, n) for n in sizes.values())
    assert sum((1 - found[k]) * n for k, n in sizes.items()) == pytest.approx(budget, rel=1e-9)
    assert all(0 <= found[k] <= 1 for k in sizes)


def test_small_leaves_are_denser_and_power_zero_is_uniform():
    erk = flatopt.erk_sparsities(SHAPES, 0.9)
    assert erk["dense"] < 0.9 < erk["conv"]
    flat = flatopt.erk_sparsities(SHAPES, 0.9, power=0.0)
    assert flat["conv"] == pytest.approx(flat["dense"])
    assert uniform_sparsities(SHAPES, 0.9) == {"conv": 0.9, "dense": 0.9, "bias": None}


def test_what_is_not_chosen_has_no_sparsity_and_what_is_given_keeps_it():
    assert flatopt.erk_sparsities(SHAPES, 0.9)["bias"] is None
    custom = {"conv": None, "dense": 0.25, "bias": None}
    found = flatopt.erk_sparsities(SHAPES, 0.9, custom=custom)
    alone = flatopt.erk_sparsities({"conv": SHAPES["conv"]}, 0.9)
    assert found == {"conv": alone["conv"], "dense": 0.25, "bias": None}
    only_dense = lambda params: {k: k == "dense" for k in params}  # noqa: E731
    assert flatopt.erk_sparsities(SHAPES, 0.9, mask=only_dense)["conv"] is None


def test_trees_without_sparse_leaves_have_no_sparsities():
    assert flatopt.erk_sparsities({}, 0.9) == {}
    assert flatopt.erk_sparsities({"a": None, "b": jnp.ones(3)}, 0.9) == {"a": None, "b": None}
    assert flatopt.erk_sparsities(jnp.zeros((0, 3)), 0.9) == 0.0
    assert flatopt.mask_density({}) == 1.0


def test_no_leaf_is_emptied_of_weights():
    assert [number_alive(s, 3) for s in (0.0, 0.5, 0.999999)] == [3, 2, 1]
    assert number_alive(0.9, 0) == 0


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_a_sparsity_out_of_range_says_so(sparsity: float):
    with pytest.raises(ValueError, match=r"sparsity=.* out of range: it must be .* \[0, 1\)"):
        flatopt.erk_sparsities(SHAPES, sparsity)


def test_the_density_of_a_mask_counts_masks_alone():
    mask = {"a": jnp.array([True, False, False, False]), "b": jnp.array([[True, True]])}
    assert float(flatopt.mask_density(mask)) == pytest.approx(0.5)
    assert float(flatopt.mask_density(mask["a"])) == 0.25
