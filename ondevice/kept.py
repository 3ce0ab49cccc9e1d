"""The safetensors file that an order leaves on the device for the next order of its run."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from wire import storage

log = logging.getLogger("edge-agent")

Tensors = dict[str, NDArray[Any]]  # by name


@dataclass(frozen=True)
class KeptFile:
    """The file that an earlier order of the run left; a missing or damaged file is ignored.

    Attributes:
        path: None if no order of the run has left a file.
        named: renames the file's tensors to their names in a state.
    """

    path: Path | None = None
    named: Callable[[Tensors], Tensors] = dict

    def read(self) -> Tensors:
        """The tensors by name; {} if the file cannot be read."""
        if self.path is None:
            return {}
        try:
            return self.named(load_file(self.path))
        except (OSError, SafetensorError) as fault:
            log.warning("%s cannot be read (%s); going on without it", self.path, fault)
            return {}


def write(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write tensors to a file that is whole or absent, even after a power cut."""
    content = save({name: np.asarray(value) for name, value in tensors.items()})
    with storage.at(path.parent):
        storage.write(path, content)


def keep_only(files: Iterable[Path], needed: Iterable[str]) -> None:
    """Remove all files whose names are not in `needed`."""
    names = frozenset(needed)
    for path in files:
        if path.name not in names:
            path.unlink()
