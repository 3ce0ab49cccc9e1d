"""How the server trains its large model (FedGKT), and evaluates."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ServerConfig:
    """How the server trains its large model (FedGKT), and evaluates.

    Attributes:
        model: a network's name, see `models.registry`; takes the devices' feature maps.
        epochs, batch, lr, optimizer, weight_decay: of server training in each round.
        schedule: of the learning rate. "constant"; "cosine", from lr to 0 over all rounds and their
            epochs; "plateau", a tenth whenever held-out accuracy has not risen for `patience`
            evaluations (the reference code).
        alpha, temperature: of the distillation term.
        torch_device: "auto" takes CUDA where there is one.
        precision: of convolutions and matrix products; "auto" is bfloat16 on CUDA, else float32.
        compile: let torch.compile make the large model; wants a C++ compiler, and on CUDA Triton.
        eval_batch: images of one evaluation pass; 0: 16 on a CPU, whose cache holds so many, and
            1024 on a GPU.
        eval_every: what is learnt is evaluated after each so many rounds, and after the last.
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
            if getattr(self, name) < number:
                raise ValueError(f"{name}: expected {number} or more, got {getattr(self, name)}")
        for name in ("lr", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected over 0, got {getattr(self, name)}")
