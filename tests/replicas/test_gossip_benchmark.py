"""Gossip against a large batch: a small run, and what the page says of the committed one."""

import json

import jax
import numpy as np

from benchmarks import gossip, record


def test_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(gossip, "RATES", (0.1,))
    monkeypatch.setattr(gossip, "SIZES", (8,))
    monkeypatch.setattr(gossip, "TOGETHER", 32)
    with jax.numpy_rank_promotion("allow"):
        assert gossip.main(["--seeds=2", "--steps=4", "--json", str(tmp_path / "g.json")]) == 0
    results = json.loads((tmp_path / "g.json").read_text())
    assert len(gossip.lines(results)) == 2 + 1 + 1 + 2 + 1
    assert results["rows"][0]["large batch"]["distance"] == [0, 0]
    assert min(results["rows"][0]["gossip"]["distance"]) > 0


def test_the_distance_of_replicas_falls_as_the_root_of_the_batch():
    results = json.loads((record.RESULTS / "gossip.json").read_text())
    sizes = np.array([int(size) for size in results["distance"]])
    distances = np.array(list(results["distance"].values())).mean(1)
    assert len(results["seeds"]) == 8
    assert (np.diff(distances) < 0).all()
    slope = np.polyfit(np.log(sizes), np.log(distances), 1)[0]
    assert -0.6 < slope < -0.4


def test_gossip_bears_larger_rates_and_gains_little_where_both_learn():
    rows = json.loads((record.RESULTS / "gossip.json").read_text())["rows"]
    found = {
        row["rate"]: [np.array(row[way]["accuracy"], float) for way in ("large batch", "gossip")]
        for row in rows
    }
    learn = {rate: [gossip.learned(a) for a in pair] for rate, pair in found.items()}
    assert all(pair == [8, 8] for rate, pair in learn.items() if rate <= 0.7)
    between = [pair for rate, pair in learn.items() if 0.7 < rate < 2]
    assert all(big < ring and ring >= 7 for big, ring in between)
    assert learn[2.0] == [0, 0]
    best = np.max([[a.mean() for a in pair] for pair in found.values()], axis=0)
    assert abs(best[1] - best[0]) < 0.005
