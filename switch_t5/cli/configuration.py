"""Configurations in gin's language, read strictly: the one file that imports gin.

Of gin only the parser is used. Gin's own registry and bindings are global to the process, remember no line
numbers, and accept a macro that nothing reads; here each configuration is an object of its own that knows
where each of its values was set.

The language is gin's. ``NAME = value`` sets a macro and ``%NAME`` reads it. ``Configurable.parameter =
value`` sets a parameter, and ``scope/Configurable.parameter = value`` does so in that scope alone.
``@Configurable()`` is what the configurable builds, ``@Configurable`` the configurable itself. ``include
'file.gin'`` reads another file, and ``import module`` makes ``module.function`` a configurable. One thing
differs: a reference inside a macro is built in the scope of the line that reads the macro.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

from switch_t5.cli import config_files
from switch_t5.cli.bindings import Binding, Bindings, Macro, Origin, Reference, literal, map_leaves, scoped
from switch_t5.cli.checks import check, check_conventions, check_effect
from switch_t5.cli.configurables import MISSING, Catalogue
from switch_t5.errors import ConfigError, UserError

# What gin files may set and build: bare name -> "module:attribute", imported when first needed.
CONFIGURABLES: dict[str, str] = {
    "RuntimeConfig": "switch_t5.cli.runtime:RuntimeConfig",
    "TransformerConfig": "switch_t5.model.config:TransformerConfig",
    "MoEConfig": "switch_t5.layers.moe_config:MoEConfig",
    "RouterConfig": "switch_t5.routing.router:RouterConfig",
    "MeshConfig": "switch_t5.partitioning.mesh:MeshConfig",
    "DataConfig": "switch_t5.data.pipeline:DataConfig",
    "text_task": "switch_t5.data.tasks:text_task",
    "LossConfig": "switch_t5.training.losses:LossConfig",
    "TrainConfig": "switch_t5.training.loop:TrainConfig",
    "DistillationConfig": "switch_t5.training.distillation:DistillationConfig",
    "UpcyclingConfig": "switch_t5.model.upcycling:UpcyclingConfig",
    "DecodingConfig": "switch_t5.inference.config:DecodingConfig",
    "EvaluationConfig": "switch_t5.inference.config:EvaluationConfig",
    "CheckpointConfig": "switch_t5.checkpoint.manager:CheckpointConfig",
    "rsqrt_decay": "switch_t5.training.schedules:rsqrt_decay",
    "constant_schedule": "switch_t5.training.schedules:constant_schedule",
    "linear_decay": "switch_t5.training.schedules:linear_decay",
    "cosine_decay": "switch_t5.training.schedules:cosine_decay",
    "adafactor": "switch_t5.training.optimizers:adafactor",
    "adamw": "switch_t5.training.optimizers:adamw",
    "sgd": "switch_t5.training.optimizers:sgd",
    "parameter_groups": "switch_t5.training.parameter_groups:parameter_groups",
    "optax_optimizer": "switch_t5.training.optimizers:optax_optimizer",
}

# The scopes that the commands build in, beside those that gin files refer to themselves.
SCOPES = ("train", "eval", "infer")

_FLAG_NAME = re.compile(r"(?:[A-Za-z_][\w.]*/)*[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


class LocatedError(ConfigError):
    """A ConfigError whose sentence also says where the parameter was set."""


class Configuration:
    """What the gin files and flags of one command say, checked, and ready to build from.

    Use ``load`` to make one.
    """

    def __init__(self, bindings: Bindings, catalogue: Catalogue) -> None:
        self._bindings = bindings
        self._catalogue = catalogue
        self._building: list[tuple[str, str]] = []

    @classmethod
    def load(
        cls,
        gin_files: Sequence[str] = (),
        bindings: Sequence[str] = (),
        search_paths: Sequence[str] = (),
        *,
        configurables: Mapping[str, str] = CONFIGURABLES,
        scopes: Collection[str] = SCOPES,
    ) -> Configuration:
        """Reads and checks a configuration; builds nothing.

        Args:
          gin_files: each looked for in the working folder, then in ``search_paths``, then among the packaged
            files; later ones override earlier ones.
          bindings: ``NAME=VALUE``, where NAME is a macro or ``Configurable.parameter``; these override the
            files. A VALUE that is not a gin literal is taken as text.
          search_paths: folders with gin files.
          configurables: bare name -> ``module:attribute`` of what may be set and built.
          scopes: the scopes that the caller passes to ``get``.

        Raises:
          UserError: one sentence with the file and line, or the flag, and the nearest right name.
        """
        catalogue = Catalogue(configurables)
        reader = _Reader(search_paths, catalogue)
        for name in gin_files:
            reader.read_file(name, asked="--gin_file")
        check_conventions(reader.bindings, config_files.shown(config_files.packaged_configs()))
        for binding in bindings:
            reader.read_flag(binding)
        check(reader.bindings, catalogue, scopes)
        return cls(reader.bindings, catalogue)

    @classmethod
    def names_set(cls, gin_files: Sequence[str], search_paths: Sequence[str] = ()) -> set[str]:
        """Returns the macros and configurables that files set, unchecked: to know what they leave to a command.

        Raises:
          UserError: a file is not there, or not gin's language.
        """
        reader = _Reader(search_paths, Catalogue(CONFIGURABLES))
        for name in gin_files:
            reader.read_file(name, asked="--gin_file")
        return {binding.name for binding in reader.bindings.said}

    def get(self, name: str, **arguments: Any) -> Any:
        """Builds a configurable.

        Args:
          name: a configurable, or ``scope/configurable`` to build it in a scope.
          **arguments: parameters that the caller gives; they win over what the configuration says.

        Raises:
          UserError: a required parameter has no value, or a value is refused; says where it was set.
        """
        scope, _, bare = name.rpartition("/")
        return self._build(bare, scope, (), arguments)

    def check_flags_have_effect(self, roots: Collection[str]) -> None:
        """Refuses a flag for a configurable that nothing uses, such as an optimizer that was not chosen.

        Args:
          roots: the configurables that the caller builds by name, without scopes.

        Raises:
          UserError: names the flag and what is not used.
        """
        check_effect(self._bindings, roots)

    @contextlib.contextmanager
    def locating_errors(self) -> Iterator[None]:
        """Adds to a ConfigError raised inside where its parameter was set; ``get`` does so by itself."""
        try:
            yield
        except ConfigError as error:
            raise self._located(error, scope="") from None

    def resolved(self, roots: Iterable[str] = (), omit: Collection[str] = ()) -> str:
        """Returns the whole configuration as a gin file without macros, the same for the same meaning.

        It holds each parameter that is set, and the defaults of the configurables that are set or referred
        to, as far as gin has words for them.

        Args:
          roots: further configurables whose defaults to write, such as those that a command builds by name.
          omit: parameters that are left out, such as ``RuntimeConfig.process_id``.
        """
        groups: dict[tuple[str, str], dict[str, str]] = {}
        for name in self._mentioned(roots):
            groups[name, ""] = {}
            for parameter in self._catalogue.parameters(name):
                default = self._catalogue.default(name, parameter)
                with contextlib.suppress(TypeError):
                    groups[name, ""][parameter] = literal(default)
        for (name, scope, parameter), value in self._values().items():
            groups.setdefault((name, scope), {})[parameter] = literal(value)
        for (name, _), values in groups.items():
            for parameter in [key for key in values if f"{name}.{key}" in omit]:
                del values[parameter]
        lines = ["# The resolved configuration: macros replaced, defaults written out."]
        if self._bindings.imports:
            lines += ["", *self._bindings.imports]
        for (name, scope), values in sorted(groups.items()):
            if values:
                lines.append("")
            target = scoped(scope, name)
            lines += [f"{target}.{parameter} = {values[parameter]}" for parameter in sorted(values)]
        return "\n".join(lines) + "\n"

    def difference(
        self,
        stored: str,
        ignore: Collection[str] = (),
        *,
        place: str = "the stored configuration",
        words: tuple[str, str] = ("was", "and is now"),
    ) -> list[str]:
        """Returns how this configuration differs from one that ``resolved`` wrote, a sentence a parameter.

        Args:
          stored: the other configuration's text. Names in it that are no longer known are differences too.
          ignore: parameters that may differ, such as ``TrainConfig.train_steps`` or ``MeshConfig.*``,
            whatever the scope.
          place: what to call ``stored`` in an error.
          words: what to write before the other configuration's value, and before this one's.

        Raises:
          UserError: ``stored`` is not gin's language.
        """
        reader = _Reader((), self._catalogue)
        reader.read_text(stored, place)
        other = Configuration(reader.bindings, self._catalogue)
        sentences: list[str] = []
        for key in sorted({*self._values(), *other._values()}):
            name, scope, parameter = key
            if any(fnmatch.fnmatchcase(f"{name}.{parameter}", pattern) for pattern in ignore):
                continue
            before, now = other._effective(*key), self._effective(*key)
            if before != now:
                change = f"{words[0]} {_shown(before)} {words[1]} {_shown(now)}{self._how_set(*key)}"
                sentences.append(f"{scoped(scope, name)}.{parameter} {change}.")
        return sentences

    def _build(self, name: str, scope: str, args: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
        """Calls a configurable with what the caller gives and, for the rest, what the configuration says."""
        target = self._catalogue.target(name)
        signature = self._catalogue.signature(name)
        if (name, scope) in self._building:
            raise UserError(f"{scoped(scope, name)} is made of itself: one of its parameters refers to it.")
        given = signature.bind_partial(*args, **arguments).arguments
        bound = {key: item for key, item in self._bindings.within(name, scope).items() if key not in given}
        self._building.append((name, scope))
        try:
            values = {key: self._value(item.value, scope) for key, item in bound.items()}
        finally:
            self._building.pop()
        _check_complete(name, scope, signature, {*given, *values})
        try:
            self._catalogue.check_values(name, values)
            return target(*args, **values, **arguments)
        except ConfigError as error:
            raise self._located(error, scope) from None

    def _value(self, value: Any, scope: str) -> Any:
        """Returns a bound value with its macros replaced and its references built, made anew each time."""

        def build(leaf: Any) -> Any:
            if not isinstance(leaf, Reference):
                return leaf
            inner = leaf.scope or scope
            if leaf.is_call:
                return self._build(leaf.name, inner, (), {})
            return _Configured(leaf, functools.partial(self._build, leaf.name, inner))

        return map_leaves(build, self._bindings.without_macros(value))

    def _located(self, error: ConfigError, scope: str) -> ConfigError:
        """Returns ``error`` with where its parameter was set, where the configuration sets it."""
        if isinstance(error, LocatedError):
            return error
        name, _, parameter = error.parameter.rpartition(".")
        binding = self._bindings.within(name, scope).get(parameter)
        binding = binding or self._bindings.macros.get(error.parameter)
        if binding is None:
            return error
        message = str(error).removeprefix(error.parameter).strip()
        sentence, mark, rest = message.partition(". Did you mean")
        sentence = f"{sentence.removesuffix('.')} ({self._bindings.source(binding)})."
        return LocatedError(error.parameter, sentence + mark[1:] + rest)

    def _values(self) -> dict[tuple[str, str, str], Any]:
        """Returns the set parameters' values without macros, by (configurable, scope, parameter)."""
        return {
            (binding.name, binding.scope, binding.parameter): self._bindings.without_macros(binding.value)
            for binding in self._bindings.final()
        }

    def _mentioned(self, roots: Iterable[str]) -> list[str]:
        """Returns the configurables that are set or referred to, and ``roots``."""
        names = {name for name, _ in self._bindings.groups()} | set(roots)
        for value in self._values().values():
            map_leaves(lambda leaf: names.add(leaf.name) if isinstance(leaf, Reference) else None, value)
        return sorted(names)

    def _effective(self, name: str, scope: str, parameter: str) -> Any:
        """Returns the value that a parameter has in a scope: as set, by default, or MISSING."""
        binding = self._bindings.within(name, scope).get(parameter)
        if binding is None:
            return self._catalogue.default(name, parameter)
        return self._bindings.without_macros(binding.value)

    def _how_set(self, name: str, scope: str, parameter: str) -> str:
        binding = self._bindings.within(name, scope).get(parameter)
        return f" ({self._bindings.source(binding)})" if binding else ""


