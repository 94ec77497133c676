"""The classes and functions that a configuration may build, imported when one is first needed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from switch_t5.errors import UserError, check_types, closest

MISSING = inspect.Parameter.empty


class Catalogue:
    """The configurables by name.

    A name is one of the table's, or ``module.attribute`` of a module that a gin file imports.

    Args:
      table: ``module:attribute`` of each name.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self._table = dict(table)
        self._modules: dict[str, types.ModuleType] = {}

    def add_module(self, name: str, module: types.ModuleType) -> None:
        """Makes what ``module`` holds known as ``name.attribute``."""
        self._modules[name] = module

    @property
    def names(self) -> list[str]:
        """The table's names."""
        return list(self._table)

    def __contains__(self, name: str) -> bool:
        return name in self._table or name.split(".")[0] in self._modules

    def target(self, name: str) -> Callable[..., Any]:
        """Returns the class or function called ``name``.

        Raises:
          UserError: there is none; the text is a clause such as ``there is no configurable 'x'.``.
        """
        if name in self._table:
            module, attribute = self._table[name].split(":")
            return getattr(importlib.import_module(module), attribute)
        first, *rest = name.split(".")
        if first not in self._modules:
            near = suggestion(name.split(".")[-1], self._table)
            raise UserError(f"there is no configurable {name!r}.{near}")
        found: Any = self._modules[first]
        for attribute in rest:
            if not hasattr(found, attribute):
                near = suggestion(attribute, dir(found))
                raise UserError(f"{first} has no {attribute!r}.{near}")
            found = getattr(found, attribute)
        if not callable(found):
            raise UserError(f"{name} is not a class or a function.")
        return found

    def signature(self, name: str) -> inspect.Signature:
        """Returns the signature of a configurable."""
        return inspect.signature(self.target(name))

    def parameters(self, name: str) -> list[str]:
        """Returns the names of a configurable's parameters, as its signature orders them."""
        return [
            parameter.name
            for parameter in self.signature(name).parameters.values()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]

    def takes_any(self, name: str) -> bool:
        """Whether a configurable takes parameters that its signature does not name."""
        kinds = [parameter.kind for parameter in self.signature(name).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def default(self, name: str, parameter: str) -> Any:
        """Returns a parameter's default, or MISSING where it has none."""
        if name not in self or parameter not in self.signature(name).parameters:
            return MISSING
        target = self.target(name)
        if dataclasses.is_dataclass(target):
            for field in dataclasses.fields(target):
                if field.name == parameter and field.default_factory is not dataclasses.MISSING:
                    return field.default_factory()
        return self.signature(name).parameters[parameter].default

    def check_values(self, name: str, values: Mapping[str, Any]) -> None:
        """Checks the values given to a function against its annotations; classes check their own.

        Raises:
          ConfigError: names the parameter, the type it takes and the value it got.
        """
        target = self.target(name)
        if inspect.isclass(target):
            return
        try:
            hints = typing.get_type_hints(target)
        except NameError:  # An annotation that only a type checker can see.
            return
        checked = [key for key in values if _is_plain(hints.get(key))]
        record = dataclasses.make_dataclass(name, [(key, hints[key]) for key in checked])
        check_types(record(**{key: values[key] for key in checked}))


def _is_plain(hint: Any) -> bool:
    """Whether an annotation is made of gin's own types alone."""
    if typing.get_origin(hint) is typing.Literal:
        return True
    parts = typing.get_args(hint)
    if parts:
        return all(_is_plain(part) for part in parts if part is not Ellipsis)
    return hint in (int, float, str, bool, type(None))


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` as ``closest`` does, or an empty string; capitals do not count."""
    names = list(candidates)
    same = [candidate for candidate in names if candidate.casefold() == name.casefold()]
    return closest(name, names) or (closest(same[0], same) if same else "")
