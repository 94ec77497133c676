"""The program switch-t5: its commands, flags, exit codes, and the sentence for each mistake."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import switch_t5
from switch_t5.cli import main as program
from switch_t5.cli.main import Command, main
from switch_t5.errors import ConfigError, UserError

ROOT = Path(switch_t5.__file__).resolve().parents[1]


class Fake:
    """A command that remembers what it was given, or does what a test wants."""

    def __init__(self) -> None:
        self.args = argparse.Namespace()
        self.action = lambda: 0

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--steps", type=int, default=1, help="how many")
        parser.add_argument("--mode", choices=["greedy", "beam"])

    def run(self, args: argparse.Namespace) -> int:
        self.args = args
        return self.action()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The commands: ``train`` with gin, ``data`` without, both of them this one."""
    command = Fake()
    module = types.ModuleType("fake_command_of_test")
    vars(module).update(add_arguments=command.add_arguments, run=command.run)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    commands = {
        "train": Command(module.__name__, "train a model"),
        "data": Command(module.__name__, "look at data", takes_gin=False),
    }
    monkeypatch.setattr(program, "COMMANDS", commands)
    return command


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Returns what ``switch-t5 words`` says on standard error when it exits with 2."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("switch-t5: ") and said.err.count("\n") == 1
    return said.err.removeprefix("switch-t5: ").removesuffix("\n")


def test_the_gin_flags_reach_the_command(fake):
    words = ["train", "--gin_file=a.gin", "--gin.N=1", "--gin_file", "b.gin", "--gin_search_paths=x,y"]
    assert main([*words, "--gin.Model.dim", "-2", "--steps=3", "--gin_search_paths=z", "--gin.TEXT=a b=c"]) == 0
    assert fake.args.gin_file == ["a.gin", "b.gin"]
    assert fake.args.gin_search_paths == ["x", "y", "z"]
    assert fake.args.gin_bindings == ["N=1", "Model.dim=-2", "TEXT=a b=c"]
    assert fake.args.steps == 3


def test_without_gin_flags_their_lists_are_empty(fake):
    assert main(["train"]) == 0
    assert (fake.args.gin_file, fake.args.gin_search_paths, fake.args.gin_bindings) == ([], [], [])


def test_the_lists_of_one_call_do_not_reach_the_next(fake):
    main(["train", "--gin_file=a.gin", "--gin_search_paths=x"])
    main(["train"])
    assert (fake.args.gin_file, fake.args.gin_search_paths) == ([], [])


def test_the_commands_exit_code_is_the_programs(fake):
    fake.action = lambda: 143
    assert main(["train"]) == 143


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "a command is missing: train or data (switch-t5 --help describes them)."),
        (["trian"], "there is no command 'trian'. Did you mean 'train'?"),
        (["xyz"], "there is no command 'xyz'. The commands are train or data."),
        (
            ["--gin_file=a", "train"],
            "--gin_file=a stands before any command: write switch-t5 COMMAND --gin_file=a.",
        ),
        (["train", "--gin_fil=a"], "switch-t5 train has no flag --gin_fil. Did you mean '--gin_file'?"),
        (["train", "--gin-file", "a"], "switch-t5 train has no flag --gin-file. Did you mean '--gin_file'?"),
        (["train", "--step=3"], "switch-t5 train has no flag --step. Did you mean '--steps'?"),
        (
            ["train", "--BATCH_SIZE=3"],
            "switch-t5 train has no flag --BATCH_SIZE. Did you mean '--gin.BATCH_SIZE'?",
        ),
        (["train", "--zzz"], "switch-t5 train has no flag --zzz."),
        (["train", "extra"], "switch-t5 train does not take the argument 'extra'."),
        (["train", "--gin.N"], "--gin.N has no value: write --gin.N=VALUE."),
        (["train", "--gin.N", "--steps=3"], "--gin.N has no value: write --gin.N=VALUE."),
        (["data", "--gin.N=3"], "switch-t5 data takes no gin flags, such as --gin.N."),
        (
            ["train", "--steps=x"],
            "argument --steps: invalid int value: 'x' (switch-t5 train --help describes the flags).",
        ),
        (["train", "--mode=greddy"], "switch-t5 train: 'greddy' is no --mode. Did you mean 'greedy'?"),
        (["train", "--mode=x"], "switch-t5 train: 'x' is no --mode. It is one of greedy or beam."),
    ],
)
def test_a_mistake_in_the_words_is_one_sentence_and_exit_code_2(fake, capsys, words, sentence):
    assert complaint(capsys, *words) == sentence


