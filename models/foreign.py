"""A user's own networks, by the name of the function or class that makes them.

    package.module:factory        beside run.toml, in the current folder, or installed
    path/to/file.py:factory       relative to run.toml, on a command line to the current folder
    name                          an entry point of the group `stillhouse.models`

A factory may take, by name, `classes` (or `num_classes`), the number of logits, and `input_shape`,
the shape of one sample. A name may begin with the folder that it is relative to:
`/home/me/run/./nets.py:make` (`wire.names`).

`locate` finds what else a user may bring (a strategy's class) by the same forms of names.
"""

import hashlib
import inspect
import logging
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from models.imports import Scope, plain, seeded
from models.submodel import run
from wire import records
from wire.errors import StillhouseError
from wire.names import MARK
from wire.records import did_you_mean

_CLASSES = ("classes", "num_classes")
log = logging.getLogger("models")


class Kind(NamedTuple):
    """What a user's name stands for.

    Attributes:
        group: of the entry points by which packages offer such.
        word: for what stands behind the colon, in messages.
    """

    group: str
    word: str

    @property
    def forms(self) -> str:
        """How a name may be written, for messages."""
        return f"name path/to/file.py:{self.word} or package.module:{self.word}"


NETWORKS = Kind("stillhouse.models", "factory")


@dataclass(frozen=True, eq=False)
class Found:
    """What a user's name stands for.

    Attributes:
        name: as it was written; of an entry point, with what that points at.
        scope: its modules.
        value: the function or class.
    """

    name: str
    scope: Scope
    value: Any

    @property
    def sources(self) -> Mapping[str, str]:
        """SHA-256 of its source files, by path, as far as they are imported."""
        return dict(self.scope.sources) or _installed(self.value)


@dataclass
class Foreign:
    """A network's factory.

    Attributes:
        found: where.
    """

    found: Found
    _last: Callable[[], object] = field(default=lambda: None)

    def make(self, classes: int, shape: tuple[int, ...]) -> nn.Module:
        """A new network; the random numbers of numpy and Python follow torch's seed, too.

        Raises:
            StillhouseError: it takes something else, raises, or returns no new network.
        """
        name = self.found.name
        with seeded(torch.initial_seed() % (1 << 32)):
            made = self._call(classes, shape)
        if not isinstance(made, nn.Module):
            raise StillhouseError(
                f"{name}: expected it to return a torch.nn.Module, got {type(made).__name__}"
            )
        if made is self._last():
            raise StillhouseError(
                f"{name}: returns the same network at each call; make a new one each time, so "
                "that its weights follow from the run's seed"
            )
        self._last = weakref.ref(made)
        if any(map(is_lazy, made.parameters())):  # such layers take their shapes from a first batch
            run(made.eval(), torch.zeros(2, *shape), fails=f"{name} fails on {shape}")
            made.train()
        return made

    def _call(self, classes: int, shape: tuple[int, ...]) -> object:
        last: Exception | None = None
        for asked in _asked(self.found.name, self.found.value):
            values = {key: shape if key == "input_shape" else classes for key in asked}
            state = torch.get_rng_state()
            try:
                return _bound(self.found.value, values)
            except Exception as fault:  # noqa: BLE001 - it is the user's code
                last = fault
                if not _refuses(fault, asked):
                    break
            torch.set_rng_state(state)
        assert last is not None  # noqa: S101 - there is something to ask for, or nothing
        where = place_of(last, self.found.scope)
        raise StillhouseError(f"{self.found.name}: fails {where}") from last


def find(name: str) -> Foreign | None:
    """The network that a name stands for; None where it has no `:` and is no entry point.

    Raises:
        StillhouseError: there is no such file, module or factory, or importing it fails.
    """
    found = locate(name, NETWORKS)
    return _network(found) if found else None


def locate(name: str, kind: Kind) -> Found | None:
    """What a name stands for; None where it has no `:` and is no entry point.

    Raises:
        StillhouseError: there is no such file, module, function or class, or importing it fails.
    """
    if ":" in name:
        return _find(name, str(Path.cwd()), kind)
    return _offered(name, kind) if name in entry_points(kind) else None


