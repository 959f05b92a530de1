"""A progress bar for loops in Python that take long."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def bar(items: Iterable[_T], description: str, show: bool) -> Iterator[_T]:
    """Goes through `items`, with tqdm's bar if `show`."""
    if not show:
        return iter(items)
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'flatopt[plots]'.") from error
    return iter(tqdm(items, desc=description, leave=False))
