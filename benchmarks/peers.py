"""Starts the PyTorch worker, and asks it to train the network that flatopt trains."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from benchmarks import methods
from benchmarks.models import Problem

WORKER = Path(__file__).with_name("peers_worker.py")
BASE = "SGD"

# PyTorch's optimisers and the methods of flatopt beside them. Where the name alone does not say
# it, the library is `pytorch_optimizer` or PyTorch itself.
PEERS = {
    "SGD": "sgd",
    "SAM": "sam",
    "GSAM": "gsam",
    "WSAM": "wsam",
    "LookSAM": "looksam every=5",
    "Lookahead": "lookahead",
    "AveragedModel, mean": "swa",
    "AveragedModel, EMA": "params_ema",
}

SETTINGS = {
    "rate": methods.RATE,
    "momentum": methods.MOMENTUM,
    "rho": methods.RHO,
    "ema_decay": methods.EMA_DECAY,
    "every": methods.EVERY,
}


class PeerError(Exception):
    """What the worker could not do, in its own words."""


class Worker:
    """A running worker; a context manager."""

    def __init__(self, python: str):
        """Starts the worker with this interpreter, on a GPU where JAX computes on one."""
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self._process = subprocess.Popen(
            [python, str(WORKER), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        """Returns the worker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
          PeerError: if the worker reports an error, or ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            assert self._process.stderr is not None
            said = self._process.stderr.read().strip().splitlines() or ["nothing"]
            raise PeerError(f"the worker ended and said: {said[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def load(self, problem: Problem, folder: Path, **more: Any) -> dict[str, Any]:
        """Hands over a network, its batch and further arrays."""
        path = folder / f"{problem.name}.npz"
        export(path, problem, **more)
        return self.ask("load", path=str(path))

    def passes_per_step(self, variant: str, settings: dict[str, Any]) -> float:
        """Gradient evaluations a step, counted by the worker over one period."""
        steps = methods.EVERY
        answer = self.ask("steps", variant=variant, settings=settings, steps=steps)
        return answer["passes"] / steps

    def turn_of(self, variant: str, settings: dict[str, Any]) -> Callable[[int], float]:
        """The seconds of a step, as `timing.interleaved_seconds` wants them."""
        return lambda steps: self.ask("steps", variant=variant, settings=settings, steps=steps)[
            "seconds"
        ]


def export(path: Path, problem: Problem, **more: Any) -> None:
    """Writes what the worker needs to build the same network."""
    arrays = {"x": problem.batch[0], "y": problem.batch[1], **more}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(problem.params):
        arrays[f"params.{jax.tree_util.keystr(keys, simple=True, separator='.')}"] = leaf
    about = json.dumps({"name": problem.name, "sizes": problem.sizes})
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(path, allow_pickle=False, about=np.array(about), **arrays)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the benchmarks that have peers."""
    parser.add_argument(
        "--peers", action="store_true", help="also measure PyTorch and pytorch_optimizer"
    )
    parser.add_argument(
        "--peers-python",
        default=sys.executable,
        metavar="PATH",
        help="a Python that has torch and pytorch_optimizer (this one)",
    )
