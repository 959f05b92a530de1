"""Training steps with flatopt, and those that a user would write or take instead.

A step maps `(carry, batch)` to the next carry, `(params, opt_state)`, and is compiled with its
carry donated.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import flatopt
from benchmarks import bare
from benchmarks.methods import (
    EMA_DECAY,
    EVERY,
    METHODS,
    MOMENTUM,
    RATE,
    RHO,
    Optimizer,
    sgd,
)

ALPHA = 0.5  # Of LookSAM.

Carry = Any
Step = Callable[[Carry, Any], Carry]
LossFn = Callable[..., jax.Array]


class Alternative(NamedTuple):
    """Another way to take the step of a method.

    Attributes:
      name: as the tables call it.
      method: the flatopt method that it stands beside.
      step: from a loss to the step, not compiled.
      init: from parameters to the carry.
    """

    name: str
    method: str
    step: Callable[[LossFn], Step]
    init: Callable[[Any], Carry]


def compiled(step: Step) -> Any:
    """The step, jitted; the old carry gives its memory to the new one."""
    return jax.jit(step, donate_argnums=0)


def fresh_carry(init: Callable[[Any], Carry], params: Any) -> Carry:
    """A carry of its own: some states hold the parameters themselves, which forbids donation."""
    return jax.tree.map(jnp.copy, init(params))


def with_flatopt(tx: Optimizer, loss_fn: LossFn) -> Step:
    """The step of a training loop with flatopt, as README shows it."""
    tx = optax.with_extra_args_support(tx)

    def step(carry: Carry, batch: Any) -> Carry:
        params, opt_state = carry
        grad_fn = flatopt.make_grad_fn(loss_fn, *batch)
        loss, grads = grad_fn.value_and_grad(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    return step


def init_of(tx: Optimizer) -> Callable[[Any], Carry]:
    """The carry of `with_flatopt`."""
    return lambda params: (params, tx.init(params))


def sam_one_graph(loss_fn: LossFn) -> Step:
    """The form of flatopt that compiles the model once for both points."""
    value_and_grad = flatopt.sam_value_and_grad(loss_fn, flatopt.scale_to_norm(RHO))
    optimizer = sgd()

    def step(carry: Carry, batch: Any) -> Carry:
        params, opt_state = carry
        _, grads = value_and_grad(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def sam(loss_fn: LossFn) -> Step:
    """The least that SAM needs, with nothing but JAX and optax's SGD."""
    optimizer = sgd()

    def step(carry: Carry, batch: Any) -> Carry:
        params, opt_state = carry
        grads = jax.grad(loss_fn)(params, *batch)
        scale = RHO / (optax.tree.norm(grads) + 1e-12)
        perturbed = jax.tree.map(lambda p, g: p + scale * g, params, grads)
        grads = jax.grad(loss_fn)(perturbed, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def looksam(loss_fn: LossFn) -> Step:
    """LookSAM with the least it needs: a branch, and norms and products taken once."""
    optimizer = sgd()

    def step(carry: Carry, batch: Any) -> Carry:
        params, (opt_state, direction, number) = carry
        clean = jax.grad(loss_fn)(params, *batch)
        norm = optax.tree.norm(clean) + 1e-12

        def sharp() -> tuple[Any, Any]:
            perturbed = jax.tree.map(lambda p, g: p + RHO / norm * g, params, clean)
            grads = jax.grad(loss_fn)(perturbed, *batch)
            share = optax.tree.vdot(clean, grads) / norm**2
            new = jax.tree.map(lambda s, c: s - share * c, grads, clean)
            return grads, optax.tree.scale(1 / optax.tree.norm(new), new)

        def reused() -> tuple[Any, Any]:
            return optax.tree.add_scale(clean, ALPHA * norm, direction), direction

        grads, direction = jax.lax.cond(number % EVERY == 0, sharp, reused)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), (opt_state, direction, number + 1)

    return step


def _init_looksam(params: Any) -> Carry:
    number = jnp.zeros([], jnp.int32)
    return params, (sgd().init(params), optax.tree.zeros_like(params), number)


