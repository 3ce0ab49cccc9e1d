"""A graph under construction: values with static shapes, no duplicate work, no dead nodes.

Values are numbered in the order in which they are made (v0, v1, ...), so that the same calls give
the same bytes. A node with the operator, inputs and attributes of an earlier one is that earlier
one; constants are shared by content. Nodes that no output needs are dropped in the end. So a rule
may offer two ways to one value and let a later rule choose: it leaves what it knows of the value in
a note.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from tools.export.graphs.program import PRODUCTS, Array, Node, Place, Program, Spec
from tools.export.graphs.value import Value

_NUMPY_TYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.bool: np.bool_,
}

N = TypeVar("N")


class Graph:
    """Nodes in the order of execution, with the inputs and outputs named by the caller.

    Attributes:
        place: the origin of the nodes to come.
        place_of_products: the origin of the products among them.
    """

    def __init__(self) -> None:
        self.place = self.place_of_products = Place()
        self._nodes: list[Node] = []
        self._known: dict[tuple[Any, ...], tuple[Value, ...]] = {}
        self._makers: dict[str, Node] = {}
        self._values: dict[str, Value] = {}
        self._constants: dict[str, Array] = {}
        self._constant_names: dict[tuple[Any, ...], Value] = {}
        self._inputs: dict[str, Value] = {}
        self._outputs: dict[str, Value] = {}
        self._notes: dict[tuple[type, str], Any] = {}

    def input(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Value:
        """Declare an input; it is dropped again if nothing reads it."""
        value = Value(tuple(shape), dtype, name, graph=self)
        self._inputs[name] = self._values[name] = value
        return value

    def output(self, name: str, value: Value) -> None:
        """Declare an output."""
        self._outputs[name] = value

    def constant(self, content: Any, dtype: torch.dtype = torch.float32) -> Value:
        """A constant tensor; the content is anything that numpy can make an array of."""
        array: Array = np.array(content, dtype=_NUMPY_TYPES[dtype], order="C")
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constant_names:
            name = f"c{len(self._constants)}"
            self._constants[name] = array
            value = Value(array.shape, dtype, name, graph=self)
            self._constant_names[key] = self._values[name] = value
        return self._constant_names[key]

    def ints(self, values: Sequence[int]) -> Value:
        """A constant vector of int64: axes, shapes, pads."""
        return self.constant(list(values), torch.int64)

    def node(
        self,
        op: str,
        *inputs: Value | None,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        **attributes: Any,
    ) -> Value:
        """One node with one output of the given shape and type."""
        return self.nodes(op, *inputs, outputs=[Spec(tuple(shape), dtype)], **attributes)[0]

    def nodes(
        self, op: str, *inputs: Value | None, outputs: Sequence[Spec], **attributes: Any
    ) -> tuple[Value, ...]:
        """One node with several outputs."""
        names = tuple("" if value is None else value.name for value in inputs)
        pairs = tuple(
            (key, tuple(value) if isinstance(value, list) else value)
            for key, value in sorted(attributes.items())
        )
        key = (op, names, pairs, tuple((spec.shape, spec.dtype) for spec in outputs))
        if key not in self._known:
            count = len(self._values)
            results = [
                Value(spec.shape, spec.dtype, f"v{count + i}", graph=self)
                for i, spec in enumerate(outputs)
            ]
            place = self.place_of_products if op in PRODUCTS else self.place
            node = Node(op, names, tuple(v.name for v in results), pairs, place)
            self._nodes.append(node)
            self._makers |= {value.name: node for value in results}
            self._values |= {value.name: value for value in results}
            self._known[key] = tuple(results)
        return self._known[key]

    @contextmanager
    def placed(self, place: Place) -> Iterator[None]:
        """Within the block, this is the origin of all nodes."""
        outer = self.place, self.place_of_products
        self.place = self.place_of_products = place
        try:
            yield
        finally:
            self.place, self.place_of_products = outer

    def maker(self, value: Value) -> Node | None:
        """The node whose output the value is; None for an input or a constant."""
        return self._makers.get(value.name)

    def value(self, name: str) -> Value:
        """The value of this name."""
        return self._values[name]

    def note(self, value: Value, fact: Any) -> None:
        """Leave a note on a value, in the place of an earlier one of the same type."""
        self._notes[type(fact), value.name] = fact

    def noted(self, value: Value, kind: type[N]) -> N | None:
        """The note of this type on the value."""
        fact: N | None = self._notes.get((kind, value.name))
        return fact

    def program(self, name: str) -> Program:
        """The finished graph: only live nodes, constants and inputs; outputs have their names."""
        rename: dict[str, str] = {}
        copies: list[Node] = []
        specs: dict[str, Spec] = {key: Spec(v.shape, v.dtype) for key, v in self._values.items()}
        for key, value in self._outputs.items():
            specs[key] = Spec(value.shape, value.dtype)
            if value.name in self._makers and value.name not in rename:
                rename[value.name] = key
            else:  # an input, a constant or a second name for a value
                source = rename.get(value.name, value.name)
                copies.append(Node("Identity", (source,), (key,), ()))
        nodes = [
            replace(
                node,
                inputs=tuple(rename.get(i, i) for i in node.inputs),
                outputs=tuple(rename.get(o, o) for o in node.outputs),
            )
            for node in self._nodes
        ]
        whole = Program(name, (), specs, tuple(self._inputs), tuple(self._outputs), self._constants)
        return whole.with_nodes([*nodes, *copies])
