"""The network with the device's objective in PyTorch, its FLOPs, and its exports."""

import json
import warnings
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models
from benchmarks.train_step.setting import (
    ALPHA,
    CLASSES,
    MOMENTUM,
    SEED,
    TEMPERATURE,
    WEIGHT_DECAY,
    Setting,
    Task,
)
from wire.names import title

OPSET = 17  # onnxruntime-training 1.19 has gradients for this one


class Objective(nn.Module):
    """The loss of a batch, as in tools.export.tracing.step; always built with the same weights."""

    def __init__(self, chosen: Setting) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.net = models.build(chosen.model, classes=CLASSES, input_shape=chosen.input)

    def forward(self, x: Tensor, y: Tensor, teacher: Tensor | None = None) -> Tensor:
        """Mean cross entropy; with a teacher, plus alpha * T^2 * KL."""
        logits = self.net(x)
        ce = F.cross_entropy(logits, y)
        if teacher is None:
            return ce
        student = F.log_softmax(logits / TEMPERATURE, 1)
        target = F.log_softmax(teacher / TEMPERATURE, 1)
        kl = F.kl_div(student, target, reduction="batchmean", log_target=True)
        return ce + ALPHA * TEMPERATURE**2 * kl


def default_task(model: str, shape: tuple[int, int, int]) -> Task:
    """Distillation for the networks that FedGKT splits, classification for all others."""
    net = models.build(model, classes=CLASSES, input_shape=shape)
    return "distill" if isinstance(net, models.SplitModel) else "classify"


def flops_per_image(chosen: Setting, folder: Path) -> float:
    """FLOPs of one image, both passes: 2 x multiply-adds of convolutions and matrix products."""
    batch = {key: torch.from_numpy(array) for key, array in chosen.load_batch(folder).items()}
    with FlopCounterMode(display=False) as counter:
        Objective(chosen).train()(**batch).backward()
    return cast("int", counter.get_total_flops()) / chosen.batch


def export_step(chosen: Setting, folder: Path) -> None:
    """Compile the training step.

    Raises:
        ExportError: the network cannot be compiled.
    """
    from tools.export import Sgd, export  # not above: PyTorch's contenders must not pay for it

    export(
        Objective(chosen).net,
        name=title(chosen.model),
        classes=CLASSES,
        input_shape=chosen.input,
        batch=chosen.batch,
        task=chosen.task,
        optimizer=Sgd(MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY),
        out=folder / "artifact",
    )


def export_forward(chosen: Setting, folder: Path) -> None:
    """Network and objective as ONNX, in training mode, for onnxruntime-training."""
    whole = Objective(chosen).train()
    batch = {key: torch.from_numpy(array) for key, array in chosen.load_batch(folder).items()}
    with warnings.catch_warnings():
        # The newer exporter writes CastLike, for which onnxruntime-training has no gradient. The
        # older one warns that it is deprecated.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            whole,
            tuple(batch.values()),
            str(folder / "forward.onnx"),
            input_names=list(batch),
            output_names=["loss"],
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
            opset_version=OPSET,
            dynamo=False,
        )
    names = [name for name, parameter in whole.named_parameters() if parameter.requires_grad]
    (folder / "trained.json").write_text(json.dumps(names))