def msam(loss_fn: LossFn) -> Step:
    """Momentum-SAM in two passes: the new momentum and its norm, then the parameters."""

    def step(carry: Carry, batch: Any) -> Carry:
        params, (momentum, scale) = carry
        grads = jax.grad(loss_fn)(params, *batch)
        new = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, grads)
        new_scale = RHO / (optax.tree.norm(new) + 1e-12)
        params = jax.tree.map(
            lambda p, old, m: p + (scale * old - (RATE + new_scale) * m), params, momentum, new
        )
        return params, (new, new_scale)

    return step


def _init_msam(params: Any) -> Carry:
    return params, (optax.tree.zeros_like(params), jnp.zeros([]))


def ema(loss_fn: LossFn) -> Step:
    """An average kept beside the optimiser with `optax.incremental_update`."""
    optimizer = sgd()

    def step(carry: Carry, batch: Any) -> Carry:
        params, (opt_state, average) = carry
        grads = jax.grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 1 - EMA_DECAY)
        return params, (opt_state, average)

    return step


def _init_ema(params: Any) -> Carry:
    return params, (sgd().init(params), params)


def _optax_sam(opaque: bool) -> Any:
    adversarial = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return optax.contrib.sam(sgd(), adversarial, sync_period=2, opaque_mode=opaque)


def bare_step(program: bare.Bare, loss_fn: LossFn) -> Step:
    """The step of a program of `benchmarks.bare`."""

    def step(carry: Carry, batch: Any) -> Carry:
        params, state = carry
        return program.step(params, state, lambda point: jax.grad(loss_fn)(point, *batch))

    return step


def _init_bare(program: bare.Bare) -> Callable[[Any], Carry]:
    return lambda params: (params, program.init(params))


def optax_sam(loss_fn: LossFn, opaque: bool) -> Step:
    """`optax.contrib.sam`, one whole SAM step a call: two updates in transparent mode."""
    tx = _optax_sam(opaque)

    def step(carry: Carry, batch: Any) -> Carry:
        params, opt_state = carry
        for _ in range(1 if opaque else 2):
            grads = jax.grad(loss_fn)(params, *batch)
            extra = {"grad_fn": lambda p, _: jax.grad(loss_fn)(p, *batch)} if opaque else {}
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            params = optax.apply_updates(params, updates)
        return params, opt_state

    return step


def optax_lookahead(loss_fn: LossFn) -> Step:
    """`optax.lookahead`, whose parameters are pairs."""
    tx = optax.lookahead(sgd(), EVERY, 0.5)

    def step(carry: Carry, batch: Any) -> Carry:
        params, opt_state = carry
        grads = jax.grad(loss_fn)(params.fast, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def _init_optax_lookahead(params: Any) -> Carry:
    pair = optax.LookaheadParams.init_synced(params)
    return pair, optax.lookahead(sgd(), EVERY, 0.5).init(pair)


def alternatives() -> list[Alternative]:
    """All of them."""
    return [
        Alternative("sam, by hand", "sam", sam, init_of(sgd())),
        Alternative("sam_value_and_grad", "sam", sam_one_graph, init_of(sgd())),
        *(
            Alternative(
                f"optax.contrib.sam, {mode}",
                "sam",
                functools.partial(optax_sam, opaque=mode == "opaque"),
                init_of(_optax_sam(mode == "opaque")),
            )
            for mode in ("opaque", "transparent")
        ),
        Alternative("msam, by hand", "msam", msam, _init_msam),
        Alternative("looksam, by hand", "looksam every=5", looksam, _init_looksam),
        Alternative("optax.incremental_update", "params_ema", ema, _init_ema),
        Alternative("optax.lookahead", "lookahead", optax_lookahead, _init_optax_lookahead),
        *(
            Alternative(
                f"{program.method}, bare",
                program.method,
                functools.partial(bare_step, program),
                _init_bare(program),
            )
            for program in bare.PROGRAMS
        ),
    ]


def variants(
    names: list[str],
) -> dict[str, tuple[Callable[[LossFn], Step], Callable[[Any], Carry]]]:
    """From a loss to the step, and the initial carry, of methods and alternatives by name."""
    found = {}
    for name in names:
        if name in METHODS:
            tx = METHODS[name]()
            found[name] = (functools.partial(with_flatopt, tx), init_of(tx))
    return found | {a.name: (a.step, a.init) for a in alternatives() if a.name in names}
