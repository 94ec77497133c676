"""What a configuration says: the value last given to each macro and parameter, and where it was given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# A value that a gin file leaves to the user: ``MODEL_DIR = %gin.REQUIRED``.
REQUIRED = "gin.REQUIRED"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where something was said.

    Attributes:
      place: such as ``configs/runs/pretrain.gin, line 12`` or ``--gin.TRAIN_STEPS=abc``.
      is_flag: whether it was a flag of the command line.
    """

    place: str
    is_flag: bool = False

    @property
    def how_set(self) -> str:
        """The origin as the end of a sentence about a value, such as ``set in a.gin, line 3``."""
        return f"set {'by' if self.is_flag else 'in'} {self.place}"


@dataclasses.dataclass(frozen=True)
class Macro:
    """A use of a macro: ``%NAME``."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """A use of a configurable: ``@scope/name`` or, built on the spot, ``@scope/name()``."""

    name: str
    scope: str = ""
    is_call: bool = False

    def __repr__(self) -> str:
        return f"@{scoped(self.scope, self.name)}{'()' if self.is_call else ''}"


@dataclasses.dataclass(frozen=True)
class Binding:
    """One value given to a macro (``parameter`` is empty) or to a configurable's parameter.

    Attributes:
      name: of the macro or the configurable.
      parameter: of the configurable, or an empty string for a macro.
      scope: the scope in which a configurable's binding holds, such as ``eval``; empty for everywhere.
      value: of literals, macros and references, nested in lists, tuples and dictionaries.
      origin: where the value was given.
    """

    name: str
    parameter: str
    scope: str
    value: Any
    origin: Origin

    @property
    def is_macro(self) -> bool:
        """Whether the value is a macro's."""
        return not self.parameter

    @property
    def target(self) -> str:
        """The left-hand side as it stands in a gin file."""
        return self.name if self.is_macro else f"{scoped(self.scope, self.name)}.{self.parameter}"


class Bindings:
    """All bindings of a configuration, in the order in which they were read; later ones win.

    Attributes:
      said: every binding, also those that a later one overrides.
      mentions: the configurables that head a block, with where.
      imports: the import statements in order, each once.
      macros: the last binding of each macro.
    """

    def __init__(self) -> None:
        self.said: list[Binding] = []
        self.mentions: list[tuple[Reference, Origin]] = []
        self.imports: list[str] = []
        self.macros: dict[str, Binding] = {}
        self._parameters: dict[tuple[str, str], dict[str, Binding]] = {}

    def add(self, binding: Binding) -> None:
        """Adds a binding, which overrides an earlier one of the same target."""
        self.said.append(binding)
        if binding.is_macro:
            self.macros[binding.name] = binding
        else:
            self._parameters.setdefault((binding.name, binding.scope), {})[binding.parameter] = binding

    def groups(self) -> list[tuple[str, str]]:
        """Returns the sorted (name, scope) of each configurable with bindings."""
        return sorted(self._parameters)

    def exactly(self, name: str, scope: str) -> dict[str, Binding]:
        """Returns a configurable's bindings, by parameter, that were given for just this scope."""
        return self._parameters.get((name, scope), {})

    def within(self, name: str, scope: str) -> dict[str, Binding]:
        """Returns a configurable's bindings, by parameter, that hold in ``scope``: the innermost win."""
        parts = scope.split("/") if scope else []
        merged: dict[str, Binding] = {}
        for depth in range(len(parts) + 1):
            merged.update(self.exactly(name, "/".join(parts[:depth])))
        return merged

    def final(self) -> Iterator[Binding]:
        """Yields the parameters' bindings that no later one overrides, sorted by configurable."""
        for name, scope in self.groups():
            yield from self._parameters[name, scope].values()

    def without_macros(self, value: Any) -> Any:
        """Returns ``value`` with each macro replaced by its value; one that has none stays."""

        def replace(leaf: Any) -> Any:
            if isinstance(leaf, Macro) and leaf.name in self.macros:
                return self.without_macros(self.macros[leaf.name].value)
            return leaf

        return map_leaves(replace, value)

    def source(self, binding: Binding) -> str:
        """Returns how a parameter got its value, through the macro that gave it, if one did."""
        macro = ""
        while isinstance(binding.value, Macro) and binding.value.name in self.macros:
            macro = binding.value.name
            binding = self.macros[macro]
        through = f"macro {macro}, " if macro and not binding.origin.is_flag else ""
        return through + binding.origin.how_set


def scoped(scope: str, name: str) -> str:
    """Returns ``scope/name``, or the bare name without a scope."""
    return f"{scope}/{name}" if scope else name


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Returns a copy of nested lists, tuples and dictionaries with ``function`` applied to the rest."""
    if isinstance(value, Mapping):
        return {map_leaves(function, key): map_leaves(function, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(function, entry) for entry in value)
    return function(value)


def leaves(value: Any) -> list[Any]:
    """Returns what is left of ``value`` without its lists, tuples and dictionaries."""
    found: list[Any] = []
    map_leaves(found.append, value)
    return found


def literal(value: Any) -> str:
    """Returns ``value`` as gin reads it back.

    Raises:
      TypeError: for a value that gin has no words for, such as a function.
    """
    if isinstance(value, Reference):
        return repr(value)
    if isinstance(value, Macro):
        return f"%{value.name}"
    if type(value) is dict:
        return "{" + ", ".join(f"{literal(key)}: {literal(entry)}" for key, entry in value.items()) + "}"
    if type(value) is list:
        return "[" + ", ".join(map(literal, value)) + "]"
    if type(value) is tuple:
        return "(" + ", ".join(map(literal, value)) + (",)" if len(value) == 1 else ")")
    if type(value) is float and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # gin has no word for infinity, but reads this as one.
    is_nan = type(value) is float and math.isnan(value)
    if value is None or (type(value) in (bool, int, float, str, bytes) and not is_nan):
        return repr(value)
    raise TypeError(f"{value!r} is not a gin value")
