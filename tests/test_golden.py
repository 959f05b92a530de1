"""Replays trajectories that the authors' own programs recorded, in float64.

`tests/golden/README.md` describes the files. The environment variable FLATOPT_GOLDEN_DIR names
another folder of such files: there is one adapter per method, and each reads its hyperparameters
from the file, so that files with other seeds, shapes, lengths and hyperparameters replay too.
"""

import os
import pathlib

import jax
import pytest

from tests import (
    golden_averages,
    golden_curves,
    golden_entropy,
    golden_sam,
    golden_sam_family,
    golden_slow_weights,
)
from tests.golden_problems import load

_DEFAULT = pathlib.Path(__file__).parent / "golden"
FOLDER = pathlib.Path(os.environ.get("FLATOPT_GOLDEN_DIR", _DEFAULT))
FILES = sorted(FOLDER.glob("*.npz"))
ADAPTERS = (
    golden_sam.ADAPTERS
    | golden_sam_family.ADAPTERS
    | golden_averages.ADAPTERS
    | golden_slow_weights.ADAPTERS
    | golden_entropy.ADAPTERS
    | golden_curves.ADAPTERS
)
# Recorded programs that flatopt has no counterpart of. What is neither here nor above fails.
NOT_OURS = {"rigl": "RigL prunes and regrows weights: it trains sparse networks, not flat minima."}


def test_the_folder_holds_files() -> None:
    assert FILES, f"no .npz file in {FOLDER}"


def test_nothing_in_the_repository_is_left_out() -> None:
    methods = {path.name.split("__")[0] for path in _DEFAULT.glob("*.npz")}
    assert methods == set(ADAPTERS)


def _mark(path: pathlib.Path) -> list[pytest.MarkDecorator]:
    """Files of the full-batch problem count as extra: only their data differ from the others."""
    extra = FOLDER == _DEFAULT and "__mlp_full__" in path.name
    return [pytest.mark.exhaustive] if extra else []


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.name, marks=_mark(path)) for path in FILES]
)
def test_replays(path: pathlib.Path) -> None:
    golden = load(path)
    if golden.method in NOT_OURS:
        pytest.skip(NOT_OURS[golden.method])
    assert golden.method in ADAPTERS, f"no adapter for method {golden.method}"
    with jax.enable_x64(True):
        ADAPTERS[golden.method](golden)
