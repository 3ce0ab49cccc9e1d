"""Attention, recurrence, look-ups and functions give PyTorch's numbers; see test_rules.py."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.export.compare import assert_same


class Call(nn.Module):
    """A function of the module and x."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    "module",
    [
        nn.MultiheadAttention(8, 2, batch_first=True),
        nn.MultiheadAttention(8, 2, batch_first=True, bias=False, add_zero_attn=True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("weights", [True, False])
def test_attention_layer(module, weights):
    assert_same(Call(lambda s, x: s.a(x, x, 2 * x, need_weights=weights)[0], a=module), (2, 5, 8))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_layer(activation, norm_first):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    assert_same(layer, (2, 5, 8))


HIDDEN = torch.full((5, 5), -torch.inf).triu(1)  # each position attends to itself and earlier ones
NOTHING = HIDDEN.clone()
NOTHING[2] = -torch.inf  # the third attends to nothing, and gets 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_causal": True},
        {"scale": 0.25},
        {"attn_mask": HIDDEN},
        {"attn_mask": HIDDEN == 0},
        {"attn_mask": NOTHING},
        {"attn_mask": torch.linspace(-2, 2, 50).reshape(2, 1, 5, 5)},
    ],
    ids=["plain", "causal", "scaled", "masked", "by booleans", "masked whole", "biased"],
)
def test_scaled_dot_product_attention(settings):
    def attention(_, x):
        return F.scaled_dot_product_attention(torch.sin(x), torch.cos(x), x, **settings)

    assert_same(Call(attention), (2, 3, 5, 4))


def test_attention_with_a_learned_bias_and_across_lengths():
    def biased(module, x):
        return F.scaled_dot_product_attention(x, x[:, :, 1:], x[:, :, :3], attn_mask=module.bias)

    def across(_, x):
        return F.scaled_dot_product_attention(x, x[:, :, 1:], x[:, :, :3], is_causal=True)

    assert_same(Call(biased, bias=nn.Parameter(torch.randn(3, 4, 3))), (2, 3, 4, 4))
    assert_same(Call(across), (2, 3, 4, 4))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.GRU(6, 4, batch_first=True, bidirectional=True), (2, 5, 6)),
        (nn.RNN(6, 4, 2), (5, 2, 6)),
    ],
    ids=repr,
)
def test_recurrence_is_unrolled(layer, shape):
    assert_same(Call(lambda s, x: s.layer(x)[0], layer=layer), shape)


def test_cells_of_a_recurrence():
    assert_same(Call(lambda s, x: s.cell(x)[0], cell=nn.LSTMCell(6, 4)), (3, 6))
    assert_same(Call(lambda s, x: s.cell(x), cell=nn.GRUCell(6, 4)), (3, 6))


def test_parametrized_layers():
    assert_same(nn.RMSNorm(6, eps=1e-5), (3, 6))
    assert_same(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), (2, 6))
    assert_same(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), (2, 6))
    assert_same(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6))


def test_look_ups_by_constant_and_by_computed_index():
    table = nn.Embedding(6, 4)
    assert_same(Call(lambda s, x: s.table(x.argmax(2)), table=table), (2, 5, 6))
    padded = nn.Embedding(6, 6, padding_idx=1)
    assert_same(Call(lambda s, x: x + s.table(torch.arange(5)), table=padded), (2, 5, 6))


PLACES = torch.tensor([[[1, 3]], [[0, 5]]])
ROWS, COLUMNS = torch.tensor([[0], [-1]]), torch.tensor([3, 1, 1])

