"""What can go wrong, as one small tree.

StillhouseError            bad input or a broken promise; commands print it and exit with code 2
├── SettingsError          a configuration file: unknown key, wrong type, value out of range
├── DataError              images or labels that cannot be used
├── ArtifactError          a training artifact that is damaged, foreign or unfit for the data
├── WireError              bytes from the network that break the protocol
│   ├── FrameError         a frame: magic, version, sizes, digest, header
│   ├── OrderError         an order that the device cannot read
│   ├── CodecError         a codec spec, or an encoded tensor
│   └── TransferError      a blob: chunks, sizes, digest, or its sender no longer has it
├── LinkError              the broker cannot be reached
│   └── RefusedError       the broker refuses us
├── SignatureError         a damaged key, or data that its owner did not sign
├── ReleaseError           a package of the agent that a device must not install
├── BrokerError            a broker that the orchestrator runs itself
├── ExportError            a module that cannot be compiled to a training step
├── AdmissionError         a result that must not enter the aggregate; its text goes to the device
├── StorageError           a disk: read-only, not ours to write, failing
│   ├── StalledError       no room, or another program holds a file; trying again may help
│   └── DamagedError       a journal that holds something else than was written
└── RunError               a run directory: missing, taken, damaged, or of another configuration

A message says what was expected, what came, from where, and what to do.
"""


class StillhouseError(Exception):
    """Bad input or a broken promise; the message carries its remedy."""


class SettingsError(StillhouseError):
    """A configuration file is wrong."""


class DataError(StillhouseError):
    """Images or labels cannot be used."""


class ArtifactError(StillhouseError):
    """A training artifact is damaged, foreign or unfit for the data."""


class WireError(StillhouseError):
    """Bytes from the network break the protocol."""


class FrameError(WireError):
    """A frame's magic, version, sizes, digest or header is wrong."""


class OrderError(WireError):
    """An order cannot be read; `run`, `sequence` and `round` say which one."""

    def __init__(self, text: str, run: str, sequence: int, round_: int) -> None:
        super().__init__(text)
        self.run, self.sequence, self.round = run, sequence, round_


class CodecError(WireError):
    """A codec spec or an encoded tensor is wrong."""


class TransferError(WireError):
    """A blob cannot be received."""


class LinkError(StillhouseError):
    """The broker cannot be reached, or not by these files."""


class RefusedError(LinkError):
    """The broker refuses us: name, password or certificate are not those that it knows."""


class SignatureError(StillhouseError):
    """A key is damaged, or something was not signed by its owner."""


class ReleaseError(StillhouseError):
    """A file is not a release, or not one for this device."""


class BrokerError(StillhouseError):
    """A broker that the orchestrator runs itself does not run."""


class ExportError(StillhouseError):
    """A module cannot be compiled to a training step."""


class AdmissionError(StillhouseError):
    """A result must not enter the aggregate."""


class StorageError(StillhouseError):
    """A disk cannot be read or written."""


class StalledError(StorageError):
    """A disk has no room, or another program holds a file; trying again may help."""


class DamagedError(StorageError):
    """A journal holds something else than was written."""


class RunError(StillhouseError):
    """A run directory is missing, taken, damaged, or of another configuration."""
