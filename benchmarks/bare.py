"""The least that a step of the costlier methods needs, in plain JAX: formulas, and nothing else.

A program here has no options, guards no zero norm and no overflow, and keeps no counter that it
does not use. Where it draws noise it takes flatopt's draws: those of `jax.random` take several
times as long (`benchmarks.noise`), which would hide what the method itself costs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import flatopt
from benchmarks.methods import ADAM_RATE, MOMENTUM, RATE, RHO
from flatopt._core import rng

Tree = Any
Gradient = Callable[[Tree], Tree]

TINY = 1e-12
INNER_STEPS = 5
REPLICAS = 3


class Bare(NamedTuple):
    """A program.

    Attributes:
      method: the row that it stands beside.
      init: from parameters to the state.
      step: from parameters, state and the function of gradients to both after one step.
    """

    method: str
    init: Callable[[Tree], Tree]
    step: Callable[[Tree, Tree, Gradient], tuple[Tree, Tree]]


def zeros(tree: Tree) -> Tree:
    """A tree of zeros."""
    return jax.tree.map(jnp.zeros_like, tree)


def descend(w: Tree, v: Tree, g: Tree) -> tuple[Tree, Tree]:
    """Heavy-ball momentum."""
    v = jax.tree.map(lambda v, g: MOMENTUM * v + g, v, g)
    return jax.tree.map(lambda w, v: w - RATE * v, w, v), v


def ascend(w: Tree, g: Tree) -> Tree:
    """The point at distance rho along g."""
    scale = RHO / (optax.tree.norm(g) + TINY)
    return jax.tree.map(lambda w, g: w + scale * g, w, g)


def _mixing(mix: Callable[[Tree, Tree], Tree]) -> Callable[..., Any]:
    def step(w: Tree, v: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
        clean = gradient(w)
        return descend(w, v, mix(clean, gradient(ascend(w, clean))))

    return step


def _gsam(clean: Tree, sharp: Tree) -> Tree:
    share = optax.tree.vdot(clean, sharp) / optax.tree.vdot(sharp, sharp)
    return jax.tree.map(lambda c, s: s - 0.4 * (c - share * s), clean, sharp)


def _gnp(clean: Tree, sharp: Tree) -> Tree:
    return jax.tree.map(lambda c, s: 0.2 * c + 0.8 * s, clean, sharp)


def _wsam(w: Tree, v: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    clean = gradient(w)
    sharp = gradient(ascend(w, clean))
    v = jax.tree.map(lambda v, c: MOMENTUM * v + c, v, clean)
    weight = 0.8 / (1 - 0.8)
    w = jax.tree.map(lambda w, v, c, s: w - RATE * (v + weight * (s - c)), w, v, clean, sharp)
    return w, v


def _friendly_sam(w: Tree, state: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    v, mean, share = state  # The mean starts at the first gradient.
    clean = gradient(w)
    noise = jax.tree.map(lambda c, m: c - m, clean, mean)
    mean = jax.tree.map(lambda m, c: m + share * (c - m), mean, clean)
    w, v = descend(w, v, gradient(ascend(w, noise)))
    return w, (v, mean, jnp.full_like(share, 0.1))


def _vasso(w: Tree, state: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    v, mean = state
    mean = jax.tree.map(lambda m, c: 0.6 * m + 0.4 * c, mean, gradient(w))
    w, v = descend(w, v, gradient(ascend(w, mean)))
    return w, (v, mean)


def _hold_perturbed(w: Tree, state: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    v, offset = state
    g = gradient(w)
    scale = RHO / (optax.tree.norm(g) + TINY)
    v = jax.tree.map(lambda v, g: MOMENTUM * v + g, v, g)
    w = jax.tree.map(lambda w, o, v, g: w - o - RATE * v + scale * g, w, offset, v, g)
    return w, (v, jax.tree.map(lambda g: scale * g, g))


def _sampa(w: Tree, state: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    v, last, started = state
    ascent = ascend(w, last)
    ahead = jax.tree.map(lambda w, v, g: w - started * RATE * (MOMENTUM * v + g), w, v, last)
    both = jax.vmap(gradient)(jax.tree.map(lambda a, b: jnp.stack([a, b]), ascent, ahead))
    sharp, last = (jax.tree.map(lambda g, i=i: g[i], both) for i in range(2))
    w, v = descend(w, v, jax.tree.map(lambda a, b: 0.2 * a + 0.8 * b, last, sharp))
    return w, (v, last, jnp.ones_like(started))


def _langevin(w: Tree, key: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    key, use = rng.split(key)
    xi = rng.normal_like(use, w)
    kick = (2 * RATE * 1e-4) ** 0.5
    return jax.tree.map(lambda w, g, z: w - RATE * g + kick * z, w, gradient(w), xi), key


def _rwp(w: Tree, state: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    v, key = state
    key, use = rng.split(key)

    def displaced(w: jax.Array, z: jax.Array) -> jax.Array:
        axes = tuple(range(w.ndim - 1)) or None
        return w + 0.1 * jnp.sqrt(jnp.sum(w * w, axis=axes, keepdims=w.ndim > 1)) * z

    clean = gradient(w)
    point = jax.tree.map(displaced, w, rng.normal_like(use, w))
    noisy = gradient(point)
    w, v = descend(w, v, jax.tree.map(lambda c, s: 0.5 * c + 0.5 * s, clean, noisy))
    return w, (v, key)


def _esam(w: Tree, state: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    v, key = state
    key, use = rng.split(key)
    clean = gradient(w)
    scale = RHO / (optax.tree.norm(clean) + TINY) / 0.5
    point = jax.tree.map(
        lambda w, g, u: w + jnp.where(u < 0.5, scale * g, 0), w, clean, rng.uniform_like(use, w)
    )
    w, v = descend(w, v, gradient(point))
    return w, (v, key)


def _explored(w: Tree, key: Tree, gradient: Gradient, grads: Tree | None) -> tuple[Tree, Tree]:
    """The mean of a Langevin loop, with Nesterov's momentum where no gradient is at hand."""
    momentum = grads is None
    eta, gamma = 0.1, 0.5
    kick = (2 * eta) ** 0.5 * (1e-4 if momentum else 0.01)

    def move(y: Tree, mean: Tree, v: Tree, key: Tree, g: Tree) -> tuple[Tree, ...]:
        key, use = rng.split(key)
        xi = rng.normal_like(use, w)
        if momentum:
            v = jax.tree.map(lambda v, g: 0.5 * v - eta * g, v, g)
            g = jax.tree.map(lambda v, g: g - 0.5 / eta * v, v, g)
        y = jax.tree.map(lambda y, g, w, z: y - eta * (g + gamma * (y - w)) + kick * z, y, g, w, xi)
        return y, jax.tree.map(lambda m, y: 0.75 * m + 0.25 * y, mean, y), v, key

    carry: tuple[Tree, ...] = (w, w, zeros(w) if momentum else jnp.zeros([]), key)
    if not momentum:
        carry = move(w, w, jnp.zeros([]), key, grads)

    def body(_: Any, carry: Any) -> Any:
        y, mean, v, key = carry
        return move(y, mean, v, key, gradient(y))

    carry = jax.lax.fori_loop(0 if momentum else 1, INNER_STEPS, body, carry)
    return carry[1], carry[3]


