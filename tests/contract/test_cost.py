"""What the methods cost, in XLA's own numbers: these do not wobble."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
from flatopt._core import tree_math
from flatopt._sparse import sparse_training

WIDTHS = (784, 512, 512, 10)  # 0.67 M parameters: 1.3 MFLOP per example in the forward pass.
BATCH = 64
MOMENTUM = 0.9


def _params() -> list[dict[str, jax.Array]]:
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


def _compiled(
    tx: optax.GradientTransformationExtraArgs, batch: int = BATCH, donate: bool = True
) -> Any:
    def step(params: Any, opt_state: Any, x: jax.Array, labels: jax.Array) -> Any:
        grad_fn = flatopt.make_grad_fn(_loss, x, labels)
        _, grads = grad_fn.value_and_grad(params)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    params = _params()
    x, labels = jnp.ones([batch, WIDTHS[0]]), jnp.zeros([batch], jnp.int32)
    jitted = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    return jitted.lower(params, tx.init(params), x, labels).compile()


def _base() -> optax.GradientTransformationExtraArgs:
    return optax.sgd(0.1, momentum=MOMENTUM)


def _flops(tx: optax.GradientTransformationExtraArgs) -> float:
    return _compiled(tx).cost_analysis()["flops"]


def _temporary_bytes(tx: optax.GradientTransformationExtraArgs) -> int:
    return _compiled(tx).memory_analysis().temp_size_in_bytes


def _rarely(quantity: str) -> float:
    """What XLA counts for the branch of a norm that ordinary numbers never take."""
    plain, whole = (
        jax.jit(norm).lower(_params()).compile().cost_analysis()[quantity]
        for norm in (lambda tree: jnp.sqrt(tree_math.vdot(tree, tree)), tree_math.norm)
    )
    return whole - plain


def test_a_norm_looks_twice_in_a_branch_of_its_own():
    text = jax.jit(tree_math.norm).lower(_params()).compile().as_text()
    assert " conditional(" in text[text.index("ENTRY") :]


def test_the_model_is_large_enough():
    """At least 1 MFLOP per example forward, three times that with the backward pass."""
    assert _flops(_base()) >= 3e6 * BATCH


@pytest.mark.parametrize(
    ("tx", "limit"),
    [
        (optax.chain(flatopt.sam(0.05), _base()), 2.02),
        (optax.chain(flatopt.asam(0.5), _base()), 2.02),
        (flatopt.wasam(_base(), 0.05), 2.03),
        (flatopt.msam(_base(), 0.3), 1.02),
        (optax.chain(_base(), flatopt.swa()), 1.01),
        (optax.chain(_base(), flatopt.params_ema(0.99)), 1.01),
    ],
    ids=["sam", "asam", "wasam", "msam", "swa", "params_ema"],
)
def test_flops_over_sgd(tx: optax.GradientTransformationExtraArgs, limit: float):
    assert _flops(tx) - _rarely("flops") <= limit * _flops(_base())


def test_sam_computes_no_more_than_what_optax_offers():
    """Beside `optax.contrib.sam` in its opaque form, which takes the same two gradients."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    other = optax.contrib.sam(_base(), ascent, sync_period=2, opaque_mode=True)
    theirs = _compiled(other).cost_analysis()
    ours = _compiled(optax.chain(flatopt.sam(0.05), _base())).cost_analysis()
    assert ours["flops"] - _rarely("flops") <= theirs["flops"]
    assert ours["bytes accessed"] - _rarely("bytes accessed") <= 1.001 * theirs["bytes accessed"]


@pytest.mark.parametrize(
    ("tx", "copies"),
    [
        (optax.chain(flatopt.sam(0.05), _base()), 1.05),
        (optax.chain(flatopt.looksam(0.05, every=5, alpha=0.7), _base()), 1.1),
        (flatopt.alternate(_base(), flatopt.scale_to_norm(0.05)), 0.05),
        (flatopt.lookahead(_base(), every=5), 0.05),
        (flatopt.periodic_swa(_base(), period=5), 0.05),
        (optax.chain(_base(), flatopt.swa()), 0.05),
    ],
    ids=["sam", "looksam", "alternate", "lookahead", "periodic_swa", "swa"],
)
def test_temporary_copies_of_the_parameters(
    tx: optax.GradientTransformationExtraArgs, copies: float
):
    copy = optax.tree.size(_params()) * 4
    extra = _temporary_bytes(tx) - _temporary_bytes(_base())
    assert extra <= copies * copy, extra / copy


def _accessed(tx: optax.GradientTransformationExtraArgs, donate: bool = True) -> float:
    """Bytes read and written, in copies of the parameters; a loop's body counts once."""
    bytes_accessed = _compiled(tx, donate=donate).cost_analysis()["bytes accessed"]
    return bytes_accessed / (4 * optax.tree.size(_params()))


def test_noise_is_no_pass_of_its_own():
    """Langevin dynamics read and write what SGD does; biases are drawn into memory."""
    langevin, sgd = flatopt.langevin(0.1, 1e-4), optax.sgd(0.1)
    assert _accessed(langevin) <= _accessed(sgd) + 0.1
    copy = optax.tree.size(_params()) * 4
    assert _temporary_bytes(langevin) <= _temporary_bytes(sgd) + 0.05 * copy


