"""What every results file says about itself, and how it is written."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import provenance

RESULTS = Path(__file__).parent / "results"
_FLAT_LIST = re.compile(r"\[\n *([^][{}]*?)\n *\]")


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` with the command, the versions and the machine of this run, as JSON."""
    about = {
        "command": _command(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(about | results, indent=1, allow_nan=False)
    path.write_text(_FLAT_LIST.sub(_on_one_line, text) + "\n")


def _on_one_line(found: re.Match[str]) -> str:
    # Strings of JSON hold no line breaks, so what is in them stays as it is.
    return "[" + re.sub(r",\n *", ", ", found[1]) + "]"


def _matters(variable: str) -> bool:
    """Whether an environment variable changes what is measured."""
    return variable.startswith(("MALLOC_", "XLA_FLAGS", "JAX_"))


def _command() -> list[str]:
    module = sys.modules["__main__"].__spec__
    # Of absolute paths the last part: where they lie on this machine helps nobody.
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return ["python", "-m", module.name if module else "", *words]
