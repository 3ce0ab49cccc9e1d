"""The app that Flower runs in its environment: FedAvg over arrays that nodes return at once.

Each node adds a different number to the arrays, because real updates differ: Flower stores objects
by their hash, and would send four equal updates as one.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator"
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Return the arrays that came, with a small change that differs from node to node."""
    change = np.float32(1e-3 * (1 + int(context.node_config["partition-id"])))
    arrays = [array + change for array in message.content["arrays"].to_numpy_ndarrays()]
    metrics = MetricRecord({"num-examples": 8})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content=content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Do the rounds; write their seconds, and how many nodes returned, to a file."""
    config = context.run_config
    ends: list[float] = []
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=config["devices"],
        min_available_nodes=config["devices"],
        train_metrics_aggr_fn=lambda records, _: MetricRecord({"returned": len(records)}),
    )
    shapes = json.loads(config["shapes"])
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(shape, np.float32) for shape in shapes]),
        num_rounds=config["rounds"],
        evaluate_fn=lambda _round, _arrays: ends.append(time.perf_counter()),
    )
    rounds = {  # ends[0] is before the first round
        "seconds": [end - begin for begin, end in pairwise(ends[1:])],
        "returned": [
            int(result.train_metrics_clientapp[number]["returned"])
            for number in range(2, config["rounds"] + 1)
        ],
    }
    partial = Path(config["out"] + ".new")
    partial.write_text(json.dumps(rounds))
    partial.rename(config["out"])
