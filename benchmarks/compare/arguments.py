"""The command line of `benchmarks.compare`: the flags, their defaults and their checks."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.compare import batch_norm, datasets
from benchmarks.compare.methods import BASELINE, METHODS

# Of digits, and of the larger images, where plain SGD does not train with the higher rate.
DEFAULT_TRAIN_SIZE, OTHER_TRAIN_SIZE = 300, 5000
DEFAULT_LEARNING_RATE, OTHER_LEARNING_RATE = 0.1, 0.02
SHORTEST = 10
PROGRAM = "python -m benchmarks.compare"


def fail(message: str) -> NoReturn:
    """Says in one line what is wrong, and ends the program with exit code 2."""
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    """Leaves out the usage that argparse prints before an error."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        fail(message)


def parse(command: Sequence[str]) -> tuple[argparse.Namespace, datasets.Dataset]:
    """Reads and checks the command line and loads the data; what is wrong ends the program."""
    parser = _make_parser()
    args = parser.parse_args(command)
    try:
        _check(args)
        dataset = datasets.load(args.dataset, args.data_dir)
        _check_sizes(args, dataset)
    except ValueError as error:
        fail(str(error))
    return args, dataset


def _make_parser() -> argparse.ArgumentParser:
    lines = [(m.name, m.about) for m in METHODS.values()] + [(batch_norm.NAME, batch_norm.ABOUT)]
    width = max(len(name) for name, _ in lines)
    methods = "\n".join(f"  {name:{width}} {about}" for name, about in lines)
    usual = [method.name for method in METHODS.values() if method.default] + [batch_norm.NAME]
    parser = _Parser(
        prog=PROGRAM,
        description="Train a small network with every method and compare accuracy and flatness.",
        epilog=f"methods:\n{methods}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--methods", type=_names, default=usual, help=f"comma-separated ({','.join(usual)})")
    add("--seeds", type=int, default=8, help="number of seeds, trained together (8)")
    add("--steps", type=int, default=3000, help="updates of a run (3000)")
    add("--out", type=Path, default=Path("out"), help="folder for the picture (out)")
    add("--json", type=Path, help="also write every number to this file")
    add("--dataset", default="digits", help="digits, mnist, fashion_mnist, cifar10 or an .npz name")
    add("--data-dir", type=Path, help="folder of .npz data sets ($FLATOPT_DATA_DIR)")
    add("--train-size", type=int, help="training images a seed (digits: 300, others: 5000)")
    add("--batch-size", type=int, default=32, help="images in a batch (32)")
    add("--learning-rate", type=float, help="the highest (digits: 0.1, others: 0.02)")
    add("--label-noise", type=float, default=0.0, help="share of wrong training labels (0)")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _check(args: argparse.Namespace) -> None:
    """Raises `ValueError` for what can be wrong before the data are read; fills in defaults."""
    choices = [*METHODS, batch_norm.NAME]
    unknown = [name for name in args.methods if name not in choices]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}: there are {', '.join(choices)}")
    if not args.methods:
        raise ValueError("--methods names no method")
    # The baseline always runs, first: differences are taken from it.
    args.methods = list(dict.fromkeys([BASELINE, *args.methods]))
    _require(args.seeds >= 1, f"--seeds {args.seeds} must be at least 1")
    _require(args.steps >= SHORTEST, f"--steps {args.steps} must be at least {SHORTEST}")
    _require(args.batch_size >= 1, f"--batch-size {args.batch_size} must be at least 1")
    if args.learning_rate is None:
        usual = DEFAULT_LEARNING_RATE if args.dataset == "digits" else OTHER_LEARNING_RATE
        args.learning_rate = usual
    rate = args.learning_rate
    _require(rate > 0 and math.isfinite(rate), f"--learning-rate {rate} must be above 0 and finite")
    _require(0 <= args.label_noise <= 1, f"--label-noise {args.label_noise} must be in [0, 1]")
    if args.data_dir is None and os.environ.get("FLATOPT_DATA_DIR"):
        args.data_dir = Path(os.environ["FLATOPT_DATA_DIR"])
    _require(
        args.data_dir is None or args.data_dir.is_dir(),
        f"the data folder {args.data_dir} does not exist",
    )
    _check_writable("--out", args.out)
    if args.json is not None:
        _require(not args.json.is_dir(), f"--json {args.json} is a folder")
        _check_writable("--json", args.json.parent)


def _check_sizes(args: argparse.Namespace, dataset: datasets.Dataset) -> None:
    """Raises `ValueError` for sizes that do not fit the data; fills in the default size."""
    if args.train_size is None:
        usual = DEFAULT_TRAIN_SIZE if args.dataset == "digits" else OTHER_TRAIN_SIZE
        args.train_size = min(usual, dataset.largest_train_size)
    most = dataset.largest_train_size
    _require(1 <= args.train_size <= most, f"--train-size {args.train_size} must be in [1, {most}]")
    _require(
        args.batch_size <= args.train_size,
        f"--batch-size {args.batch_size} must not exceed --train-size {args.train_size}",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_writable(flag: str, folder: Path) -> None:
    """Raises `ValueError` unless `folder` is writable or can be made; makes nothing."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"{flag}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: {nearest} is not writable")
