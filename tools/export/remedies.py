"""Advice on operators that cannot be compiled: the nearest ones that can."""

import difflib

from tools.export.rules import RULES

_NOISE = "a compiled step has no random numbers; "
_DROPOUT = _NOISE + "leave dropout out, or set p=0"
_SILENCE = _NOISE + "leave the noise out, or add it to the images beforehand"
_RANKING = "nearest supported: max, min or amax along an axis, or max pooling"
_WINDOWS = "nearest supported: MaxPool{n}d or AvgPool{n}d with a fixed kernel and stride"
_ALGEBRA = "nearest supported: products (matmul, einsum) and norms; no decomposition of a matrix"
_SIZES = "the shapes of a compiled step are fixed; nearest supported: torch.where with a mask"
_REAL = "nearest supported: real and imaginary parts as two tensors"
_LOGARITHMS = (
    "nearest supported: torch.exp of a sum of logarithms, or factors multiplied one by one"
)

# Advice by a word in the operator's name; the first that fits counts.
_FAMILIES = {
    "dropout": _DROPOUT,
    "bernoulli": _DROPOUT,
    "rrelu": _NOISE + "nearest supported: nn.LeakyReLU",
    "rand": _SILENCE,
    "normal": _SILENCE,
    "exponential": _SILENCE,
    "uniform": _SILENCE,
    "multinomial": _SILENCE,
    "poisson": _SILENCE,
    "rnn": "nearest supported: nn.GRU, which is unrolled, nn.LSTMCell in a loop over the steps, a "
    "convolution over time, or attention",
    "lstm": "nearest supported: nn.GRU, or nn.LSTMCell in a loop over the steps",
    "fft": "nearest supported: a convolution, or products with constant matrices of sines and "
    "cosines",
    "complex": _REAL,
    "as_real": _REAL,
    "searchsorted": "nearest supported: comparisons with each bound, summed",
    "sort": _RANKING,
    "topk": _RANKING,
    "kthvalue": _RANKING,
    "median": _RANKING,
    "mode": _RANKING,
    "bucketize": "nearest supported: comparisons with each bound, summed",
    "nonzero": _SIZES,
    "masked_select": _SIZES,
    "unique": _SIZES,
    "bincount": _SIZES,
    "_local_scalar_dense": "the shapes and the flow of a compiled step are fixed; avoid .item(), "
    "and use torch.where instead of a branch",
    "attention": "nearest supported: softmax(q @ k.transpose(-2, -1) * scale) @ v",
    "prod": _LOGARITHMS,
    "adaptive_avg_pool3d": _WINDOWS.format(n=3),
    "adaptive_max_pool3d": _WINDOWS.format(n=3),
    "fractional_max_pool2d": _WINDOWS.format(n=2),
    "grid_sampler": "nearest supported: F.interpolate, slices and padding",
    "im2col": "nearest supported: Tensor.unfold along one axis, then another",
    "cdist": "nearest supported: squared distances as x*x - 2 x y^T + y*y, with matmul",
    "trilinear": "nearest supported: torch.einsum('bi,oij,bj->bo', x, weight, y)",
    "embedding_bag": "nearest supported: nn.Embedding, and a sum or mean over what it finds",
    "embedding_renorm": "nearest supported: nn.Embedding with max_norm=None",
    "diagonal": "nearest supported: a product with torch.eye(n), summed along an axis",
    "atan2": "nearest supported: torch.atan of a quotient",
    "hypot": "nearest supported: (a * a + b * b).sqrt()",
    "scatter_reduce": "nearest supported: scatter_add, index_add",
    "index_reduce": "nearest supported: scatter_add, index_add",
    "quantize": "nearest supported: float32; train first, quantize afterwards",
    "sparse": "nearest supported: dense tensors",
    "linalg": _ALGEBRA,
    "cholesky": _ALGEBRA,
    "triangular_solve": _ALGEBRA,
}


def remedy(name: str) -> str:
    """Advice on an ATen operator without a rule, such as "aten.median.dim"."""
    base = name.removeprefix("aten.").partition(".")[0]
    for word, advice in _FAMILIES.items():
        if word in base:
            return advice
    known = sorted({op._schema.name.removeprefix("aten::") for op in RULES})  # noqa: SLF001
    plain = [op for op in known if not op.endswith(("_backward", "_copy", "_"))]
    near = difflib.get_close_matches(base.strip("_"), plain, n=1, cutoff=0.65)
    if near:
        return f"nearest supported by name: aten.{near[0]}; or add a rule to tools/export/rules"
    return "write it with other operators, or add a rule for it to tools/export/rules"
