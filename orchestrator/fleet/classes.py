"""The names of a run's classes, and the check that devices mean the same by them.

    runs/NAME/classes.json    names in the order of the logits, who named them, and whether labels
                              are mapped by name

Names come from `device.classes` in run.toml, or else from the held-out images. Then the training
artifacts hold them, and each device finds its own classes among them by name. If neither has names,
labels are numbers: the places of a device's classes in their order. Then all devices must have the
same names. Until a round is opened, the first of the devices that are there decides which; from
then on the names stay.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.config import RunConfig
from wire import classes, records, storage
from wire.errors import RunError

log = logging.getLogger("orchestrator")

FILE = "classes.json"


@dataclass(frozen=True)
class Classes:
    """A run's classes.

    Attributes:
        count: how many there are.
        names: in the order of the logits; () if nobody has named them yet.
        digest: digest of a device's names that are too many for a birth message.
        by: who named them: run.toml, the held-out images, or a device.
        mapped: whether devices find their classes by name; otherwise a label is the number of a
            class.
    """

    count: int
    names: tuple[str, ...] = ()
    digest: str = ""
    by: str = ""
    mapped: bool = False

    def __post_init__(self) -> None:
        if self.names and len(self.names) != self.count:
            raise ValueError(f"expected {self.count} names of classes, got {len(self.names)}")

    @property
    def artifact_names(self) -> tuple[str, ...]:
        """The names for training artifacts; () if labels are numbers."""
        return self.names if self.mapped else ()

    def named_by(self, device: str, names: Sequence[str], digest: str = "") -> "Classes":
        """These classes, with a device's names if nobody has named them yet."""
        fits = digest or len(names) == self.count
        if self.by or not fits:
            return self
        return replace(self, names=tuple(names), digest=digest, by=device)

    def refusal(self, names: Sequence[str], digest: str = "") -> str:
        """Why a device with classes of these names may not take part; "" if it may.

        Args:
            names: () if the device has none, or too many to send.
            digest: digest of names that are too many to send. If labels are mapped, the device
                itself checks the names before it trains.
        """
        if not names and not digest:
            return ""
        if self.mapped:
            problem = classes.difference(names, self.names)
            return problem and (
                f"{problem}; rename it there, or begin a run whose `classes` names it too"
            )
        remedy = (
            f"the run knows classes by number, so all devices must have the same; {self._remedy()}"
        )
        if names and len(names) != self.count:
            return (
                f"expected {self.count} classes, got {len(names)}: {classes.listed(names)}; "
                f"{remedy}"
            )
        agreed = self.digest or classes.digest(self.names)
        if agreed in ("", digest or classes.digest(names)):
            return ""
        problem = classes.difference(names, self.names) if self.names else ""
        problem = problem or (
            f"its classes ({classes.listed(names) or digest[:12]}) are not in the order of the "
            f"run's ({classes.listed(self.names) or agreed[:12]})"
        )
        return f"{problem}, as {self.by} has them; {remedy}"

    def _remedy(self) -> str:
        example = classes.listed(self.names) if len(self.names) < 10 else '"bolt", "nut", ...'
        return (
            f"rename what differs, or begin a run with classes = [{example}] in run.toml, and some "
            "may be missing on a device"
        )


def read(folder: Path) -> Classes | None:
    """The classes that are settled for a folder's run, or None.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise RunError(f"{path}: cannot be read ({fault}); restore it from a backup") from fault
    return records.build(Classes, content, where=str(path), error=RunError)


def write(folder: Path, settled: Classes) -> None:
    """Settle the classes of a folder's run: write the file, all of it or nothing."""
    text = json.dumps(records.plain(settled), indent=1, ensure_ascii=False) + "\n"
    with storage.at(folder):
        storage.write(folder / FILE, text.encode())


def resolve(config: RunConfig, heldout: Sequence[str] = ()) -> Classes:
    """A run's classes before any device is there.

    A run that an older version began without names goes on with numbers, because its artifacts
    hold no names.

    Args:
        config: the settings in run.toml.
        heldout: the names of the held-out images' classes, if they have any.

    Raises:
        RunError: the file with the settled classes is damaged.
    """
    device, settled = config.device, read(config.folder)
    if settled is not None:
        return settled
    if device.class_names:
        return Classes(device.class_count, device.class_names, by="run.toml", mapped=True)
    begun = any(any(config.folder.glob(name)) for name in ("artifact*", "checkpoints"))
    if len(heldout) == device.class_count and config.heldout and not begun:
        return Classes(device.class_count, tuple(heldout), by=config.heldout.name, mapped=True)
    return Classes(device.class_count)


def settle(config: RunConfig, settled: Classes) -> RunConfig:
    """Write the classes of a run to its folder; return its configuration with these names."""
    if read(config.folder) is None:
        write(config.folder, settled)
    if settled.names:
        log.info("classes, by %s: %s", settled.by, classes.listed(settled.names))
    else:
        log.info("%d classes, by number; nobody names them yet", settled.count)
    return named(config, settled)


def named(config: RunConfig, settled: Classes) -> RunConfig:
    """A run's configuration with the names that training artifacts hold."""
    if not settled.mapped:
        return config
    return replace(config, device=replace(config.device, classes=settled.names))
