"""The PyTorch side of the benchmarks: a program of its own, which needs PyTorch and not JAX.

`benchmarks.peers` starts it and sends requests, one JSON object a line:
`load` builds a network from a file of weights and data, `steps` takes training steps with one
optimiser, `run` trains from the start on given batches. Each is answered by one line of JSON.
"""

import copy
import importlib.metadata
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

HEAD_WIDTH = 32
TRIAL_STEPS = 10
THREADS = torch.get_num_threads()
DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
Step = Callable[[Any, Any], None]


# Networks of the same shapes as those of `benchmarks.models`.


class CNN(torch.nn.Module):
    """Blocks of 3x3 convolution, ReLU and 2x2 maximum, then a mean and a linear layer."""

    def __init__(self, channels: list[int], classes: int):
        """Makes the layers."""
        super().__init__()
        pairs = zip([3, *channels[:-1]], channels, strict=True)
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(m, n, 3, padding=1) for m, n in pairs
        )
        self.head = torch.nn.Linear(channels[-1], classes)

    def forward(self, x: Any) -> Any:
        """Returns logits."""
        for layer in self.convolutions:
            x = torch.nn.functional.max_pool2d(torch.relu(layer(x)), 2)
        return self.head(x.mean((2, 3)))


class Transformer(torch.nn.Module):
    """PyTorch's own encoder layers, LayerNorm first, over embedded patches."""

    def __init__(self, sizes: dict[str, Any], classes: int):
        """Makes the layers."""
        super().__init__()
        width = sizes["width"]
        self.embed = torch.nn.Linear(sizes["features"], width)
        self.positions = torch.nn.Parameter(torch.empty(sizes["length"], width))
        self.blocks = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(
                width, sizes["heads"], 4 * width, dropout=0.0, activation="gelu",
                batch_first=True, norm_first=True,
            )
            for _ in range(sizes["layers"])
        )  # fmt: skip
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, classes)

    def forward(self, x: Any) -> Any:
        """Returns logits."""
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def load(path: str) -> tuple[Any, dict[str, Any]]:
    """The network and the arrays of the file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(str(arrays.pop("about")))
    sizes, name = about["sizes"], about["name"]
    tensors = {
        key: torch.from_numpy(value.astype(np.int64) if value.dtype.kind == "i" else value)
        for key, value in arrays.items()
    }
    weights = {key.removeprefix("params."): t for key, t in tensors.items() if "params." in key}
    data = {key: t for key, t in tensors.items() if "params." not in key}
    with torch.no_grad():
        model = _BUILDERS[name](sizes, weights)
    if name == "cnn":
        data["x"] = data["x"].permute(0, 3, 1, 2).contiguous()
    return model.to(DEVICE), {key: t.to(DEVICE) for key, t in data.items()}


def _linear(layer: Any, weights: dict[str, Any], name: str) -> None:
    layer.weight.copy_(weights[f"{name}.kernel"].T)
    layer.bias.copy_(weights[f"{name}.bias"])


def _build_mlp(sizes: dict[str, Any], weights: dict[str, Any]) -> Any:
    widths = sizes["widths"]
    layers: list[Any] = []
    for i, (m, n) in enumerate(itertools.pairwise(widths)):
        layers += [torch.nn.Linear(m, n), torch.nn.ReLU()]
        _linear(layers[-2], weights, str(i))
    return torch.nn.Sequential(*layers[:-1])


def _build_cnn(sizes: dict[str, Any], weights: dict[str, Any]) -> Any:
    model = CNN(sizes["channels"], len(weights["head.bias"]))
    for i, layer in enumerate(model.convolutions):
        layer.weight.copy_(weights[f"convolutions.{i}.kernel"].permute(3, 2, 0, 1))
        layer.bias.copy_(weights[f"convolutions.{i}.bias"])
    _linear(model.head, weights, "head")
    return model


def _build_transformer(sizes: dict[str, Any], weights: dict[str, Any]) -> Any:
    model = Transformer(sizes, len(weights["head.bias"]))

    def norm(layer: Any, name: str) -> None:
        layer.weight.copy_(weights[f"{name}.scale"])
        layer.bias.copy_(weights[f"{name}.bias"])

    _linear(model.embed, weights, "embed")
    model.positions.copy_(weights["positions"])
    for i, block in enumerate(model.blocks):
        own = f"blocks.{i}"
        block.self_attn.in_proj_weight.copy_(weights[f"{own}.attention.kernel"].T)
        block.self_attn.in_proj_bias.copy_(weights[f"{own}.attention.bias"])
        _linear(block.self_attn.out_proj, weights, f"{own}.out")
        _linear(block.linear1, weights, f"{own}.expand")
        _linear(block.linear2, weights, f"{own}.contract")
        norm(block.norm1, f"{own}.norm1")
        norm(block.norm2, f"{own}.norm2")
    norm(model.norm, "norm")
    _linear(model.head, weights, "head")
    return model


_BUILDERS = {"mlp": _build_mlp, "cnn": _build_cnn, "transformer": _build_transformer}


# Training steps, as the documentation of each library shows them.


def _pass(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss


def _simple(model: Any, optimizer: Any, after: Callable[[], None] = lambda: None) -> Step:
    def step(x: Any, y: Any) -> None:
        _pass(model, optimizer, x, y)
        optimizer.step()
        after()

    return step


def _with_closure(model: Any, optimizer: Any, first: bool = True) -> Step:
    """`first`: the caller takes the first gradient, as SAM and LookSAM want it."""

    def step(x: Any, y: Any) -> None:
        def closure() -> Any:
            return _pass(model, optimizer, x, y)

        if first:
            closure()
        optimizer.step(closure)

    return step


def _sgd(model: Any, s: dict[str, Any]) -> Any:
    return torch.optim.SGD(model.parameters(), lr=s["rate"], momentum=s["momentum"])


def _averaged(model: Any, s: dict[str, Any], **kwargs: Any) -> Step:
    average = torch.optim.swa_utils.AveragedModel(model, **kwargs)
    return _simple(model, _sgd(model, s), lambda: average.update_parameters(model))


def _ema(model: Any, s: dict[str, Any]) -> Step:
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(s["ema_decay"])
    return _averaged(model, s, multi_avg_fn=ema)


def _wrapped(model: Any, s: dict[str, Any], name: str, **kwargs: Any) -> Step:
    import pytorch_optimizer

    optimizer = getattr(pytorch_optimizer, name)(
        model.parameters(), torch.optim.SGD, rho=s["rho"], lr=s["rate"],
        momentum=s["momentum"], **kwargs,
    )  # fmt: skip
    return _with_closure(model, optimizer)


def _wsam(model: Any, s: dict[str, Any]) -> Step:
    import pytorch_optimizer

    optimizer = pytorch_optimizer.WSAM(
        model, model.parameters(), torch.optim.SGD, rho=s["rho"], lr=s["rate"],
        momentum=s["momentum"],
    )  # fmt: skip
    return _with_closure(model, optimizer, first=False)


def _gsam(model: Any, s: dict[str, Any]) -> Step:
    import pytorch_optimizer

    base = _sgd(model, s)
    schedule = torch.optim.lr_scheduler.ConstantLR(base, factor=1.0)
    radius = pytorch_optimizer.ProportionScheduler(
        schedule, max_lr=s["rate"], max_value=s["rho"], min_value=s["rho"]
    )
    optimizer = pytorch_optimizer.GSAM(model.parameters(), base, model, radius, alpha=0.4)

    def step(x: Any, y: Any) -> None:
        optimizer.set_closure(cross_entropy, x, y)
        optimizer.step()

    return step


def _lookahead(model: Any, s: dict[str, Any]) -> Step:
    import pytorch_optimizer

    return _simple(model, pytorch_optimizer.Lookahead(_sgd(model, s), k=s["every"], alpha=0.5))


VARIANTS: dict[str, Callable[[Any, dict[str, Any]], Step]] = {
    "SGD": lambda model, s: _simple(model, _sgd(model, s)),
    "SAM": lambda model, s: _wrapped(model, s, "SAM"),
    "GSAM": _gsam,
    "WSAM": _wsam,
    "LookSAM": lambda model, s: _wrapped(model, s, "LookSAM", k=s["every"], alpha=0.5),
    "Lookahead": _lookahead,
    "AveragedModel, mean": _averaged,
    "AveragedModel, EMA": _ema,
}


def _faster_threads(work: Callable[[], Any]) -> None:
    """Sets one thread or all of them, whichever does the work sooner.

    On small networks, and on a busy machine, threads cost more than they give.
    """
    seconds = {}
    for threads in sorted({1, THREADS}):
        torch.set_num_threads(threads)
        work()
        began = time.perf_counter()
        for _ in range(TRIAL_STEPS):
            work()
        seconds[threads] = time.perf_counter() - began
    torch.set_num_threads(min(seconds, key=lambda n: seconds[n]))


def _seconds() -> float:
    """The time, once the device has done what it was told."""
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


class Worker:
    """What is kept between requests."""

    def __init__(self) -> None:
        """Starts with no network."""
        self.model: Any = None
        self.data: dict[str, Any] = {}
        self.steps_of: dict[str, Step] = {}
        self.passes = 0

    def _count(self, *_: Any) -> None:
        self.passes += 1

    def load(self, path: str) -> dict[str, Any]:
        """Takes a network and data; returns its loss and the versions."""
        self.model, self.data = load(path)
        self.steps_of = {}
        x, y = self.data["x"], self.data["y"]
        with torch.no_grad():
            loss = cross_entropy(self.model(x), y)
        model = copy.deepcopy(self.model)
        if "rows" in self.data:  # Steps are on so many examples, not on all.
            x, y = x[self.data["rows"][0]], y[self.data["rows"][0]]
        if DEVICE == "cpu":
            _faster_threads(lambda: cross_entropy(model(x), y).backward())
        packages = ("torch", "pytorch_optimizer")
        versions = {name: importlib.metadata.version(name) for name in packages}
        return {"loss": float(loss), "versions": versions, "threads": torch.get_num_threads()}

    def steps(self, variant: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
        """Takes steps; returns the seconds of one, and the passes through the model of all."""
        if variant not in self.steps_of:
            model = copy.deepcopy(self.model)
            model.register_forward_hook(self._count)
            self.steps_of[variant] = VARIANTS[variant](model, settings)
        self.passes = 0
        step, x, y = self.steps_of[variant], self.data["x"], self.data["y"]
        began = _seconds()
        for _ in range(steps):
            step(x, y)
        return {"seconds": (_seconds() - began) / steps, "passes": self.passes}

    def run(self, variant: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Trains from the file's weights over its batches; returns the seconds and the loss."""
        seconds, loss = self._train(variant, settings, self.data["rows"])
        return {"seconds": seconds, "loss": loss, "threads": torch.get_num_threads()}

    def _train(self, variant: str, settings: dict[str, Any], rows: Any) -> tuple[float, float]:
        began = _seconds()
        model = copy.deepcopy(self.model)
        step = VARIANTS[variant](model, settings)
        x, y = self.data["x"], self.data["y"]
        for places in rows:
            step(x[places], y[places])
        seconds = _seconds() - began
        with torch.no_grad():
            return seconds, float(cross_entropy(model(x), y))


def main() -> None:
    """Answers requests until the input ends."""
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # What the libraries print is no answer.
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 on a GPU, as JAX has it.
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # Reported in the results, not hidden.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