def entry_points(kind: Kind = NETWORKS) -> dict[str, list[metadata.EntryPoint]]:
    """What installed packages offer, by name."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group=kind.group):
        same = found.setdefault(point.name, [])
        if point.value not in (other.value for other in same):
            same.append(point)
    return found


def place_of(fault: BaseException, scope: Scope, file: str = "") -> str:
    """One line: where in the user's files something went wrong, and what.

    Args:
        fault: what went wrong.
        scope: the user's modules.
        file: another source file of the user's: an installed one, which no scope has.
    """
    message = plain(str(fault)).strip().splitlines()
    what = f"{type(fault).__name__}: {message[0]}" if message else type(fault).__name__
    if isinstance(fault, SyntaxError) and fault.filename:
        return f"at {fault.filename}:{fault.lineno}: {what}"
    frames = traceback.extract_tb(fault.__traceback__)
    users = [
        frame
        for frame in frames
        if scope.path_below(Path(frame.filename)) in scope.sources or frame.filename == file
    ]
    if not users:
        return f"with {what}"
    more = "; install it where the orchestrator runs" if isinstance(fault, ImportError) else ""
    return f"at {users[-1].filename}:{users[-1].lineno}: {what}{more}"


@cache
def say_clash(name: str) -> None:
    """Log, once, that an entry point has the name of one of our networks."""
    for point in entry_points().get(name, ()):
        log.warning(
            "%s: the network of this name is Stillhouse's; that of an installed package is %s",
            name, point.value,
        )  # fmt: skip


@cache
def _network(found: Found) -> Foreign:
    value = found.value
    if isinstance(value, nn.Module) or not callable(value):
        what = "a network that is made already" if isinstance(value, nn.Module) else "no function"
        raise StillhouseError(
            f"{found.name}: {found.name.rpartition(':')[2]!r} is {what} ({type(value).__name__}); "
            "name a function or a class that makes a new network at each call"
        )
    return Foreign(found)


@cache
def _offered(name: str, kind: Kind) -> Found:
    first, *more = entry_points(kind)[name]
    if more:
        values = ", ".join(point.value for point in (first, *more))
        raise StillhouseError(
            f"{name}: entry points of several packages have this name; name one of {values}"
        )
    return _resolved(f"{name} = {first.value}", first.module, first.attr, [], kind)


@cache
def _find(name: str, current: str, kind: Kind) -> Found:
    base, mark, rest = name.partition(MARK)
    if not mark:
        base, rest = current, name
    place, _, attribute = rest.rpartition(":")
    folders = [Path(base), Path(current)]
    if not place or not all(part.isidentifier() for part in attribute.split(".")):
        raise StillhouseError(f"{rest!r}: expected a {kind.word} behind the colon; {kind.forms}")
    if place.endswith(".py"):
        path = _file(rest, place, folders, kind)
        # Where the file is in a package, it is imported as a module of it.
        root, parts = path.parent, [path.stem]
        while (root / "__init__.py").is_file():
            root, parts = root.parent, [root.name, *parts]
        return _resolved(rest, ".".join(parts), attribute, [root, *folders], kind)
    if not all(part.isidentifier() for part in place.split(".")):
        raise StillhouseError(f"{rest}: {place!r} is neither a module nor a file; {kind.forms}")
    return _resolved(rest, place, attribute, folders, kind)


def _file(name: str, place: str, folders: list[Path], kind: Kind) -> Path:
    below = records.path(place, name, StillhouseError)
    tried = [(folder / below).resolve() for folder in folders]
    for path in tried:
        if path.is_file():
            return path
    beside = [path.name for path in tried[0].parent.glob("*.py")]
    hint = did_you_mean(tried[0].name, beside, 0.5) or f"; {kind.forms}"
    raise StillhouseError(f"{name}: no file {tried[0]}{hint}")


def _resolved(name: str, place: str, attribute: str, folders: list[Path], kind: Kind) -> Found:
    scope = Scope([folder for folder in dict.fromkeys(folders) if folder.is_dir()], place)
    try:
        module = scope.load(place)
    except (Exception, SystemExit) as fault:
        if isinstance(fault, ModuleNotFoundError) and _is_part(plain(fault.name or ""), place):
            near = [path.stem for folder in folders for path in folder.glob("*.py")]
            where = " and ".join(dict.fromkeys(map(str, folders))) or "the installed packages"
            raise StillhouseError(
                f"{name}: cannot be imported: no module {plain(fault.name or '')!r} in {where}, "
                f"nor installed{did_you_mean(place, near, 0.5) or '; ' + kind.forms}"
            ) from fault
        raise StillhouseError(f"{name}: importing it fails {place_of(fault, scope)}") from fault
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [key for key in vars(found) if not key.startswith("_")]
            raise StillhouseError(
                f"{name}: {getattr(module, '__file__', place)} has no {part!r}"
                f"{did_you_mean(part, known, 0.5) or '; it has ' + _callables(found)}"
            )
        found = getattr(found, part)
    return Found(name, scope, found)


def _asked(name: str, factory: Callable[..., Any]) -> list[tuple[str, ...]]:
    """The sets of argument names to try on a factory, one after the other.

    There are several if it takes **kwargs: the function that it hands them to may refuse one.

    Raises:
        StillhouseError: it needs an argument that we do not offer (`classes`, `input_shape`).
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a builtin has no signature
        return [(), ("classes",)]
    kinds = inspect.Parameter
    asked = tuple(p.name for p in parameters if p.name in (*_CLASSES, "input_shape"))
    for parameter in parameters:
        open_ = parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        if not open_ and parameter.default is kinds.empty and parameter.name not in asked:
            raise StillhouseError(
                f"{name}: takes {parameter.name!r}, which has no default; a factory may ask for "
                "`classes` (or `num_classes`), the number of logits, and `input_shape` (channels, "
                "height, width)"
            )
    if not any(p.kind is kinds.VAR_KEYWORD for p in parameters):
        return [asked]
    offered = dict.fromkeys((tuple(dict.fromkeys((*asked, "input_shape"))), asked))
    if any(key in asked for key in _CLASSES):
        return list(offered)
    # Both names first: what they are passed to may swallow the wrong one, as MobileNetV3 does.
    return [(*key, *rest) for rest in offered
            for key in (_CLASSES, ("classes",), ("num_classes",), ())]  # fmt: skip


