"""A user's own networks: found by name, made from the seed, and kept apart from ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from models import foreign
from wire import names
from wire.errors import StillhouseError

ROOT = Path(__file__).parents[2]
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__", "/").replace("INIT", "__init__") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build(name, classes=5, shape=(3, 8, 8)):
    torch.manual_seed(0)
    return models.build(name, classes=classes, input_shape=shape)


@pytest.mark.parametrize(
    "name",
    ["nets.py:Net", "./nets.py:Net", "{here}/nets.py:Net", "nets:Net", "{here}/./nets.py:Net",
     "sub/deep/net.py:Net", "sub.deep.net:Net", "my nets/größe.py:Net"],
)  # fmt: skip
def test_every_form_of_a_name_finds_the_factory(folder, name):
    write(folder, nets=NET, sub__deep__net=NET)
    (folder / "my nets").mkdir()
    (folder / "my nets/größe.py").write_text(NET)
    model = build(name.format(here=folder))
    assert models.try_out(model, name, classes=5, shape=(3, 8, 8)) is None
    (digest,) = models.sources(name.format(here=folder)).values()
    assert len(digest) == 64


def test_home_is_expanded(folder, monkeypatch):
    write(folder, nets=NET)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir("/")
    assert build("~/nets.py:Net").fc.out_features == 5


def test_an_anchored_name_is_found_from_anywhere_and_shown_as_it_was_written(folder, monkeypatch):
    write(folder, a__nets=NET)
    name = names.anchored("a/nets.py:Net", folder)
    monkeypatch.chdir("/")
    assert build(name).fc.out_features == 5
    assert names.anchored(name, Path("/")) == name
    assert names.written(name) == "a/nets.py:Net"
    assert names.title(name) == "nets:Net"
    assert names.anchored("resnet8", folder) == names.written("resnet8") == "resnet8"
    assert names.parse(names.cut(name, "features.3")) == (name, "features.3")
    assert names.parse("/home/me@work/n.py:make") == ("/home/me@work/n.py:make", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def make(): return Net(5)", 5),
        ("def make(classes): return Net(classes)", 7),
        ("def make(num_classes): return Net(num_classes)", 7),
        ("def make(classes, /): return Net(classes)", 7),
        ("def make(*, classes, input_shape): return Net(classes, input_shape[0])", 7),
        ("def make(input_shape, classes=9): return Net(classes)", 7),
        ("def make(**more): return Net(more['classes'], more['input_shape'][1])", 7),
        ("def make(weights=None, **more): return Net(**more)", 7),
        (("class Other(Net):\n    def __init__(self, num_classes): super().__init__(num_classes)\n"
         "def make(*, weights=None, **more): return Other(**more)"), 7),
        ("import functools\nmake = functools.partial(Net, width=2)", 7),
        ("class make:\n    def __new__(cls, classes): return Net(classes)", 7),
        ("make = Net", 7),
    ],
)  # fmt: skip
def test_a_factory_gets_what_it_names(folder, text, expected):
    write(folder, nets=NET + text)
    assert build("nets.py:make", classes=7).fc.out_features == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def make(n): return Net(n)", ("takes 'n', which has no default; a factory may ask for "
         "`classes` .*`input_shape`")),
        ("def make(classes, width): return Net(5)", "takes 'width', which has no default"),
        ("make = Net(5)", r"'make' is a network that is made already \(Net\); name a function"),
        ("make = 3", r"'make' is no function \(int\)"),
        ("made = Net(5)\ndef make(): return made", "returns the same network at each call"),
        ("def make(): return None", "return a torch.nn.Module, got NoneType"),
        ("def make(): return Net", "return a torch.nn.Module, got type"),
        ("def make(): raise ValueError('too\\nmany')",
         r"fails at .*/nets.py:\d+: ValueError: too$"),
        ("def make(): return Net(clases=5)", "nets.py:.*unexpected keyword argument 'clases'"),
        ("def mak(): return None", "has no 'make'; did you mean 'mak'"),
        ("def build_it(): return None", "has no 'make'; it has Net, build_it$"),
        ("import nowhere", (r"importing it fails at .*/nets.py:12: ModuleNotFoundError: No module "
         "named 'nowhere'; install it where the orchestrator runs")),
        ("raise SystemExit(3)", "importing it fails at .*nets.py:12: SystemExit: 3"),
        ("def make(:", "importing it fails at .*nets.py:12: SyntaxError: "),
        ("1 / 0", "importing it fails at .*/nets.py:12: ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(folder, text, reason):
    write(folder, nets=NET + text)
    if "made = " in text:
        build("nets.py:make")
    with pytest.raises(StillhouseError, match=reason) as fault:
        build("nets.py:make")
    assert str(fault.value).startswith("nets.py:make: ")
    assert "\n" not in str(fault.value)
    assert "stillhouse_own" not in str(fault.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("net.py:Net", r"no file .*/net.py; did you mean 'nets.py'"),
        ("nest:Net", "no module 'nest' in .*, nor installed; did you mean 'nets'"),
        ("nets.nets:Net", "no module 'nets.nets'|not a package"),
        ("nets.py:", "expected a factory behind the colon"),
        ("nets.py:Net()", "expected a factory behind the colon"),
        (":Net", "expected a factory behind the colon"),
        ("nets/nets:Net", "is neither a module nor a file"),
        ("~nobody-x/nets.py:Net", r"'~nobody-x/nets.py': expected the home folder of a user"),
        (f"{'x' * 300}.py:Net", "expected a path of names of up to 255 bytes"),
        ("resnet8@", "did you mean 'resnet8'"),
        ("nets.py", "no model is named 'nets.py'; .*or name your own: path/to/file.py:factory"),
        ("resnet_8", "did you mean 'resnet8'"),
    ],
)
def test_a_name_that_leads_nowhere_is_answered(folder, name, reason):
    write(folder, nets=NET)
    with pytest.raises(StillhouseError, match=reason):
        build(name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def make(): return Net(4)", (r"float32 logits of shape \(2, 5\) for two images, got "
         r"torch.float32 of \(2, 4\); a factory asks for the number of logits as `classes`")),
        ("def make(classes): return Net(classes).double()", ("parameter 'conv.weight' is "
         "torch.float64, expected torch.float32")),
        ("def make(classes): return nn.Sequential(nn.Flatten(), nn.Linear(9, classes))",
         r"fails on images of shape \(3, 8, 8\), in module '1' \(Linear\)"),
        ("class make(Net):\n    def forward(self, x): return [super().forward(x)]",
         "it returns a list"),
        (("class make(Net):\n    extractor = property(lambda self: self.conv)\n"
         "    def extract(self, x): return self.conv(x) * 2, self(x)"),
         r"expected extract\(x\) to return the output of `extractor`"),
        (("class make(Net):\n    extractor = property(lambda self: self.conv)\n"
         "    def extract(self, x): return self.conv(x), self(x), None"),
         "the logits of forward.x., got ValueError: too many values to unpack"),
        (("class make(Net):\n    extractor = property(lambda self: self.conv)\n"
         "    def extract(self, x): return self.encoder(x)"),
         "got AttributeError: 'make' object has no attribute 'encoder'"),
    ],
)  # fmt: skip
def test_a_network_that_does_not_fit_is_refused_when_it_is_tried(folder, text, reason):
    write(folder, nets=NET + text)
    with pytest.raises(StillhouseError, match=reason):
        models.try_out(build("nets.py:make"), "nets", classes=5, shape=(3, 8, 8))


def test_weights_follow_from_the_seed_whatever_random_numbers_are_drawn(folder):
    more = """
