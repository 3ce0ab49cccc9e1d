"""Refusal of settings that a strategy does not use, since it would ignore them in silence.

A strategy's `check` calls the functions that apply to it. Each raises ValueError if a setting is
wrong for it; the message names the key and the remedy.
"""

from orchestrator.config.average import AverageConfig
from orchestrator.config.run import RunConfig
from orchestrator.config.submodel import SubmodelConfig
from orchestrator.config.transfer import TransferConfig
from wire.names import written


def need_heldout(config: RunConfig) -> None:
    """For a strategy that evaluates on the server's images."""
    if config.heldout is None:
        raise ValueError(
            "heldout: name images that the server evaluates on; only fedgkt does without, with "
            "device.holdout over 0 and transfer.resend = 0"
        )


def refuse_holdout(config: RunConfig) -> None:
    """For a strategy that does not evaluate on images that devices hold out."""
    if config.device.holdout:
        raise ValueError(
            f"device.holdout: strategy {written(config.strategy)!r} evaluates on the server's "
            "images; leave it out"
        )


def refuse_submodel(config: RunConfig) -> None:
    """For a strategy that trains whole models."""
    if config.submodel != SubmodelConfig():
        raise ValueError(
            f"submodel: strategy {written(config.strategy)!r} trains whole models; use feddropout"
        )


def refuse_average(config: RunConfig, why: str) -> None:
    """For a strategy that averages nothing; `why` says so."""
    if config.average != AverageConfig():
        raise ValueError(f"average: {why}; remove [average]")


def refuse_transfer(config: RunConfig) -> None:
    """For a strategy without feature maps."""
    if config.transfer != TransferConfig():
        raise ValueError(
            f"transfer: strategy {written(config.strategy)!r} sends no feature maps; remove "
            "[transfer], or begin with orchestrator init --preset fedavg"
        )


def refuse_own_networks(config: RunConfig) -> None:
    """For a strategy in which all devices train one network."""
    if config.device.others:
        raise ValueError(
            f"device.others is for fedgkt and local, not for {written(config.strategy)}, which "
            "averages weights; leave it out"
        )


def refuse_late_results(config: RunConfig) -> None:
    """For a strategy whose results count only in the round whose weights they started from."""
    if config.cohort.carry_rounds:
        raise ValueError(
            f"cohort.carry_rounds is for fedgkt and local, not for {written(config.strategy)}, "
            "which averages weights; leave it out"
        )


def refuse_split(config: RunConfig) -> None:
    """For a strategy that does not cut networks in two."""
    device = config.device
    if any([device.split, *(other.split for other in device.others)]):
        raise ValueError(
            f"device.split: strategy {written(config.strategy)!r} sends no feature maps; leave it "
            "out"
        )


def refuse_updates(config: RunConfig) -> None:
    """For a strategy that asks for no updates of a global model."""
    if config.device.mu or config.device.feedback:
        raise ValueError(
            f"device.mu and device.feedback are for fedavg and feddropout, not for "
            f"{written(config.strategy)}; leave them out"
        )
