"""The program ``switch-t5``: finds the command, reads its flags, reports a user's mistake in one sentence.

Nothing heavy is imported here: a command's module is imported when the command is called.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from switch_t5 import __version__
from switch_t5.cli.allocator import restart_with_large_pages
from switch_t5.cli.processes import ending_alone
from switch_t5.errors import UserError, closest

# Exit codes.
DONE, USERS_MISTAKE, INTERRUPTED, BROKEN_PIPE = 0, 2, 130, 141

_GIN_PREFIX = "--gin."


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      module: has ``add_arguments(parser)`` and ``run(args) -> int``, the exit code.
      summary: the command's line in ``switch-t5 --help``.
      takes_gin: whether it takes ``--gin_file``, ``--gin_search_paths`` and ``--gin.NAME=VALUE``; ``args``
        then has the lists ``gin_file``, ``gin_search_paths`` and ``gin_bindings``.
    """

    module: str
    summary: str
    takes_gin: bool = True


COMMANDS = {
    "train": Command("switch_t5.cli.train", "pre-train or fine-tune a model; continues a stopped run"),
    "eval": Command("switch_t5.cli.eval", "evaluate a trained model"),
    "infer": Command("switch_t5.cli.infer", "let a trained model write"),
    "plan": Command("switch_t5.cli.plan", "tell what a model costs and where it fits"),
    "convert": Command("switch_t5.cli.convert", "write a checkpoint in another format", takes_gin=False),
    "inspect": Command("switch_t5.cli.inspect", "look into a checkpoint of any format", takes_gin=False),
    "conformance": Command(
        "switch_t5.cli.conformance", "check routing on these devices against the oracle", takes_gin=False
    ),
    "data": Command("switch_t5.cli.data", "list tasks, look at batches, train a vocabulary", takes_gin=False),
}


def program() -> int:
    """The entry of the console: :func:`main`, with large pages where the command may train or run a model."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS and COMMANDS[sys.argv[1]].takes_gin:
        restart_with_large_pages()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``switch-t5`` and returns its exit code.

    0: done. 2: the user's mistake, told in one sentence on standard error. 130: stopped by Ctrl-C. 141:
    nobody reads standard output any more. Any other error propagates with its traceback, and Python exits
    with 1.

    Args:
      argv: the words after the program's name; None takes them from the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()  # Here, and not when Python exits, a broken pipe can be told from an error.
    except UserError as error:
        print(f"switch-t5: {_printable(str(error))}", file=sys.stderr)
        return USERS_MISTAKE
    except KeyboardInterrupt:
        print("switch-t5: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _standard_output_is_broken():
            raise
        return BROKEN_PIPE


def _printable(sentence: str) -> str:
    """A sentence without what a terminal would obey: files that it quotes may hold anything."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in sentence)


def _run(words: list[str]) -> int:
    """Runs the command that ``words`` name."""
    if not words:
        raise UserError(f"a command is missing: {_listed(COMMANDS)} (switch-t5 --help describes them).")
    name, *words = words
    if name.startswith("-"):
        _answer_without_command(name)
    if name not in COMMANDS:
        near = closest(name, COMMANDS) or f" The commands are {_listed(COMMANDS)}."
        raise UserError(f"there is no command {name!r}.{near}")
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = _Parser(prog=f"switch-t5 {name}", description=_sentence(command.summary))
    gin_bindings: list[str] = []
    if command.takes_gin:
        _add_gin_flags(parser)
        gin_bindings, words = _take_gin_bindings(words)
    module.add_arguments(parser)
    if misspelt := _misspelt(words, _flags(parser)):
        parser.refuse(misspelt, command.takes_gin)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.refuse(unknown, command.takes_gin)
    if command.takes_gin:
        args.gin_bindings = gin_bindings
    with ending_alone():
        return module.run(args)


