"""What methods there are: a name, a factory, its place beside an optimiser, what it needs."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeVar

import optax

Kind: TypeAlias = Literal["stage", "wrapper", "average", "optimizer"]
_Factory = TypeVar("_Factory", bound=Callable[..., optax.GradientTransformationExtraArgs])


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of flatopt, as `flatopt.methods` lists it.

    Attributes:
      name: that of its factory.
      factory: the public function that makes it.
      kind: its place: a "stage" comes before an optimiser, a "wrapper" around it, an "average"
        behind it, and an "optimizer" instead of it.
      needs: names of what `update` must be given besides `params`, such as "grad_fn".
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kind: Kind
    needs: tuple[str, ...] = ()

    @property
    def cost(self) -> str:
        """Gradients and copies, as its docstring says; empty where Python keeps no docstrings."""
        return cost_of(self.factory)

    def around(
        self, optimizer: optax.GradientTransformation, **arguments: Any
    ) -> optax.GradientTransformationExtraArgs:
        """The method in its place beside a whole optimiser, its learning rate and decay included.

        `arguments` are those of the factory, less `optimizer`; `optax.masked`, `freeze` and
        clipping of the descent gradient belong inside `optimizer`.
        """
        match self.kind:
            case "stage":
                return optax.chain(self.factory(**arguments), optimizer)
            case "average":
                return optax.chain(optimizer, self.factory(**arguments))
            case "wrapper":
                return self.factory(optimizer, **arguments)
        raise ValueError(
            f"flatopt.{self.name} is an optimiser itself and goes around none; write "
            f"flatopt.{self.name}(...) instead of yours"
        )


def cost_of(factory: Callable[..., Any]) -> str:
    """The line "Cost:" of a docstring."""
    found = re.search(r"^Cost:\s+(.*?)(?:\n\n|\Z)", inspect.getdoc(factory) or "", re.M | re.S)
    return " ".join(found[1].split()) if found else ""


_METHODS: dict[str, Method] = {}


def method(kind: Kind, *, needs: tuple[str, ...] = ()) -> Callable[[_Factory], _Factory]:
    """Enters a public factory into the list of methods, and leaves it as it is."""

    def enter(factory: _Factory) -> _Factory:
        _METHODS[factory.__name__] = Method(factory.__name__, factory, kind, needs)
        return factory

    return enter


def methods() -> Mapping[str, Method]:
    """All methods by name: for trainers and scripts that choose one by a string.

    Returns:
      A read-only mapping from names, such as "sam", to `Method`: `name`, `factory`, `kind`,
      `needs`, `cost`, and `around(optimizer, **arguments)`, which puts it where it belongs.

    Examples:
      >>> import optax, flatopt
      >>> method = flatopt.methods()["sam"]
      >>> print(method.kind, method.needs, method.cost)
      stage ('grad_fn',) 1 extra gradient; 0 copies (+1 temporary).
      >>> tx = method.around(optax.adamw(1e-3), rho=0.05)  # chain(sam(rho=0.05), adamw(1e-3))
      >>> print([m.name for m in flatopt.methods().values() if m.kind == "average"][:2])
      ['bema', 'lawa']

    Cost: 0 extra gradients; 0 copies.
    """
    return MappingProxyType(dict(sorted(_METHODS.items())))
