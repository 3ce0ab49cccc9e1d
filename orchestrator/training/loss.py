"""The loss of learning from labels and a teacher, for the large model and simulated devices.

    l = CE(z, y) + alpha * T^2 * KL(softmax(z_t / T) || softmax(z / T))

z are the student's logits and z_t the teacher's (He et al. 2020, equations 3 and 5). The factor T^2
keeps the gradient's size independent of T (Hinton et al. 2015). `tools.export` compiles the same
loss into a device's training step.
"""

import torch
from torch.nn import functional as F


def each(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | None,
    *,
    alpha: float | torch.Tensor,
    temperature: float,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Each sample's loss, (..., B).

    Args:
        logits: z, (..., B, C).
        labels: y, (..., B) int64.
        teacher: z_t, (..., B, C); None leaves the distillation term out.
        alpha: weight of the distillation term; a tensor has one for each sample.
        temperature: T.
        smoothing: share of a label's probability that goes to all classes alike (Szegedy et al.
            2016, section 7).
    """
    hard = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=smoothing
    )
    hard = hard.view(labels.shape)
    if teacher is None:
        return hard
    soft = F.kl_div(
        F.log_softmax(logits / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(dim=-1)
    return hard + alpha * temperature**2 * soft


def mean(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | None,
    *,
    alpha: float,
    temperature: float,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
    total: float | None = None,
) -> torch.Tensor:
    """Mean loss of a batch.

    Args:
        logits: z, (B, C).
        labels: y, (B,) int64.
        teacher: z_t, (B, C); None leaves the distillation term out.
        alpha: weight of the distillation term.
        temperature: T.
        smoothing: of labels; see `each`.
        weights: of the samples in the mean, (B,); None: all alike.
        total: sum of the weights in the whole batch, if these samples are a part of it. The result
            is then their share of the batch's mean, and all shares add up to the mean.
    """
    losses = each(
        logits, labels, teacher, alpha=alpha, temperature=temperature, smoothing=smoothing
    )
    if weights is None:
        return losses.mean()
    return (weights * losses).sum() / (weights.sum() if total is None else total)