FUNCTIONS = {
    "index": lambda _, x: x[:, torch.tensor([2, 0, 2, -1])],
    "index of two neighbours": lambda _, x: x[:, ROWS, COLUMNS],
    "index of two apart": lambda _, x: x[torch.tensor([1, 0]), :, torch.tensor([2, -2])],
    "index_select": lambda _, x: x.index_select(-1, torch.tensor([0, 2, 2])),
    "index_add": lambda _, x: x.index_add(1, torch.tensor([1, 1]), x[:, :2]),
    "index_put": lambda _, x: x.index_put((torch.tensor([1]), torch.tensor([3])), x[:1, 0] * 2),
    "gather": lambda _, x: x.gather(1, x[:, :2].long().abs()),
    "scatter": lambda _, x: x.scatter(2, PLACES, x[:, :1, :2]),
    "scatter a number": lambda _, x: x.scatter(2, PLACES, 0.5),
    "scatter_add": lambda _, x: x.scatter_add(2, PLACES * 0, x[:, 1:2, 1:3] * 2),
    "repeat_interleave": lambda _, x: x.repeat_interleave(2, 1),
    "max along an axis": lambda _, x: x.max(1)[0],
    "min along an axis": lambda _, x: x.min(-1, keepdim=True)[0],
    "amax": lambda _, x: x.amax((0, 2)),
    "argmin": lambda _, x: x * (x.argmin(1, keepdim=True) == 2),
    "any, all": lambda _, x: x * ((x > 1).any(1, keepdim=True) | (x < 1).all(2, keepdim=True)),
    "cumsum": lambda _, x: x.cumsum(1),
    "logsumexp": lambda _, x: x.logsumexp((1, 2)),
    "std": lambda _, x: x.std(1) + x.var(2, correction=0).sum(1, keepdim=True),
    "norm 2": lambda _, x: F.normalize(x, dim=1),
    "norm 1": lambda _, x: x.norm(p=1, dim=(1, 2)),
    "norm 3": lambda _, x: x.norm(p=3, dim=1),
    "norm inf": lambda _, x: torch.linalg.vector_norm(x, torch.inf, 2),
    "cosine similarity": lambda _, x: F.cosine_similarity(x, x.flip(1), 2),
    "einsum": lambda _, x: torch.einsum("bij,bkj->bik", x, x),
    "baddbmm": lambda _, x: torch.baddbmm(x, x[:, :, :5], x, beta=0.5, alpha=2),
    "matrices and vectors": lambda _, x: x[0].T @ x[1, :, 0] @ x[0].T @ x[0] @ x[1, 2],
    "outer": lambda _, x: torch.outer(x[0, 0], x[0, 1]),
    "strided slices": lambda _, x: x[:, ::2, 1::3],
    "strided write": lambda _, x: torch.cat([x, x]).slice_scatter(x, 0, 1, None, 2),
    "roll": lambda _, x: x.roll((1, -2), (1, 2)) + x.roll(3),
    "unbind": lambda _, x: torch.stack(x.unbind(1)[::-1], 2),
    "unfold": lambda _, x: x.unfold(2, 3, 1).unfold(1, 2, 2),
    "rot90, tile": lambda _, x: torch.rot90(x, 1, (1, 2)).tile(2),
    "tril, masked_fill": lambda _, x: x.tril().masked_fill(x > 0.5, 0.25),
    "clamp by tensors": lambda _, x: x.clamp(x.detach() - 0.5, torch.tensor(0.7)),
    "where, maximum": lambda _, x: torch.where(x > 0, x, -2 * x).maximum(x * x),
    "powers": lambda _, x: x**3 + (x.abs() + 0.1) ** 0.5 + 2**x + (x * x + 1) ** x,
    "logarithms": lambda _, x: (x.abs() + 1).log2() * (x.abs() + 1).log10() + x.abs().log1p(),
    "exponentials": lambda _, x: x.exp2() + x.expm1() + (x / 2).erfc(),
    "circular": lambda _, x: x.sin() * x.cos() + (x / 9).tan() + x.atan(),
    "inverse circular": lambda _, x: (x / 9).asin() * (x / 9).acos(),
    "hyperbolic": lambda _, x: x.sinh() * x.cosh(),
    "inverse hyperbolic": lambda _, x: x.asinh() + (x.abs() + 2).acosh() + (x / 9).atanh(),
    "remainders": lambda _, x: x.fmod(0.3) + x.remainder(0.3) + x.trunc() + x.frac(),
    "rounded quotients": lambda _, x: (
        x * (x.detach() // 0.3) * x.long().div(-2, rounding_mode="floor")
    ),
    "nan_to_num": lambda _, x: torch.nan_to_num(x),
    "logit": lambda _, x: x.sigmoid().logit(),
    "lerp, addcmul": lambda _, x: torch.lerp(x, x * x, 0.3).addcmul(x, x, value=0.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    assert_same(Call(FUNCTIONS[name]), (2, 5, 6))
