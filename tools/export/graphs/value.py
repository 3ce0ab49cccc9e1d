"""Tensors of a graph under construction, with operators that read as algebra.

    gate * (1 - gate) * slope      two Mul and one Sub
    (weight @ covariance).sum([1]) a MatMul and a ReduceSum

Every operator and method adds one ONNX node to the value's graph, or none where the result is the
value itself: a reshape to the same shape, a cast to the same type. A Python number becomes a
constant of the tensor's type.

Arithmetic broadcasts. It reads what its operands were before they were expanded, which has fewer
values, and expands the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tools.export.graphs.program import Node, Spec, onnx_type

if TYPE_CHECKING:
    from tools.export.graphs.graph import Graph


@dataclass(frozen=True)
class Value(Spec):
    """A tensor in a graph; two are equal if they have the same name, shape and type."""

    name: str = ""
    graph: "Graph" = field(kw_only=True, repr=False, compare=False)

    def __bool__(self) -> bool:
        raise TypeError(f"{self.name}: the values of a graph are not known while it is built")

    def node(
        self,
        op: str,
        *others: "Value | None",
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        **attributes: Any,
    ) -> "Value":
        """A node that reads this value, then the others; it keeps shape and type unless told."""
        return self.graph.node(
            op,
            self,
            *others,
            shape=self.shape if shape is None else shape,
            dtype=self.dtype if dtype is None else dtype,
            **attributes,
        )

    @property
    def maker(self) -> Node | None:
        """The node whose output this is; None for an input or a constant."""
        return self.graph.maker(self)

    @property
    def sources(self) -> "tuple[Value, ...]":
        """The values that the maker reads."""
        return () if self.maker is None else tuple(map(self.graph.value, self.maker.inputs))

    # arithmetic

    def __add__(self, other: "Operand") -> "Value":
        return binary("Add", self, self._like(other))

    def __sub__(self, other: "Operand") -> "Value":
        return binary("Sub", self, self._like(other))

    def __rsub__(self, number: float) -> "Value":
        return binary("Sub", self._like(number), self)

    def __mul__(self, other: "Operand") -> "Value":
        return binary("Mul", self, self._like(other))

    def __truediv__(self, other: "Operand") -> "Value":
        return binary("Div", self, self._like(other))

    def __pow__(self, other: "Operand") -> "Value":
        return binary("Pow", self, self._like(other))

    def __matmul__(self, other: "Factor") -> "Value":
        return matmul(self, other)

    def __neg__(self) -> "Value":
        return self.node("Neg")

    def __abs__(self) -> "Value":
        return self.node("Abs")

    # A sum and a product are the same node whichever side the number stands on.
    __radd__ = __add__
    __rmul__ = __mul__

    # comparisons and choices; == says whether two values are the same one

    def __gt__(self, other: "Operand") -> "Value":
        return self._compared("Greater", other)

    def __lt__(self, other: "Operand") -> "Value":
        return self._compared("Less", other)

    def equals(self, other: "Operand") -> "Value":
        """True where the two have the same number."""
        return self._compared("Equal", other)

    def where(self, a: "Value", b: "Value") -> "Value":
        """This value is a mask: a where it is true, b elsewhere."""
        return self.node("Where", a, b, shape=_broadcast(self, a, b), dtype=a.dtype)

    def _compared(self, op: str, other: "Operand") -> "Value":
        right = self._like(other)
        return self.node(op, right, shape=_broadcast(self, right), dtype=torch.bool)

    # types and shapes

    def cast(self, dtype: torch.dtype) -> "Value":
        """In another type."""
        if dtype == self.dtype:
            return self
        return self.node("Cast", dtype=dtype, to=onnx_type(dtype))

    def expand(self, shape: Sequence[int]) -> "Value":
        """Broadcast to a shape; `small` gives this value back."""
        if tuple(shape) == self.shape:
            return self
        wide = self.node("Expand", self.graph.ints(shape), shape=shape)
        self.graph.note(wide, _Expanded(self.small))
        return wide

    @property
    def small(self) -> "Value":
        """The value before it was expanded: enough for an operator that broadcasts."""
        expanded = self.graph.noted(self, _Expanded)
        return self if expanded is None else expanded.source

    def reshape(self, shape: Sequence[int]) -> "Value":
        """The same numbers, in order, in another shape."""
        if tuple(shape) == self.shape:
            return self
        return self.node("Reshape", self.graph.ints(shape), shape=shape)

    def transpose(self, order: Sequence[int]) -> "Value":
        """Axes in another order; two such in a row become one, or none."""
        if self.maker is not None and self.maker.op == "Transpose":
            first = self.maker.attribute("perm")
            return self.sources[0].transpose([first[axis] for axis in order])
        if list(order) == list(range(len(self.shape))):
            return self
        shape = [self.shape[axis] for axis in order]
        return self.node("Transpose", shape=shape, perm=list(order))

    @property
    def T(self) -> "Transposed":  # noqa: N802  (the name that numpy and PyTorch give it)
        """The matrix, or each of a stack of them, transposed, as a factor of a product."""
        return Transposed(self)

    # reductions

    def sum(self, axes: Sequence[int] = (), *, keep: bool = False) -> "Value":
        """Sum over axes, over all if none is named; `keep` leaves them with a length of 1."""
        return self.reduce("ReduceSum", axes, keep=keep)

    def mean(self, axes: Sequence[int] = (), *, keep: bool = False) -> "Value":
        """Mean over axes, likewise."""
        return self.reduce("ReduceMean", axes, keep=keep)

    def reduce(self, op: str, axes: Sequence[int] = (), *, keep: bool = False) -> "Value":
        """ReduceSum, ReduceMean, ReduceMax or ReduceMin over axes, likewise."""
        rank = len(self.shape)
        reduced = sorted({axis % rank for axis in axes}) if axes else list(range(rank))
        shape = [
            1 if axis in reduced else length
            for axis, length in enumerate(self.shape)
            if keep or axis not in reduced
        ]
        if not reduced:
            return self
        return self.node(op, self.graph.ints(reduced), shape=shape, keepdims=int(keep))

    def _like(self, other: "Operand") -> "Value":
        """The other operand in this value's type."""
        if isinstance(other, Value):
            return other.cast(self.dtype)
        return self.graph.constant(other, self.dtype)


