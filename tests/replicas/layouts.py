"""Replicas in every layout: on a leading axis, in a mapped axis, on as many devices."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flatopt
from tests import cases

NUMBER = 8
TOPOLOGIES = ("ring", "exponential", "torus", "full")


def sgd():
    return optax.sgd(0.05, momentum=0.9)


METHODS = {
    "couple": lambda axis: optax.chain(flatopt.couple_replicas(0.5, axis_name=axis), sgd()),
    "couple_schedule": lambda axis: optax.chain(
        flatopt.couple_replicas(flatopt.exponential_scoping(0.1, 0.5), axis_name=axis), sgd()
    ),
    "couple_every": lambda axis: optax.chain(
        flatopt.couple_replicas(0.5, axis_name=axis, every=2), sgd()
    ),
    "parle": lambda axis: flatopt.parle(0.05, 0.1, 0.5, every=2, axis_name=axis),
    **{
        f"gossip_{topology}": lambda axis, topology=topology: flatopt.gossip(
            sgd(), topology, axis_name=axis
        )
        for topology in TOPOLOGIES
    },
    "gossip_matrix": lambda axis: flatopt.gossip(
        sgd(), flatopt.mixing_matrix("exponential", NUMBER), axis_name=axis
    ),
}


def make_replicas(number: int = NUMBER):
    return flatopt.replicate_params(cases.init_params(), number, std=0.3, key=1)


def make_batches(step: int, number: int = NUMBER):
    """One batch for each replica."""
    batches = [cases.make_batch(100 * step + a) for a in range(number)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *batches)


def size_of(params) -> int:
    return len(jax.tree.leaves(params)[0])


def one_step(tx, params, opt_state, batch):
    grads = jax.grad(cases.loss_fn)(params, batch)
    grad_fn = flatopt.make_grad_fn(cases.loss_fn, batch)
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), opt_state


def train_leading(tx, params, steps: int = 4):
    """The optimiser sees the whole stack of replicas."""
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batches):
        grads = jax.vmap(jax.grad(cases.loss_fn))(params, batches)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(steps):
        params, opt_state = step(params, opt_state, make_batches(i, size_of(params)))
    return params


def train_vmapped(tx, params, steps: int = 4):
    """The optimiser sees one replica, inside a mapped axis."""
    opt_state = jax.vmap(tx.init, axis_name="replicas")(params)
    step = jax.jit(jax.vmap(functools.partial(one_step, tx), axis_name="replicas"))
    for i in range(steps):
        params, opt_state = step(params, opt_state, make_batches(i, size_of(params)))
    return params


def train_sharded(tx, params, steps: int = 4):
    """One replica on each of eight devices."""
    mesh = jax.make_mesh((NUMBER,), ("replicas",), axis_types=(AxisType.Auto,))

    def squeezed(function):
        def local(*args):
            result = function(*jax.tree.map(lambda x: x[0], args))
            return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

        specs = {"in_specs": P("replicas"), "out_specs": P("replicas"), "check_vma": False}
        return jax.jit(jax.shard_map(local, mesh=mesh, **specs))

    opt_state = squeezed(tx.init)(params)
    step = squeezed(functools.partial(one_step, tx))
    for i in range(steps):
        params, opt_state = step(params, opt_state, make_batches(i))
    return params
