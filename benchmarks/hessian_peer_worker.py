"""Runs the PyTorch libraries for `hessian_peers`, one request a line; needs PyTorch, not JAX.

A request names a library; the answer has its eigenvalues and the seconds it took, as JSON.
"""

import importlib.metadata
import json
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch

PACKAGES = {
    "curvlinops": "curvlinops-for-pytorch",
    "pyhessian": "pyhessian",
    "hessian_eigenthings": "hessian-eigenthings",
}


def load(path: str) -> tuple[Any, list[Any]]:
    """The network and the batches of the file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    layers = []
    for i in range(int(arrays["layers"])):
        kernel = arrays[f"kernel{i}"]
        layer = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel.T.copy()))
            layer.bias.copy_(torch.from_numpy(arrays[f"bias{i}"]))
        layers += [layer, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    batches = [
        (torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))
        for x, y in zip(arrays["x"], arrays["y"], strict=True)
    ]
    return model, batches


def curvlinops(model: Any, batches: list[Any], k: int) -> list[float]:
    """SciPy's eigsh on a Hessian operator, as its documentation shows."""
    import scipy.sparse.linalg
    from curvlinops import HessianLinearOperator

    params = [p for p in model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(
        model, torch.nn.CrossEntropyLoss(), params, batches, check_deterministic=False
    )
    scipy_operator = operator.to_scipy()
    values = scipy.sparse.linalg.eigsh(
        scipy_operator, k=k, which="LA", tol=1e-4, return_eigenvectors=True
    )[0]
    return sorted(values, reverse=True)


def pyhessian(model: Any, batches: list[Any], k: int) -> list[float]:
    """Power iteration with deflation; its default tolerance of 1e-3 is too loose for 1e-4."""
    from pyhessian import hessian

    operator = hessian(model, torch.nn.CrossEntropyLoss(), dataloader=batches, cuda=False)
    return operator.eigenvalues(maxIter=1000, tol=1e-6, top_n=k)[0]


def hessian_eigenthings(model: Any, batches: list[Any], k: int) -> list[float]:
    """Its Lanczos process; the 2 k steps that it takes by default are too few for 1e-4."""
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    operator = HessianOperator(model, batches, supervised_loss(torch.nn.CrossEntropyLoss()))
    result = lanczos(operator, k=k, max_iter=40, which="LA", tol=1e-4, seed=0)
    return sorted((float(v) for v in result.eigenvalues), reverse=True)


def main() -> None:
    """Answers requests until the input ends."""
    path, k = sys.argv[1], int(sys.argv[2])
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # What the libraries print is no answer.
    torch.set_num_threads(1)
    model, batches = load(path)
    for line in sys.stdin:
        name = line.strip()
        torch.manual_seed(0)
        try:
            began = time.perf_counter()
            values = globals()[name](model, batches, k)
            answer = {
                "seconds": time.perf_counter() - began,
                "values": [float(v) for v in values],
                "version": importlib.metadata.version(PACKAGES[name]),
                "torch": torch.__version__,
            }
        except Exception as error:  # Reported in the results, not hidden.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
