"""Records of finished cells: whole files or none, however a run ends."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.claims.cell import Cell


def path_of(folder: Path, cell: Cell) -> Path:
    """Where the record of a cell lies."""
    return folder / cell.claim / f"{cell.name}.json"


def write(folder: Path, cell: Cell, results: dict[str, Any], seconds: float) -> None:
    """Writes the record; until it is whole, the one that was there stays."""
    path = path_of(folder, cell)
    part = path.with_name(f".{path.name}.part")
    try:
        record.write(
            part,
            {
                "claim": cell.claim,
                "cell": cell.name,
                "config": cell.config,
                "results": results,
                "seconds": seconds,
            },
        )
        with part.open("rb") as file:
            os.fsync(file.fileno())  # Else a crash may leave the new name with no content.
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(folder: Path, claim: str) -> dict[str, dict[str, Any]]:
    """Every record of a claim, by the name of its cell."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(_files(folder / claim))}


def is_finished(folder: Path, cell: Cell) -> bool:
    """Whether the cell's record is there and was made with the cell's configuration."""
    try:
        found = json.loads(path_of(folder, cell).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    # Through JSON, where a tuple is a list and a key a string.
    return bool(found.get("config") == json.loads(json.dumps(cell.config)))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.json") if not path.name.startswith(".")]
