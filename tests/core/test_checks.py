"""Bad arguments: an error that names the argument, the value, the range and the mend."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._core import checks


@pytest.mark.parametrize(
    "value",
    ["0.1", "abc", 1j, {}, [0.1], None, fractions.Fraction(1, 2), optax.sgd(0.1)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match=r"rho=.* must be a finite number in \[0, inf\)"):
        flatopt.sam(value)


@pytest.mark.parametrize("value", [0.1, np.float32(0.1), jnp.array(0.1), np.array([0.1, 0.2]), 1])
def test_every_kind_of_number_is_taken(value):
    checks.check_number("rho", value, low=0.0)


def test_a_transformation_in_place_of_a_number_asks_for_the_order():
    with pytest.raises(TypeError, match="is the order of the arguments right"):
        flatopt.sam(optax.sgd(0.1))


def test_a_schedule_is_refused_where_none_is_taken():
    with pytest.raises(TypeError, match="A schedule is not taken here"):
        checks.check_number("beta", lambda step: 0.5, schedule_allowed=False)


def test_a_number_in_place_of_a_transformation_is_refused():
    with pytest.raises(TypeError, match=r"optimizer=0\.1 must be an optax transformation"):
        checks.as_transformation("optimizer", 0.1)


@pytest.mark.parametrize(
    ("grad_fn", "what"),
    [
        (lambda w, i: jnp.sum(w**2), "a single number, such as the loss"),
        (lambda w, i: (jnp.sum(w**2), 2 * w), r"a pair, such as \(value, grads\)"),
        (lambda w, i: {"w": w}, "something else"),
        (lambda w, i: w[:1], "something else"),
    ],
    ids=["loss", "pair", "structure", "shape"],
)
def test_a_grad_fn_that_returns_no_gradient_is_refused(grad_fn, what: str):
    tx, w = optax.chain(flatopt.sam(0.1), optax.sgd(0.1)), jnp.ones(2)
    with pytest.raises(TypeError, match=f"grad_fn must return the gradient alone.*{what}"):
        tx.update(w, tx.init(w), w, grad_fn=grad_fn)


def test_checked_gradients_cost_nothing():
    """The check looks at shapes while tracing: the program is the same."""
    w = jnp.ones(2)

    def program(grad_fn):
        return str(jax.make_jaxpr(lambda w: grad_fn(w, 0))(w))

    def grad_fn(w, _):
        return 2 * w

    assert program(checks.require_grad_fn("sam", grad_fn, w)) == program(grad_fn)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: flatopt.scale_to_norm(0.1, epsilon=0.0), r"epsilon=0.0 .* in \(0, inf\)"),
        (lambda: flatopt.scale_to_norm(0.1, epsilon=-1.0), r"epsilon=-1.0 .* in \(0, inf\)"),
        (lambda: flatopt.gadam(0.1, b1=optax.constant_schedule(0.9)), "b1=.* A schedule is not"),
        (lambda: flatopt.gadamx(0.1, partial=optax.constant_schedule(0.1)), "partial=.* schedule"),
        (lambda: flatopt.wasam(0.1, 0.1), r"optimizer=0.1 must be an optax transformation"),
        (lambda: flatopt.lookahead(0.1), r"optimizer=0.1 must be an optax transformation"),
        (lambda: flatopt.gradient_at(0.05), r"perturbation=0.05 must be an optax transformation"),
        (lambda: flatopt.msam(0.3, optax.sgd(0.1)), "is the order of the arguments right"),
    ],
)
def test_arguments_that_used_to_fail_deep_are_refused_by_name(make, error: str):
    with pytest.raises((TypeError, ValueError), match=error):
        make()
