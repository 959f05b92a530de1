"""Writes the tables of the documentation from the committed results.

`python -m benchmarks.render`. A page says `<!-- table: compare_digits -->`; what stands from there
to `<!-- end -->` is replaced by the table of `results/compare_digits.json`, or by nothing where
there is no such file yet. `python -m benchmarks.draw` draws the plots that stand under tables.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    accelerators,
    anneal,
    averages,
    batch_hessian,
    compile_time,
    draw,
    fuzz,
    gossip,
    local_entropy,
    memory,
    noise,
    scaling,
    sparse,
    step_time,
    whole_run,
)
from benchmarks.compare.report import Estimate
from examples import binary_perceptron, gaussian_mixture, perceptron, phase_diagram, three_regimes

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
# What a user would weigh against another, and what it stands beside.
COST_ROWS = [
    "sam", "sam, by hand", "optax.contrib.sam, opaque", "optax.contrib.sam, transparent",
    "sam every=5", "looksam every=5", "msam_sgd", "swa", "params_ema", "lookahead",
    "optax.lookahead", "PyTorch SAM", "PyTorch Lookahead",
]  # fmt: skip
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def render(page: Path) -> str:
    """Returns the text of `page` with every table made anew."""
    up = "../" * (len(page.relative_to(ROOT).parts) - 1)
    return _BLOCK.sub(lambda m: m[1] + table(m[2], up) + m[3], page.read_text())


def table(name: str, up: str) -> str:
    """The table and the provenance line of one results file; `up` leads to the root."""
    if name in ("brings", "cost"):
        return brings(up) if name == "brings" else cost(up)
    file = name.removeprefix("batch_norm_")  # The second table of a comparison.
    kind = next(kind for kind in _TABLES if name.startswith(kind))
    path = RESULTS / f"{file}.json"
    if not path.exists():
        return ""
    results = json.loads(path.read_text())
    lines = [*_TABLES[kind](results), "", _provenance(file, up, results), ""]
    if kind in draw.KINDS:
        lines += [f"![{file}]({up}benchmarks/plots/{file}.png)", ""]
    return "\n".join(lines)


def brings(up: str) -> str:
    """README's five lines: what the methods brought, and what they cost."""
    models = ("mlp", "cnn", "transformer")
    names = ["compare_digits", "compare_fashion_mnist", *(f"step_time_{m}" for m in models)]
    if not all((RESULTS / f"{name}.json").exists() for name in [*names, "whole_run"]):
        return ""
    digits, fashion, *times = (json.loads((RESULTS / f"{name}.json").read_text()) for name in names)

    def gain(results: dict[str, Any], method: str, equal_gradients: bool = False) -> str:
        arms = {(arm["method"], arm["equal_gradients"]): arm for arm in results["arms"]}
        arm = arms[method, equal_gradients]
        return _pm(arm["difference_points_mean"], arm["difference_points_standard_error"], "+.2f")

    def times_sgd(method: str) -> str:
        medians = [
            row["over_base"]["median"]
            for model, results in zip(models, times, strict=True)
            for row in results["models"][model]["rows"]
            if row["variant"] == method
        ]
        return f"{min(medians):.2f} to {max(medians):.2f}"

    recomputed = digits["batch_norm"]["difference_points"]["recomputed_minus_last"]
    mean = _pm(recomputed["mean"], recomputed["standard_error"], "+.2f")
    runs = json.loads((RESULTS / "whole_run.json").read_text())["rows"]
    faster = next(row for row in runs if row["method"] == "sam")["times_faster_than_peer"]["1"]
    less, step = "shortened to as many gradients as SGD", times_sgd("sam")
    lines = [
        f"- `sam` {gain(digits, 'sam')}, `asam` {gain(digits, 'asam')}; {less} "
        f"{gain(digits, 'sam', True)} and {gain(digits, 'asam', True)}.",
        f"- `msam`, which takes no second gradient, {gain(digits, 'msam')}.",
        "- `swa` of a network with BatchNorm, at a constant rate and with noisy labels, over its "
        f"last weights: {mean}.",
        f"- On Fashion-MNIST, in a short run, `sam` *loses*: {gain(fashion, 'sam')}.",
        f"- A step takes {step} times SGD's with `sam`, {times_sgd('msam_sgd')} with `msam_sgd`, "
        "on a CPU; a whole run in one scan is "
        f"{faster['median']:.1f} times faster than a PyTorch loop.",
    ]
    return "\n".join(["", *lines, "", f"[All results]({up}docs/results.md).", ""])


