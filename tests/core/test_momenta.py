"""Momenta are found by the names of their fields: all of them, and nothing else."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._core import momenta
from tests import cases

PARAMS = {"kernel": jnp.full((4, 6), 0.5), "bias": jnp.linspace(0.1, 0.3, 3)}
# Every optimiser of optax with momenta, as a whole chain.
OPTIMISERS = {
    "adabelief": optax.adabelief(0.1),
    "adadelta": optax.adadelta(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "adam": optax.adam(0.1),
    "adamax": optax.adamax(0.1),
    "adamw": optax.adamw(0.1),
    "adan": optax.adan(0.1),
    "ademamix": optax.contrib.ademamix(0.1),
    "adopt": optax.contrib.adopt(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "dadapt_adamw": optax.contrib.dadapt_adamw(),
    "ema": optax.chain(optax.ema(0.9), optax.scale(-0.1)),
    "gadamx": flatopt.gadamx(0.1),
    "lamb": optax.lamb(0.1),
    "lars": optax.lars(0.1),
    "lbfgs": optax.chain(optax.scale_by_lbfgs(), optax.scale(-0.1)),
    "lion": optax.lion(0.1),
    "madgrad": optax.contrib.madgrad(0.1),
    "momo": optax.contrib.momo(0.1),
    "momo_adam": optax.contrib.momo_adam(0.1),
    "muon": optax.contrib.muon(0.1),
    "nadamw": optax.nadamw(0.1),
    "novograd": optax.novograd(0.1),
    "optimistic": optax.optimistic_gradient_descent(0.1),
    "prodigy": optax.contrib.prodigy(),
    "radam": optax.radam(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9),
    "rmsprop_centred": optax.rmsprop(0.1, centered=True),
    "rprop": optax.rprop(0.1),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "signum": optax.signum(0.1),
    "simplified_ademamix": optax.contrib.simplified_ademamix(0.1),
    "sm3": optax.sm3(0.1),
    "sophia": optax.contrib.sophia(0.1),
    "yogi": optax.yogi(0.1),
}
# What is no memory of gradients, and goes on: estimates of a learning rate, keys of noise.
GOES_ON = {
    "ProdigyState": {"grad_sum", "params0", "estim_lr", "numerator_weighted"},
    "DAdaptAdamWState": {"grad_sum", "estim_lr", "numerator_weighted"},
    "MomoState": {"lb"},
    "MomoAdamState": {"lb"},
    "HutchinsonState": {"key"},
    "ScaleByScheduleState": {"count"},
    "AverageState": {"step", "total_weight", "mean"},
}


def _named(state: Any) -> Iterator[Any]:
    """The named tuples in a state, from the outside in."""
    if hasattr(state, "_fields"):
        yield state
    children = [state[k] for k in sorted(state)] if isinstance(state, dict) else state
    if isinstance(children, tuple | list):
        for child in children:
            yield from _named(child)


def _loss(params: Any) -> jax.Array:
    return 0.5 * sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(params))


def _trained(tx: Any, params: Any = PARAMS, steps: int = 3) -> tuple[Any, Any]:
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(_loss)(params)
        updates, state = tx.update(grads, state, params, value=value, obj_fn=_loss)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def _same(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_momentum_of_optax_starts_anew(name: str):
    """Field by field: what a reset leaves as it was is on the list of what goes on."""
    tx = OPTIMISERS[name]
    params, state = _trained(tx)
    fresh = tx.init(params)
    renewed = momenta.reset(state, fresh, params)
    assert jax.tree.structure(renewed) == jax.tree.structure(state)
    changed = False
    for own, new, start in zip(_named(state), _named(renewed), _named(fresh), strict=True):
        for field in own._fields:
            mine, now, first = (getattr(s, field) for s in (own, new, start))
            if any(_named(mine)):
                continue
            goes_on = field in GOES_ON.get(type(own).__name__, ())
            assert _same(now, mine if goes_on else first), f"{type(own).__name__}.{field}"
            changed |= not _same(now, mine)
    assert changed


@pytest.mark.parametrize("name", OPTIMISERS)
def test_single_entries_of_every_momentum_start_anew(name: str):
    """Of what has the shape of its parameter, or is several of them; all else goes on."""
    tx = OPTIMISERS[name]
    params, state = _trained(tx)
    fresh = tx.init(params)
    chosen = jnp.zeros((4, 6), bool).at[1, 2].set(True)
    entries = {"kernel": chosen, "bias": optax.MaskedNode()}
    renewed = momenta.reset_entries(state, fresh, entries, params)
    assert jax.tree.structure(renewed) == jax.tree.structure(state)
    reset = momenta.reset(state, fresh, params)
    paths = jax.tree_util.tree_leaves_with_path(state)
    others = map(jax.tree.leaves, (renewed, reset, fresh))
    found = 0
    for (path, own), now, gone, first in zip(paths, *others, strict=True):
        is_kernel = own.shape[-2:] == (4, 6) and "kernel" in jax.tree_util.keystr(path)
        # What a whole reset takes and is no point of the weights: those have no zero to go back to.
        if is_kernel and now.dtype == first.dtype and not _same(gone, own) and not _same(now, own):
            found += 1
            np.testing.assert_array_equal(now, jnp.where(chosen, first, own))
        else:
            np.testing.assert_array_equal(now, own)
    has_entries = any(x.shape[-2:] == (4, 6) for x in jax.tree.leaves(_momenta(state)))
    assert bool(found) == has_entries


def _momenta(state: Any) -> list[Any]:
    """The fields that are momenta, of every state inside."""
    return [getattr(s, f) for s in _named(state) for f in s._fields if momenta._is_momentum(f)]


def test_entries_below_masks_of_partitions_start_anew():
    rates = {"kernel": optax.adam(0.1), "bias": optax.sgd(0.1, momentum=0.9)}
    tx = optax.partition(rates, {"kernel": "kernel", "bias": "bias"})
    params, state = _trained(tx)
    chosen = jnp.ones((4, 6), bool)
    entries = {"kernel": chosen, "bias": optax.MaskedNode()}
    renewed = momenta.reset_entries(state, tx.init(params), entries, params)
    adam = renewed.inner_states["kernel"].inner_state[0]
    assert not jnp.any(adam.mu["kernel"])
    assert adam.count == 3
    assert jnp.all(renewed.inner_states["bias"].inner_state[0].trace["bias"])


def test_no_optimiser_with_momenta_is_missing():
    """Whatever transformation of optax keeps a field that is a momentum stands in the table."""
    known = {type(s) for tx in OPTIMISERS.values() for s in _named(tx.init(PARAMS))}
    found = set()
    for module in (optax, optax.contrib):
        for name in (n for n in dir(module) if n.startswith("scale_by_")):
            try:
                found |= {type(s) for s in _named(getattr(module, name)().init(PARAMS))}
            except TypeError:  # It needs arguments: an optimiser of the table has it.
                continue
    assert not {t.__name__ for t in found - known if momenta.NAMES & set(t._fields)}


def test_the_count_of_a_momentum_starts_anew_and_that_of_a_schedule_goes_on():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=schedule)
    params, state = _trained(optax.chain(optax.clip(1.0), tx))
    renewed = momenta.reset(state, optax.chain(optax.clip(1.0), tx).init(params), params)[1]
    assert renewed.count == 3
    np.testing.assert_allclose(renewed.hyperparams["learning_rate"], 0.08, rtol=1e-5)
    (adam,) = (s for s in _named(renewed) if isinstance(s, optax.ScaleByAdamState))
    assert adam.count == 0
    cases.assert_equal(adam.mu, optax.tree.zeros_like(params))
    params, state = _trained(optax.sgd(schedule, momentum=0.9))
    renewed = momenta.reset(state, optax.sgd(schedule, momentum=0.9).init(params), params)
    assert renewed[1].count == 3
    assert _same(renewed[0].trace, optax.tree.zeros_like(params))


def test_an_injected_rate_is_no_momentum_where_the_parameters_are_one_number():
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25, momentum=0.5)
    params, state = _trained(tx, jnp.float32(3.0))
    renewed = momenta.reset(state, tx.init(params), params)
    cases.assert_equal(renewed.hyperparams, state.hyperparams)
    assert optax.tree.get(state, "trace") != 0
    assert optax.tree.get(renewed, "trace") == 0
    found = momenta.find_first(state, params, "msam")
    assert found == optax.tree.get(state, "trace")


RESETS = {
    "lookahead": lambda tx: flatopt.lookahead(tx, every=4, reset_state=True),
    "periodic_swa": lambda tx: flatopt.periodic_swa(tx, 4),
}


@pytest.mark.parametrize("wrap", RESETS.values(), ids=RESETS)
def test_an_average_inside_keeps_its_mean_and_its_count(wrap: Any):
    for average in (flatopt.swa(), flatopt.params_ema(0.5), flatopt.lawa(2), flatopt.swag(2)):
        tx = optax.chain(optax.adam(0.1), average)
        _, state = _trained(wrap(tx), steps=4)
        _, plain = _trained(tx, steps=4)
        cases.assert_close(state.inner_state[1], plain[1])
        moments = state.inner_state[0][0]
        assert moments.count == 0
        assert not any(x.any() for x in jax.tree.leaves((moments.mu, moments.nu)))


@pytest.mark.parametrize("wrap", RESETS.values(), ids=RESETS)
def test_a_direction_that_a_stage_remembers_is_no_momentum(wrap: Any):
    tx = optax.chain(flatopt.vasso(0.05), cases.sgd())
    _, state = cases.run(wrap(tx), steps=4)
    _, plain = cases.run(tx, steps=4)
    cases.assert_close(state.inner_state[0], plain[0])
    assert not any(x.any() for x in jax.tree.leaves(state.inner_state[1][0].trace))


def test_a_schedule_counted_beside_a_momentum_goes_on():
    """A step of flatopt counts its schedules by `step`, and the bias of its momenta never so."""
    tx = flatopt.entropy_sgd(0.1, 2, 0.01)
    params, state = cases.run(tx, steps=3)
    renewed = momenta.reset(state, tx.init(params), params)
    steps = [s.step for s in _named(renewed) if "trace" in s._fields and "step" in s._fields]
    assert steps
    assert all(step == 3 for step in steps)


class Gaussian(NamedTuple):
    """Parameters with the name of a momentum."""

    mu: jax.Array
    rho: jax.Array


@pytest.mark.parametrize("wrap", RESETS.values(), ids=RESETS)
def test_parameters_may_be_called_like_momenta(wrap: Any):
    params = Gaussian(jnp.ones(3), jnp.zeros(3))
    tx = optax.chain(optax.adam(0.1), flatopt.swa())
    _, state = _trained(wrap(tx), params, steps=4)
    _, plain = _trained(tx, params, steps=4)
    cases.assert_close(state.inner_state[1], plain[1])
    found = momenta.find_first(plain, params, "msam")
    cases.assert_equal(found, plain[0][0].mu)


@pytest.mark.parametrize("wrap", RESETS.values(), ids=RESETS)
def test_a_reset_reaches_into_masks_partitions_and_single_arrays(wrap: Any):
    labels = {"hidden": "sgd", "out": "adam", "temperature": "sgd"}
    tx = optax.partition({"sgd": cases.sgd(), "adam": optax.adam(0.01)}, labels)
    _, state = cases.run(wrap(tx), steps=4)
    moving = [
        x for x in jax.tree.leaves(state.inner_state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert len(moving) == 3 + 2 * 2
    assert all(not x.any() for x in moving)

    masked = optax.masked(cases.sgd(), {"hidden": True, "out": False, "temperature": True})
    _, state = cases.run(wrap(optax.chain(masked, optax.scale(0.1))), steps=4)
    assert not any(x.any() for x in jax.tree.leaves(state.inner_state))

    tx, w = wrap(cases.sgd()), jnp.float32(1.0)
    _, state = _trained(tx, w, steps=4)
    assert optax.tree.get(state.inner_state, "trace") == 0


@pytest.mark.parametrize("wrap", RESETS.values(), ids=RESETS)
def test_under_multi_steps_the_sum_of_gradients_goes_on(wrap: Any):
    tx = optax.MultiSteps(cases.sgd(), 3).gradient_transformation()
    _, state = cases.run(wrap(tx), steps=4)  # The reset falls between two whole steps.
    _, plain = cases.run(tx, steps=4)
    inner = state.inner_state
    assert inner.mini_step == plain.mini_step == 1
    cases.assert_close(inner.acc_grads, plain.acc_grads, rtol=0.5, atol=0.5)
    assert any(x.any() for x in jax.tree.leaves(inner.acc_grads))
    assert not any(x.any() for x in jax.tree.leaves(inner.inner_opt_state[0].trace))


@pytest.mark.parametrize("name", ["adam", "sgd", "muon", "rmsprop", "sm3"])
def test_towards_goes_a_share_of_the_way(name: str):
    tx = OPTIMISERS[name]
    params, state = _trained(tx)
    fresh = tx.init(params)
    moved = momenta.towards(state, fresh, 0.25, params)
    for own, new in zip(_named(state), _named(moved), strict=True):
        for field in own._fields:
            mine = getattr(own, field)
            if any(_named(mine)):
                continue
            share = 0.75 if field in momenta.NAMES else 1  # Counts and schedules stay.
            expected = jax.tree.map(lambda x, share=share: share * x, mine)
            cases.assert_close(getattr(new, field), expected)


def test_what_tunes_an_optimiser_around_it_goes_on():
    tx = optax.contrib.mechanize(optax.sgd(0.1, momentum=0.9))
    params, state = _trained(tx)
    renewed = momenta.reset(state, tx.init(params), params)
    for field in ("r", "m", "v", "s", "count"):
        assert _same(getattr(renewed, field), getattr(state, field))
    assert _same(optax.tree.get(renewed, "trace"), optax.tree.zeros_like(params))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("wrap", [lambda tx: flatopt.msam(tx, 0.1), flatopt.record_cosine])
def test_the_momenta_of_several_replicas_are_refused(wrap: Any, number: int):
    """Else the parameters would take another shape, without an error."""
    tx = wrap(flatopt.replicated_sgd(cases.sgd(), number, 0.5))
    with pytest.raises(ValueError, match="found momenta of other shapes than the parameters"):
        tx.init(cases.init_params())


def test_what_holds_no_array_is_no_momentum():
    tx = flatopt.msam(flatopt.entropy_sgd(0.1, 2, 0.01, form="lua"), 0.1)
    with pytest.raises(ValueError, match="found no momentum in the state"):
        tx.init(cases.init_params())
