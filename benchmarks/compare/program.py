"""Compares the methods on real images: a table, a picture and, if wanted, all numbers as JSON.

Run it with `python -m benchmarks.compare`; `--help` lists the flags.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

import flatopt
from benchmarks import provenance
from benchmarks.compare import (
    arguments,
    batch_norm,
    datasets,
    flatness,
    flatness_picture,
    picture,
    report,
    training,
)
from benchmarks.compare.methods import BASELINE, METHODS, Method, Setting
from examples.models.mlp import MLP

PICTURE, FLATNESS_PICTURE = "compare.png", "flatness.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    command = list(sys.argv[1:] if argv is None else argv)
    began = time.perf_counter()
    args, dataset = arguments.parse(command)
    arms, networks, task = compare(args, dataset)
    second = _second_table(args, dataset)
    baseline, machine = arms[0], provenance.machine()
    print(report.table(arms, baseline))
    print()
    print(report.verdict(arms, baseline))
    print()
    if second is not None:
        print(batch_norm.table(second))
        print()
    print(_notes(arms, args, machine))
    results = {
        "command": ["python", "-m", "benchmarks.compare", *command],
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "versions": provenance.versions(),
        "machine": machine,
        "line_positions": training.LINE_POSITIONS.tolist(),
        "arms": report.to_json(arms, baseline),
        "batch_norm": None if second is None else batch_norm.to_json(second),
    }
    try:
        _write(args, arms, networks, task, results)
    except OSError as error:
        arguments.fail(f"the results cannot be written: {error}")
    seconds = time.perf_counter() - began
    print(f"All of it took {seconds:.0f} s, {machine['cpus']} CPUs, with compilation and pictures.")
    return 0


def _second_table(args: argparse.Namespace, dataset: datasets.Dataset) -> batch_norm.Study | None:
    """What BatchNorm statistics an average needs, if it was asked for."""
    if batch_norm.NAME not in args.methods:
        return None
    steps = min(args.steps, batch_norm.MOST_STEPS)
    with tqdm(total=steps, unit="step", desc=batch_norm.NAME, leave=False) as bar:
        return batch_norm.study(
            dataset, list(range(args.seeds)), steps, args.train_size, bar.update
        )


class _Plan(NamedTuple):
    """One run to do."""

    method: Method
    equal_gradients: bool
    steps: int
    gradient_evaluations: int


def compare(
    args: argparse.Namespace, dataset: datasets.Dataset
) -> tuple[list[report.Arm], dict[str, Any], training.Task]:
    """Trains and judges every method; the first arm is the baseline.

    Methods that take more gradients than the baseline run once more, shortened to as many.

    Returns:
      The arms, the first seed's network of each method at full length, and the task.
    """
    seeds = list(range(args.seeds))
    split = datasets.split(dataset, seeds, args.train_size, args.label_noise)
    batches = datasets.batches(split, seeds, args.steps, args.batch_size)
    task = training.Task(MLP(classes=dataset.classes), dataset, split, seeds)
    plans = _plan(args)
    networks: dict[str, Any] = {}
    with tqdm(total=sum(plan.steps for plan in plans), unit="step", leave=False) as bar:

        def run(plan: _Plan) -> report.Arm:
            bar.set_description(plan.method.name)
            tx = plan.method.build(_setting(args, plan.steps))
            first = datasets.Batches(*(part[: plan.steps] for part in batches))
            trained = training.train(
                task, tx, first, bar.update, fresh_batches=plan.method.fresh_batches
            )
            scores = jax.tree.map(np.asarray, task.score(trained.params))
            if not plan.equal_gradients:
                networks[plan.method.name] = jax.tree.map(lambda leaf: leaf[0], trained.params)
            return report.Arm(
                method=plan.method.name,
                equal_gradients=plan.equal_gradients,
                steps=plan.steps,
                gradient_evaluations=plan.gradient_evaluations,
                seconds=trained.seconds,
                compile_seconds=trained.compile_seconds,
                **scores._asdict(),
            )

        return [run(plan) for plan in plans], networks, task


def _plan(args: argparse.Namespace) -> list[_Plan]:
    """Every method at full length, then those that cost more than the baseline, shortened."""

    def entry(name: str, equal_gradients: bool, steps: int) -> _Plan:
        method = METHODS[name]
        count = training.count_gradients(method.build(_setting(args, steps)), steps)
        return _Plan(method, equal_gradients, steps, count)

    names = [name for name in args.methods if name in METHODS]
    counted = tqdm(names, desc="counting gradients", leave=False)
    full = [entry(name, False, args.steps) for name in counted]
    budget = full[0].gradient_evaluations
    shortened = [
        entry(plan.method.name, True, plan.steps * budget // plan.gradient_evaluations)
        for plan in full
        if plan.gradient_evaluations > budget
    ]
    return full + shortened


def _setting(args: argparse.Namespace, steps: int) -> Setting:
    return Setting(steps, max(1, args.train_size // args.batch_size), args.learning_rate)


def _write(
    args: argparse.Namespace,
    arms: list[report.Arm],
    networks: dict[str, Any],
    task: training.Task,
    results: dict[str, Any],
) -> None:
    """Writes the pictures and the JSON file."""
    title = picture.title(**{name: getattr(args, name) for name in picture.TITLE})
    args.out.mkdir(parents=True, exist_ok=True)
    with _whole_file(args.out / PICTURE) as part:
        picture.draw(arms, title, part)
    with _whole_file(args.out / FLATNESS_PICTURE) as part:
        _draw_flatness(networks, task, f"{title}: the first seed", part)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with _whole_file(args.json) as part:
            part.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    pictures = [args.out / PICTURE, args.out / FLATNESS_PICTURE]
    print("Written:", *(pictures + ([args.json] if args.json else [])))


def _draw_flatness(networks: dict[str, Any], task: training.Task, title: str, path: Path) -> None:
    """Spectra of every network that did not diverge, and the plane through three of them."""

    def fine(params: Any) -> bool:
        return all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))

    data = task.first_seed()
    sound = {name: params for name, params in networks.items() if fine(params)}
    shown = tqdm(list(sound)[: picture.LINES], desc="spectra", leave=False)
    densities = {name: flatness.density(task.loss_on, sound[name], data) for name in shown}
    corners = dict(list(sound.items())[:3])
    surface = flatness.surface(task.loss_on, corners, data) if len(corners) == 3 else None
    num_params = sum(leaf[0].size for leaf in jax.tree.leaves(task.initial_params))
    flatness_picture.draw(densities, surface, num_params, title, path)


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A file to write to that takes the name `path` once it is complete."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _notes(arms: Sequence[report.Arm], args: argparse.Namespace, machine: dict[str, Any]) -> str:
    """How to read the table, and what it was measured on."""
    notes = [
        f"Means over {picture.seeds_in_words(args.seeds)} ± standard error; differences are paired "
        "by seed.",
        "gradients: evaluations of one seed, counted. run s: all seeds together, not compiling.",
    ]
    if any(arm.equal_gradients for arm in arms):
        notes.append(f"*: shortened to as many gradient evaluations as {BASELINE}.")
    notes.append(
        "local energy: rise of the training error under weight noise of "
        f"{flatness.ENERGY_SIGMA:g}; barrier: of the training loss on the line to the next seed."
    )
    used = min(args.train_size, training.FLATNESS_IMAGES)
    if used < args.train_size:
        notes.append(f"Flatness is that of the loss on {used} of the training images.")
    notes.append(
        f"Machine: {machine['cpus']} CPUs, backend {machine['backend']} ({machine['device']}), "
        f"jax {jax.__version__}, flatopt {flatopt.__version__}."
    )
    return "\n".join(notes)
