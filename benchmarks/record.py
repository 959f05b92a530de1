"""What every results file says about itself, and how it is written."""

import json
import sys
from pathlib import Path
from typing import Any

from examples import provenance


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` with the command, the versions and the machine of this run, as JSON."""
    about = {
        "command": ["python", "-m", _module(), *sys.argv[1:]],
        "versions": provenance.versions(),
        "machine": provenance.machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | results, indent=1, allow_nan=False) + "\n")


def _module() -> str:
    return ".".join(Path(sys.argv[0]).with_suffix("").parts[-2:])
