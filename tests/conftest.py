"""Strict switches for every test: eight fake devices, no silent rank promotion."""

import atexit
import importlib.util
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def _known(flag: str) -> bool:
    """Whether the XLA at hand has the flag: it ends the program at one that it does not know."""
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None
    assert spec.origin is not None
    for library in Path(spec.origin).parent.glob("*.so"):
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            if text.find(flag.strip("-").split("=")[0].encode()) >= 0:
                return True
    return False


# Before jax is imported: eight fake CPU devices, so that sharding is tested on any machine, and a
# compiler in a hurry, since compilation is most of the time of a test. XLA's older emitters are
# twice as fast.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *filter(_known, FLAGS)])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What one worker has compiled, none compiles again; the workers inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="flatopt-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

from tests.replay import Golden, load

TESTS_BETWEEN_CLEARINGS = 150
_DONE = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of one method in a row: what they compile is shared before it is forgotten."""

    def method(item: pytest.Item) -> str:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        return getattr(case, "factory", "")

    items.sort(key=method)


@pytest.fixture(autouse=True)
def _forget_compiled_programs(request: pytest.FixtureRequest):
    """Every so many tests: each program maps memory, and a process may have so many maps only."""
    yield
    stash = request.config.stash
    stash[_DONE] = stash.get(_DONE, 0) + 1
    if stash[_DONE] % TESTS_BETWEEN_CLEARINGS == 0:
        jax.clear_caches()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    """A recorded run, for a test under `tests.replay.replays`; the test runs in float64."""
    with jax.enable_x64(True):
        yield load(request.param)
