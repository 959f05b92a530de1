"""Strict switches for every test: eight fake devices, no silent rank promotion."""

import os

# Before jax is imported: eight fake CPU devices, so that sharding is tested on any machine, and a
# compiler in a hurry: compilation is most of the time of a test.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
