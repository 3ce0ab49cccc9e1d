"""The network that `edge-agent predict --config` uses: the one that this device trained last."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from edge_agent import journal
from ondevice import card
from ondevice.images import Preprocess
from ondevice.predict import Floats, Pixels, photos_shape
from wire.artifact import open_artifact
from wire.errors import ArtifactError


class OwnNetwork:
    """The small network that this device trained last, from its state folder.

    Args:
        state: the folder.
        threads: number for each operator; 0 takes all cores.

    Raises:
        ArtifactError: no run has left a network in the folder, or the network is damaged.
    """

    def __init__(self, state: Path, *, threads: int) -> None:
        from ondevice.trainer import Inference  # imports onnxruntime only when needed

        newest = journal.newest_weights(state / "journal.db")
        if newest is None:
            raise ArtifactError(
                f"{state}: expected a network that this device trained, got none; its first round "
                "of fedgkt or local leaves one. For other runs, name a file that `orchestrator "
                "export` wrote"
            )
        self.run, digest, file = newest
        artifact = open_artifact(state / "artifacts" / digest, expect_digest=digest)
        try:
            weights, trained = load_file(artifact.weights), load_file(state / file)
        except (OSError, SafetensorError) as fault:
            raise ArtifactError(
                f"{state / file}: cannot be read ({fault}); the next round writes a new one"
            ) from fault
        weights |= {
            n: a for n, a in trained.items() if n in weights and a.shape == weights[n].shape
        }
        manifest = artifact.manifest
        model, preprocess = manifest.model, manifest.preprocess
        self.classes = model.class_names or card.numbers(model.classes)
        self.shape = photos_shape(model.input, f"{state}: {model.name}")
        self.batch, self.name = manifest.micro_batch, model.name
        self._preprocess = Preprocess(preprocess.mean, preprocess.std)
        self._weights = weights  # the graph reads this memory
        self._run = Inference(artifact, "eval", weights, threads=threads)

    def __call__(self, pixels: Pixels) -> Floats:
        """Logits (N, classes) of images, uint8 (N, H, W, C) with N up to `batch`."""
        self._preprocess(pixels, out=self._run.x[: len(pixels)])
        self._run()
        logits: Floats = self._run.outputs["logits"][: len(pixels)].copy()
        return logits
