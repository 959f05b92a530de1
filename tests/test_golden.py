"""No recorded run is left out: each file has a test that replays it, beside its method's tests."""

import pathlib
import re

import pytest

from tests.replay import FOLDER, OWN_FOLDER

TESTS = pathlib.Path(__file__).parent
# Rows of the table "Not replayed" in the README of the recorded runs: `method` | why.
NOT_REPLAYED = dict(
    re.findall(
        r"^\| `(\w+)` \| (.+) \|$",
        (OWN_FOLDER / "README.md").read_text().partition("## Not replayed")[2],
        re.MULTILINE,
    )
)


def methods_with_a_replay() -> set[str]:
    texts = (path.read_text() for path in TESTS.rglob("test_*.py"))
    return {name for text in texts for name in re.findall(r'^@replays\("(\w+)"\)', text, re.M)}


def methods_in(folder: pathlib.Path) -> set[str]:
    return {path.name.split("__")[0] for path in folder.glob("*.npz")}


@pytest.mark.golden
def test_the_folder_holds_files():
    assert methods_in(FOLDER), f"no .npz file in {FOLDER}"


@pytest.mark.golden
@pytest.mark.parametrize("method", sorted(methods_in(FOLDER)))
def test_a_recorded_method_is_replayed_or_the_readme_says_why_not(method: str):
    replayed = method in methods_with_a_replay()
    assert replayed or method in NOT_REPLAYED, f"no test replays {method}"
    assert not (replayed and method in NOT_REPLAYED), f"{method} is replayed: take it off the list"


def test_a_replay_without_a_recorded_run_is_no_test():
    assert methods_with_a_replay() <= methods_in(OWN_FOLDER)
