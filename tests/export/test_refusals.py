"""For an operator that cannot be compiled, the error gives its name, its place and a remedy."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tools.export import export
from tools.export.remedies import _FAMILIES, remedy
from wire.errors import ExportError


class Part(nn.Module):
    """A convolution, and a function applied to its output."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


class Network(nn.Module):
    """A classifier with a part under test in its block."""

    def __init__(self, part):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), part)
        self.head = nn.LazyLinear(5)

    def forward(self, x):
        y = self.block(x)
        return self.head((y[0] if isinstance(y, tuple) else y).flatten(1))


def refusal(module, out, **changes):
    """The error message of export, which must not write anything."""
    if isinstance(module, Network):
        with torch.no_grad():
            module(torch.zeros(4, 3, 6, 6))  # the head finds its size
    settings = {"classes": 5, "input_shape": (3, 6, 6), "batch": 4, "task": "classify"} | changes
    with pytest.raises(ExportError) as caught:
        export(module, name="net", out=out / "art", **settings)
    assert list(out.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "operator", "instead"),
    [
        (nn.Dropout(0.5), "bernoulli", "set p=0"),
        (nn.Dropout2d(0.5), "bernoulli", "set p=0"),
        (nn.RReLU(), "rrelu", "nn.LeakyReLU"),
        (Part(lambda x: x + torch.randn_like(x)), "randn", "leave the noise out"),
        (Part(F.gumbel_softmax), "exponential", "leave the noise out"),
        (nn.AdaptiveMaxPool2d(4), "adaptive_max_pool2d", "MaxPool2d"),
        (nn.Sequential(nn.Flatten(2), nn.LSTM(36, 4, batch_first=True)), "rnn", "nn.GRU"),
        (Part(lambda x: torch.fft.rfft2(x).abs()), "fft", "products with constant matrices"),
        (Part(lambda x: torch.complex(x, x).abs()), "complex", "two tensors"),
        (Part(lambda x: x.sort(1)[0]), "sort", "max, min or amax"),
        (Part(lambda x: x.topk(2, 1)[0]), "topk", "max, min or amax"),
        (Part(lambda x: x.median(1)[0]), "median", "max, min or amax"),
        (Part(lambda x: x.prod(1)), "prod", "sum of logarithms"),
        (Part(torch.linalg.det), "linalg", "matmul"),
        (Part(lambda x: torch.cdist(x, x)), "cdist", "with matmul"),
        (Part(lambda x: F.bilinear(x, x, x.new_ones(2, 6, 6))), "trilinear", "torch.einsum"),
        (Part(lambda x: torch.atan2(x, x + 9)), "atan2", "torch.atan of a quotient"),
        (Part(lambda x: torch.hypot(x, x)), "hypot", "(a * a + b * b).sqrt()"),
        (
            Part(lambda x: F.grid_sample(x, x[:, :2, :2].mT, align_corners=False)),
            "grid_sampler",
            "interpolate",
        ),
        (Part(torch.lgamma), "lgamma", "add a rule"),
        (Part(lambda x: x.cummax(1)[0]), "cummax", "nearest supported by name: aten.max"),
        (Part(lambda x: x.half().float()), "_to_copy", "float32, float64, int32"),
    ],
)
def test_layer_without_a_rule_is_refused_with_the_nearest_that_has_one(
    tmp_path, part, operator, instead
):
    message = refusal(Network(part), tmp_path)
    assert operator in message
    assert "module 'block.1" in message
    assert instead in message


def one_branch(x):
    return x if x.sum() > 0 else -x


def some_rounds(x):
    for _ in range(int(x.abs().sum()) % 3):
        x = x * x
    return x


@pytest.mark.parametrize(
    "function",
    [
        one_branch,
        some_rounds,
        lambda x: x * x.max().item(),
        lambda x: x * x.tolist()[0][0][0][0],
        lambda x: x * x[x > 0].mean(),
        lambda x: x * torch.from_numpy(x.detach().numpy().copy()),
    ],
    ids=["branch", "loop", "item", "tolist", "mask", "numpy"],
)
def test_flow_that_depends_on_data_is_refused_with_the_module_it_is_in(tmp_path, function):
    message = refusal(Network(Part(function)), tmp_path)
    assert "module 'block.1' (Part) looks at its data" in message
    assert "Use torch.where" in message


def test_forward_pass_that_fails_names_the_module_it_fails_in(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(7, 5)))
    message = refusal(network, tmp_path)
    assert "fails on a batch of shape (4, 3, 6, 6), in module '1.0' (Linear): mat1" in message


def test_checkpointing_is_refused_with_its_place(tmp_path):
    part = Part(lambda x: checkpoint(torch.sin, x, use_reentrant=False))
    message = refusal(Network(part), tmp_path)
    assert "in module 'block.1' (Part): hooks on saved tensors cannot be compiled" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("idle", "parameter 'block.1.idle.weight' gets no gradient (1 such); remove it, or set"),
        ("cut", "parameter 'block.0.weight' gets no gradient (4 such)"),
        ("all cut", "parameter 'block.0.weight' gets no gradient (6 such)"),
        ("integers", "parameter 'block.1.order' is torch.int64, expected torch.float32; use a buf"),
        ("half", "parameter 'block.1.conv.weight' is torch.float16, expected torch.float32; call"),
    ],
)
def test_parameter_that_cannot_be_trained_is_named(tmp_path, change, words):
    network = Network(Part(torch.sin))
    part = network.block[1]
    if change == "idle":
        part.idle = nn.Linear(2, 2, bias=False)
    elif change == "cut":
        part.function = torch.detach
    elif change == "all cut":
        network.register_forward_hook(lambda *args: args[-1].detach())
    elif change == "integers":
        part.order = nn.Parameter(torch.arange(3), requires_grad=False)
    else:
        part.half()
        part.forward = torch.sin
    assert words in refusal(network, tmp_path)


