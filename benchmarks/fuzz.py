"""Random chains of flatopt and optax over random trees: what must hold of any of them.

    python -m benchmarks.fuzz --number 10000 --json benchmarks/results/fuzz_0.json

Chain n is drawn from seed n alone: `--first n --number 1` repeats it. The file is written as the
run goes on; started again, it goes on behind the last chain in it. `--again` tries what failed once
more. Nothing is compiled but one chain in so many, and trees are small: some ten chains a second.

Of each chain: structure, shapes and dtypes of parameters, updates and state stay; no number that is
not finite comes of finite ones; a second call gives the same bits; msgpack gives back the state;
compiled, it is the same to rounding; a wrong argument is refused by its name.
"""

import argparse
import dataclasses
import json
import math
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import flatopt
from benchmarks import record
from tests import cases

STEPS = 2
JIT_EVERY = 50
PURE_EVERY = 5
SAVE_EVERY = 200
CURVATURE = 0.5
# Arguments that are shares, and counts that shape the program.
SHARES = ("decay", "sparsity", "fraction", "keep", "quantile", "lam", "b1", "b2", "beta", "gamma")
COUNTS = ("every", "start", "num_steps", "window", "number", "alpha_every", "inverse_every")
SINGLE_REPLICA = ("hold_replicas",)
SHAPES: tuple[dict[str, Any], ...] = (
    {"w": (2, 3), "b": (3,)},
    {"w": (2, 3)},
    {"scalar": ()},
    {"deep": {"a": [(4,), (2, 2)], "empty": {}}, "b": ()},
    {"w": (2, 3), "nothing": None},
    {"w": (3,), "zero_size": (0,)},
    {"w": (2, 0), "v": (1,)},
    {"list": [(1,), (1, 1), (1, 1, 1)]},
    {"conv": (2, 2, 1, 2), "b": (2,)},
)
DTYPES: tuple[tuple[str, ...], ...] = (
    ("float32",), ("float32",), ("float32",), ("bfloat16",), ("float16",), ("float32", "bfloat16"),
)  # fmt: skip
SCALES = {"float32": (1e-12, 1e-6, 1.0, 1.0, 1.0, 1e6, 1e12), "half": (1e-2, 1.0, 1.0, 10.0)}
OPTAX_STAGES: dict[str, Callable[[], Any]] = {
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "clip": lambda: optax.clip(0.5),
    "add_decayed_weights": lambda: optax.add_decayed_weights(1e-3),
    "normalize_by_update_norm": lambda: optax.normalize_by_update_norm(eps=1e-3),
    "trace": lambda: optax.trace(0.5),
    "scale_by_adam": lambda: optax.scale_by_adam(eps=1e-3),
}
OPTAX_BASES: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "adam": lambda: optax.adam(0.05, eps=1e-3),
    "adamw": lambda: optax.adamw(0.05, eps=1e-3),
    "lion": lambda: optax.lion(0.01),
    "rmsprop": lambda: optax.rmsprop(0.05, eps=1e-3),
}
OPTAX_WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "with_extra_args_support": optax.with_extra_args_support,
}
KINDS, SHARES_OF_KINDS = (
    ("stage", "wrapper", "average", "optax", "around"),
    (0.4, 0.25, 0.2, 0.1, 0.05),
)
STAGES = ("perturbation", "direction", "combiner", "stage")


@dataclasses.dataclass
class Chain:
    """A chain, and the names of its factories from the first to the outermost."""

    tx: Any
    names: list[str]
    flatopts: list[tuple[cases.Case, dict[str, Any]]]


def draw_arguments(case: cases.Case, rng: np.random.Generator) -> dict[str, Any]:
    """The arguments of a case with other numbers."""
    drawn: dict[str, Any] = {}
    for name, value in case.kwargs.items():
        if isinstance(value, bool) or case.factory in SINGLE_REPLICA or rng.random() < 0.3:
            continue
        if name in COUNTS and isinstance(value, int):
            drawn[name] = int(rng.integers(1, 4))
        elif name in SHARES and isinstance(value, float):
            drawn[name] = float(rng.uniform(0.05, 0.95))
        elif isinstance(value, float) and value > 0:
            drawn[name] = float(value * 10 ** rng.uniform(-1.0, 0.3))
    if "every" in case.kwargs and "period" in case.kwargs:
        drawn["period"] = 2 * drawn.get("every", case.kwargs["every"])
    return drawn