def cost(up: str) -> str:
    """What a step costs over SGD's, on every model, and a whole run over PyTorch's."""
    # A step of the MLP takes more than the 32 MiB that glibc keeps: see benchmarks/README.md.
    models = {"cnn": "CNN", "transformer": "Transformer", "mlp": "MLP, bound by memory"}
    files = [f"step_time_{model}" for model in models]
    if not all((RESULTS / f"{file}.json").exists() for file in [*files, "whole_run"]):
        return ""
    ratios = []
    for model, file in zip(models, files, strict=True):
        rows = json.loads((RESULTS / f"{file}.json").read_text())["models"][model]["rows"]
        ratios.append({row["variant"]: row["over_base"]["median"] for row in rows})
    lines = [f"| a step over SGD's | {' | '.join(models.values())} |", "| --- |" + 3 * " ---: |"]
    lines += [
        f"| {variant} | {' | '.join(f'{ratio[variant]:.2f}' for ratio in ratios)} |"
        for variant in COST_ROWS
    ]
    runs = json.loads((RESULTS / "whole_run.json").read_text())["rows"]
    faster = next(row for row in runs if row["method"] == "sam")["times_faster_than_peer"]
    lines += [
        "",
        "A whole run of `sam` as one compiled scan, its compilation apart, is "
        f"{faster['1']['median']:.1f} times faster than a PyTorch loop; with 8 seeds at once, "
        f"{faster['8']['median']:.1f} times a seed.",
    ]
    links = (f"[{f}]({up}benchmarks/results/{f}.json)" for f in [*files, "whole_run"])
    return "\n".join([*lines, "", f"Medians; results: {', '.join(links)}.", ""])


def _compare(results: dict[str, Any]) -> list[str]:
    lines = [
        "| method | gradients | test accuracy, % | minus sgd, points | top eigenvalue "
        "| local energy, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm in results["arms"]:
        star = r"\*" if arm["equal_gradients"] else ""
        accuracy = _pm(
            100 * arm["test_accuracy_mean"], 100 * arm["test_accuracy_standard_error"], ".2f"
        )
        difference = (
            ""
            if arm["method"] == "sgd"
            else _pm(arm["difference_points_mean"], arm["difference_points_standard_error"], "+.2f")
        )
        lines.append(
            f"| {arm['method']}{star} | {arm['gradient_evaluations_per_seed']} | {accuracy} "
            f"| {difference} | {arm['top_eigenvalue_mean']:.2g} "
            f"| {100 * np.mean(arm['local_energy']):.2f} |"
        )
    return lines


def _batch_norm(results: dict[str, Any]) -> list[str]:
    study = results["batch_norm"]
    lines = ["| evaluated | test accuracy, % |", "| --- | ---: |"]
    for name, shares in study["test_accuracy"].items():
        estimate = Estimate.of(100 * np.array(shares))
        lines.append(f"| {name.replace('_', ' ')} | {estimate.show(2)} |")
    for name, points in study["difference_points"].items():
        difference = _pm(points["mean"], points["standard_error"], "+.2f")
        lines.append(f"| {name.replace('_', ' ')}, points | {difference} |")
    return lines


def _local_entropy(results: dict[str, Any]) -> list[str]:
    return local_entropy.table(results["results"]).splitlines()


def _three_regimes(results: dict[str, Any]) -> list[str]:
    return three_regimes.table(results).splitlines()


def _phase_diagram(results: dict[str, Any]) -> list[str]:
    return phase_diagram.table(results).splitlines()


def _binary_perceptron(results: dict[str, Any]) -> list[str]:
    return binary_perceptron.table(results["arms"]).splitlines()


def _gaussian_mixture(results: dict[str, Any]) -> list[str]:
    return gaussian_mixture.table(results["arms"]).splitlines()


def _perceptron(results: dict[str, Any]) -> list[str]:
    return perceptron.table(results["arms"]).splitlines()


_TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "accelerators": accelerators.lines,
    "anneal": anneal.lines,
    "averages": averages.lines,
    "batch_hessian": batch_hessian.lines,
    "batch_norm_compare": _batch_norm,
    "binary_perceptron": _binary_perceptron,
    "compare": _compare,
    "compile_time": compile_time.lines,
    "gaussian_mixture": _gaussian_mixture,
    "fuzz": fuzz.lines,
    "gossip": gossip.lines,
    "local_entropy": _local_entropy,
    "memory": memory.lines,
    "noise": noise.lines,
    "perceptron": _perceptron,
    "phase_diagram": _phase_diagram,
    "scaling": scaling.lines,
    "sparse": sparse.lines,
    "step_time": step_time.lines,
    "three_regimes": _three_regimes,
    "whole_run": whole_run.lines,
}


def _pm(mean: float, error: float, form: str) -> str:
    return f"{mean:{form}} ± {error:{form.removeprefix('+')}}"


def _provenance(name: str, up: str, results: dict[str, Any]) -> str:
    """One line: where the numbers are and how they were made."""
    machine, versions = results["machine"], results["versions"]
    seeds = results.get("seeds") or range(results.get("settings", {}).get("seeds", 0))
    seeds = f"seeds {seeds[0]} to {seeds[-1]}, " if seeds else ""
    variables = [f"{k}={v}" for k, v in results.get("environment", {}).items()]
    processors = "1 CPU" if machine["cpus"] == 1 else f"{machine['cpus']} CPUs"
    return (
        f"[{name}.json]({up}benchmarks/results/{name}.json): {seeds}{processors}, "
        f"{machine['device']}, jax {versions['jax']}, optax {versions['optax']}; "
        f"`{' '.join(variables + results['command'])}`"
    )


def main() -> None:
    """Rewrites the pages in place."""
    for page in PAGES:
        text = render(page)
        if text != page.read_text():
            page.write_text(text)
            print(f"rewrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