def _local_entropy(w: Tree, state: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    v, key = state
    mean, key = _explored(w, key, gradient, gradient(w))
    w, v = descend(w, v, jax.tree.map(lambda w, m: w - m, w, mean))
    return w, (v, key)


def _entropy_sgd(w: Tree, state: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    b, key, started = state
    first = gradient(w)
    mean, key = _explored(w, key, gradient, None)
    b = jax.tree.map(
        lambda b, f, w, m: MOMENTUM * jnp.where(started, b, f) + (w - m), b, first, w, mean
    )
    w = jax.tree.map(lambda w, m, b: w - RATE * (w - m + MOMENTUM * b), w, mean, b)
    return w, (b, key, jnp.ones_like(started))


def _replicated(w: Tree, state: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    """Replicas, of which the weights are the first, are coupled to their mean."""
    others, momenta = state
    replicas = (w, *others)
    mean = jax.tree.map(lambda *x: sum(x) / REPLICAS, *replicas)
    moved = []
    for x, v in zip(replicas, momenta, strict=True):
        g = jax.tree.map(lambda g, x, m: g + 0.5 * (x - m), gradient(x), x, mean)
        moved.append(descend(x, v, g))
    replicas, momenta = (tuple(pair[i] for pair in moved) for i in range(2))
    return replicas[0], (replicas[1:], momenta)


def _other_replicas(w: Tree) -> Tree:
    replicas = flatopt.replicate_params(w, REPLICAS, std=0.1, key=0)
    others = tuple(jax.tree.map(lambda x, a=a: x[a], replicas) for a in range(1, REPLICAS))
    return others, tuple(zeros(w) for _ in range(REPLICAS))


def _msam_on_adamw(w: Tree, state: Tree, gradient: Gradient) -> tuple[Tree, Tree]:
    mu, nu, t, scale = state  # `scale`: 0.1 over the norm of the last momentum.
    t = t + 1
    g = gradient(w)
    new = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, g)
    nu = jax.tree.map(lambda n, g: 0.999 * n + 0.001 * g * g, nu, g)
    new_scale = 0.1 / (optax.tree.norm(new) + TINY)
    fix1, fix2 = 1 / (1 - 0.9**t), 1 / (1 - 0.999**t)

    def moved(w: Any, old: Any, m: Any, n: Any) -> Any:
        centre = w + scale * old
        step = fix1 * m / (jnp.sqrt(fix2 * n) + 1e-8) + 1e-4 * centre
        return centre - ADAM_RATE * step - new_scale * m

    return jax.tree.map(moved, w, mu, new, nu), (new, nu, t, new_scale)


def _with_key(init: Callable[[Tree], Tree]) -> Callable[[Tree], Tree]:
    return lambda w: (init(w), rng.key_data(0))


PROGRAMS = (
    Bare("gsam", zeros, _mixing(_gsam)),
    Bare("gnp", zeros, _mixing(_gnp)),
    Bare("wsam", zeros, _wsam),
    Bare("friendly_sam", lambda w: (zeros(w), zeros(w), jnp.ones([])), _friendly_sam),
    Bare("vasso", lambda w: (zeros(w), zeros(w)), _vasso),
    Bare("hold_perturbed", lambda w: (zeros(w), zeros(w)), _hold_perturbed),
    Bare("sampa", lambda w: (zeros(w), zeros(w), jnp.zeros([])), _sampa),
    Bare("langevin", lambda _: rng.key_data(0), _langevin),
    Bare("rwp", _with_key(zeros), _rwp),
    Bare("esam", _with_key(zeros), _esam),
    Bare("local_entropy L=5", _with_key(zeros), _local_entropy),
    Bare(
        "entropy_sgd L=5", lambda w: (zeros(w), rng.key_data(0), jnp.zeros([], bool)), _entropy_sgd
    ),
    Bare("replicated_sgd 3 replicas", _other_replicas, _replicated),
    Bare(
        "msam on adamw",
        lambda w: (zeros(w), zeros(w), jnp.zeros([]), jnp.zeros([])),
        _msam_on_adamw,
    ),
)