import random
import numpy as np
import torch

def make(classes):
    net = Net(classes)
    with torch.no_grad():
        net.fc.bias[0] = random.random()
        net.fc.bias[1] = np.random.rand()
    torch.set_default_dtype(torch.float64)
    return net
"""
    write(folder, nets=NET + more)
    first, second = (build("nets.py:make").state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.get_default_dtype() == torch.float32


def test_lazy_layers_take_their_shapes_from_the_input(folder):
    write(folder, nets="from torch import nn\ndef make(classes): return nn.Sequential("
          "nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(classes))")  # fmt: skip
    assert build("nets.py:make")[2].in_features == 4 * 36


PACKAGES = {
    "models__INIT": "VALUE = 'mine'",
    "models__blocks": "from tools.width import WIDTH\nfrom wire import factor\nimport models\n"
                      "assert models.VALUE == 'mine'",
    "models__lazy": "def same(x): return x",
    "tools__width": "WIDTH = 4",
    "wire": "factor = 1",
    "orchestrator__INIT": "",
    "models__mine": """
import torch
import models.blocks
import models.blocks as blocks
from models import VALUE
from models.blocks import WIDTH
from . import blocks as same
assert VALUE == "mine" and blocks is same is models.blocks
""" + NET + """
class Mine(Net):
    def forward(self, x):
        import tools.width
        from models.lazy import same
        return same(super().forward(x))
