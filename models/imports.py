"""Import a user's own modules so that their names never clash with ours.

Our packages have plain names (`models`, `tools`, `wire`), and a user's may have the same. So each
`Scope` is a private package: a user's `models.blocks` is `stillhouse_own_1.models.blocks` in
`sys.modules`, and two files `net.py` of two folders are two modules. Each user's module has an
`__import__` of its own, so that an import statement finds the user's modules first, whenever it
runs. Installed packages (torch, timm) are imported as ever.

torchvision can be imported beside a torch of another build (`_vision`). The random numbers that a
module draws while it is imported are the same each time, and do not change those drawn later.

A call with an absolute name, `importlib.import_module("blocks")`, finds no user's module; write an
import statement, or `import_module(".blocks", __package__)`.
"""

import builtins
import hashlib
import importlib
import itertools
import random
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np
import torch

OURS = (
    "benchmarks", "edge_agent", "hardware", "models", "ondevice", "orchestrator", "tools", "wire",
)  # fmt: skip
_MARKS = ("edge_agent", "orchestrator", "wire")  # a folder with all of them holds Stillhouse
_PREFIX = "stillhouse_own_"
_numbers = itertools.count(1)
_scopes: dict[str, "Scope"] = {}
_schemas: list[Any] = []  # torch forgets a schema when its Library object dies


class Scope:
    """The modules of one user's network.

    Args:
        folders: where to look for them first, in this order.
        place: the module that is wanted, with dots.

    Attributes:
        package: the private package.
        sources: SHA-256 of each source file that was imported, by its path below its folder.
    """

    def __init__(self, folders: Sequence[Path], place: str) -> None:
        self.package = f"{_PREFIX}{next(_numbers)}"
        self.sources: dict[str, str] = {}
        self._folders = [str(folder) for folder in folders]
        self._wanted = place.partition(".")[0]
        self._installed = False
        self.builtins = {**vars(builtins), "__import__": self._import}
        package = ModuleType(self.package)
        package.__path__ = []
        sys.modules[self.package], _scopes[self.package] = package, self
        importlib.invalidate_caches()
        self._installed = self._find(self._wanted) is None and _comes_with_ours(self._wanted)

    def load(self, place: str) -> ModuleType:
        """Import a module, the user's if there is one, or else an installed one.

        Raises:
            Exception: whatever the module's own code raises.
        """
        before = list(sys.path)
        try:
            with _apart():
                if self.holds(self._wanted):
                    return importlib.import_module(f"{self.package}.{place}")
                return importlib.import_module(place)
        finally:  # folders that a module put before ours go behind them
            sys.path[:] = [*before, *(entry for entry in sys.path if entry not in before)]

    def holds(self, name: str) -> bool:
        """Whether a top-level name is the user's."""
        if name in sys.stdlib_module_names and name != self._wanted:
            return False
        return self._find(name) is not None

    def entries(self, name: str) -> list[str]:
        """The folders in which a top-level name is the user's."""
        folders = [*self._folders, *(entry for entry in sys.path if _outside(entry))]
        if name in OURS or (name == self._wanted and self._installed):
            folders += sys.path
        return [f for f in folders if not _holds_ours(f)] if name in OURS else folders

    def _find(self, name: str) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, self.entries(name))
        if spec is None or spec.loader is not None:
            return spec
        # A folder without __init__.py may hold images. It is a package only if it has modules, and
        # if no installed package has its name.
        with_modules = any(
            next(Path(place).glob(pattern), None)
            for place in spec.submodule_search_locations or ()
            for pattern in ("*.py", "*/*.py")
        )
        known = name not in OURS and PathFinder.find_spec(name)
        return spec if with_modules and not (known and known.loader) else None

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002 - names of builtins.__import__
        locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """The `__import__` of a user's module, which its import statements call."""
        top = name.partition(".")[0]
        if level or not self.holds(top):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        private = f"{self.package}.{name}"
        if fromlist:
            return builtins.__import__(private, globals, locals, fromlist, 0)
        importlib.import_module(private)
        return sys.modules[f"{self.package}.{top}"]

    def path_below(self, path: Path) -> str:
        """A file's path below the folder that it was found in."""
        for entry in (*self._folders, *sys.path):
            if path.is_relative_to(entry or "."):
                return path.relative_to(entry or ".").as_posix()
        return str(path)


class _Loader(SourceFileLoader):
    """Compiles the source each time: bytecode is stale if a file is edited within a second."""

    def __init__(self, name: str, path: str, scope: Scope) -> None:
        super().__init__(name, path)
        self._scope = scope

    def get_code(self, fullname: str) -> CodeType:
        del fullname
        data = self.get_data(self.path)
        place = self._scope.path_below(Path(self.path))
        self._scope.sources[place] = hashlib.sha256(data).hexdigest()
        code: CodeType = self.source_to_code(data, self.path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = self._scope.builtins
        with _apart():
            super().exec_module(module)


@contextmanager
def _apart() -> Iterator[None]:
    """Within the block, random numbers are the same each time; after it they go on as before."""
    with torch.random.fork_rng(devices=[]), seeded(0):
        torch.default_generator.manual_seed(0)
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block, Python's and numpy's global random numbers follow a seed.

    After it they go on as before, and torch's default type is restored.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - a user's code may use it
    dtype = torch.get_default_dtype()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_default_dtype(dtype)


class _Finder(MetaPathFinder):
    """Finds the modules of a scope's package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            _vision(PathFinder.find_spec(fullname, path, target))
        package, _, name = fullname.partition(".")
        scope = _scopes.get(package)
        if scope is None or not name:
            return None
        spec = PathFinder.find_spec(fullname, path if "." in name else scope.entries(name), target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path, scope)
        return spec


sys.meta_path.insert(0, _Finder())


def _vision(spec: ModuleSpec | None) -> None:
    """Let torchvision be imported beside a torch that cannot load its compiled operators.

    A torchvision wheel of another build than torch's (a CUDA one beside a CPU-only torch) fails at
    import with "operator torchvision::nms does not exist": it registers Python rules for two
    operators of a library that did not load. Data sets and classifiers need neither, so their
    names suffice.
    """
    if _schemas or spec is None or spec.origin is None:
        return
    with suppress(OSError):
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            return
    define: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    define.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    define.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(define)


def _outside(entry: str) -> bool:
    """Whether an entry of `sys.path` is one of the user's folders, such as one of PYTHONPATH."""
    path = Path(entry or ".").resolve()
    library = Path(sysconfig.get_path("stdlib")).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return path.is_dir() and not installed and not path.is_relative_to(library)


def _comes_with_ours(name: str) -> bool:
    """Whether a distribution that installs this package also has one with the name of ours."""
    known = metadata.packages_distributions()
    others = {owner for ours in OURS for owner in known.get(ours, ())} - {"stillhouse"}
    return not others.isdisjoint(known.get(name, ()))


def _holds_ours(entry: str) -> bool:
    """Whether a folder holds Stillhouse itself, this copy or another."""
    return all((Path(entry or ".") / name / "__init__.py").is_file() for name in _MARKS)


def plain(text: str) -> str:
    """A message without the names of private packages."""
    return re.sub(rf"{_PREFIX}(\d+\.)?", "", text)