def _bound(factory: Callable[..., Any], values: Mapping[str, object]) -> object:
    """Call a factory with these arguments by name; positional-only ones by place."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return factory(*values.values())
    alone = [key for key, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    first = [values[key] for key in alone if key in values]
    return factory(*first, **{key: value for key, value in values.items() if key not in alone})


def _refuses(fault: Exception, asked: tuple[str, ...]) -> bool:
    """Whether a factory, or what it passes its arguments on to, does not take one of them."""
    return isinstance(fault, TypeError) and any(
        f"unexpected keyword argument '{key}'" in str(fault) for key in asked
    )


def _installed(factory: Callable[..., Any]) -> dict[str, str]:
    """SHA-256 of the file of an installed factory, by the file's name."""
    try:
        path = Path(inspect.getsourcefile(inspect.unwrap(factory)) or "")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    except (TypeError, OSError):
        return {}


def _is_part(module: str, place: str) -> bool:
    return place == module or place.startswith(f"{module}.")


def _callables(owner: object) -> str:
    """For a message: the functions and classes that a module or a class defines."""
    names = [k for k, v in vars(owner).items() if callable(v) and not k.startswith("_")]
    if isinstance(owner, ModuleType):
        names = [k for k in names if getattr(vars(owner)[k], "__module__", None) == owner.__name__]
    return ", ".join(names) or "none of its own"
