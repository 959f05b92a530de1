"""The benchmarks in small: what they compare is the same, and what they write can be rendered."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks import (
    accelerators,
    anneal,
    batch_hessian,
    by_hand,
    compile_time,
    draw,
    memory,
    methods,
    models,
    noise,
    peers,
    record,
    render,
    scaling,
    sparse,
    step_time,
    timing,
    whole_run,
)
from tests import cases

# Pieces of methods, what needs a named axis, what only records, what has a benchmark of its own.
NOT_MEASURED = {
    "gradient_at", "reuse_direction", "scale_by_hutchinson",
    "couple_replicas", "gossip", "hold_replicas",
    "record_gradient_norm", "record_distance", "record_cosine",
    "sparse_training",
    "project_to_sphere", "fixed_elr", "record_effective_learning_rate", "sgd_by_curvature",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _plain_jax():
    """As in a program of a user; and no window for plots."""
    plt.switch_backend("agg")
    with jax.numpy_rank_promotion("allow"):
        yield


def _tiny(name: str = "mlp", dtype: str = "float32") -> models.Problem:
    match name:
        case "mlp":
            return models.mlp((6, 8, 10), 4, dtype)
        case "cnn":
            return models.cnn((4, 8), 8, 4, dtype)
        case "transformer":
            return models.transformer(8, 1, 4, 6, 2, dtype)
    raise ValueError(name)


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_models_compute_in_half_precision_what_they_do_in_single(name: str):
    single, half = _tiny(name), _tiny(name, "bfloat16")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(half.params))
    loss, grads = jax.jit(jax.value_and_grad(single.loss_fn))(single.params, *single.batch)
    other = jax.jit(half.loss_fn)(half.params, *half.batch)
    assert other != loss
    np.testing.assert_allclose(other, loss, rtol=0.1)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads)) or name != "mlp"
    assert jax.tree.structure(grads) == jax.tree.structure(single.params)


def test_the_convolutions_gradient_is_the_one_that_jax_derives():
    problem, plain = _tiny("cnn"), models.cnn((4, 8), 8, 4, plain=True)
    own, derived = (
        jax.jit(jax.grad(p.loss_fn, argnums=(0, 1)))(p.params, *p.batch) for p in (problem, plain)
    )
    cases.assert_close(own, derived)


def test_the_wide_residual_network_is_wrn_16_4():
    # Only shapes: it is made for a GPU.
    problem = jax.eval_shape(lambda: models.wide_resnet(batch_size=2).params)
    assert sum(leaf.size for leaf in jax.tree.leaves(problem)) == 2_748_890


def test_every_method_is_measured():
    public = {c.factory for c in cases.CASES if c.kind in ("stage", "wrapper", "average")}
    names = {name.split()[0] for name in methods.METHODS}
    assert public - NOT_MEASURED - names == set()
    assert set(methods.MAIN) <= set(methods.METHODS)
    assert set(peers.PEERS.values()) <= set(methods.METHODS)


@pytest.mark.parametrize(
    ("name", "count"), [("sgd", 1), ("sam", 2), ("looksam every=5", 1.2), ("msam", 1)]
)
def test_gradients_are_counted_exactly(name: str, count: float):
    assert methods.gradients_per_step(name) == count


@pytest.mark.parametrize("other", by_hand.alternatives(), ids=lambda a: a.name)
def test_alternatives_take_the_steps_of_the_method(other: by_hand.Alternative):
    """Else their times would compare nothing."""
    problem = _tiny()
    tx = methods.METHODS[other.method]()
    ours = by_hand.compiled(by_hand.with_flatopt(tx, problem.loss_fn))
    theirs = by_hand.compiled(other.step(problem.loss_fn))
    own = by_hand.fresh_carry(by_hand.init_of(tx), problem.params)
    carry = by_hand.fresh_carry(other.init, problem.params)
    for _ in range(7):
        own, carry = ours(own, problem.batch), theirs(carry, problem.batch)
    params = carry[0].fast if other.name == "optax.lookahead" else carry[0]
    cases.assert_close(params, own[0], rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda p, q: np.abs(p - q).max(), params, problem.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_turns_rotate_and_the_first_round_is_dropped():
    order: list[str] = []

    def turn(name: str) -> timing.Turn:
        def run(steps: int) -> float:
            order.append(name)
            return steps * len(order)

        return run

    seconds = timing.interleaved_seconds({n: turn(n) for n in "abc"}, repeats=2, steps=1)
    assert order == list("abcbcacab")
    assert seconds == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}
    assert timing.ratio(seconds["a"], seconds["b"]) == {
        "median": (6 / 4 + 8 / 9) / 2, "min": 8 / 9, "max": 6 / 4,
    }  # fmt: skip


@pytest.fixture
def rendered(tmp_path: Path, monkeypatch) -> Any:
    """Runs a benchmark's command line, and returns its results, table and plot."""

    def run(module: Any, name: str, arguments: list[str]) -> tuple[dict[str, Any], str, bool]:
        path = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--json", str(path)])
        module.main()
        monkeypatch.setattr(render, "RESULTS", tmp_path)
        drawn = draw.draw(tmp_path, tmp_path / "plots")
        return json.loads(path.read_text()), render.table(name, "../"), bool(drawn)

    return run


