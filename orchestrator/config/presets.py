"""What `orchestrator init` writes: `run.toml` for each way of training, with comments."""

import tomllib
from collections.abc import Iterator, Mapping
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
# Settings of every run, then of the presets, as lines of run.toml. Of two lines with one key the
# later one counts, in the place of the first.
RUN = """
name = "first"  # its folder is runs/NAME
fleet = "fleet"
heldout = "data/heldout.npz"  # images that the server evaluates on: .npz, or a folder of classes
admission = "enrolled"  # or "open": any device that the broker lets in
[broker]
kind = "embedded"  # for this computer alone; "mosquitto" runs Debian's, "external" takes a url
host = "127.0.0.1"  # "mosquitto" with "0.0.0.0" is for devices elsewhere, by mutual TLS
# port = 8883  # default: 8883 with TLS, else 1883
# url = "mqtts://broker.example:8883"  # with kind = "external"
[cohort]
min_devices = 2  # a round begins only with so many,
wait_s = 10.0  # and waits so long for more
quorum = 1.0  # it closes when this share of the cohort has returned,
deadline_s = 600.0  # or then, with whoever has
carry_rounds = 0  # late results count in so many rounds more (fedgkt)
"""
NETWORK = """
[device]
model = "resnet8"
classes = 10  # or their names: ["bolt", "nut", ...]
input = [3, 32, 32]
"""
TAUGHT = f"""{NETWORK}
batch = 16
epochs = 3
lr = 0.05
schedule = "cosine"
alpha = 1.0  # weight of the server's logits in the device's loss
temperature = 3.0
features = "relu|q=2|zstd"  # q=2: two bits a value, entropy-coded, two thirds of the image's bytes
[transfer]
extractor = "shared"  # "shared": all devices go on with the mean of their first layers,
freeze_after = 1  # which stay as they are after so many rounds
"""
SHARED = 'network = "shared"  # "shared": all go on with the mean of their whole networks'
LARGE = """
[server]
model = "resnet55"  # resnet109, resnet55; resnet19 and resnet10 where there is no GPU
epochs = 5
batch = 64
lr = 0.001
"""
LARGE_COSINE = f"""{LARGE}
schedule = "cosine"
alpha = 0.0  # weight of the devices' logits: small devices are poor teachers
"""
SETTINGS = {
    "dropout": f"""
strategy = "feddropout"
rounds = 60
{NETWORK}
model = "caldas_cnn"  # any network that can be compiled
batch = 10
epochs = 1
lr = 0.05
momentum = 0.0
weight_decay = 0.0
state = "eden|b=3|mse/float16"  # weights on their way down: matrices/vectors
update = "eden|b=1/float16"  # updates on their way up
[submodel]
keep_rate = 0.5  # share of the units of each hidden layer that a device trains
units = "random"  # or "shared", "ordered" (HeteroFL), "rolling" (FedRolex)
absent = "holders"  # "holders": average over those who trained a unit; "zero": the paper's
[server]
eval_every = 5
""",
    "fedavg": f"""
strategy = "fedavg"
rounds = 30
{NETWORK}
model = "resnet8"  # any network that can be compiled; resnet20 where devices are strong
classes = 10
batch = 16
epochs = 3
lr = 0.05
schedule = "cosine"
mu = 0.0  # weight of FedProx's term, 0.01 where devices' images differ much
state = "float32"  # weights on their way down; "eden|b=3|mse/float16" is a tenth of float32
update = "float32"  # updates on their way up; "eden|b=2/float16" is a sixteenth of float32
[server]
eval_every = 1
""",
    "fedgkt": f"""
strategy = "fedgkt"  # fedgkt, feddropout, fedavg or local
rounds = 10
{NETWORK}
batch = 32
epochs = 1
lr = 0.05
augment = true
features = "identity|q=8"  # codec of the feature maps: float32, identity|q=N, relu|q=4|zstd
update = "float32"  # of weight updates, and of weights on their way down
state = "float32"  # (feddropout, fedavg): "hadamard|q=4", "eden|b=2/float16", ...
{LARGE}""",
    "frugal": f"""
strategy = "fedgkt"
rounds = 30
{TAUGHT}
views = true  # feature maps travel once more, and the server crops them itself,
student_views = false  # false: while devices see their images as they are
{SHARED}
{LARGE_COSINE}""",
    "paper": f"""
strategy = "fedgkt"
rounds = 200
{NETWORK}
batch = 64
epochs = 1
lr = 0.001
optimizer = "adam"
alpha = 1.0  # weight of the server's logits in the device's loss
temperature = 3.0
augment = true
features = "float32"
[server]
model = "resnet55"  # or resnet109
epochs = 20  # 10 where devices' images differ much (non-IID)
batch = 256
lr = 0.001
schedule = "plateau"
alpha = 1.0  # weight of the devices' logits in the server's loss
temperature = 3.0
""",
    "shared": f"""
strategy = "fedgkt"  # fedgkt, feddropout, fedavg or local
rounds = 30
{TAUGHT}
freeze_after = 3  # which stay as they are after so many rounds
{SHARED}
# views = true  # photos: the server trains on crops and mirror images too, and gains
# student_views = false  # much (preset frugal); not where left and right differ, as in digits
[device]
classes = 10
{LARGE_COSINE}""",
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
    lines = dict(_lines(RUN)) | dict(_lines(SETTINGS[preset]))
    return settings.render(Template(RunConfig, about, lines), changes or {})


def _lines(text: str) -> Iterator[tuple[str, Setting]]:
    """The settings in lines of a TOML file, by dotted key; a line that begins with # is an example.

    Two blanks and # begin a comment.
    """
    table = ""
    for line in filter(None, text.splitlines()):
        if line.startswith("["):
            table = f"{line[1:-1]}."
            continue
        pair, _, comment = line.partition("  # ")
        ((key, value),) = tomllib.loads(pair.removeprefix("# ")).items()
        yield table + key, Setting(value, comment, example=pair.startswith("# "))
