"""How the server trains its large model (FedGKT), and how it evaluates."""

from dataclasses import dataclass
from typing import Literal

from ondevice.views import PAD
from orchestrator.config.ranges import expect


@dataclass(frozen=True)
class ServerConfig:
    """How the server trains its large model (FedGKT), and how it evaluates.

    Attributes:
        model: name of a network that takes the devices' feature maps; see `models.registry`.
        epochs: passes over all samples in each round. A list has a number for each round, and the
            last holds for all later ones: [0, 16, 0] trains in round 2 only.
        batch, lr, weight_decay: of server training.
        optimizer: "sgd" with Nesterov momentum, "adam", or "muon" for convolutions that batch norm
            follows (`training.optimizers`).
        schedule: of the learning rate. "constant"; "cosine", from lr to 0 over all rounds, epoch by
            epoch; "linear", from lr to 0 over all rounds, step by step; "plateau", divided by ten
            whenever held-out accuracy has not risen for more than `patience` evaluations (as in the
            reference code).
        patience: see "plateau".
        alpha, temperature: of the distillation term.
        label_smoothing: share of a label's probability that goes to all classes alike.
        averaging: whether training follows slow averages of the weights (`SlowWeights`).
        flips: of cropped feature maps. "random": each epoch draws which samples are mirrored;
            "alternating": each sample is mirrored in every second epoch.
        shift: most pixels that feature maps are moved by when they are cropped.
        small_crops: share of server training, from its beginning, in which maps are cropped to 3/4
            of their height and width. Such an epoch costs a little over half of a whole one.
        torch_device: "auto" takes CUDA if it is available.
        precision: of convolutions and matrix products; "auto" is bfloat16 on CUDA, else float32.
        compile: run the large model through torch.compile; needs a C++ compiler, on CUDA Triton.
        eval_batch: images per evaluation pass; 0: 16 on a CPU (as many as its cache holds), 1024 on
            a GPU.
        eval_views: whether held-out images are also evaluated by mean logits over several views
            ("server_accuracy_averaged").
        eval_every: how many rounds from one evaluation to the next; the last round has one too.
    """

    model: str = "resnet19"
    epochs: int | tuple[int, ...] = 5
    batch: int = 64
    lr: float = 1e-3
    optimizer: Literal["sgd", "adam", "muon"] = "adam"
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine", "linear", "plateau"] = "constant"
    patience: int = 5
    alpha: float = 1.0
    temperature: float = 3.0
    label_smoothing: float = 0.0
    averaging: bool = False
    flips: Literal["random", "alternating"] = "random"
    shift: int = 4
    small_crops: float = 0.0
    torch_device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    eval_batch: int = 0
    eval_views: bool = False
    eval_every: int = 1

    def __post_init__(self) -> None:
        least = {"eval_batch": 0, "eval_every": 1, "patience": 0, "batch": 2, "shift": 0}
        for name, number in least.items():
            value = getattr(self, name)
            expect(name, value, value >= number, f"{number} or more")
        if isinstance(self.epochs, int):
            expect("epochs", self.epochs, self.epochs >= 1, "1 or more")
        else:
            fits = min(self.epochs, default=-1) >= 0 and any(self.epochs)
            expect("epochs", self.epochs, fits, "a list of 0 or more, not only of 0")
        expect("shift", self.shift, self.shift <= PAD, f"at most {PAD}")
        small = self.small_crops
        expect("small_crops", small, 0 <= small < 1, "0 or more and below 1")
        share = self.label_smoothing
        expect("label_smoothing", share, 0 <= share < 1, "0 or more and below 1")
        expect("lr", self.lr, self.lr > 0, "over 0")
        expect("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        expect("temperature", self.temperature, self.temperature > 0, "over 0")

    def epochs_in(self, round_: int) -> int:
        """How many passes the server makes in a round, from 1."""
        if isinstance(self.epochs, int):
            return self.epochs
        return self.epochs[min(round_, len(self.epochs)) - 1]
