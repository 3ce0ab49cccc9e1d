"""A training artifact: a folder with compiled graphs, initial weights and their manifest.

    manifest.json       describes the other files; its SHA-256 is the artifact's digest
    train.onnx          batch, hyperparameters and state -> loss, correct, next state
    eval.onnx           x, parameters, buffers -> logits
    extract.onnx        x, parameters, buffers -> features, logits (split models only)
    init.safetensors    the initial value of every state tensor

An artifact may come from the network, so it is checked before use; see `wire.manifest`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wire.errors import ArtifactError
from wire.manifest import MANIFEST, MAX_MANIFEST_BYTES, WEIGHTS, FileRef, Manifest


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk."""

    folder: Path
    manifest: Manifest
    digest: str

    def path(self, graph: Literal["train", "eval", "extract"]) -> Path:
        """The file of a graph.

        Raises:
            ArtifactError: the artifact has no such graph.
        """
        if graph not in self.manifest.graphs:
            raise ArtifactError(
                f"{self.folder}: {self.manifest.model.name!r} has no {graph!r} graph; export a "
                f"split model (one with an extractor and an extract method)"
            )
        return self.folder / self.manifest.graphs[graph].file

    @property
    def weights(self) -> Path:
        """The file of the initial state (safetensors)."""
        return self.folder / WEIGHTS


def open_artifact(
    folder: Path, expect_digest: str | None = None, *, verify: bool = True
) -> Artifact:
    """Open an artifact and check it.

    Args:
        folder: where manifest.json lies.
        expect_digest: the digest that a work order names.
        verify: read every file and compare its SHA-256; otherwise compare only the sizes.

    Raises:
        ArtifactError: a file is missing, damaged or foreign; the message names it.
    """
    path = folder / MANIFEST
    data = _read(path)
    digest = hashlib.sha256(data).hexdigest()
    if expect_digest is not None and digest != expect_digest:
        raise ArtifactError(
            f"{path}: expected SHA-256 {expect_digest}, got {digest}; this is another artifact, or "
            f"a damaged one: remove the folder and fetch it again"
        )
    manifest = Manifest.parse(data, where=str(path))
    for name, ref in sorted(manifest.files.items()):
        _check(folder / name, ref, verify=verify)
    return Artifact(folder, manifest, digest)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as fault:
        raise ArtifactError(
            f"{path}: cannot be read ({fault.strerror}); name the folder of an exported artifact"
        ) from fault


def _check(path: Path, ref: FileRef, *, verify: bool) -> None:
    remedy = "remove the folder and fetch or export the artifact again"
    try:
        size = path.stat().st_size
        if size != ref.bytes or not path.is_file():
            raise ArtifactError(f"{path}: expected {ref.bytes} bytes, got {size}; {remedy}")
        if not verify:
            return
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as fault:
        raise ArtifactError(f"{path}: cannot be read ({fault.strerror}); {remedy}") from fault
    if got != ref.sha256:
        raise ArtifactError(f"{path}: expected SHA-256 {ref.sha256}, got {got}; {remedy}")
