"""What a run's configuration promises, and what it refuses."""

from pathlib import Path

import pytest

from orchestrator.config import DeviceConfig, RunConfig, SubmodelConfig, Tier


@pytest.mark.parametrize(
    ("device", "memory_mb", "rate"),
    [("zero-3", 8000, 0.25), ("pi-3", 512, 0.5), ("pi-3", 513, 0.75), ("zero", 8000, 0.75)],
)
def test_the_first_tier_that_holds_a_device_decides_its_keep_rate(device, memory_mb, rate):
    tiers = (Tier(0.25, devices="zero-*"), Tier(0.5, memory_mb=512))
    submodels = SubmodelConfig(0.75, tiers=tiers)
    assert submodels.rate_of(device, memory_mb * 10**6) == rate
    assert submodels.rates == {0.25, 0.5, 0.75}


def test_error_feedback_is_refused_where_the_units_change_with_the_rounds():
    device = DeviceConfig(update="eden|b=1|mse", feedback=True)
    settings = {"name": "run", "heldout": Path("heldout.npz"), "strategy": "feddropout"}
    with pytest.raises(ValueError, match=r'use submodel\.units = "ordered", or whole models'):
        RunConfig(**settings, device=device, submodel=SubmodelConfig(0.5))
    RunConfig(**settings, device=device, submodel=SubmodelConfig(0.5, units="ordered"))
    RunConfig(**settings, device=device)
