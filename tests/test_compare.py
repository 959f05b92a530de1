"""The comparison of the methods: tiny whole runs, bad arguments, and what it measures."""

import itertools
import json
import re
import urllib.error

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
import sklearn.datasets

import flatopt
from benchmarks.compare import (
    batch_norm,
    datasets,
    flatness,
    methods,
    picture,
    program,
    report,
    training,
)

STEPS = 12
TINY = ["--seeds", "2", "--steps", str(STEPS), "--train-size", "64"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # A file that goes astray lands where a test sees it.
    monkeypatch.delenv("FLATOPT_DATA_DIR", raising=False)


@pytest.fixture
def small_task(monkeypatch):
    """Little to measure, so that whole runs are quick."""
    monkeypatch.setattr(training, "LINE_DIRECTIONS", 2)


def _run(arguments, path):
    assert (
        program.main([*arguments, "--out", str(path / "out"), "--json", str(path / "r.json")]) == 0
    )
    return json.loads((path / "r.json").read_text())


def _arm(method="sam", accuracy=(0.5, 0.5), **changes):
    seeds = len(accuracy)
    fields = {
        "equal_gradients": False,
        "steps": STEPS,
        "gradient_evaluations": STEPS,
        "accuracy": np.array(accuracy),
        "train_loss": np.ones(seeds),
        "top_eigenvalue": np.ones(seeds),
        "trace": np.ones(seeds),
        "local_energy": np.ones(seeds),
        "barrier": np.ones(seeds),
        "line": np.ones((seeds, len(training.LINE_POSITIONS))),
        "seconds": 1.0,
        "compile_seconds": 1.0,
    }
    return report.Arm(method=method, **{**fields, **changes})


# Whole runs


@pytest.mark.usefixtures("small_task")
def test_whole_run(tmp_path, capsys):
    results = _run([*TINY, "--methods", "sam,swa,msam"], tmp_path)

    names = [(arm["method"], arm["equal_gradients"]) for arm in results["arms"]]
    assert names == [(m, False) for m in ("sgd", "sam", "swa", "msam")] + [("sam", True)]
    assert {"jax", "jaxlib", "optax", "flax", "numpy", "scipy", "flatopt", "python"} == set(
        results["versions"]
    )
    assert results["versions"]["flatopt"] == flatopt.__version__
    assert results["machine"]["cpus"] >= 1
    assert results["settings"]["steps"] == STEPS
    assert results["command"][-2:] == ["--json", str(tmp_path / "r.json")]
    baseline = np.array(results["arms"][0]["test_accuracy"])
    for arm in results["arms"]:
        accuracy = np.array(arm["test_accuracy"])
        assert accuracy.shape == (2,)
        assert ((accuracy >= 0) & (accuracy <= 1)).all()
        paired = 100 * (accuracy - baseline)
        np.testing.assert_allclose(arm["test_accuracy_mean"], accuracy.mean())
        np.testing.assert_allclose(arm["difference_points_mean"], paired.mean())
        error = abs(paired[0] - paired[1]) / 2  # The standard error of two values.
        np.testing.assert_allclose(arm["difference_points_standard_error"], error)
        for measure in ("top_eigenvalue", "trace", "local_energy", "barrier"):
            assert len(arm[measure]) == 2
            assert np.isfinite(arm[measure]).all()
        assert len(arm["line_loss_mean"]) == len(results["line_positions"])
        # At position 0 the line is the training loss itself: nothing is displaced there.
        middle = arm["line_loss_mean"][len(training.LINE_POSITIONS) // 2]
        np.testing.assert_allclose(middle, np.mean(arm["train_loss"]), rtol=1e-5)
    shortened = results["arms"][-1]
    assert shortened["steps"] == STEPS // 2
    assert shortened["gradient_evaluations_per_seed"] == STEPS

    for name in ("compare.png", "flatness.png"):
        image = matplotlib.image.imread(tmp_path / "out" / name)
        assert image.shape[1] >= 1200
        assert image.std() > 0.05  # Something is drawn.
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "compare.png",
        "flatness.png",
        "out",
        "r.json",
    ]

    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"All of it took \d+ s, \d+ CPUs, with compilation and pictures.", lines[-1]
    )
    assert lines[0].startswith("method")
    assert [line.split()[0] for line in lines[2:7]] == ["sgd", "sam", "swa", "msam", "sam*"]