def draw_chain(rng: np.random.Generator) -> Chain:
    """One to five factories: stages, an optimiser, wrappers around it, averages behind it."""
    chain = Chain(None, [], [])

    def choose(kinds: tuple[str, ...]) -> tuple[cases.Case, dict[str, Any]]:
        among = [c for c in cases.CASES if c.kind in kinds]
        case = among[rng.integers(len(among))]
        chosen = case, draw_arguments(case, rng)
        chain.flatopts.append(chosen)
        chain.names.append(case.name)
        return chosen

    def choose_of(table: dict[str, Any]) -> Any:
        name = sorted(table)[rng.integers(len(table))]
        chain.names.append(f"optax.{name}")
        return table[name]

    left = int(rng.integers(1, 6)) - 1
    core: Callable[[], Any] = choose_of(OPTAX_BASES) if left else lambda: optax.sgd(0.05)
    tx, before, behind = core(), [], []
    for _ in range(left + (not chain.names)):
        kind = rng.choice(
            ["stage", "wrapper", "average", "optax", "around"], p=[0.4, 0.25, 0.2, 0.1, 0.05]
        )
        if kind == "stage":
            case, drawn = choose(STAGES)
            before.append(_stage(case, drawn))
        elif kind == "wrapper":
            case, drawn = choose(("wrapper",))
            # Around what is drawn so far; a method that is an optimiser itself takes its place.
            inner = {"optimizer": tx} if "optimizer" in case.kwargs else {}
            tx = getattr(flatopt, case.factory)(**{**case.kwargs, **drawn, **inner})
        elif kind == "average":
            case, drawn = choose(("average",))
            behind.append(getattr(flatopt, case.factory)(**{**case.kwargs, **drawn}))
        elif kind == "optax":
            before.append(choose_of(OPTAX_STAGES)())
        else:
            tx = choose_of(OPTAX_WRAPPERS)(tx)
    chain.tx = optax.with_extra_args_support(optax.chain(*before, tx, *behind))
    return chain


def _stage(case: cases.Case, drawn: dict[str, Any]) -> Any:
    made = getattr(flatopt, case.factory)(**{**case.kwargs, **drawn})
    return cases.complete(case.kind, made, optax.identity)


def _has_small_epsilon(chain: Chain) -> bool:
    """Adam's 1e-8 is 0 in float16, and so are squares of small gradients: 0 / 0 in optax itself."""
    words = ("adam", "pace", "schedule_free")
    return any(word in name for name in chain.names for word in words)


def draw_params(rng: np.random.Generator, chain: Chain) -> Any:
    """A tree of small arrays."""
    half = not _has_small_epsilon(chain)
    dtypes = DTYPES[rng.integers(len(DTYPES))]
    dtypes = ("bfloat16",) if dtypes == ("float16",) and not half else dtypes
    scales = SCALES["float32" if dtypes == ("float32",) else "half"]
    scale = scales[rng.integers(len(scales))]
    # Polyak's step is as long as the weights are large, and its square times the decay is a share.
    scale = min(scale, 1.0) if any("schedule_free" in name for name in chain.names) else scale

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        dtype = dtypes[rng.integers(len(dtypes))]
        return jnp.asarray(np.asarray(rng.normal(size=shape) * scale, np.float32)).astype(dtype)

    shapes = SHAPES[rng.integers(len(SHAPES))]
    return jax.tree.map(leaf, shapes, is_leaf=lambda s: isinstance(s, tuple))


def gradient(params: Any, _: Any = 0) -> Any:
    """Of a bowl around zero: finite wherever the parameters are, and training contracts."""
    return jax.tree.map(lambda p: (CURVATURE * p).astype(p.dtype), params)


def value(params: Any) -> jax.Array:
    """Its height."""
    return 0.5 * CURVATURE * optax.tree.norm(jax.tree.map(jnp.float32, params), squared=True)


def step(tx: Any) -> Callable[[Any, Any], Any]:
    """A step of the chain on the bowl."""
    grad_fn = cases.GradientByHand(gradient, value)

    def run(params: Any, state: Any) -> Any:
        extra = {"grad_fn": grad_fn, "value": value(params)}
        updates, state = tx.update(gradient(params), state, params, **extra)
        return optax.apply_updates(params, updates), state, updates

    return run


