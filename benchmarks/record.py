"""What every results file says about itself, and how it is written."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import provenance

RESULTS = Path(__file__).parent / "results"


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` with the command, the versions and the machine of this run, as JSON."""
    about = {
        "command": _command(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | results, indent=1, allow_nan=False) + "\n")


def _matters(variable: str) -> bool:
    """Whether an environment variable changes what is measured."""
    return variable.startswith(("MALLOC_", "XLA_FLAGS", "JAX_"))


def _command() -> list[str]:
    module = sys.modules["__main__"].__spec__
    # Of absolute paths the last part: where they lie on this machine helps nobody.
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return ["python", "-m", module.name if module else "", *words]