@pytest.mark.usefixtures("small_task")
def test_second_table(tmp_path, capsys):
    """One run with BatchNorm, evaluated in five ways."""
    results = _run([*TINY, "--methods", "swa_bn"], tmp_path)
    assert [arm["method"] for arm in results["arms"]] == ["sgd"]
    accuracy = {k: np.array(v) for k, v in results["batch_norm"]["test_accuracy"].items()}
    assert list(accuracy) == ["last", "last_recomputed", "stale", "averaged", "recomputed"]
    for own in accuracy.values():
        assert own.shape == (2,)
        assert ((own >= 0) & (own <= 1)).all()
    for name, other in (("recomputed_minus_stale", "stale"), ("recomputed_minus_last", "last")):
        paired = 100 * (accuracy["recomputed"] - accuracy[other])
        entry = results["batch_norm"]["difference_points"][name]
        np.testing.assert_allclose(entry["mean"], paired.mean())
        np.testing.assert_allclose(entry["standard_error"], abs(paired[0] - paired[1]) / 2)
    lines = capsys.readouterr().out.splitlines()
    (title,) = [i for i, line in enumerate(lines) if line.startswith("swa_bn")]
    assert [line.split()[0] for line in lines[title + 3 : title + 8]] == ["last"] * 2 + [
        "average"
    ] * 3


def test_recomputed_statistics_beat_stale_ones_and_the_average_its_last_iterate():
    """The table's own setting, with other seeds."""
    dataset = datasets.load("digits", None)
    study = batch_norm.study(dataset, [20, 21, 22, 23], batch_norm.MOST_STEPS, 300)
    accuracy = study.accuracy
    for worse in (accuracy.stale, accuracy.last):
        difference = report.Estimate.of(100 * (accuracy.recomputed - worse))
        assert difference.mean > report.CLEAR * difference.error
    assert report.Estimate.of(100 * (accuracy.recomputed - accuracy.averaged)).mean < 1.0


def test_batch_norm_study_is_the_plain_loop():
    dataset, steps, size = datasets.load("digits", None), 8, 40
    study = batch_norm.study(dataset, [0, 1], steps, size)
    split = datasets.split(dataset, [0, 1], size, batch_norm.LABEL_NOISE)
    batches = datasets.batches(split, [0, 1], steps, batch_norm.BATCH_SIZE)
    task = training.Task(batch_norm.BatchNormMLP(), dataset, split, [0, 1])
    model, (params, stats) = (
        task.model,
        (
            jax.tree.map(lambda leaf: leaf[1], task.initial_params[name])
            for name in ("params", "batch_stats")
        ),
    )
    tx = optax.sgd(batch_norm.LEARNING_RATE, momentum=methods.MOMENTUM)
    state, kept = tx.init(params), []

    @jax.jit
    def step(params, stats, state, x, labels):
        def loss_fn(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new["batch_stats"]

        grads, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), stats, state

    for t in range(steps):
        x = dataset.images[batches.rows[t, 1]].astype(np.float32) / 16
        params, stats, state = step(params, stats, state, x, batches.labels[t, 1])
        kept.append(params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, kept[5], kept[7])  # From 6 on, each 2.

    def accuracy(params):
        test = dataset.images[split.test_rows[1]] / np.float32(16)
        logits = model.apply({"params": params, "batch_stats": stats}, test)
        return np.mean(np.argmax(logits, -1) == dataset.labels[split.test_rows[1]])

    np.testing.assert_allclose(study.accuracy.last[1], accuracy(params), atol=2e-3)
    np.testing.assert_allclose(study.accuracy.stale[1], accuracy(mean), atol=2e-3)


@pytest.mark.usefixtures("small_task")
def test_methods_are_paired(tmp_path, monkeypatch):
    twin = methods.Method("twin", methods.METHODS["sgd"].build, "the baseline again")
    monkeypatch.setitem(methods.METHODS, "twin", twin)
    first, second = _run([*TINY, "--methods", "sgd,twin"], tmp_path)["arms"]
    for field in ("test_accuracy", "train_loss", "top_eigenvalue", "trace", "barrier"):
        assert first[field] == second[field]
    assert first["train_loss"][0] != first["train_loss"][1]  # But two seeds are two runs.


