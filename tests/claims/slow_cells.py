"""A program of a few slow cells, to be killed: `python -m tests.claims.slow_cells --tiny`."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.claims.cell import Cell, Claim, Context, Size, Verdict
from benchmarks.claims.run import main

NUMBER = 24
SECONDS = 0.05


def _run(config: Mapping[str, Any], context: Context) -> dict[str, Any]:
    del context
    time.sleep(SECONDS)
    values = [np.random.default_rng(seed).normal(size=2000).tolist() for seed in config["seeds"]]
    return {"values": values}


def _cells(size: Size) -> list[Cell]:
    seeds = {"tiny": 2, "quick": 4, "full": 8}[size]
    return [
        Cell("slow", f"cell.{n}", {"number": n, "seeds": (n, n + seeds)}, _run)
        for n in range(NUMBER)
    ]


def _verdict(records: Any) -> Verdict:
    return Verdict("reproduced", f"{len(records)} records")


CLAIM = Claim("slow", "Cells that take their time", (), _cells, lambda records: "", _verdict)

if __name__ == "__main__":
    raise SystemExit(main([CLAIM]))
