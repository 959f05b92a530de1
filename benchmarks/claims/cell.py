"""What a claim is made of: cells, each of which becomes one record."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Size = Literal["tiny", "quick", "full"]
SIZES: tuple[Size, ...] = ("tiny", "quick", "full")
Records = Mapping[str, Mapping[str, Any]]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Context(NamedTuple):
    """What a cell may use but must not depend on.

    Attributes:
      data_dir: where the data sets lie that no package holds; None: there are none.
    """

    data_dir: Path | None = None


class Cell(NamedTuple):
    """One measurement.

    Attributes:
      claim: the name of its claim, which is the folder of its record.
      name: the record's file name without its ending.
      config: everything that determines the values, seeds included, as JSON has it.
      run: `run(config, context)`, values, gradients and wall seconds, as JSON has them; called
        twice it gives the same values, wall seconds apart.
      needs: files of the data folder without which it cannot run.
    """

    claim: str
    name: str
    config: dict[str, Any]
    run: Callable[[Mapping[str, Any], Context], dict[str, Any]]
    needs: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """What the records say of a claim.

    Attributes:
      word: the verdict.
      reason: why, from the records alone.
    """

    word: Literal["reproduced", "not at this scale", "contradicted"]
    reason: str


class Claim(NamedTuple):
    """A claim and its measurements.

    Attributes:
      name: how the command line calls it.
      title: one line.
      papers: authors, title and arXiv id of each.
      cells: `cells(size)`, what is to be measured.
      table: Markdown, from the records of its cells by name.
      verdict: from the same records.
      needs_data: files of the data folder that every cell needs.
    """

    name: str
    title: str
    papers: tuple[str, ...]
    cells: Callable[[Size], list[Cell]]
    table: Callable[[Records], str]
    verdict: Callable[[Records], Verdict]
    needs_data: tuple[str, ...] = ()


def check_cells(cells: list[Cell]) -> None:
    """Names must serve as those of files, each once.

    Raises:
      ValueError: if one does not.
    """
    seen = set()
    for cell in cells:
        for name in (cell.claim, cell.name):
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"name={name!r} must start with a letter or digit and hold letters, digits, "
                    "'.', '_' and '-' alone: it names a file"
                )
        if cell[:2] in seen:
            raise ValueError(f"name={cell.name!r} must be unique in claim {cell.claim!r}")
        seen.add(cell[:2])
