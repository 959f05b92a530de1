"""Parameters that live at a displaced point."""

import numpy as np
import optax
import pytest

import flatopt
from tests import cases


def test_without_a_displacement_it_is_the_optimiser():
    held = flatopt.hold_perturbed(cases.sgd(), flatopt.scale_to_norm(0.0))
    cases.assert_close(cases.run(held)[0], cases.run(cases.sgd())[0])


def test_the_centre_is_an_offset_of_length_rho_away():
    held = flatopt.hold_perturbed(cases.sgd(), flatopt.scale_to_norm(0.3))
    params, state = cases.run(held)
    centre = flatopt.eval_params(state, params)
    apart = optax.tree.norm(optax.tree.sub(params, centre))
    np.testing.assert_allclose(apart, 0.3, rtol=1e-4)


def test_both_arguments_are_transformations():
    with pytest.raises(TypeError, match=r"optimizer=0\.1 must be an optax transformation"):
        flatopt.hold_perturbed(0.1, flatopt.scale_to_norm(0.3))
    with pytest.raises(TypeError, match=r"perturbation=0\.3 must be an optax transformation"):
        flatopt.hold_perturbed(cases.sgd(), 0.3)
