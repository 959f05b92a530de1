"""What every results file says about itself, and how it is written."""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("flatopt", "jax", "jaxlib", "optax", "flax", "numpy")


def provenance() -> dict[str, Any]:
    """Command, versions and machine of this run."""
    return {
        "command": ["python", "-m", _module(), *sys.argv[1:]],
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
        },
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` with their provenance, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(provenance() | results, indent=1) + "\n")


def _module() -> str:
    return ".".join(Path(sys.argv[0]).with_suffix("").parts[-2:])
