"""Federated Dropout on the server: units are drawn only as often as they change."""

import contextlib
from dataclasses import replace

import pytest

from models import submodel
from orchestrator.config import CohortConfig, DeviceConfig, RunConfig, ServerConfig, SubmodelConfig
from orchestrator.display.report import Report
from orchestrator.launch import prepare
from orchestrator.run_folder.store import Store
from orchestrator.simulation import devices
from orchestrator.strategies import create

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path, digits):
    return RunConfig(
        name="run",
        heldout=digits / "heldout.npz",
        strategy="feddropout",
        runs=tmp_path / "runs",
        cohort=CohortConfig(min_devices=2),
        device=DeviceConfig(mean=(0.3,) * 3, std=(0.37,) * 3),
        server=ServerConfig(torch_device="cpu"),
    )


@pytest.fixture
def drawn_for(monkeypatch):
    """The devices for which units have been drawn so far."""
    drawn = []
    choose = submodel.choose

    def counted(*arguments, device, **more):
        drawn.append(device)
        return choose(*arguments, device=device, **more)

    monkeypatch.setattr(submodel, "choose", counted)
    return drawn


@pytest.mark.parametrize(("units", "shared"), [("random", False), ("rolling", True)])
def test_units_that_devices_share_are_drawn_once(config, digits, drawn_for, units, shared):
    config = replace(config, submodel=SubmodelConfig(keep_rate=0.5, units=units))
    with contextlib.closing(Store(config)) as store:
        strategy, births = made(config, store, digits)
        drawn_for.clear()  # a new strategy tries the layout with a draw
        orders = strategy.orders(strategy.begin(), 1, 1, births)
    assert len(births) > 1
    assert len(drawn_for) == (1 if shared else len(births))
    assert len({order.submodel for order in orders.values()}) == len(drawn_for)


def made(config, store, digits):
    """The strategy, and the births of the devices."""
    task = prepare.task(
        config, store, prepare.variants(config), prepare.read_heldout(config),
        Report(config, store),
    )  # fmt: skip
    shards = devices.read_shards(config, digits)
    births = {name: devices.birth(name, shard) for name, shard in shards.items()}
    return create("feddropout", task), births
