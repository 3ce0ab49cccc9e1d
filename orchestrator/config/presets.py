"""What `orchestrator init` writes: `run.toml` for each way of training, with comments."""

from collections.abc import Mapping
from typing import Any

from orchestrator.config.run import RunConfig
from wire import settings
from wire.errors import SettingsError
from wire.settings import Setting, Template

DEFAULT = "shared"  # the preset of `orchestrator init`
WHY_DEFAULT = (
    "The default, shared, is FedGKT in which devices share what they learn: of these it trains "
    "both the large and the small network well on digits as on photos."
)
ABOUT = "A Stillhouse run. Start it with: orchestrator start --config run.toml"
RUN = {
    "name": Setting("first", "its folder is runs/NAME"),
    "fleet": Setting("fleet"),
    "heldout": Setting(
        "data/heldout.npz", "images that the server evaluates on: .npz, or a folder of classes"
    ),
    "admission": Setting("enrolled", 'or "open": any device that the broker lets in'),
}
BROKER_AND_COHORT = {
    "broker.kind": Setting(
        "embedded", 'loopback only; "mosquitto" runs Debian\'s, "external" takes a url'
    ),
    "broker.host": Setting("127.0.0.1"),
    "broker.port": Setting(1883),
    "broker.url": Setting("mqtts://broker.example:8883", 'with kind = "external"', example=True),
    "cohort.min_devices": Setting(2, "a round begins only with so many,"),
    "cohort.wait_s": Setting(10.0, "and waits so long for more"),
    "cohort.quorum": Setting(1.0, "it closes when this share of the cohort has returned,"),
    "cohort.deadline_s": Setting(600.0, "or then, with whoever has"),
    "cohort.carry_rounds": Setting(0, "late results count in so many rounds more (fedgkt)"),
}
STRATEGIES = "fedgkt, feddropout, fedavg or local"
NAMED_CLASSES = 'or their names: ["bolt", "nut", ...]'
SERVER_MODELS = "resnet109, resnet55; resnet19 and resnet10 where there is no GPU"
TWO_BITS = "q=2: two bits a value, entropy-coded, two thirds of the image's bytes"
SERVER_LOGITS = "weight of the server's logits in the device's loss"