class _Configured:
    """A configurable that the program calls itself, perhaps with arguments: what ``@name`` stands for."""

    def __init__(self, reference: Reference, call: Callable[..., Any]) -> None:
        self._reference = reference
        self._call = call
        self.__name__ = reference.name

    def __call__(self, *args: Any, **arguments: Any) -> Any:
        return self._call(args, arguments)

    def __repr__(self) -> str:
        return repr(self._reference)


def _check_complete(name: str, scope: str, signature: inspect.Signature, given: Collection[str]) -> None:
    """Checks that every parameter without a default has a value."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        f"{scoped(scope, name)}.{parameter.name}"
        for parameter in signature.parameters.values()
        if parameter.default is MISSING and parameter.kind not in variable and parameter.name not in given
    ]
    if missing:
        flags = " ".join(f"--gin.{parameter}=VALUE" for parameter in missing)
        names = missing[0] if len(missing) == 1 else f"{', '.join(missing[:-1])} and {missing[-1]}"
        verb, what = ("has", "it") if len(missing) == 1 else ("have", "them")
        raise UserError(f"{names} {verb} no value: give {what} in a gin file or with {flags}.")


def _shown(value: Any) -> str:
    if value is MISSING:
        return "not set"
    try:
        return literal(value)
    except TypeError:
        return repr(value)


class _Delegate(config_parser.ParserDelegate):
    """What gin's parser makes of ``@name`` and ``%NAME``."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(name, scope, evaluate)

    def macro(self, macro_name: str) -> Any:
        return Macro(macro_name)


