"""What results were measured with: versions and machine, for the JSON files."""

import os
import platform
from importlib import metadata
from typing import Any

import jax

import flatopt


def versions() -> dict[str, str]:
    """The versions of what computes."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy", "scipy")
    found = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "flatopt": flatopt.__version__, **found}


def machine() -> dict[str, Any]:
    """The machine, with the processors that this run may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux alone.
    return {
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }
