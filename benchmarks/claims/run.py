"""Runs what is not finished yet; stopped at any moment, it goes on from there."""

import argparse
import fnmatch
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import record
from benchmarks.claims import store
from benchmarks.claims.cell import SIZES, Cell, Claim, Context, check_cells

PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}


def main(claims: Sequence[Claim], argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser(claims)
    args = parser.parse_args(argv)
    if args.device is not None:
        jax.config.update("jax_platforms", PLATFORMS[args.device])
    folder = args.records or _default_folder(args.size)
    chosen = [claim for claim in claims if not args.only or claim.name in args.only]
    plan = [(claim, _chosen_cells(claim, args)) for claim in chosen]
    check_cells([cell for _, cells in plan for cell in cells])
    if args.list:
        for claim, cells in plan:
            done = sum(store.is_finished(folder, cell) for cell in cells)
            print(f"{claim.name}: {done} finished, {len(cells) - done} left. {claim.title}")
        return 0
    runnable = []
    for claim, cells in plan:
        for cell in cells:
            missing = _missing((*claim.needs_data, *cell.needs), args.data_dir)
            if missing and args.only:
                parser.error(f"{claim.name} needs {', '.join(missing)}: name --data-dir")
            if missing:
                print(f"left out: {claim.name}/{cell.name} needs {', '.join(missing)}", flush=True)
            else:
                runnable.append(cell)
    run(runnable, folder, Context(args.data_dir))
    return 0


def run(cells: Sequence[Cell], folder: Path, context: Context) -> None:
    """Runs the cells that are not finished, one record each, and says how long the rest takes."""
    left = [cell for cell in cells if not store.is_finished(folder, cell)]
    print(f"{len(cells) - len(left)} of {len(cells)} cells are finished in {folder}", flush=True)
    began = time.perf_counter()
    for number, cell in enumerate(left, start=1):
        start = time.perf_counter()
        results = cell.run(cell.config, context)
        now = time.perf_counter()
        store.write(folder, cell, results, now - start)
        remaining = (now - began) / number * (len(left) - number)
        print(
            f"[{number}/{len(left)}] {cell.claim}/{cell.name}: {now - start:.1f} s, "
            f"about {remaining:.0f} s left",
            flush=True,
        )


def _parser(claims: Sequence[Claim]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    for size in SIZES:
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size)
    parser.set_defaults(size="quick")
    names = [claim.name for claim in claims]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="of these claims")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help="of these cells (*)")
    parser.add_argument("--device", choices=PLATFORMS, help="where to compute")
    parser.add_argument("--data-dir", type=Path, help="folder of the data that no package holds")
    parser.add_argument("--records", type=Path, help="folder of the records")
    parser.add_argument("--list", action="store_true", help="say what is finished and stop")
    return parser


def _chosen_cells(claim: Claim, args: argparse.Namespace) -> list[Cell]:
    return [cell for cell in claim.cells(args.size) if fnmatch.fnmatch(cell.name, args.cells)]


def _default_folder(size: str) -> Path:
    return record.RESULTS / "claims" if size == "full" else Path("out") / f"claims-{size}"


def _missing(files: Sequence[str], data_dir: Path | None) -> list[str]:
    return [name for name in files if data_dir is None or not (data_dir / name).is_file()]
