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
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

TESTS_BETWEEN_CLEARINGS = 150
_DONE = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def _forget_compiled_programs(request: pytest.FixtureRequest):
    """Every so many tests: each program maps memory, and a process may have so many maps only."""
    yield
    stash = request.config.stash
    stash[_DONE] = stash.get(_DONE, 0) + 1
    if stash[_DONE] % TESTS_BETWEEN_CLEARINGS == 0:
        jax.clear_caches()