def test_batch_of_one_is_refused_for_a_batch_norm_by_its_place(tmp_path):
    message = refusal(Network(nn.BatchNorm2d(3)), tmp_path, batch=1)
    assert "'block.1' is a batch norm" in message
    assert "normalizes by that one sample's own statistics" in message
    assert "export with a batch of 2 or more, or use GroupNorm" in message


@pytest.mark.parametrize(
    "key", ["x", "y", "lr", "loss", "correct", "logits", "state[0:12]", "next[3:4]", "c0", "v12"]
)
@pytest.mark.parametrize("kind", ["parameter", "state buffer", "integer buffer", "constant buffer"])
def test_tensor_with_a_name_of_the_compiled_steps_own_is_refused(tmp_path, key, kind):
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    if kind == "parameter":
        network.register_parameter(key, nn.Parameter(torch.zeros(2), requires_grad=False))
    elif kind == "integer buffer":
        network.register_buffer(key, torch.arange(2))
    else:
        network.register_buffer(key, torch.zeros(2), persistent=kind == "state buffer")
    message = refusal(network, tmp_path)
    assert f"a tensor is called {key!r}, which the compiled step uses itself; rename" in message


def test_module_called_optim_is_refused(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    network.add_module("optim", nn.Linear(5, 5))
    assert "a tensor is called 'optim.weight'" in refusal(network, tmp_path)


def test_tensor_whose_name_only_resembles_a_range_is_kept(tmp_path):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(108, 5)
            for key in ("next", "state[0]", "state[0:2]s", "v", "c1x"):
                self.register_parameter(key, nn.Parameter(torch.zeros(5)))

        def forward(self, x):
            return self.head(x.flatten(1)) + sum(self._parameters.values())

    artifact = export(
        Shifted(), name="net", classes=5, input_shape=(3, 6, 6), batch=4, task="classify",
        out=tmp_path / "art",
    )  # fmt: skip
    assert {"next", "state[0]", "state[0:2]s", "v", "c1x"} <= {
        spec.name for spec in artifact.manifest.state
    }


def test_parameter_without_values_is_named(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    network.register_parameter("gap", nn.Parameter(torch.zeros(0)))
    assert "parameter 'gap' has no values (shape (0,))" in refusal(network, tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.complex64], ids=str)
@pytest.mark.parametrize("persistent", [True, False], ids=["saved", "not saved"])
def test_buffer_of_another_type_is_named(tmp_path, dtype, persistent):
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    network.register_buffer("table", torch.zeros(3, dtype=dtype), persistent=persistent)
    message = refusal(network, tmp_path)
    assert f"buffer 'table' is {dtype}, expected torch.float32, int64, int32 or bool" in message
    assert "cast it to int64 or float32" in message


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (lambda x: x.no_such, "in evaluation mode fails on a batch of shape (4, 3, 6, 6), in mod"),
        (lambda x: x + "s", "in evaluation mode fails on a batch of shape (4, 3, 6, 6), in mod"),
        (lambda x: x @ x[0, 0, :2], "in evaluation mode fails on a batch of shape (4, 3, 6, 6), "),
        (lambda _: 1 / 0, "in evaluation mode fails on a batch of shape (4, 3, 6, 6), in module"),
    ],
    ids=["attribute", "type", "shapes", "arithmetic"],
)
def test_evaluation_mode_that_fails_is_refused_with_its_place(tmp_path, evaluate, words):
    class Moody(Part):
        def forward(self, x):
            return self.conv(x) if self.training else super().forward(x)

    message = refusal(Network(Moody(evaluate)), tmp_path)
    assert words in message
    assert "module 'block.1' (Moody): " in message


@pytest.mark.parametrize(
    ("evaluate", "got"),
    [(lambda y: (y, y), "tuple"), (lambda y: y[:, :2], "(4, 2)"), (lambda _: None, "NoneType")],
    ids=["tuple", "shape", "nothing"],
)
def test_evaluation_mode_that_returns_anything_but_logits_is_refused(tmp_path, evaluate, got):
    class Moody(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y if self.training else evaluate(y)

    message = refusal(Moody(nn.Flatten(), nn.Linear(108, 5)), tmp_path)
    assert f"expected logits of shape (4, 5) in evaluation mode, got {got}; return what" in message


def test_logits_of_another_type_are_refused(tmp_path):
    network = Network(nn.Identity())
    network.register_forward_hook(lambda *args: args[-1].double())
    assert "expected logits of torch.float32, got torch.float64" in refusal(network, tmp_path)


@pytest.mark.parametrize("word", _FAMILIES)
def test_every_family_gives_its_own_remedy(word):
    assert remedy(f"aten.{word}.default") == _FAMILIES[word]


@pytest.mark.parametrize(
    ("operator", "instead"),
    [
        ("aten.div.Tensor_mode", "add a rule"),  # its overload does not name a family
        ("aten.scatter_reduce.two", "scatter_add"),
        ("aten._scaled_dot_product_attention_math", "softmax(q @ k"),
        ("aten.adaptive_max_pool3d", "MaxPool3d"),
        ("aten.logcumsumexp", "aten.cumsum"),
        ("aten.no_such_thing", "write it with other operators"),
    ],
)
def test_remedy_is_of_the_family_or_the_nearest_by_name(operator, instead):
    assert instead in remedy(operator)
