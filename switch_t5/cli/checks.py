"""What a configuration must satisfy before anything is built: names known, macros given and read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from switch_t5.cli.bindings import REQUIRED, Binding, Bindings, Macro, Origin, Reference, leaves, scoped
from switch_t5.cli.configurables import Catalogue, suggestion
from switch_t5.errors import UserError


def check(bindings: Bindings, catalogue: Catalogue, scopes: Collection[str]) -> None:
    """Checks a whole configuration.

    Args:
      bindings: what the gin files and the flags said.
      catalogue: the configurables.
      scopes: the scopes that the program itself builds in.

    Raises:
      UserError: the first mistake found, where it stands, and the nearest right name.
    """
    for reference, origin in bindings.mentions:
        _check_reference(reference, origin, catalogue)
    for binding in bindings.said:
        _check_names(binding, catalogue)
    _check_scopes(bindings, scopes)
    _check_cycles(bindings)
    live = _live_macros(bindings, bindings.final())
    _check_flags_are_read(bindings, catalogue, live)
    _check_macros_are_given(bindings, live)
    _check_macros_are_read(bindings, catalogue)


def check_effect(bindings: Bindings, roots: Collection[str]) -> None:
    """Checks that each flag sets something that is used.

    Args:
      bindings: what the gin files and the flags said.
      roots: the configurables that the program builds by name; they use what they refer to.

    Raises:
      UserError: the first flag that has no effect.
    """
    used = _reached(bindings, roots)
    live = _live_macros(bindings, [binding for binding in bindings.final() if binding.name in used])
    for flag in bindings.said:
        if not flag.origin.is_flag or flag.name in (live if flag.is_macro else used):
            continue
        readers = {binding.name for binding in bindings.final() if flag.name in _live_macros(bindings, [binding])}
        unused = ", ".join(sorted(readers)) if flag.is_macro else flag.name
        raise UserError(f"{flag.origin.place} has no effect: nothing here uses {unused}.")


def _reached(bindings: Bindings, roots: Collection[str]) -> set[str]:
    """Returns the configurables that ``roots`` refer to, also through others, and ``roots``."""
    reached: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            for binding in bindings.final():
                if binding.name == name:
                    found = leaves(bindings.without_macros(binding.value))
                    waiting += [leaf.name for leaf in found if isinstance(leaf, Reference)]
    return reached


def _check_names(binding: Binding, catalogue: Catalogue) -> None:
    """Checks the configurable, the parameter and the references of one binding."""
    if not binding.is_macro:
        _check_reference(Reference(binding.name), binding.origin, catalogue)
        known = catalogue.parameters(binding.name)
        if binding.parameter not in known and not catalogue.takes_any(binding.name):
            near = suggestion(binding.parameter, known)
            place = binding.origin.place
            raise UserError(f"{place}: {binding.name} has no parameter {binding.parameter!r}.{near}")
    for leaf in leaves(binding.value):
        if isinstance(leaf, Reference):
            _check_reference(leaf, binding.origin, catalogue)


def _check_reference(reference: Reference, origin: Origin, catalogue: Catalogue) -> None:
    try:
        catalogue.target(reference.name)
    except UserError as error:
        raise UserError(f"{origin.place}: {error}") from None


def _check_scopes(bindings: Bindings, scopes: Collection[str]) -> None:
    """Checks that each scope that holds bindings, such as ``eval/``, is one that something is built in."""
    entered = set(scopes)
    for binding in bindings.said:
        entered |= {leaf.scope for leaf in leaves(binding.value) if isinstance(leaf, Reference)}
    # What is built in the scope a/b also takes the bindings of the scope a.
    parts = [scope.split("/") for scope in entered if scope]
    entered = {"/".join(path[:end]) for path in parts for end in range(1, len(path) + 1)}
    for binding in bindings.said:
        if binding.scope and binding.scope not in entered:
            place, near = binding.origin.place, suggestion(binding.scope, entered)
            near = near or f" A value such as @{binding.scope}/MoEConfig() would build in it."
            raise UserError(f"{place}: nothing is built in the scope {binding.scope!r}.{near}")


def _macros_in(value: object) -> list[str]:
    return [leaf.name for leaf in leaves(value) if isinstance(leaf, Macro)]


def _check_cycles(bindings: Bindings) -> None:
    """Checks that no macro is made of itself."""

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            path = " -> ".join((*trail[trail.index(name) :], name))
            raise UserError(f"{bindings.macros[name].origin.place}: macro {name} is made of itself ({path}).")
        if name in bindings.macros:
            for inner in _macros_in(bindings.macros[name].value):
                visit(inner, (*trail, name))

    for name in bindings.macros:
        visit(name, ())


def _live_macros(bindings: Bindings, readers: Iterable[Binding]) -> dict[str, Binding]:
    """Returns each macro that ``readers`` read, also through others, with the binding that reads it first."""
    live: dict[str, Binding] = {}

    def visit(reader: Binding) -> None:
        for name in _macros_in(reader.value):
            if name not in live:
                live[name] = reader
                if name in bindings.macros:
                    visit(bindings.macros[name])

    for reader in readers:
        visit(reader)
    return live


def _check_flags_are_read(bindings: Bindings, catalogue: Catalogue, live: Collection[str]) -> None:
    """Checks that each macro given by a flag reaches a parameter."""
    for binding in bindings.macros.values():
        if not binding.origin.is_flag or binding.name in live:
            continue
        for reader in bindings.said:
            if binding.name in _macros_in(reader.value) and not reader.is_macro:
                winner = bindings.exactly(reader.name, reader.scope)[reader.parameter]
                raise UserError(
                    f"{binding.origin.place} has no effect: {winner.target}, which read that macro, "
                    f"is {winner.origin.how_set}."
                )
        near = _near_unread(binding.name, live, bindings, catalogue)
        raise UserError(f"{binding.origin.place} gives a macro that nothing reads.{near}")


def _check_macros_are_given(bindings: Bindings, live: dict[str, Binding]) -> None:
    """Checks that each macro that reaches a parameter has a value."""
    missing: dict[str, Origin] = {}
    for reader in _live_readers(bindings, live):
        for name in _macros_in(reader.value):
            if name == REQUIRED:
                missing.setdefault(reader.target, reader.origin)
            elif name not in bindings.macros:
                missing.setdefault(name, reader.origin)
    if len(missing) > 1:
        names = sorted(missing)
        flags = " ".join(f"--gin.{name}=VALUE" for name in names)
        raise UserError(f"{', '.join(names[:-1])} and {names[-1]} have no value: give them with {flags}.")
    for name, origin in missing.items():
        # A macro that is set but not read is what this one may have been meant to be.
        near = suggestion(name, set(bindings.macros) - set(live))
        raise UserError(f"{name} has no value ({origin.place}): give it with --gin.{name}=VALUE.{near}")


def _live_readers(bindings: Bindings, live: Collection[str]) -> Iterator[Binding]:
    yield from bindings.final()
    yield from (binding for name, binding in bindings.macros.items() if name in live)


def _check_macros_are_read(bindings: Bindings, catalogue: Catalogue) -> None:
    """Checks that each macro that a gin file sets is read by some line, though perhaps an overridden one."""
    read = {name for binding in bindings.said for name in _macros_in(binding.value)}
    for binding in bindings.macros.values():
        if binding.name not in read:
            near = _near_unread(binding.name, read, bindings, catalogue)
            raise UserError(f"{binding.origin.place}: nothing reads the macro {binding.name!r}.{near}")


def _near_unread(name: str, read: Collection[str], bindings: Bindings, catalogue: Catalogue) -> str:
    """Returns what an unread macro may have been meant to be: a parameter, or another macro."""
    for configurable, scope in bindings.groups():
        if name in catalogue.parameters(configurable):
            parameter = f"{scoped(scope, configurable)}.{name}"
            return suggestion(parameter, [parameter])
    if name in catalogue:
        return f" {name} is a configurable: give one of its parameters, as in {name}.PARAMETER."
    return suggestion(name, set(read) - {REQUIRED})


def check_conventions(bindings: Bindings, packaged: str) -> None:
    """Refuses two conventions at once, and a packaged file that takes back what a convention before it set.

    The user's own files may do so, for they say what the user wants.

    Args:
      bindings: of all files.
      packaged: the folder of the packaged gin files, as origins name it.

    Raises:
      UserError: says which file to leave out or to give last.
    """
    root = "" if packaged == "." else f"{packaged}/"
    conventions: dict[str, Binding] = {}
    chosen = ""
    for binding in bindings.said:
        file = binding.origin.place.rpartition(", line ")[0]
        if file.startswith(f"{root}conventions/"):
            if chosen not in ("", file):
                raise UserError(f"{chosen} and {file} are two conventions: give one of them.")
            chosen = file
            conventions[binding.target] = binding
        elif file.startswith(root) and binding.target in conventions:
            before = conventions[binding.target]
            if binding.value != before.value:
                raise UserError(
                    f"{binding.target} is {before.value!r} by {chosen} and would be set to {binding.value!r} in "
                    f"{binding.origin.place}: give --gin_file={chosen.removeprefix(root)} after {file}."
                )
