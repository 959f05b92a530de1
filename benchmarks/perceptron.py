"""Records what `examples.perceptron` measures: `python -m benchmarks.perceptron --json ...`."""

from pathlib import Path

from benchmarks import record
from examples import perceptron


def main() -> None:
    """Runs the example with its own flags, and writes every number to a file."""
    parser = perceptron.make_parser()
    parser.prog = "python -m benchmarks.perceptron"
    parser.add_argument("--json", type=Path, required=True, help="where every number goes")
    settings = parser.parse_args()
    arms = perceptron.run(settings)
    results = {
        "seeds": list(range(settings.first_seed, settings.first_seed + settings.seeds)),
        "sigmas": perceptron.SIGMAS.tolist(),
        "distances": perceptron.DISTANCES.tolist(),
        "arms": arms,
    }
    record.write(settings.json, results)


if __name__ == "__main__":
    main()