# A description of each preset.
PRESETS = {
    "dropout": "Federated Dropout: devices train half the width of one network, and weights "
    "travel, compressed.",
    "fedavg": "devices train one network, weights travel, and the server averages them.",
    "fedgkt": "FedGKT, a beginning: devices send feature maps at eight bits in every round.",
    "frugal": "FedGKT with what has worked best here: feature maps of two bits, sent twice and "
    "then no more.",
    "paper": "FedGKT as He et al. 2020 published it, from random weights: float32, everything, "
    "every round: 65,536 bytes an image and round. See docs/fedgkt.md before a fleet pays for it.",
    "shared": "FedGKT in which devices share what they learn: the default, good for both networks. "
    "Feature maps of two bits travel in four rounds, and weights of the small network in all.",
}
# Settings of each preset.
SETTINGS: dict[str, dict[str, Setting]] = {
    "dropout": {
        "strategy": Setting("feddropout"),
        "rounds": Setting(60),
        "device.model": Setting("caldas_cnn", "any network that can be compiled"),
        "device.classes": Setting(10, NAMED_CLASSES),
        "device.input": Setting((3, 32, 32)),
        "device.batch": Setting(10),
        "device.epochs": Setting(1),
        "device.lr": Setting(0.05),
        "device.momentum": Setting(0.0),
        "device.weight_decay": Setting(0.0),
        "device.state": Setting(
            "eden|b=3|mse/float16", "weights on their way down: matrices/vectors"
        ),
        "device.update": Setting("eden|b=1/float16", "updates on their way up"),
        "submodel.keep_rate": Setting(
            0.5, "share of the units of each hidden layer that a device trains"
        ),
        "submodel.units": Setting(
            "random", 'or "shared", "ordered" (HeteroFL), "rolling" (FedRolex)'
        ),
        "submodel.absent": Setting(
            "holders", '"holders": average over those who trained a unit; "zero": the paper\'s'
        ),
        "server.eval_every": Setting(5),
    },
    "fedavg": {
        "strategy": Setting("fedavg"),
        "rounds": Setting(30),
        "device.model": Setting(
            "resnet8", "any network that can be compiled; resnet20 where devices are strong"
        ),
        "device.classes": Setting(10),
        "device.input": Setting((3, 32, 32)),
        "device.batch": Setting(16),
        "device.epochs": Setting(3),
        "device.lr": Setting(0.05),
        "device.schedule": Setting("cosine"),
        "device.mu": Setting(
            0.0, "weight of FedProx's term, 0.01 where devices' images differ much"
        ),
        "device.state": Setting(
            "float32", 'weights on their way down; "eden|b=3|mse/float16" is a tenth of float32'
        ),
        "device.update": Setting(
            "float32", 'updates on their way up; "eden|b=2/float16" is a sixteenth of float32'
        ),
        "server.eval_every": Setting(1),
    },
    "fedgkt": {
        "strategy": Setting("fedgkt", STRATEGIES),
        "rounds": Setting(10),
        "device.model": Setting("resnet8"),
        "device.classes": Setting(10, NAMED_CLASSES),
        "device.input": Setting((3, 32, 32)),
        "device.batch": Setting(32),
        "device.epochs": Setting(1),
        "device.lr": Setting(0.05),
        "device.augment": Setting(True),
        "device.features": Setting(
            "identity|q=8", "codec of the feature maps: float32, identity|q=N, relu|q=4|zstd"
        ),
        "device.update": Setting("float32", "of weight updates, and of weights on their way down"),
        "device.state": Setting(
            "float32", '(feddropout, fedavg): "hadamard|q=4", "eden|b=2/float16", ...'
        ),
        "server.model": Setting("resnet55", SERVER_MODELS),
        "server.epochs": Setting(5),
        "server.batch": Setting(64),
        "server.lr": Setting(0.001),
    },
    "frugal": {
        "strategy": Setting("fedgkt"),
        "rounds": Setting(30),
        "device.model": Setting("resnet8"),
        "device.classes": Setting(10, NAMED_CLASSES),
        "device.input": Setting((3, 32, 32)),
        "device.batch": Setting(16),
        "device.epochs": Setting(3),
        "device.lr": Setting(0.05),
        "device.schedule": Setting("cosine"),
        "device.alpha": Setting(1.0, SERVER_LOGITS),
        "device.temperature": Setting(3.0),
        "device.features": Setting("relu|q=2|zstd", TWO_BITS),
        "transfer.extractor": Setting(
            "shared", '"shared": all devices go on with the mean of their first layers,'
        ),
        "transfer.freeze_after": Setting(1, "which stay as they are after so many rounds"),
        "transfer.views": Setting(
            True, "feature maps travel once more, and the server crops them itself,"
        ),
        "transfer.student_views": Setting(
            False, "false: while devices see their images as they are"
        ),
        "transfer.network": Setting(
            "shared", '"shared": all go on with the mean of their whole networks'
        ),
        "server.model": Setting("resnet55", SERVER_MODELS),
        "server.epochs": Setting(5),
        "server.batch": Setting(64),
        "server.lr": Setting(0.001),
        "server.schedule": Setting("cosine"),
        "server.alpha": Setting(
            0.0, "weight of the devices' logits: small devices are poor teachers"
        ),
    },
    "paper": {
        "strategy": Setting("fedgkt"),
        "rounds": Setting(200),
        "device.model": Setting("resnet8"),
        "device.classes": Setting(10, NAMED_CLASSES),
        "device.input": Setting((3, 32, 32)),
        "device.batch": Setting(64),
        "device.epochs": Setting(1),
        "device.lr": Setting(0.001),
        "device.optimizer": Setting("adam"),
        "device.alpha": Setting(1.0, SERVER_LOGITS),
        "device.temperature": Setting(3.0),
        "device.augment": Setting(True),
        "device.features": Setting("float32"),
        "server.model": Setting("resnet55", "or resnet109"),
        "server.epochs": Setting(20, "10 where devices' images differ much (non-IID)"),
        "server.batch": Setting(256),
        "server.lr": Setting(0.001),
        "server.schedule": Setting("plateau"),
        "server.alpha": Setting(1.0, "weight of the devices' logits in the server's loss"),
        "server.temperature": Setting(3.0),
    },
    "shared": {
        "strategy": Setting("fedgkt", STRATEGIES),
        "rounds": Setting(30),
        "device.model": Setting("resnet8"),
        "device.classes": Setting(10),
        "device.input": Setting((3, 32, 32)),
        "device.batch": Setting(16),
        "device.epochs": Setting(3),
        "device.lr": Setting(0.05),
        "device.schedule": Setting("cosine"),
        "device.alpha": Setting(1.0, SERVER_LOGITS),
        "device.temperature": Setting(3.0),
        "device.features": Setting("relu|q=2|zstd", TWO_BITS),
        "transfer.extractor": Setting(
            "shared", '"shared": all devices go on with the mean of their first layers,'
        ),
        "transfer.freeze_after": Setting(3, "which stay as they are after so many rounds"),
        "transfer.network": Setting(
            "shared", '"shared": all go on with the mean of their whole networks'
        ),
        "transfer.views": Setting(
            True,
            "photos: the server trains on crops and mirror images too, and gains",
            example=True,
        ),
        "transfer.student_views": Setting(
            False,
            "much (preset frugal); not where left and right differ, as in digits",
            example=True,
        ),
        "server.model": Setting("resnet55", SERVER_MODELS),
        "server.epochs": Setting(5),
        "server.batch": Setting(64),
        "server.lr": Setting(0.001),
        "server.schedule": Setting("cosine"),
        "server.alpha": Setting(
            0.0, "weight of the devices' logits: small devices are poor teachers"
        ),
    },
}


def presets() -> tuple[str, ...]:
    """The names that `template` knows."""
    return tuple(sorted(PRESETS))


def template(preset: str = DEFAULT, changes: Mapping[str, Any] | None = None) -> str:
    """The text of a commented `run.toml`: what all runs need, and a preset's settings.

    Args:
        preset: its name.
        changes: values that replace the preset's, by dotted key.

    Raises:
        SettingsError: no preset has this name, or the file could not be loaded with these changes;
            the message says what was expected.
    """
    if preset not in PRESETS:
        raise SettingsError(f"no preset {preset!r}; there are {', '.join(presets())}")
    about = (ABOUT, f"Preset {preset}: {PRESETS[preset]}")
    file = Template(RunConfig, about, {**RUN, **BROKER_AND_COHORT, **SETTINGS[preset]})
    return settings.render(file, changes or {})