def describe(tree: Any) -> Any:
    """Structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(x), jnp.result_type(x).name) for x in leaves]


def check_run(tx: Any, params: Any, seed: int) -> None:
    """Raises AssertionError where a run breaks a rule."""
    one, state = step(tx), tx.init(params)
    start = params, state
    rule = describe(params)
    for number in range(STEPS):
        new, after, updates = one(params, state)
        assert describe(new) == rule, f"parameters changed: {rule} to {describe(new)}"
        shapes = [jnp.shape(x) for x in jax.tree.leaves(updates)]
        assert shapes == [shape for shape, _ in rule[1]], f"updates of shapes {shapes}"
        if number:
            assert describe(after) == describe(state), "the state changed its structure or dtypes"
        assert_finite(new, "parameters")
        assert_finite(after, "state")
        if number == 0 and seed % PURE_EVERY == 0:
            assert_same(one(params, state), (new, after, updates), "not pure")
        params, state = new, after
    evaluated = _evaluated(state, params)
    if evaluated is not None:
        assert describe(evaluated) == rule, f"eval_params of {describe(evaluated)}"
        assert_finite(evaluated, "eval_params")
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    assert_same(restored, state, "msgpack")
    if seed % JIT_EVERY == 0:
        check_compiled(one, start, (params, state))


def check_compiled(one: Any, start: Any, found: Any) -> None:
    """The same run under `jax.jit`, to rounding."""
    with jax.disable_jit(False):
        jitted = jax.jit(one)
        for _ in range(STEPS):
            start = jitted(*start)[:2]
        assert describe(start) == describe(found), "jit changed shapes or dtypes"
        half = any(x.dtype.itemsize < 4 for x in jax.tree.leaves(found[0]))
        size = max(
            (float(jnp.abs(x).max()) for x in jax.tree.leaves(found[0]) if x.size), default=0.0
        )
        for a, b in zip(*(jax.tree.leaves(tree[0]) for tree in (start, found)), strict=True):
            a, b = (np.asarray(x, np.float32) for x in (a, b))
            tolerance = 5e-2 if half else 1e-3
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size, err_msg="jit")


def _evaluated(state: Any, params: Any) -> Any:
    try:
        return flatopt.eval_params(state, params)
    except ValueError as error:  # Two averages on one level: which one is asked for.
        if "eval_params" in str(error) or "averag" in str(error):
            return None
        raise


def assert_finite(tree: Any, what: str) -> None:
    """No NaN; infinities are allowed in a state, as bounds of what has not been seen."""
    for path, x in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            bad = np.isnan if what == "state" else lambda a: ~np.isfinite(a)
            wrong = bool(bad(np.asarray(x, np.float32)).any())
            assert not wrong, f"{what}{jax.tree_util.keystr(path)} is not finite"


def assert_same(a: Any, b: Any, what: str) -> None:
    """Equal bits."""
    assert describe(a) == describe(b), what
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y), equal_nan=x.dtype.kind == "f"), what


def check_misuse(chain: Chain, params: Any, rng: np.random.Generator) -> None:
    """One wrong argument of the first method of flatopt, and a call without `grad_fn`."""
    if not chain.flatopts:
        return
    case, drawn = chain.flatopts[0]
    words = [n for n, v in case.kwargs.items() if isinstance(v, float | int | str)]
    words = [n for n in words if not isinstance(case.kwargs[n], bool) and n != "key"]
    if words:
        name = words[rng.integers(len(words))]
        wrong = (math.nan, "wrong", object())[rng.integers(3)]
        wrong = "wrong" if isinstance(case.kwargs[name], str) else wrong  # A choice of words.
        arguments = {**case.kwargs, **drawn, name: wrong}
        expect_refusal(lambda: getattr(flatopt, case.factory)(**arguments), name)
    if case.needs_grad_fn and case.kind in STAGES:
        tx = optax.with_extra_args_support(_stage(case, {}))
        expect_refusal(lambda: tx.update(gradient(params), tx.init(params), params), "grad_fn")


def expect_refusal(call: Callable[[], Any], name: str) -> None:
    """Raises AssertionError unless `call` raises an error that names what is wrong."""
    try:
        call()
    except (ValueError, TypeError) as error:
        if name in str(error):
            return
        raise AssertionError(f"the error does not name {name}: {error}") from error
    raise AssertionError(f"a wrong {name} was taken")


def try_seed(seed: int) -> tuple[str, str, list[str]]:
    """Result of one seed: "passed", "refused" or "failed"; what was said; the names."""
    rng = np.random.default_rng(seed)
    chain = Chain(None, [], [])
    try:
        with jax.disable_jit():
            try:
                chain = draw_chain(rng)
                params = draw_params(rng, chain)
                check_run(chain.tx, params, seed)
            except (ValueError, TypeError) as error:  # What does not go together is said.
                if not re.match(r"flatopt\.\w+ |\w+=", str(error)):
                    raise
                return "refused", str(error), chain.names
            check_misuse(chain, params, rng)
    except Exception:
        return "failed", traceback.format_exc(limit=-4), chain.names
    return "passed", "", chain.names


@dataclasses.dataclass
class Tally:
    """What has been found so far, as it stands in the file."""

    first: int
    results: dict[str, int]
    factories: dict[str, int]
    seconds: float
    failures: list[dict[str, Any]]
    mended: list[dict[str, Any]]

    @property
    def chains(self) -> int:
        """How many have been tried."""
        return sum(self.results.values())

    def add(self, seed: int) -> None:
        """Tries one more."""
        result, said, names = try_seed(seed)
        self.results[result] += 1
        length = str(max(1, len(names)))
        self.factories[length] = self.factories.get(length, 0) + 1
        if result == "failed":
            self.failures.append({"seed": seed, "names": names, "said": said})
            print(f"seed {seed}: {' > '.join(names)}\n{said}", flush=True)

    def try_again(self) -> None:
        """Tries what failed once more: what has been mended since counts as passed."""
        found = {entry["seed"]: try_seed(entry["seed"]) for entry in self.failures}
        for entry in self.failures:
            result, said, _ = found[entry["seed"]]
            self.results["failed"] -= 1
            self.results[result] += 1
            if result != "failed":
                said = entry["said"].strip().splitlines()[-1][:200]
                self.mended.append({**entry, "said": said})
        self.failures = [e for e in self.failures if found[e["seed"]][0] == "failed"]


def load(path: Path | None, first: int) -> Tally:
    """What stands in the file, or nothing."""
    if path and path.exists():
        old = json.loads(path.read_text())
        if old["first"] == first:
            fields = [field.name for field in dataclasses.fields(Tally)]
            return Tally(**{name: old[name] for name in fields})
    return Tally(first, {"passed": 0, "refused": 0, "failed": 0}, {}, 0.0, [], [])


def lines(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    kinds, lengths = results["results"], results["factories"]
    chains, first = sum(kinds.values()), results["first"]
    of = ", ".join(f"{n} of {lengths[n]:,}" for n in sorted(lengths))
    return [
        "| seeds | chains | passed | refused by name | failed, mended since | fail | min |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| {first:,} to {first + chains - 1:,} | {chains:,} | {kinds['passed']:,} "
        f"| {kinds['refused']:,} | {len(results['mended'])} | {kinds['failed']} "
        f"| {results['seconds'] / 60:.0f} |",
        "",
        f"Factories in a chain, and chains: {of}.",
    ]


def main() -> None:
    """Runs the chains, writes JSON where asked, and fails where one breaks a rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--first", type=int, default=0, help="the first seed (%(default)s)")
    add("--number", type=int, default=10_000, help="how many (%(default)s)")
    add("--json", type=Path, help="write the results here, and go on from what is there")
    add("--again", action="store_true", help="try what failed, in the file, once more")
    args = parser.parse_args()
    tally = load(args.json, args.first)
    began = time.perf_counter() - tally.seconds

    def save() -> None:
        tally.seconds = round(time.perf_counter() - began, 1)
        if args.json:
            settings = {"steps": STEPS, "jit_every": JIT_EVERY, "pure_every": PURE_EVERY}
            record.write(args.json, {"settings": settings, **dataclasses.asdict(tally)})

    if args.again:
        tally.try_again()
    for seed in tqdm(range(args.first + tally.chains, args.first + args.number), disable=None):
        tally.add(seed)
        if tally.chains % SAVE_EVERY == 0:
            save()
    save()
    if tally.failures:
        raise SystemExit(f"{len(tally.failures)} chains broke a rule.")


if __name__ == "__main__":
    main()