@pytest.mark.usefixtures("small_task")
def test_own_data_set_with_noisy_labels_and_one_seed(tmp_path, monkeypatch, capsys):
    _write_images(tmp_path / "tiny.npz")
    monkeypatch.setenv("FLATOPT_DATA_DIR", str(tmp_path))
    more = ["--dataset", "tiny", "--methods", "msam", "--batch-size", "8", "--label-noise", "0.5"]
    results = _run([*TINY, *more, "--seeds", "1", "--train-size", "20"], tmp_path)
    assert results["settings"]["dataset"] == "tiny"
    assert results["settings"]["learning_rate"] == 0.02
    assert [len(arm["test_accuracy"]) for arm in results["arms"]] == [1, 1]
    # One value has no standard error, and nothing is concluded from it.
    assert results["arms"][1]["difference_points_standard_error"] is None
    assert results["arms"][1]["barrier"] == [None]  # There is no next seed.
    out = capsys.readouterr().out
    assert "± n/a" in out
    assert "no difference can be judged" in out


def _write_images(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (30, 4, 4, 3), dtype=np.uint8),
        "y_train": np.arange(30, dtype=np.uint8) % 3,
        "x_test": rng.integers(0, 256, (9, 4, 4, 3), dtype=np.uint8),
        "y_test": np.arange(9, dtype=np.uint8) % 3,
    }
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


# What is wrong is said in one line


