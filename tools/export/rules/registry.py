"""The table from ATen operators to rules.

A rule is called as rule(graph, out, *arguments) with the arguments of the ATen call, tensors as
`Value`s, and the shapes and types that PyTorch computed for the results in `out`: a `Spec`, or a
tuple of them where the operator returns several tensors. It returns as many `Value`s.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor  # noqa: F401  (torch must be loaded before its operators are named)
from torch._ops import OpOverload

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)

RULES: dict[OpOverload, Rule] = {}


class Unsupported(Exception):  # noqa: N818  (a verdict of a rule; the exporter words the error)
    """An operator has a rule, but not for these arguments; the text says which and what to do."""


def rule(*operators: Any) -> Callable[[R], R]:
    """Register a rule for these operator overloads."""

    def register(function: R) -> R:
        for operator in operators:
            RULES[operator] = function
        return function

    return register