@dataclass(frozen=True)
class Transposed:
    """A matrix that a product reads transposed, without a node of its own."""

    matrix: Value

    def __matmul__(self, other: "Factor") -> Value:
        return matmul(self, other)


@dataclass(frozen=True)
class _Expanded:
    """A note on an expanded value."""

    source: Value


Operand = Value | float | int | bool
Factor = Value | Transposed


def binary(op: str, a: Value, b: Value) -> Value:
    """An arithmetic node on two values of one type, done before they are expanded."""
    left, right = a.small, b.small
    return left.node(op, right, shape=_broadcast(left, right)).expand(_broadcast(a, b))


def matmul(a: Factor, b: Factor, *, alpha: float = 1.0) -> Value:
    """Alpha * a @ b over the last two axes, one node."""
    left, turned_left = as_stored(a)
    right, turned_right = as_stored(b)
    rows = left.shape[-1] if turned_left else left.shape[-2]
    columns = right.shape[-2] if turned_right else right.shape[-1]
    stack = max(left.shape[:-2], right.shape[:-2], key=len)
    shape = (*stack, rows, columns)
    if not turned_left and not turned_right and alpha == 1:
        return left.node("MatMul", right, shape=shape)
    return left.node(
        "FusedMatMul", right, shape=shape, transA=int(turned_left), transB=int(turned_right),
        alpha=float(alpha),
    )  # fmt: skip


def as_stored(factor: Factor) -> tuple[Value, bool]:
    """The matrix that a product reads, and whether it reads it transposed.

    A matrix that a node has transposed is read as it was before.
    """
    transposed = isinstance(factor, Transposed)
    matrix = factor.matrix if isinstance(factor, Transposed) else factor
    *stack, rows, columns = range(len(matrix.shape))
    maker = matrix.maker
    if maker is None or maker.op != "Transpose":
        return matrix, transposed
    if maker.attribute("perm") != (*stack, columns, rows):
        return matrix, transposed
    return matrix.sources[0], not transposed


def _broadcast(*values: Spec) -> tuple[int, ...]:
    shapes = (value.shape for value in values)
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
