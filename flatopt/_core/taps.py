"""Taps: where a model says what goes into each of its layers, and what comes out."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping

import jax


@dataclasses.dataclass
class Recording:
    """What the taps of one call of a model see, while it is traced.

    Attributes:
      taps: by name, what is added to a layer's output; of layers that are not in it, nothing.
      inputs: by name, what went into a layer.
      outputs: by name, what came out, before anything was added.
    """

    taps: Mapping[str, jax.Array]
    inputs: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    outputs: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


_RECORDING: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("taps", default=None)


@contextlib.contextmanager
def record(taps: Mapping[str, jax.Array]) -> Iterator[Recording]:
    """Within it `tap` adds `taps` to the outputs, and notes what it sees."""
    recording = Recording(taps)
    token = _RECORDING.set(recording)
    try:
        yield recording
    finally:
        _RECORDING.reset(token)


def is_recording() -> bool:
    """Whether a tap would be seen."""
    return _RECORDING.get() is not None


def tap(name: str, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    r"""Marks a layer of a model in plain JAX, for `make_stats_fn`; elsewhere it does nothing.

    .. math:: y = W a + b + z, \qquad z = 0, \quad \partial L / \partial z = \partial L / \partial y

    Args:
      name: path of the layer's parameters, keys joined by "/": "hidden" for params["hidden"].
      inputs: a, `[batch, ..., in]`; axes between are positions that share the weights.
      outputs: y, `[batch, ..., out]`, with the bias, before the activation.

    Returns:
      `outputs`.

    Examples:
      >>> import jax.numpy as jnp, flatopt
      >>> x, layer = jnp.ones([2, 3]), {"kernel": jnp.ones([3, 1])}
      >>> y = flatopt.tap("layer", x, x @ layer["kernel"])
      >>> print(y.ravel())
      [3. 3.]

    Cost: 0 extra gradients; 0 copies.
    """
    recording = _RECORDING.get()
    if recording is None:
        return outputs
    if name in recording.inputs:
        raise ValueError(
            f"name={name!r} was tapped twice in one call. Each layer needs a name of its own; of a "
            "layer that is called several times, join the calls along an axis between."
        )
    recording.inputs[name], recording.outputs[name] = inputs, outputs
    return outputs + recording.taps[name] if name in recording.taps else outputs
