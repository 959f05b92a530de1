"""Every method by its name: what the list says of it is so."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import flatopt
from tests import cases

METHODS = flatopt.methods()


def _case(name: str) -> cases.Case:
    """The plain form of a method."""
    return next(case for case in cases.CASES if case.factory == name)


def _arguments(name: str) -> dict[str, object]:
    return {key: value for key, value in _case(name).kwargs.items() if key != "optimizer"}


def _made(name: str) -> optax.GradientTransformationExtraArgs:
    """The method beside SGD, chosen by a string."""
    method = METHODS[name]
    if method.kind == "optimizer":
        return method.factory(**_arguments(name))
    tx = method.around(cases.sgd(), **_arguments(name))
    return cases.with_statistics(tx) if "stats_fn" in method.needs else tx


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_public_factory_and_its_cost_is_told(name: str):
    method = METHODS[name]
    assert method.name == name
    assert method.factory is getattr(flatopt, name)
    assert "gradient" in method.cost
    assert "copies" in method.cost or "copy" in method.cost


@pytest.mark.parametrize("name", METHODS)
def test_what_takes_an_optimiser_is_a_wrapper(name: str):
    takes = "optimizer" in inspect.signature(METHODS[name].factory).parameters
    assert takes == (METHODS[name].kind == "wrapper")


@pytest.mark.parametrize("name", METHODS)
def test_around_an_optimiser_it_is_what_one_writes_by_hand(name: str):
    cases.assert_equal(cases.run(_made(name)), _case(name).trained)


@pytest.mark.parametrize("name", METHODS)
def test_it_needs_a_gradient_function_where_the_list_says_so(name: str):
    params = cases.init_params()
    grads = jax.grad(cases.loss_fn)(params, cases.make_batch())
    tx = _made(name)
    if "grad_fn" in METHODS[name].needs:
        with pytest.raises((ValueError, TypeError), match="grad_fn"):
            tx.update(grads, tx.init(params), params, value=jnp.ones([]))
    else:
        tx.update(grads, tx.init(params), params, value=jnp.ones([]))


@pytest.mark.parametrize("name", METHODS)
def test_it_needs_the_loss_where_the_list_says_so(name: str):
    params = cases.init_params()
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, cases.make_batch())
    tx, grads = _made(name), grad_fn(params)
    if "value" in METHODS[name].needs:
        with pytest.raises(ValueError, match="value"):
            tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    else:
        tx.update(grads, tx.init(params), params, grad_fn=grad_fn)


def test_a_whole_optimiser_goes_around_none():
    with pytest.raises(ValueError, match=r"entropy_sgd is an optimiser itself"):
        METHODS["entropy_sgd"].around(cases.sgd(), learning_rate=0.1)


def test_the_list_is_read_only():
    with pytest.raises(TypeError):
        METHODS["sam"] = METHODS["asam"]  # type: ignore[index]
