"""A run's configuration: what is accepted, and what is refused."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from ondevice.config import AgentConfig
from orchestrator import strategies
from orchestrator.config import (
    AverageConfig,
    CohortConfig,
    DeviceConfig,
    Other,
    RunConfig,
    ServerConfig,
    SubmodelConfig,
    Tier,
    TransferConfig,
    load,
    presets,
    template,
)
from orchestrator.launch.prepare import fresh
from wire.address import BrokerAddress
from wire.errors import SettingsError, StillhouseError

AGENT = partial(
    AgentConfig, "pi", "fleet", Path("images"), Path("state"), BrokerAddress("mqtt://localhost")
)

RUN = partial(RunConfig, name="run")


@pytest.mark.parametrize(
    ("device", "memory_mb", "rate"),
    [("zero-3", 8000, 0.25), ("pi-3", 512, 0.5), ("pi-3", 513, 0.75), ("zero", 8000, 0.75)],
)
def test_the_first_tier_that_holds_a_device_decides_its_keep_rate(device, memory_mb, rate):
    tiers = (Tier(0.25, devices="zero-*"), Tier(0.5, memory_mb=512))
    submodels = SubmodelConfig(0.75, tiers=tiers)
    assert submodels.rate_of(device, memory_mb * 10**6) == rate
    assert submodels.rates == {0.25, 0.5, 0.75}


@pytest.mark.parametrize("update", ["hadamard|q=2", "eden|b=4", "eden|b=1|mse/hadamard|q=8"])
def test_error_feedback_takes_codecs_of_least_error_alone(update):
    with pytest.raises(ValueError, match="may leave out more than it was given"):
        DeviceConfig(update=update, feedback=True)
    DeviceConfig(update="eden|b=0.5|mse/float16", feedback=True)


@pytest.mark.parametrize("settings", [{"mu": 0.1}, {"update": "float16", "feedback": True}])
def test_what_a_strategy_would_ignore_is_refused(settings):
    device = DeviceConfig(**settings)
    for strategy in ("fedgkt", "local"):
        run = RunConfig("run", Path("heldout.npz"), strategy=strategy, device=device)
        with pytest.raises(SettingsError, match=f"not for {strategy}; leave them out"):
            strategies.check(run)


def test_error_feedback_is_refused_where_the_units_change_with_the_rounds():
    device = DeviceConfig(update="eden|b=1|mse", feedback=True)
    settings = {"name": "run", "heldout": Path("heldout.npz"), "strategy": "feddropout"}
    with pytest.raises(SettingsError, match=r'use submodel\.units = "ordered", or whole models'):
        strategies.check(RunConfig(**settings, device=device, submodel=SubmodelConfig(0.5)))
    ordered = SubmodelConfig(0.5, units="ordered")
    strategies.check(RunConfig(**settings, device=device, submodel=ordered))
    strategies.check(RunConfig(**settings, device=device))


@pytest.mark.parametrize(("key", "value"), [("hostile", 0.5), ("hostile", -0.1), ("clip", -1.0)])
def test_a_robust_average_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key}: expected 0 or more"):
        AverageConfig(**{key: value})


@pytest.mark.parametrize(
    ("rule", "hostile", "devices", "text"),
    [
        ("trimmed_mean", 0.2, 4, "of 4 devices .* a share of 0.2 is nobody; raise hostile"),
        ("multi_krum", 0.1, 9, "a share of 0.1 is nobody"),
        ("multi_krum", 0.4, 10, "needs 11 devices to withstand 4, and cohort.min_devices is 10"),
    ],
)
def test_a_rule_that_would_withstand_nobody_is_refused(rule, hostile, devices, text):
    average, cohort = AverageConfig(rule, hostile=hostile), CohortConfig(devices)
    with pytest.raises(ValueError, match=text):
        RunConfig("run", average=average, cohort=cohort)
    RunConfig("run", average=average, cohort=CohortConfig(11))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"heldout": None}, "name images that the server evaluates on"),
        (
            {"heldout": None, "device": DeviceConfig(holdout=0.1),
             "transfer": TransferConfig(resend=0.1)},
            "name images that the server evaluates on",
        ),
        ({"strategy": "fedavg", "transfer": TransferConfig(freeze_after=1)}, "no feature maps"),
        ({"strategy": "local", "device": DeviceConfig(holdout=0.1)}, "device.holdout: strategy"),
        (
            {"device": DeviceConfig(clip=1.0),
             "transfer": TransferConfig(views=True, freeze_after=1)},
            "device.clip: the server would crop clipped feature maps",
        ),
        ({"strategy": "fedavg", "cohort": CohortConfig(carry_rounds=1)}, "which averages weights"),
        ({"strategy": "local", "average": AverageConfig("median")}, "average: each device trains"),
        ({"average": AverageConfig(clip=2.0)}, "average: devices share neither their extractors"),
        (
            {"strategy": "feddropout", "submodel": SubmodelConfig(0.5),
             "cohort": CohortConfig(10), "average": AverageConfig("trimmed_mean")},
            r'average.rule = "trimmed_mean" is over devices that hold a unit; set submodel.absent',
        ),
        (
            {"strategy": "fedavg", "device": DeviceConfig(others=(Other("resnet4", "a"),))},
            "which averages weights",
        ),
    ],
)  # fmt: skip
def test_a_run_that_could_not_do_what_it_says_is_refused(settings, text):
    with pytest.raises(SettingsError, match=text):
        strategies.check(RunConfig(**{"name": "run", "heldout": Path("heldout.npz"), **settings}))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"freeze_after": -1}, "expected 0 rounds or more"),
        ({"network": "shared"}, 'set extractor = "shared"'),
        ({"student_views": False}, "there are none to do without"),
        ({"student_views": False, "views": True}, "there are none to do without"),
        ({"resend": 1.0}, "^resend: expected a share from 0 to below 1, got 1.0$"),
        ({"age_decay": 0.0}, "^age_decay: expected a factor over 0 to 1, got 0.0$"),
        ({"resend": 0.1, "views": True}, "leave one"),
        ({"logits": "float17"}, "did you mean 'float16'"),
        ({"logits": "relu|q=8"}, "takes no negative values"),
    ],
)
def test_a_transfer_that_cannot_be_is_refused(settings, text):
    with pytest.raises((ValueError, StillhouseError), match=text):
        TransferConfig(**settings)


def test_the_first_pattern_that_holds_a_device_decides_its_model():
    device = DeviceConfig(others=(Other("resnet4", "zero-*"), Other("resnet6", "*-2")))
    assert [device.model_of(n) for n in ("zero-2", "pi-2", "pi-3")] == [
        "resnet4", "resnet6", "resnet8",
    ]  # fmt: skip
    assert device.models == ("resnet8", "resnet4", "resnet6")
    run = RunConfig("run", Path("x"), device=device, transfer=TransferConfig(freeze_after=2))
    assert len(run.recipes) == 6
    assert sum(recipe.frozen for recipe in run.recipes) == 3


@pytest.mark.parametrize("preset", presets())
def test_a_preset_is_a_run_that_can_be_loaded(preset, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(template(preset))
    config = load(path, strategies.check)
    others = {"dropout": "feddropout", "fedavg": "fedavg"}
    assert config.strategy == others.get(preset, "fedgkt")
    assert config.broker.host == "127.0.0.1"
    published = RunConfig("first", heldout=path).transfer
    assert (config.transfer == published) == (preset not in ("frugal", "shared"))


@pytest.mark.parametrize("preset", presets())
def test_grey_images_work_from_every_preset(preset, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(template(preset, {"device.input": (1, 28, 28)}))
    config = load(path)
    assert config.device.mean == (0.4809,)
    assert "CIFAR-10's in grey: mean 0.4809, std 0.2392; set device.mean" in config.device.pixels
    for recipe in config.recipes:
        with torch.inference_mode():
            logits = fresh(config, recipe).eval()(torch.zeros(2, 1, 28, 28))
        assert logits.shape == (2, 10)


def test_pixels_are_normalized_by_a_named_default_or_by_what_is_set():
    assert DeviceConfig().mean == (0.4914, 0.4822, 0.4465)
    assert "by CIFAR-10's: mean" in DeviceConfig().pixels
    assert DeviceConfig(input=(4, 8, 8)).std == (0.25,) * 4
    chosen = DeviceConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    assert chosen.pixels == "pixels are normalized by mean 0.1, 0.2, 0.3, std 0.5, 0.5, 0.5"
    with pytest.raises(ValueError, match=r"with a mean \(3\) and a std \(1\) a channel"):
        DeviceConfig(input=(1, 28, 28), mean=(0.1, 0.2, 0.3))


def test_paths_of_a_run_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "run.toml"
    home = {"pretrained": "~/runs/first", "runs": "~/runs", "heldout": "~/heldout"}
    path.write_text(template("fedgkt", home))
    config = load(path)
    assert config.heldout == tmp_path / "heldout"
    assert config.runs == tmp_path / "runs"
    assert config.pretrained == tmp_path / "runs" / "first"


def test_an_unknown_preset_is_refused_with_those_that_there_are():
    with pytest.raises(
        StillhouseError, match="no preset 'common'; there are dropout, fedavg, fedgkt"
    ):
        template("common")


def test_classes_are_a_number_or_names_in_unicode_form_c(tmp_path):
    file = tmp_path / "run.toml"

    def device(classes):
        file.write_text(f'name = "run"\nheldout = "x.npz"\n[device]\nclasses = {classes}\n')
        return load(file).device

    assert (device(3).class_count, device(3).class_names) == (3, ())
    decomposed = device('["nut", "Schlu\u0308ssel"]')
    assert (decomposed.class_count, decomposed.class_names) == (2, ("nut", "Schl\u00fcssel"))
    for wrong, text in (
        ('["nut", "nut"]', "there twice"),
        ('["nut", ""]', "printable"),
        ('["nut"]', "classes: expected 2 or more"),
        ("true", "expected int"),
        ('["nut", 3]', "expected str"),
        ('"nut"', "expected int"),
    ):
        with pytest.raises(StillhouseError, match=text):
            device(wrong)


@pytest.mark.parametrize(
    ("cls", "name", "value", "text"),
    [
        (DeviceConfig, "classes", 1, "expected 2 or more, got 1"),
        (DeviceConfig, "batch", 0, "expected 1 or more, got 0"),
        (DeviceConfig, "epochs", 0, "expected 1 or more, got 0"),
        (DeviceConfig, "lr", 0.0, "expected over 0, got 0.0"),
        (DeviceConfig, "std", (0.0, 1.0, 1.0), "expected numbers over 0, got (0.0, 1.0, 1.0)"),
        (DeviceConfig, "momentum", 1.0, "expected 0 to below 1, got 1.0"),
        (DeviceConfig, "weight_decay", -0.1, "expected 0 to below 1, got -0.1"),
        (ServerConfig, "eval_batch", -1, "expected 0 or more, got -1"),
        (ServerConfig, "eval_every", 0, "expected 1 or more, got 0"),
        (ServerConfig, "patience", -1, "expected 0 or more, got -1"),
        (ServerConfig, "epochs", 0, "expected 1 or more, got 0"),
        (ServerConfig, "batch", 1, "expected 2 or more, got 1"),
        (ServerConfig, "weight_decay", -0.1, "expected 0 or more, got -0.1"),
        (ServerConfig, "lr", 0.0, "expected over 0, got 0.0"),
        (ServerConfig, "temperature", -1.0, "expected over 0, got -1.0"),
        (CohortConfig, "quorum", 1.5, "expected a share over 0 to 1, got 1.5"),
        (CohortConfig, "deadline_s", 0.0, "expected over 0, got 0.0"),
        (CohortConfig, "wait_s", -1.0, "expected 0 or more, got -1.0"),
        (RUN, "rounds", 0, "expected 1 to 1048575, got 0"),
        (RUN, "seed", -1, "expected 0 to 1048575, got -1"),
        (RUN, "transfer_chunks", 1, "expected 2 or more, got 1"),
        (RUN, "name", "n" * 49, f"expected up to 48 characters, got {'n' * 49}"),
        (RUN, "heldout_limit", -1, "expected 0 (all) or more, got -1"),
        (AGENT, "threads", -1, "expected 0 (all cores) or more, got -1"),
        (AGENT, "window", 0, "expected 1 or more, got 0"),
        (AGENT, "retry_s", 0.0, "expected over 0, got 0.0"),
        (AGENT, "resend_s", -1.0, "expected over 0, got -1.0"),
        (AGENT, "telemetry_s", 0.0, "expected over 0, got 0.0"),
    ],
)
def test_a_value_out_of_range_is_named_alone(cls, name, value, text):
    with pytest.raises(ValueError, match=f"^{name}: {re.escape(text)}$"):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("table", "key", "spec"),
    [("device", "features", "relu|q=99"), ("device", "update", "float17"),
     ("device", "state", "a/b/c"), ("transfer", "logits", "float17")],
)  # fmt: skip
def test_a_codec_that_there_is_not_is_refused_with_the_file_and_the_key(tmp_path, table, key, spec):
    path = tmp_path / "run.toml"
    path.write_text(f'name = "run"\n[{table}]\n{key} = "{spec}"\n')
    with pytest.raises(SettingsError, match=f"^{path}: {table}: {key}: "):
        load(path)


@pytest.mark.parametrize("line", ['heldout = ""', 'runs = ""', "retry_s = inf"])
def test_an_empty_folder_and_an_infinite_number_are_refused_with_the_file(tmp_path, line):
    path = tmp_path / "run.toml"
    path.write_text(f'name = "run"\n{line}\n')
    with pytest.raises(SettingsError, match=f"^{path}: {line.split()[0]}: expected"):
        load(path)