def _refused(arguments, path, capsys):
    before = sorted(path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        program.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert sorted(path.rglob("*")) == before
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "sgd,nonsense"], "unknown method 'nonsense'"),
        (["--methods", ","], "names no method"),
        (["--steps", "9"], "at least 10"),
        (["--steps", "many"], "invalid int value"),
        (["--seeds", "0"], "at least 1"),
        (["--batch-size", "0"], "at least 1"),
        (["--batch-size", "301"], "must not exceed"),
        (["--train-size", "0"], "[1, 1796]"),
        (["--train-size", "1797"], "[1, 1796]"),
        (["--learning-rate", "0"], "above 0"),
        (["--learning-rate", "nan"], "above 0"),
        (["--label-noise", "1.5"], "[0, 1]"),
        (["--dataset", "nonsense"], "unknown data set 'nonsense'"),
        (["--dataset", "mnist", "--data-dir", "missing"], "does not exist"),
        (["--out", "file/out"], "is not a folder"),
        (["--out", "file"], "is not a folder"),
        (["--json", "folder"], "is a folder"),
        (["--json", "file/r.json"], "is not a folder"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(arguments, words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert words in _refused(arguments, tmp_path, capsys)


def test_missing_data_folder_in_the_environment(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLATOPT_DATA_DIR", str(tmp_path / "missing"))
    assert "does not exist" in _refused(["--dataset", "mnist"], tmp_path, capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, "needs the arrays x_train, y_train, x_test, y_test"),
        ({"x_train": np.zeros((30, 4, 4, 3), np.float32)}, "needs uint8 images"),
        ({"x_test": np.zeros((9, 5, 5, 3), np.uint8)}, "needs uint8 images of one size"),
        ({"y_train": np.zeros(29, np.uint8)}, "one label an image"),
    ],
)
def test_unfit_data_file(changes, words, tmp_path, capsys):
    _write_images(tmp_path / "bad.npz", **changes)
    arguments = ["--dataset", "bad", "--data-dir", str(tmp_path)]
    assert words in _refused(arguments, tmp_path, capsys)


def test_broken_or_missing_data_file(tmp_path, capsys):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    data_dir = ["--data-dir", str(tmp_path)]
    assert "cannot be read" in _refused(["--dataset", "bad", *data_dir], tmp_path, capsys)
    message = _refused(["--dataset", "other", *data_dir], tmp_path, capsys)
    assert "offers digits, bad" in message
    outside = ["--dataset", f"../{tmp_path.name}/bad", *data_dir]
    assert "unknown data set" in _refused(outside, tmp_path, capsys)


@pytest.mark.parametrize("name", sorted(datasets.OPENML))
def test_failed_download(name, tmp_path, capsys, monkeypatch):
    def fail(name, version, as_frame):
        del name, version, as_frame
        raise urllib.error.URLError("no\nnetwork")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    message = _refused(["--dataset", name], tmp_path, capsys)
    assert "could not be downloaded" in message
    assert "no network" in message


def test_download(monkeypatch):
    total = datasets.OPENML["mnist"][1] + 3
    asked = []

    def fetch(name, version, as_frame):
        asked.append((name, version, as_frame))
        target = np.array([str(i % 10) for i in range(total)])
        return sklearn.utils.Bunch(data=np.full((total, 4), 255), target=target)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    dataset = datasets.load("mnist", None)
    assert asked == [("mnist_784", 1, False)]
    assert dataset.images.dtype == np.uint8
    assert dataset.classes == 10
    assert (dataset.shift, dataset.scale) == (255.0, 1.0)  # One grey: nothing to divide by.
    assert len(dataset.images) - dataset.largest_train_size == 3


def test_interrupted_write_leaves_nothing(tmp_path):
    def write():
        with program._whole_file(tmp_path / "file") as part:
            part.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert list(tmp_path.iterdir()) == []


# Data


def test_pixels_become_inputs(tmp_path):
    _write_images(tmp_path / "tiny.npz")
    dataset = datasets.load("tiny", tmp_path)
    with np.load(tmp_path / "tiny.npz") as file:
        x_train, x_test = file["x_train"], file["x_test"]
    np.testing.assert_array_equal(dataset.images[30:], x_test.reshape(9, -1))
    task = training.Task(program.MLP(), dataset, datasets.split(dataset, [0], 5), [0])
    inputs = task.inputs(task.images[:30])
    np.testing.assert_allclose([inputs.mean(), inputs.std()], [0, 1], atol=1e-5)
    expected = (x_train[0].ravel() - x_train.mean()) / x_train.std()
    np.testing.assert_allclose(inputs[0], expected, rtol=1e-4, atol=1e-5)

    digits = datasets.load("digits", None)
    task = training.Task(program.MLP(), digits, datasets.split(digits, [0], 5), [0])
    inputs = task.inputs(task.images)
    assert (inputs.min(), inputs.max()) == (0, 1)


def test_split_and_batches_depend_on_the_seed_alone():
    dataset = datasets.load("digits", None)
    split = datasets.split(dataset, [0, 1], 300)
    alone = datasets.split(dataset, [1], 300)
    for part, own in zip(split, alone, strict=True):
        np.testing.assert_array_equal(part[1], own[0])
    batches = datasets.batches(split, [0, 1], 20, 32)
    for part, own in zip(batches, datasets.batches(alone, [1], 10, 32), strict=True):
        np.testing.assert_array_equal(part[:10, 1], own[:, 0])  # A short run is a prefix.
    for seed in range(2):
        train, test = set(split.train_rows[seed]), set(split.test_rows[seed])
        assert len(train) == 300
        assert train.isdisjoint(test)
        assert train | test == set(range(len(dataset.images)))
        epoch = batches.rows[:, seed].ravel()[:300]
        assert set(epoch) == train  # Each image once before any comes again.
        np.testing.assert_array_equal(batches.labels, dataset.labels[batches.rows])
    assert set(split.train_rows[0]) != set(split.train_rows[1])


def test_label_noise_is_exact_and_spares_the_test_images():
    dataset = datasets.load("digits", None)
    clean = datasets.split(dataset, [3], 200)
    noisy = datasets.split(dataset, [3], 200, label_noise=0.25)
    np.testing.assert_array_equal(clean.train_rows, noisy.train_rows)
    np.testing.assert_array_equal(clean.train_labels, dataset.labels[clean.train_rows])
    assert (noisy.train_labels != clean.train_labels).sum() == 50
    assert set(np.unique(noisy.train_labels)) == set(range(10))


# Gradient evaluations


def _count_without_jit(tx, steps):
    """Runs the optimiser in plain Python, branches included, and counts the derivatives."""
    counter = itertools.count()
    tx = optax.with_extra_args_support(tx)

    @jax.custom_jvp  # Its rule runs for a derivative, not for a value.
    def identity(x):
        return x

    @identity.defjvp
    def _(primals, tangents):
        jax.debug.callback(lambda _: next(counter), primals[0])  # For each mapped replica.
        return primals[0], tangents[0]

    def loss(params):
        return 0.5 * optax.tree.norm(params | {"bias": identity(params["bias"])}, squared=True)

    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    carry = training.Carry(params, tx.init(params))
    with jax.disable_jit():
        for _ in range(steps):
            carry = training.step(tx, flatopt.make_grad_fn(loss), carry)
    jax.effects_barrier()
    return next(counter)


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_gradient_evaluations_are_those_that_happen(name):
    tx = methods.METHODS[name].build(methods.Setting(STEPS, 4, 0.1))
    count = training.count_gradients(tx, STEPS)
    assert count == _count_without_jit(tx, STEPS)
    assert count >= STEPS


def test_entropy_sgd_and_replicated_sgd_cost_their_steps_and_replicas():
    setting = methods.Setting(STEPS, 4, 0.1)
    for name, each in (("entropy_sgd", methods.ENTROPY_STEPS), ("replicated_sgd", 3)):
        tx = methods.METHODS[name].build(setting)
        assert training.count_gradients(tx, STEPS) == each * STEPS


def test_fresh_batches_are_drawn_for_extra_gradients_only():
    """SGD takes none, and is the same; SAM's second gradient then is of another batch."""
    dataset = datasets.load("digits", None)
    split = datasets.split(dataset, [0, 1], 40)
    batches = datasets.batches(split, [0, 1], 5, 8)
    task = training.Task(program.MLP(), dataset, split, [0, 1])
    sam = optax.chain(flatopt.sam(0.2), optax.sgd(0.1))
    for tx, equal in ((optax.sgd(0.1), True), (sam, False)):
        runs = [training.train(task, tx, batches, fresh_batches=fresh) for fresh in (False, True)]
        one, two = (run.params["params"]["Dense_0"]["kernel"] for run in runs)
        assert bool((one == two).all()) == equal


def test_branches_not_taken_are_not_counted():
    tx = optax.chain(flatopt.sam(0.1, every=3), optax.sgd(0.1))
    assert training.count_gradients(tx, 9) == 9 + 3


def test_training_is_the_plain_loop():
    dataset = datasets.load("digits", None)
    split = datasets.split(dataset, [0, 1], 40)
    batches = datasets.batches(split, [0, 1], 5, 8)
    task = training.Task(program.MLP(), dataset, split, [0, 1])
    tx = optax.chain(flatopt.sam(0.2), optax.sgd(0.1, momentum=0.9), flatopt.swa(start=3))
    progress = []
    trained = training.train(task, tx, batches, progress.append)
    assert sum(progress) == 5

    params = jax.tree.map(lambda leaf: leaf[1], task.initial_params)
    opt_state = tx.init(params)
    for step in range(5):
        x = dataset.images[batches.rows[step, 1]].astype(np.float32) / 16
        grad_fn = flatopt.make_grad_fn(task.loss, x, batches.labels[step, 1])
        updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    expected = flatopt.eval_params(opt_state, params)
    own = jax.tree.map(lambda leaf: leaf[1], trained.params)
    for got, want in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)

    logits = task.model.apply(expected, dataset.images[split.test_rows[1]] / np.float32(16))
    right = np.argmax(logits, -1) == dataset.labels[split.test_rows[1]]
    np.testing.assert_allclose(task.score(trained.params).accuracy[1], right.mean(), atol=2e-3)


