"""Every task by name: `TASKS["digits_mlp"](data_dir, examples=300, label_noise=0.2)`."""

from collections.abc import Callable

from benchmarks.claims import images
from benchmarks.claims.task import Parts, Split, Task

__all__ = ["TASKS", "Parts", "Split", "Task"]

TASKS: dict[str, Callable[..., Task]] = {
    "digits_mlp": images.digits_mlp,
    "digits_mlp_bn": images.digits_mlp_bn,
    "fashion_mlp": images.fashion_mlp,
}