def test_noise_in_a_loop_is_no_pass_of_its_own():
    """Not in the loop, nor before it: the places of the entries are not kept for its turns."""
    copy = optax.tree.size(_params()) * 4
    for stage in (
        functools.partial(flatopt.local_entropy, 5, 0.5),
        functools.partial(flatopt.entropy_sgd, 0.1, 5, 0.5),
    ):
        noisy, quiet = stage(noise=0.01), stage(noise=0.0)
        assert _accessed(noisy) <= _accessed(quiet) + 0.2
        assert _temporary_bytes(noisy) <= _temporary_bytes(quiet) + 0.05 * copy


def test_random_perturbations_read_and_write_no_more_than_sam():
    """Nothing donated: weights where alone a gradient is taken, as SGD's, XLA copies."""
    sam = _accessed(optax.chain(flatopt.sam(0.05), _base()), donate=False)
    for stage in (flatopt.rwp(0.01), flatopt.arwp(0.01)):
        assert _accessed(optax.chain(stage, _base()), donate=False) <= sam + 0.1


def test_a_step_of_the_local_entropy_reads_and_writes_little():
    """A turn: for the point 3 read (it, gradient, centre) and 1 written, for the mean 2 and 1."""
    steps = [
        _accessed(optax.chain(flatopt.local_entropy(n, 0.5, noise=0.01), _base())) for n in (1, 2)
    ]
    gradient = _accessed(optax.sgd(0.1)) - 3  # Less its step: two read, one written.
    assert steps[0] <= _accessed(_base()) + 1.2
    assert steps[1] <= steps[0] + gradient + 7 + 0.2


def test_the_one_graph_form_needs_half_a_copy_more_than_two_graphs():
    """The sharp point and the last gradient share one place."""

    def one_graph(params: Any, opt_state: Any, x: jax.Array, labels: jax.Array) -> Any:
        _, grads = value_and_grad(params, x, labels)
        updates, opt_state = _base().update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    value_and_grad = flatopt.sam_value_and_grad(_loss, flatopt.scale_to_norm(0.05))
    params = _params()
    x, labels = jnp.ones([BATCH, WIDTHS[0]]), jnp.zeros([BATCH], jnp.int32)
    jitted = jax.jit(one_graph, donate_argnums=(0, 1))
    compiled = jitted.lower(params, _base().init(params), x, labels).compile()
    two_graphs = _temporary_bytes(optax.chain(flatopt.sam(0.05), _base()))
    copy = optax.tree.size(params) * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= two_graphs + 0.6 * copy


def test_lookahead_reads_and_writes_little_more_than_sgd():
    """The slow weights: read for the parameters, read and written for themselves, with a sum."""
    copy = 4 * optax.tree.size(_params())
    lookahead = _compiled(flatopt.lookahead(_base(), every=5)).cost_analysis()["bytes accessed"]
    assert lookahead <= _compiled(_base()).cost_analysis()["bytes accessed"] + 4.1 * copy


def test_msam_with_known_momentum_reads_and_writes_little_more_than_sgd():
    """One pass more, for the norm; as without it, two more, for a copy of the old momentum."""
    base = _accessed(_base())
    rarely = _rarely("bytes accessed") / (4 * optax.tree.size(_params()))
    assert _accessed(flatopt.msam_sgd(0.1, 0.3, momentum=MOMENTUM)) - rarely <= base + 1.5
    assert _accessed(flatopt.msam(_base(), 0.3)) - rarely <= base + 4.5


def test_msam_state_is_the_inner_state_and_three_scalars():
    params = _params()
    state = flatopt.msam(_base(), 0.3).init(params)
    inner = jax.tree.leaves(_base().init(params))
    extra = [x for x in jax.tree.leaves(state) if x.ndim == 0]
    assert len(jax.tree.leaves(state)) == len(inner) + 3
    assert len(extra) == 3


@pytest.mark.parametrize("every", [2, 10])
def test_a_skipped_ascent_is_a_real_branch(every: int):
    """The second pass stands inside a loop of one turn or none, not in the straight line."""
    text = _compiled(optax.chain(flatopt.sam(0.05, every=every), _base())).as_text()
    assert " while(" in text[text.index("ENTRY") :]
    assert _straight_products(text) == _straight_products(_compiled(_base()).as_text())


@pytest.mark.parametrize("base", [_base(), optax.adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("order", ["instead", "before", "after"])
def test_a_step_between_changes_of_a_sparse_mask(
    order: str, base: optax.GradientTransformation, monkeypatch: pytest.MonkeyPatch
):
    """What chooses the weights stands in a loop of one turn or none: here it does nothing."""
    tx = flatopt.sparse_training(base, 0.9, order=order)
    whole, plain = _compiled(tx, 128).as_text(), _compiled(base, 128)
    assert " while(" in whole[whole.index("ENTRY") :]
    assert _straight_products(whole) == _straight_products(plain.as_text())
    monkeypatch.setattr(sparse_training._Change, "_apply", lambda *args: args[-1])
    between, dense = _compiled(tx, 128).cost_analysis(), plain.cost_analysis()
    assert between["flops"] <= 1.15 * dense["flops"]
    if order != "after":  # Its moves wait in memory for the loop, whose own are counted with them.
        assert between["bytes accessed"] <= 1.15 * dense["bytes accessed"]


def test_a_step_with_a_static_mask():
    tx, base = flatopt.sparse_training(_base(), 0.9, grow=None), _base()
    static, dense = (_compiled(x).cost_analysis() for x in (tx, base))
    for quantity in ("flops", "bytes accessed"):
        assert static[quantity] <= 1.06 * dense[quantity]


def _straight_products(hlo: str) -> int:
    """Number of matrix products outside loops."""
    entry = hlo[hlo.index("ENTRY") :]
    products = entry.count(" dot(") + entry.count("matmul")
    assert products > 0
    return products
