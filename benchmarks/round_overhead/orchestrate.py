"""The orchestrator of a turn: FedAvg whose orders ask for no training.

    python -m benchmarks.round_overhead.orchestrate RUN.TOML

Devices then return an update of zeros, which they pack, journal and send like any other: float32 is
four bytes a value, whatever the value. The seconds of each round, and figures from the report, are
written to rounds.json beside the configuration.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

from orchestrator import config
from orchestrator.display.report import Report
from orchestrator.launch import start
from orchestrator.strategies.fedavg import FedAvg
from orchestrator.strategies.global_model import GlobalModel
from wire.messages import Birth, Order


class NoTraining(FedAvg):
    """FedAvg whose devices return without training."""

    def orders(
        self, state: GlobalModel, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """The orders of FedAvg, with no epochs."""
        orders = super().orders(state, round_, sequence, cohort)
        return {name: replace(order, epochs=0) for name, order in orders.items()}


def main(path: Path) -> None:
    """Do the run; a round ends when its checkpoint is written and the next orders are out."""
    ends: list[float] = []

    def changed(report: Report) -> None:
        if len(report.entries) > len(ends):
            ends.append(time.perf_counter())

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with mock.patch.object(start, "create", lambda _, task: NoTraining(task)):
        report = start.run(config.load(path), changed=changed)
    devices = [entry["devices"].values() for entry in report.entries[1:]]
    figures = {
        "seconds": [end - begin for begin, end in pairwise(ends)],
        "returned": [sum(one["accepted"] for one in entry) for entry in devices],
        "bytes_up": [sum(one["bytes_up"] for one in entry) for entry in devices],
        "bytes_down": [sum(one["bytes_down"] for one in entry) for entry in devices],
    }
    (path.parent / "rounds.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
