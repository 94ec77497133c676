"""Errors that are the user's to mend, each one clear sentence."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LARGEST_FLOAT32 = 3.4028234663852886e38


class UserError(Exception):
    """A mistake of the user's.

    Its text is one sentence: what is wrong, where, and what would be right. The command line prints it
    without a traceback and exits with code 2.
    """


class ConfigError(UserError):
    """A configuration value that cannot be used.

    Attributes:
      parameter: the dotted name of the parameter, such as ``TransformerConfig.emb_dim``.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(f"{parameter} {message}")
        self.parameter = parameter


def closest(name: str, candidates: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the candidate nearest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def check_types(config: Any) -> None:
    """Checks each field of a dataclass against its annotation.

    An int passes for a float; a bool does not pass for an int.

    Raises:
      ConfigError: names the field, the type it takes and the value it got.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _is_a(value, hints[field.name]):
            described = _describe(hints[field.name])
            if isinstance(value, int | float) and not isinstance(value, bool):
                described = described.replace("a number", "a number that float32 holds")
            raise ConfigError(
                f"{type(config).__name__}.{field.name}",
                f"must be {described}, got {value!r}.{_nearest_choice(value, hints[field.name])}",
            )


def _is_a(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_FLOAT32
    if origin in (tuple, Sequence):
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple | list) and all(_is_a(entry, item) for entry in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, hint) if isinstance(hint, type) else callable(value)


def _nearest_choice(value: Any, hint: Any) -> str:
    """``closest`` among the strings that a hint lists."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is not typing.Literal:
        options = itertools.chain.from_iterable(map(typing.get_args, options))
    return closest(value, [name for name in options if isinstance(name, str)]) if isinstance(value, str) else ""


def _describe(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "True or False"}
    if hint in names:
        return names[hint]
    if hint is None or hint is type(None):
        return "None"
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(hint))
    if origin in (tuple, Sequence):
        return "a sequence of " + _describe(typing.get_args(hint)[0]).removeprefix("a ").removeprefix("an ") + "s"
    if origin in (dict, Mapping):
        return "a mapping"
    return getattr(hint, "__name__", str(hint))