# Flatness


def test_flatness_of_a_quadratic():
    curvature = jnp.array([5.0, 1.0, 0.5, 0.0])

    def loss(params):
        return jnp.sum(curvature * params["w"] ** 2) / 2

    def error(params):
        return jnp.sum(params["w"] ** 2)

    params, other = {"w": jnp.zeros(4)}, {"w": jnp.array([2.0, 0.0, 0.0, 0.0])}
    found = flatness.measure(loss, error, params, other, jax.random.key(0))
    np.testing.assert_allclose(found.top_eigenvalue, 5.0, rtol=1e-3)
    np.testing.assert_allclose(found.trace, 6.5, rtol=1e-5)  # Signs are exact on a diagonal.
    assert found.local_energy == 0  # Noise in proportion to zero weights is none.
    assert found.barrier == 0  # A bowl lies below the line between its points.
    alone = flatness.measure(loss, error, params, None, jax.random.key(0))
    assert np.isnan(alone.barrier)


def test_the_barrier_is_that_to_the_next_seed():
    dataset = datasets.load("digits", None)
    task = training.Task(program.MLP(), dataset, datasets.split(dataset, [0, 1, 2], 40), [0, 1, 2])
    scores = task.score(task.initial_params)
    x, labels = task.first_seed()
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], task.initial_params) for i in (0, 1))
    expected = flatopt.measures.linear_barrier(
        task.loss_on, first, second, (x, labels), num_points=flatness.BARRIER_POINTS
    )
    np.testing.assert_allclose(scores.barrier[0], expected.height, rtol=1e-3, atol=1e-5)
    assert (scores.local_energy >= -1).all()
    assert np.isfinite(scores.trace).all()