class _Reader:
    """Reads gin files and flags into ``bindings``."""

    def __init__(self, search_paths: Sequence[str], catalogue: Catalogue) -> None:
        self.bindings = Bindings()
        self._search_paths = search_paths
        self._catalogue = catalogue
        self._open: list[Path] = []

    def read_file(self, name: str, *, asked: str) -> None:
        """Reads a file and what it includes; ``asked`` says for an error who asks for it."""
        path = config_files.find(name, self._search_paths, asked=asked).resolve()
        if path in self._open:
            raise UserError(f"{asked} names {name!r}, which is being read: the includes go in a circle.")
        self._open.append(path)
        self.read_text(config_files.read(path), config_files.shown(path))
        self._open.pop()

    def read_text(self, text: str, place: str) -> None:
        """Reads a gin file's text; ``place`` names it in errors."""
        for statement in _statements(text, place):
            origin = Origin(f"{place}, line {statement.location.line_num}")
            match statement:
                case config_parser.BindingStatement(scope, selector, parameter, value, _):
                    self._add(scope, selector, parameter, value, origin)
                case config_parser.BlockDeclaration(scope, selector, _):
                    self.bindings.mentions.append((Reference(selector, scope), origin))
                case config_parser.IncludeStatement(name, _):
                    self.read_file(name, asked=f"{origin.place}: include")
                case config_parser.ImportStatement():
                    self._import(statement, origin)

    def read_flag(self, flag: str) -> None:
        """Reads ``NAME=VALUE``."""
        key, equals, text = flag.partition("=")
        origin = Origin(f"--gin.{flag}", is_flag=True)
        if not equals or not _FLAG_NAME.fullmatch(key):
            raise UserError(f"{origin.place} is not --gin.NAME=VALUE with a macro or Configurable.parameter.")
        scope, selector, parameter = config_parser.parse_binding_key(key)
        self._add(scope, selector, parameter, _flag_value(text), origin)

    def _add(self, scope: str, selector: str, parameter: str, value: Any, origin: Origin) -> None:
        if parameter:
            self.bindings.add(Binding(selector, parameter, scope, value, origin))
        else:
            self.bindings.add(Binding(scoped(scope, selector), "", "", value, origin))

    def _import(self, statement: config_parser.ImportStatement, origin: Origin) -> None:
        """Imports a Python module, for what it registers and for the configurables in it."""
        try:
            module = importlib.import_module(statement.module)
        except ModuleNotFoundError as error:
            if not f"{statement.module}.".startswith(f"{error.name}."):
                raise  # The module is there, and an import of its own fails.
            why = f"there is no module {error.name!r} on PYTHONPATH"
            raise UserError(f"{origin.place}: cannot import {statement.module!r}, {why}.") from None
        whole = not (statement.is_from or statement.alias)
        bound = sys.modules[statement.module.split(".")[0]] if whole else module
        self._catalogue.add_module(statement.bound_name(), bound)
        if statement.format() not in self.bindings.imports:
            self.bindings.imports.append(statement.format())


