"""The program of the claims: what it runs, keeps and runs again."""

import json
import random
import subprocess
import sys
import time

import pytest

from benchmarks.claims import store
from benchmarks.claims.cell import Cell, check_cells
from benchmarks.claims.run import main
from tests.claims import slow_cells

CELLS = slow_cells.CLAIM.cells("tiny")


def _run(*flags: str) -> int:
    return main([slow_cells.CLAIM], ["--tiny", *flags])


def _content(folder):
    return {n: (r["config"], r["results"]) for n, r in store.read(folder, "slow").items()}


def _start(folder) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.claims.slow_cells", "--tiny", f"--records={folder}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_three_times_it_leaves_the_records_of_an_undisturbed_run(tmp_path):
    rng = random.Random(0)
    finished = [0]
    for _ in range(3):
        process = _start(tmp_path / "killed")
        process.stdout.readline()  # It is about to run the first cell that is left.
        process.stdout.readline()
        time.sleep(rng.uniform(0, 2 * slow_cells.SECONDS))  # In a cell, or in writing its record.
        process.kill()
        process.communicate()
        # What is there is whole, and each run went on from the last one.
        finished.append(len(store.read(tmp_path / "killed", "slow")))
    assert 0 < finished[1] < finished[2] < finished[3] < slow_cells.NUMBER
    process = _start(tmp_path / "killed")
    first = process.communicate()[0].splitlines()[0]
    assert first.startswith(f"{finished[3]} of {slow_cells.NUMBER} cells are finished")
    assert process.returncode == 0
    assert _run(f"--records={tmp_path / 'whole'}") == 0
    assert _content(tmp_path / "killed") == _content(tmp_path / "whole")
    assert len(_content(tmp_path / "whole")) == slow_cells.NUMBER


def test_cells_are_chosen_by_pattern_and_listed(tmp_path, capsys):
    assert _run(f"--records={tmp_path}", "--only", "slow", "--cells", "cell.1?") == 0
    assert set(store.read(tmp_path, "slow")) == {f"cell.{n}" for n in range(10, 20)}
    capsys.readouterr()
    assert _run(f"--records={tmp_path}", "--list") == 0
    assert "slow: 10 finished, 14 left" in capsys.readouterr().out


def test_another_configuration_or_a_torn_record_is_run_again(tmp_path):
    cell = CELLS[0]
    store.write(tmp_path, cell, {"values": []}, 0.0)
    assert store.is_finished(tmp_path, cell)
    assert not store.is_finished(tmp_path, cell._replace(config=cell.config | {"number": -1}))
    path = store.path_of(tmp_path, cell)
    path.write_text(path.read_text()[:-9])
    assert not store.is_finished(tmp_path, cell)


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    cell = CELLS[0]
    store.write(tmp_path, cell, {"values": [1]}, 0.0)
    with pytest.raises(ValueError, match="JSON"):
        store.write(tmp_path, cell, {"values": [float("nan")]}, 0.0)
    path = store.path_of(tmp_path, cell)
    assert json.loads(path.read_text())["results"] == {"values": [1]}
    assert list(path.parent.iterdir()) == [path]


def test_cells_that_lack_their_data_are_left_out_and_refused_by_name(tmp_path, capsys):
    claim = slow_cells.CLAIM._replace(needs_data=("nowhere.npz",))
    flags = ["--tiny", f"--records={tmp_path}", "--cells=cell.1"]
    assert main([claim], flags) == 0
    assert "left out: slow/cell.1 needs nowhere.npz" in capsys.readouterr().out
    assert store.read(tmp_path, "slow") == {}
    with pytest.raises(SystemExit):
        main([claim], [*flags, "--only", "slow"])
    assert "name --data-dir" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a/b", "", ".hidden"])
def test_names_must_be_those_of_files(name):
    with pytest.raises(ValueError, match="names a file"):
        check_cells([Cell("slow", name, {}, CELLS[0].run)])


def test_names_are_unique():
    with pytest.raises(ValueError, match="unique"):
        check_cells([CELLS[0], CELLS[0]])