def test_step_time(rendered, monkeypatch):
    monkeypatch.setitem(models.MODELS, "mlp", lambda dtype: _tiny("mlp", dtype))
    command = ["--models", "mlp", "--methods", "sam,swa", "--repeats", "2", "--peers"]
    results, table, drawn = rendered(step_time, "step_time_small", command)
    result = results["models"]["mlp"]
    rows = {row["variant"]: row for row in result["rows"]}
    assert {"sgd", "sam", "swa", "sam, by hand", "optax.contrib.sam, opaque"} <= set(rows)
    assert rows["sgd"]["over_base"] == {"median": 1, "min": 1, "max": 1}
    assert rows["sam"]["gradients_per_step"] == 2
    assert "flatopt_over_it" in rows["sam, by hand"]
    assert "flatopt_over_it" not in rows["sam"]
    assert "| sam, by hand | 2 |" in table
    assert "Slower here: " in table
    assert drawn
    # What a peer could not do is said, in its own words.
    if importlib.util.find_spec("torch") is None:
        assert "No module named 'torch'" in result["peer_errors"]["all"]
        assert "Did not run: all: the worker ended" in table
    else:
        assert rows["PyTorch SAM"]["gradients_per_step"] == 2


def test_memory(rendered, monkeypatch):
    monkeypatch.setitem(models.MODELS, "mlp", lambda: models.mlp((64, 128, 128, 10), 8))
    monkeypatch.setattr(methods, "MAIN", ["sam", "msam", "swa"])
    results, table, _ = rendered(memory, "memory", ["--quick"])
    rows = {row["method"]: row for row in results["models"]["mlp"]["rows"]}
    over = {name: row["copies_over_base"] for name, row in rows.items()}
    assert rows["sgd"]["state_copies"] == 1
    assert over["sgd"] == {"temporary": 0, "argument": 0, "output": 0, "state": 0}
    assert over["swa"]["state"] == pytest.approx(1, abs=1e-3)
    assert over["swa"]["argument"] == pytest.approx(1, abs=1e-2)
    assert over["msam"]["state"] == pytest.approx(0, abs=1e-3)
    assert over["sam"]["temporary"] < 1.2
    assert "| swa | 2.00 | 1.00 |" in table


def test_compile_time(rendered, monkeypatch):
    wanted = ["sgd", "sam", "sam, by hand"]
    monkeypatch.setitem(compile_time.MODELS, "mlp", (_tiny, wanted))
    command = ["--models", "mlp", "--repeats", "1"]
    results, table, _ = rendered(compile_time, "compile_time", command)
    rows = {row["variant"]: row for row in results["models"]["mlp"]["rows"]}
    assert list(rows) == wanted
    seconds = {phase: value["median"] for phase, value in rows["sam"]["seconds"].items()}
    total = sum(seconds[phase] for phase in compile_time.PHASES)
    assert seconds["total"] == pytest.approx(total)
    assert min(seconds.values()) > 0
    assert "mlp of 2 layers:" in table


def test_noise(rendered):
    results, table, _ = rendered(noise, "noise", ["--size", "200000", "--repeats", "1"])
    rows = {row["variant"]: row for row in results["dtypes"]["bfloat16"]}
    assert rows["flatopt, threefry2x32"]["temporary_copies"] < 0.1
    assert rows["flatopt, rbg"]["temporary_copies"] >= 1
    assert "| flatopt, threefry2x32 |" in table


def test_whole_run(rendered):
    command = ["--methods", "sam", "--steps", "60", "--repeats", "1"]
    results, table, drawn = rendered(whole_run, "whole_run", command)
    for row in results["rows"]:
        # The first of eight seeds is the one that runs alone, and it learns.
        assert row["loss"]["8"] == pytest.approx(row["loss"]["1"], rel=1e-3)
        assert row["loss"]["1"] < 2.0
        assert set(row["seconds_per_seed"]) == {"1", "8"}
    assert "| sam | 2 |" in table
    assert drawn


def test_scaling(rendered, monkeypatch):
    monkeypatch.setattr(scaling, "WIDTHS", (8, 8, models.CLASSES))
    command = ["--parts", "ascent_steps,devices", "--quick", "--repeats", "1", "--here"]
    results, table, drawn = rendered(scaling, "scaling", command)
    parts = results["parts"]
    assert list(parts) == ["ascent_steps", "devices"]
    assert list(parts["devices"]) == ["1", "4"]
    assert list(parts["ascent_steps"]["3"]) == ["sgd", "gradient_at"]
    assert "| devices | step | ms |" in table
    assert drawn


