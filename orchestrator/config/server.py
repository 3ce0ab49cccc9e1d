"""How the server trains its large model (FedGKT), and how it evaluates."""

from dataclasses import dataclass
from typing import Literal

from orchestrator.config.ranges import expect


@dataclass(frozen=True)
class ServerConfig:
    """How the server trains its large model (FedGKT), and how it evaluates.

    Attributes:
        model: name of a network that takes the devices' feature maps; see `models.registry`.
        epochs, batch, lr, optimizer, weight_decay: of server training in each round.
        schedule: of the learning rate. "constant"; "cosine", from lr to 0 over all rounds and their
            epochs; "plateau", divided by ten whenever held-out accuracy has not risen for more than
            `patience` evaluations (as in the reference code).
        patience: see "plateau".
        alpha, temperature: of the distillation term.
        torch_device: "auto" takes CUDA if it is available.
        precision: of convolutions and matrix products; "auto" is bfloat16 on CUDA, else float32.
        compile: run the large model through torch.compile; needs a C++ compiler, on CUDA Triton.
        eval_batch: images per evaluation pass; 0: 16 on a CPU (as many as its cache holds), 1024 on
            a GPU.
        eval_every: how many rounds from one evaluation to the next; the last round has one too.
    """

    model: str = "resnet19"
    epochs: int = 5
    batch: int = 64
    lr: float = 1e-3
    optimizer: Literal["sgd", "adam"] = "adam"
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    patience: int = 5
    alpha: float = 1.0
    temperature: float = 3.0
    torch_device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    eval_batch: int = 0
    eval_every: int = 1

    def __post_init__(self) -> None:
        least = {"eval_batch": 0, "eval_every": 1, "patience": 0, "epochs": 1, "batch": 2}
        for name, number in least.items():
            value = getattr(self, name)
            expect(name, value, value >= number, f"{number} or more")
        expect("lr", self.lr, self.lr > 0, "over 0")
        expect("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        expect("temperature", self.temperature, self.temperature > 0, "over 0")