""",
}  # fmt: skip


@pytest.mark.parametrize("name", ["models.mine:Mine", "models/mine.py:Mine"])
def test_a_users_packages_may_be_called_as_ours(folder, name):
    write(folder, **PACKAGES)
    before = ours()
    model = build(name)
    models.try_out(model, name, classes=5, shape=(3, 8, 8))
    assert set(models.sources(name)) == {
        "models/__init__.py", "models/blocks.py", "models/lazy.py", "models/mine.py",
        "tools/width.py", "wire.py",
    }  # fmt: skip
    assert ours() == before


def ours() -> dict[str, object]:
    """Our modules, as an import finds them."""
    return {
        key: module for key, module in sys.modules.items()
        if key.split(".")[0] in ("models", "tools", "wire", "orchestrator")
    }  # fmt: skip


def test_without_init_files_too(folder):
    write(folder, models__mine="from models.blocks import Net", models__blocks=NET)
    assert build("models.mine:Net").fc.out_features == 5


def test_a_folder_of_files_that_are_no_modules_is_no_package(folder):
    (folder / "numpy").mkdir()
    (folder / "models").mkdir()
    (folder / "models/resnet18.onnx").touch()
    more = "import numpy\nfrom models.clip import Clip\nassert numpy.array"
    write(folder, nets=NET + more)
    assert build("nets.py:Net").fc.out_features == 5


def test_files_of_one_name_in_two_folders_are_two_modules(folder):
    for name in "ab":
        write(folder / name, net=NET + f"from layers import FOLDER\nassert FOLDER == '{name}'\n"
              f"class Own(Net): folder = FOLDER\n",
              layers=f"FOLDER = '{name}'")  # fmt: skip
    assert [build(f"{name}/net.py:Own").folder for name in "aba"] == ["a", "b", "a"]


def test_an_edit_within_a_second_is_seen_by_the_next_process(folder):
    code = (
        "import models; m = models.build('nets.py:Net', classes=5, input_shape=(3, 8, 8));"
        "print(m.conv.out_channels, *models.sources('nets.py:Net').values())"
    )
    seen = []
    for width in (4, 8):
        write(folder, nets=NET.replace("width=4", f"width={width}"))
        os.utime(folder / "nets.py", (1, 1))
        seen.append(run(folder, code).stdout.split())
    assert [width for width, _ in seen] == ["4", "8"]
    assert seen[0][1] != seen[1][1]
    assert not (folder / "__pycache__").exists()


def run(folder: Path, code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def install(folder: Path, name: str, entry_points: str = "", top_level: str = "") -> Path:
    """Install a distribution in a separate site-packages folder."""
    site = folder / "lib/site-packages"
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    (info / "top_level.txt").write_text(top_level)
    return site


def test_entry_points_are_names_and_a_clash_is_said(folder, monkeypatch, caplog):
    points = f"[{foreign.NETWORKS.group}]\nmy-net = theirs.nets:Net\nresnet8 = theirs.nets:Net\n"
    site = install(folder, "theirs", points)
    write(site, theirs__nets=NET)
    monkeypatch.syspath_prepend(str(site))
    foreign.say_clash.cache_clear()
    assert "my-net" in models.names()
    assert models.names().count("resnet8") == 1
    assert build("my-net").fc.out_features == 5
    assert len(models.sources("my-net")) == 1
    assert isinstance(build("resnet8"), models.SplitModel)
    assert "resnet8: the network of this name is Stillhouse's; that of an installed" in caplog.text
    foreign.say_clash.cache_clear()


@pytest.mark.parametrize(
    ("point", "text"),
    [
        ("gone.nets:Net", "cannot be imported: no module 'gone' in the installed packages"),
        ("broken.nets:Net", "takes 'depth', which has no default; a factory may ask for"),
        ("broken.nets:Nett", "has no 'Nett'; did you mean 'Net'"),
    ],
)
def test_a_network_that_cannot_be_made_is_named_with_its_entry_point(
    folder, monkeypatch, point, text
):
    name = folder.name  # differs in each test, because modules stay imported
    site = install(folder, name, f"[{foreign.NETWORKS.group}]\n{name} = {point}\n")
    write(site, broken__nets=NET.replace("width=4", "depth"))
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(StillhouseError, match=f"^{name} = {point}: .*{text}"):
        build(name)


def test_an_installed_package_called_as_ours_is_found_beside_ours(folder, monkeypatch):
    site = install(folder, "theirs", top_level="models\ntheirs\n")
    write(site, models__INIT="", models__net="from models.blocks import Net",
          models__blocks=NET, theirs__INIT="", theirs__net="from models.blocks import Net",
          )  # fmt: skip
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    assert build("models.net:Net").fc.out_features == 5
    assert build("theirs.net:Net").fc.out_features == 5
    assert models.__file__ == str(ROOT / "models/__init__.py")


def test_what_is_installed_is_imported_once_and_as_ever(folder):
    write(folder, nets=NET)
    assert isinstance(build("torch.nn:Identity", classes=2), nn.Identity)
    assert foreign.find("torch.nn:Identity").found.value is nn.Identity


def test_what_a_module_draws_at_import_does_not_change_its_networks(folder):
    text = "import torch, numpy\nmade, one, two = Net(3), torch.rand(1), numpy.random.rand()\n"
    write(folder, nets=NET + text)
    before = torch.initial_seed()
    first, second = build("nets.py:Net"), build("nets.py:Net")
    assert torch.equal(first.conv.weight, second.conv.weight)
    write(folder, late=NET + "def make():\n    import other\n    return Net(5)", other=NET + text)
    first, second = build("late.py:make"), build("late.py:make")
    assert torch.equal(first.conv.weight, second.conv.weight)
    torch.manual_seed(before)


def test_a_network_of_torchvision_is_made(folder):
    write(folder, nets="import torchvision\nmake = torchvision.models.mobilenet_v3_small")
    model = build("nets.py:make", classes=3, shape=(3, 32, 32))
    models.try_out(model, "mobilenet", classes=3, shape=(3, 32, 32))


@pytest.mark.parametrize(
    ("name", "hint"), [("nets.Net", "'nets:Net'"), ("nets.py", "'nets.py:factory'")]
)
def test_a_name_without_a_colon_is_answered_with_the_right_one(folder, name, hint):
    write(folder, nets=NET)
    with pytest.raises(StillhouseError, match=f"did you mean {hint}"):
        build(name)