def _statements(text: str, place: str) -> Iterator[Any]:
    """Yields gin's statements, with one sentence for what gin cannot read."""
    parser = None
    try:
        parser = config_parser.ConfigParser(io.StringIO(text), _Delegate())
        yield from parser
    except SyntaxError as error:
        raise _unreadable(place, text, error.lineno) from None
    except tokenize.TokenError as error:
        raise _unreadable(place, text, error.args[1][0]) from None
    except TypeError:  # A dictionary's key that is a list.
        raise _unreadable(place, text, _line_number(parser)) from None


def _line_number(parser: Any) -> int:
    return parser.current_token.start[0] if parser and parser.current_token else 1


def _unreadable(place: str, text: str, line_number: int | None) -> UserError:
    lines = text.splitlines()
    number = min(line_number or 1, len(lines))
    # An open bracket or quote is noticed at the end of the file: the last line with something on it is shown.
    while number > 1 and not lines[number - 1].strip():
        number -= 1
    return UserError(
        f"{place}, line {number}: cannot read {lines[number - 1].strip()!r} as gin: text stands in quotes, "
        "brackets are closed, %NAME reads a macro, @name refers to a configurable."
    )


def _flag_value(text: str) -> Any:
    """Returns the value of ``--gin.NAME=text``: the gin literal that it is, or else the text itself."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        if any(token.type == tokenize.COMMENT for token in tokens):
            return text  # Gin would drop the text from # on.
        parser = config_parser.ConfigParser(text.strip(), _Delegate())
        value = parser.parse_value()
    except (SyntaxError, tokenize.TokenError, TypeError):
        return text
    token: Any = parser.current_token
    return value if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER) else text