# What a scheduled program looks like, cut down to what is counted.
PROGRAM = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %fused.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%f
  ROOT %fused.2 = (s32[], f32[4]{0}) fusion(%fused.1), kind=kLoop, calls=%f
}

%once (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %copy.1 = f32[4]{0} copy(%q)
}

%nothing (r: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} parameter(0)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %gemm = (f32[4]{0}, s8[9]{0}) custom-call(%a), custom_call_target="__cublas$gemm"
  %five = (s32[], f32[4]{0}) while(%gemm), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %some = (s32[], f32[4]{0}) while(%five), condition=%c, body=%body
  %either = f32[4]{0} conditional(%b, %a, %a), true_computation=%once, false_computation=%nothing
  %or = f32[4]{0} conditional(%i, %a, %a), branch_computations={%once, %once}
  ROOT %called = f32[4]{0} call(%or), to_apply=%once
}
"""


def test_kernels_are_counted_as_often_as_they_are_launched():
    assert accelerators.num_kernels(PROGRAM) == {
        "call": 1, "fusion": 5 * 2, "copy": 1 + 1, accelerators.ONCE_IN_A_WHILE: 2 + 1,
    }  # fmt: skip


def test_accelerators(rendered, monkeypatch):
    """Compiled for the CPU, which any machine can do."""
    here = accelerators.Target("jaxlib", lambda: SimpleNamespace(devices=jax.devices("cpu")))
    monkeypatch.setattr(accelerators, "TARGETS", {"cpu": here})
    monkeypatch.setattr(accelerators, "MODELS", {"small": lambda dtype: _tiny("mlp", dtype)})
    monkeypatch.setattr(accelerators, "FEW", ["sgd", "sam"])
    command = ["--target", "cpu", "--dtypes", "float32"]
    results, table, _ = rendered(accelerators, "accelerators_cpu", command)
    rows = {row["variant"]: row for row in results["models"]["small, float32"]["rows"]}
    assert {"sgd", "sam", "sam, by hand"} <= set(rows)
    assert rows["sgd"]["flops over base"] == 1
    assert 1.5 < rows["sam"]["flops over base"] < 2.5
    # A norm's second look stands in a branch that is hardly ever taken, but counted.
    assert rows["sam"]["flops over base"] <= 1.1 * rows["sam, by hand"]["flops over base"]
    assert "| sgd | 1.00 | 1.00 | 0.00 |" in table


def test_a_target_without_its_package_is_refused(monkeypatch, capsys):
    target = accelerators.Target("no-such-package", lambda: None)
    monkeypatch.setattr(accelerators, "TARGETS", {"h100": target})
    monkeypatch.setattr(sys, "argv", ["accelerators", "--target", "h100"])
    with pytest.raises(SystemExit):
        accelerators.main()
    assert "--target h100 needs the package no-such-package" in capsys.readouterr().err


@pytest.mark.parametrize("gradients", [100, 3000])
def test_arms_take_the_gradients_of_the_base_or_one_fewer(gradients: int):
    for arm in anneal.ARMS:
        steps = arm.steps(gradients)
        taken = anneal.training.count_gradients(arm.build(steps, 0.1, 0.1), steps)
        assert gradients - 2 < taken <= gradients, arm


def test_the_recipe_starts_where_the_rate_begins_to_fall():
    schedule, start = anneal.trapezoid(0.1, 50), anneal.decay_start(50)
    rates = np.array([schedule(step) for step in range(51)])
    np.testing.assert_allclose(rates[: start + 1], 0.1, rtol=1e-6)
    assert (np.diff(rates[start:]) < 0).all()
    assert rates[-1] == 0


def test_images_that_choose_are_not_those_that_judge():
    setting, data = anneal.SETTINGS["digits"], anneal.load("digits", None)
    rows = [anneal.make_task(data, setting, [3, 4], tuning=t).split for t in (True, False)]
    tuning, final = (jax.tree.map(np.asarray, split) for split in rows)
    assert tuning.train_rows.shape == (2, 300)
    assert tuning.test_rows.shape == (2, 700)
    assert final.test_rows.shape == (2, 797)
    chosen = np.concatenate([tuning.train_rows, tuning.test_rows], axis=1)
    assert all(len(set(row)) == 1000 for row in chosen)
    assert not set(final.test_rows.ravel()) & set(chosen.ravel())
    assert not set(final.test_rows.ravel()) & set(final.train_rows.ravel())


def test_anneal(rendered, monkeypatch):
    arms = [anneal.Arm("sgd"), anneal.Arm("sgd", "sam", "anneal"), anneal.Arm("sgd", "sam")]
    monkeypatch.setattr(anneal, "ARMS", arms)
    monkeypatch.setattr(anneal, "RATES", {"sgd": (0.01, 0.1)})
    monkeypatch.setattr(anneal, "RADII", {"sam": (0.1, 0.2)})
    command = ["--datasets", "digits", "--gradients", "40", "--seeds", "2", "--tuning-seeds", "1"]
    results, table, _ = rendered(anneal, "anneal", command)
    base, annealed, whole = results["arms"]
    assert (base["steps"], annealed["steps"], whole["steps"]) == (40, 30, 20)
    assert all(len(arm["tuning"]) == len(results["arms"][0]["tuning"]) for arm in results["arms"])
    assert {run["rate"] for run in annealed["tuning"][:2]} == {base["learning_rate"]}
    difference = 100 * (np.array(annealed["accuracy"]) - whole["accuracy"])
    assert f"{difference.mean():+.2f}" in table
    assert "| digits | sam + sgd, in the anneal | 30 | 39 |" in table


def test_a_table_without_results_is_empty(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert render.table("step_time_mlp", "../") == ""


def test_results_keep_each_list_of_numbers_on_one_line(tmp_path: Path):
    results = {"loss": [[0.5, 1e-7], []], "words": ["a [1,  2]", "b,\n c"], "rows": [{"x": 1}]}
    record.write(tmp_path / "results.json", results)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text).items() >= results.items()
    assert "\n  [0.5, 1e-07],\n" in text


def test_the_hessian_of_batches_in_small(tmp_path: Path):
    path = tmp_path / "batch_hessian.json"
    flags = ["--seeds=2", "--batches=2", "--sizes", "8", "250", "--moments", "1", "4"]
    assert batch_hessian.main([*flags, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert np.shape(results["whole"]) == (2, 2)
    assert np.shape(results["batch"]["8"]) == (2, 2, 2)
    assert len(batch_hessian.lines(results)) == 2 + 2 + 1 + 2
    assert [p.name for p in draw.draw(tmp_path, tmp_path)] == ["batch_hessian.png"]


def test_a_surplus_of_one_over_the_batch_is_found_to_be_one():
    sizes, whole = (8, 16, 32, 64), np.full((3, 1), 2.0)
    batch = {str(b): np.full((3, 1, 5), 2.0 + 7.0 * (1 / b - 1 / 1000)).tolist() for b in sizes}
    results = {"whole": whole.tolist(), "batch": batch, "settings": {"train_size": 1000}}
    found = batch_hessian.unexplained(results)
    assert found["c / B"] < 1e-12 < 0.05 < found["c / sqrt(B)"]


def test_the_batch_alone_lifts_the_top_eigenvalue():
    """What the page says of the committed numbers, at every moment of the run."""
    results = json.loads((record.RESULTS / "batch_hessian.json").read_text())
    whole = np.array(results["whole"])
    ratios = {int(size): np.mean(x, -1) / whole for size, x in results["batch"].items()}
    for moment in range(whole.shape[1]):
        means = {size: ratio[:, moment].mean() for size, ratio in ratios.items()}
        error = ratios[8][:, moment].std(ddof=1) / len(whole) ** 0.5
        assert means[8] > 1 + 3 * error
        assert means[8] > means[64] > means[512]
        assert abs(means[512] - 1) < 0.05


def test_the_dense_network_beside_a_sparse_one_has_as_many_weights():
    whole = (64, 128, 128, 10)
    assert sparse.narrow(whole, 0.0) == whole
    for off in sparse.SPARSITIES:
        narrow = sparse.narrow(whole, off)
        target = (1 - off) * sparse.number_of_weights(whole)
        assert sparse.number_of_weights(narrow) == pytest.approx(target, rel=0.1)
        assert (narrow[0], narrow[-1]) == (64, 10)


def test_the_comparison_of_sparse_networks_in_small(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sparse, "HIDDEN", (8, 8))
    monkeypatch.setattr(sparse, "TIMED", {"mlp": lambda: _tiny("mlp")})
    flags = ["--steps=8", "--seeds=2", "--train-size=40", "--sparsities=0.5", "--rounds=1"]
    sparse.main([*flags, "--json", str(tmp_path / "sparse_digits.json")])
    results = json.loads((tmp_path / "sparse_digits.json").read_text())
    assert [arm["method"] for arm in results["arms"]] == [sparse.FULL, *sparse.GROW, sparse.DENSE]
    weights = {arm["method"]: arm["weights"] for arm in results["arms"]}
    # Half of 656, and in each of three layers not a weight less than its share.
    assert all(328 <= n <= 331 for n in weights["RigL"] + weights["static mask"])
    assert len(sparse.lines(results)) == 2 + 5 + 3 + 4
    assert [path.name for path in draw.draw(tmp_path, tmp_path)] == ["sparse_digits.png"]