def _misspelt(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Words that are meant for flags and are none. argparse would first miss a required flag that is there misspelt."""
    words = words[: words.index("--")] if "--" in words else words
    if "-h" in words or "--help" in words:
        return []
    # As argparse has it, what holds a space is a value.
    return [word for word in words if word.startswith("--") and " " not in word and word.split("=")[0] not in flags]


def _answer_without_command(flag: str) -> NoReturn:
    """Answers ``--help`` and ``--version``, which need no command, and exits; refuses other flags."""
    parser = _Parser(prog="switch-t5", description="Switch Transformers in JAX.", usage="switch-t5 COMMAND ...")
    parser.add_argument("--version", action="version", version=f"switch-t5 {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary)
    parser.epilog = "switch-t5 COMMAND --help describes a command's flags."
    _, unknown = parser.parse_known_args([flag])
    raise UserError(f"{unknown[0]} stands before any command: write switch-t5 COMMAND {unknown[0]}.")


def _add_gin_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "configuration",
        "Gin files are looked for in the working folder, the search paths, the packaged configs.",
    )
    group.add_argument(
        "--gin_file", action="append", default=[], metavar="PATH", help="a gin file; later ones override"
    )
    group.add_argument(
        "--gin_search_paths",
        action="extend",
        default=[],
        type=lambda folders: [folder for folder in folders.split(",") if folder],
        metavar="FOLDER,...",
        help="folders to look for gin files in",
    )
    # For --help alone: the words that start with --gin. are taken out before the parser sees them.
    group.add_argument(
        f"{_GIN_PREFIX}NAME",
        dest="gin_bindings",
        metavar="VALUE",
        help="set a macro, such as --gin.TRAIN_STEPS=100, or a Configurable.parameter",
    )


def _take_gin_bindings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes ``--gin.NAME=VALUE`` and ``--gin.NAME VALUE`` out of ``words``.

    Returns:
      Each binding as ``NAME=VALUE``, and the other words.
    """
    bindings: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith(_GIN_PREFIX):
            others.append(word)
        elif "=" in word:
            bindings.append(word.removeprefix(_GIN_PREFIX))
        else:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{word} has no value: write {word}=VALUE.")
            bindings.append(f"{word.removeprefix(_GIN_PREFIX)}={value}")
    return bindings, others


class _Parser(argparse.ArgumentParser):
    """An argument parser that complains by UserErrors of one sentence and takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Raises argparse's complaint as a UserError."""
        raise UserError(f"{message.rstrip('.')} ({self.prog} --help describes the flags).")

    def refuse(self, unknown: Sequence[str], takes_gin: bool) -> NoReturn:
        """Raises a UserError for words that no flag or argument took.

        Args:
          unknown: the words, at least one.
          takes_gin: whether ``--gin.NAME=VALUE`` would have been understood.
        """
        flags = [word for word in unknown if word.startswith("-")]
        if not flags:
            raise UserError(f"{self.prog} does not take the argument {unknown[0]!r}.")
        flag = flags[0].split("=")[0]
        if flag.startswith(_GIN_PREFIX):
            raise UserError(f"{self.prog} takes no gin flags, such as {flag}.")
        name = flag.lstrip("-")
        near = closest(flag, _flags(self))
        if not near and takes_gin and name.isupper() and name.isidentifier():
            near = closest(f"{_GIN_PREFIX}{name}", [f"{_GIN_PREFIX}{name}"])
        raise UserError(f"{self.prog} has no flag {flag}.{near}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Complains of a wrong choice with the nearest right one, where argparse would list them all."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            is_command = isinstance(action, argparse._SubParsersAction)
            what = "/".join(action.option_strings) or ("command" if is_command else action.dest)
            near = closest(str(value), choices) or f" It is one of {_listed(choices)}."
            raise UserError(f"{self.prog}: {value!r} is no {what}.{near}")


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """Returns the flags of a parser and of the commands inside it."""
    found: list[str] = []
    for action in parser._actions:
        found += [flag for flag in action.option_strings if not flag.startswith(_GIN_PREFIX)]
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found += _flags(inner)
    return found


def _listed(names: Sequence[str] | dict[str, Any]) -> str:
    """Returns names as a sentence lists them: a, b or c."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _standard_output_is_broken() -> bool:
    """Tells whether standard output is the pipe that nobody reads any more, and if so silences it."""
    descriptor = sys.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    # Python flushes once more at exit, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True