def test_a_misspelt_flag_is_told_before_one_that_is_missing_for_it(fake, capsys, monkeypatch):
    module = sys.modules["fake_command_of_test"]

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        fake.add_arguments(parser)
        parser.add_argument("--input", required=True)
        parser.add_argument("words", nargs="*")

    monkeypatch.setattr(module, "add_arguments", add_arguments)
    assert complaint(capsys, "data", "--imput=a") == "switch-t5 data has no flag --imput. Did you mean '--input'?"
    # These are no flags: a value with a space, and what stands after two dashes.
    assert main(["data", "--input", "-- a ___", "--", "--word"]) == 0
    assert (fake.args.input, fake.args.words) == ("-- a ___", ["--word"])
    with pytest.raises(SystemExit, match="0"):
        main(["data", "--imput=a", "--help"])


def test_the_flags_of_commands_inside_a_command_are_known(fake, capsys, monkeypatch):
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        inner = parser.add_subparsers(dest="action", required=True)
        inner.add_parser("list").add_argument("--verbose", action="store_true")

    monkeypatch.setattr(sys.modules["fake_command_of_test"], "add_arguments", add_arguments)
    assert main(["data", "list", "--verbose"]) == 0 and fake.args.verbose
    assert complaint(capsys, "data", "lst") == "switch-t5 data: 'lst' is no command. Did you mean 'list'?"
    assert complaint(capsys, "data", "list", "--verbos") == (
        "switch-t5 data has no flag --verbos. Did you mean '--verbose'?"
    )


@pytest.mark.parametrize("error", [UserError("no such task."), ConfigError("no", "such task.")])
def test_the_users_mistake_in_a_command_is_one_sentence(fake, capsys, error):
    def fail() -> int:
        raise error

    fake.action = fail
    assert complaint(capsys, "train") == "no such task."


def test_another_error_propagates(fake):
    def fail() -> int:
        raise ZeroDivisionError

    fake.action = fail
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_control_c_exits_with_130(fake, capsys):
    def stop() -> int:
        raise KeyboardInterrupt

    fake.action = stop
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "switch-t5: interrupted.\n"


def test_a_broken_pipe_that_is_not_standard_output_propagates(fake):
    def fail() -> int:
        raise BrokenPipeError("a socket")

    fake.action = fail
    with pytest.raises(BrokenPipeError, match="a socket"):
        main(["train"])


def test_help_of_a_command_has_its_flags_and_the_gin_flags(fake, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: switch-t5 train ")
    assert all(
        flag in text for flag in ("--gin_file PATH", "--gin_search_paths FOLDER,...", "--gin.NAME VALUE", "--steps")
    )


def run(*words: str, **settings) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m switch_t5 words`` in the checkout."""
    command = [sys.executable, "-m", "switch_t5", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **settings)


def test_help_lists_the_commands_and_exits_with_0():
    answer = run("--help")
    assert (answer.returncode, answer.stderr) == (0, "")
    for name, command in program.COMMANDS.items():
        assert re.search(rf"^    {name}\s+{re.escape(command.summary)}$", answer.stdout, re.MULTILINE)


def test_version():
    assert run("--version").stdout == f"switch-t5 {switch_t5.__version__}\n"


def test_a_mistake_exits_with_2_and_no_traceback():
    answer = run("trian")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == "switch-t5: there is no command 'trian'. Did you mean 'train'?\n"


def test_help_imports_neither_jax_nor_gin():
    script = """
import sys
from switch_t5.cli.main import main
try:
    main(["--help"])
finally:
    print(sorted({"jax", "gin", "numpy", "tensorflow"} & set(sys.modules)))
"""
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.stdout.endswith("\n[]\n")


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe breaks in another way there")
def test_a_reader_that_goes_away_ends_the_program_quietly():
    script = """
import sys, types
from switch_t5.cli import main as program
module = types.ModuleType("fake")
module.add_arguments = lambda parser: None
module.run = lambda args: print("line\\n" * 100000) or 0
sys.modules["fake"] = module
program.COMMANDS["data"] = program.Command("fake", "x", takes_gin=False)
sys.exit(program.main(["data"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    _, complaints = process.communicate(timeout=20)
    assert (process.returncode, complaints) == (141, b"")