def test_loss_along_lines_of_a_quadratic():
    params = {"kernel": jnp.array([[3.0], [4.0]])}

    def loss(params):
        return jnp.sum((params["kernel"] - jnp.array([[3.0], [4.0]])) ** 2)

    positions = jnp.array([-1.0, 0.0, 0.5])
    line = flatness.loss_along_lines(loss, params, jax.random.key(0), positions, directions=3)
    # Every direction is as long as the one filter: 5.
    np.testing.assert_allclose(line, [25.0, 0.0, 6.25], rtol=1e-5)


# Sentences and pictures come from the numbers


def test_verdict():
    baseline = _arm("sgd", (0.5, 0.6, 0.7))
    arms = [
        baseline,
        _arm("better", (0.60, 0.71, 0.80)),
        _arm("worse", (0.40, 0.51, 0.60)),
        _arm("equal", (0.50, 0.60, 0.70)),
        _arm("unclear", (0.45, 0.70, 0.71)),
        _arm("short", (0.60, 0.71, 0.80), equal_gradients=True),
        _arm("nan", (0.9, 0.9, 0.9), train_loss=np.array([1.0, np.nan, 1.0])),
    ]
    assert report.verdict(arms, baseline).splitlines() == [
        "More accurate than sgd by more than 2 standard errors: better, short*.",
        "Less accurate than sgd by more than 2 standard errors: worse.",
        "No difference from sgd beyond 2 standard errors: equal, unclear.",
        "Diverged, not judged: nan.",
    ]
    assert "nothing to compare" in report.verdict([baseline], baseline)


def test_diverged_runs_are_reported_not_hidden(tmp_path):
    nan = np.full(2, np.nan)
    lost = _arm("sam", train_loss=nan, top_eigenvalue=nan, line=np.full((2, 25), np.nan))
    arms = [_arm("sgd"), lost]
    picture.draw(arms, "title", tmp_path / "p.png")
    assert matplotlib.image.imread(tmp_path / "p.png").std() > 0
    assert "nan" in report.table(arms, arms[0])
    entry = report.to_json(arms, arms[0])[1]
    assert entry["train_loss"] == [None, None]
    json.dumps(entry, allow_nan=False)


def test_diverged_networks_are_left_out_of_the_second_picture(tmp_path):
    dataset = datasets.load("digits", None)
    task = training.Task(program.MLP(), dataset, datasets.split(dataset, [0], 40), [0])
    params = jax.tree.map(lambda leaf: leaf[0], task.initial_params)
    lost = jax.tree.map(lambda leaf: leaf * np.nan, params)
    program._draw_flatness({"sgd": params, "sam": lost}, task, "title", tmp_path / "p.png")
    assert matplotlib.image.imread(tmp_path / "p.png").std() > 0
    program._draw_flatness({"sam": lost}, task, "title", tmp_path / "p.png")


def test_every_method_of_the_picture_has_a_row_of_its_own():
    """Also where two have the same numbers, and where there are more methods than colours."""
    arms = [_arm(f"method {i}") for i in range(12)] + [_arm("method 1", equal_gradients=True)]
    figure = picture.make_figure(arms, "title")
    gains, sharpness, lines = figure.axes
    assert [t.get_text() for t in gains.get_yticklabels()] == [f"method {i}" for i in range(12)]
    for axes in (gains, sharpness):
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        heights = [float(line.get_ydata()[0]) for line in dots]
        assert len(set(heights)) == len(arms)
        # The shortened run is open, and stands between its method and the next.
        assert dots[-1].get_markerfacecolor() == "white"
        assert 1 < heights[-1] < 2
    assert len(lines.lines) == picture.LINES


def test_a_picture_can_be_drawn_from_a_results_file():
    arms = [_arm("sgd"), _arm("sam", (0.25, 0.75), equal_gradients=True)]
    arms.append(_arm("lost", train_loss=np.full(2, np.nan)))
    again = report.from_json(json.loads(json.dumps(report.to_json(arms, arms[0]))))
    for arm, other in zip(arms, again, strict=True):
        assert (arm.label, arm.steps, arm.gradient_evaluations) == (
            other.label, other.steps, other.gradient_evaluations,
        )  # fmt: skip
        for name in ("accuracy", "train_loss", "top_eigenvalue", "barrier"):
            np.testing.assert_array_equal(getattr(arm, name), getattr(other, name))
        np.testing.assert_array_equal(np.mean(arm.line, axis=0), other.line[0])
    assert picture.title("digits", 300, 1, 10) == "digits, 300 training images, 1 seed, 10 steps"
