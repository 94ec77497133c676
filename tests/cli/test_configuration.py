"""Configurations: what gin files and flags mean, and the sentence for each mistake in them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from switch_t5.cli import config_files
from switch_t5.cli.configurables import Catalogue
from switch_t5.cli.configuration import CONFIGURABLES, Configuration
from switch_t5.errors import ConfigError, UserError, check_types


@dataclasses.dataclass(frozen=True)
class Model:
    emb_dim: int
    dropout_rate: float = 0.0
    dtype: str = "float32"
    layers: tuple[int, ...] = ()
    optimizer: object = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.emb_dim < 1:
            raise ConfigError("Model.emb_dim", f"must be at least 1, got {self.emb_dim}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError("Model.dtype", f"must be a float, got {self.dtype!r}. Did you mean 'float32'?")


@dataclasses.dataclass(frozen=True)
class Data:
    lengths: dict[str, int] = dataclasses.field(default_factory=lambda: {"inputs": 8})
    split: str = "train"
    clean: Callable[[str], str] | None = str.strip


@dataclasses.dataclass(frozen=True)
class Run:
    model: Model
    model_dir: str
    train_steps: int
    data: tuple[Data, ...] = ()


def decay(rate: float = 1.0, steps: int | None = None) -> tuple[float, int | None]:
    return rate, steps


def optimizer(parameter_axes: str, learning_rate: object, beta: float = 0.9) -> tuple:
    return parameter_axes, learning_rate, beta


def takes_anything(**settings: object) -> dict[str, object]:
    return settings


TABLE = {
    "Model": f"{__name__}:Model",
    "Data": f"{__name__}:Data",
    "Run": f"{__name__}:Run",
    "decay": f"{__name__}:decay",
    "optimizer": f"{__name__}:optimizer",
    "takes_anything": f"{__name__}:takes_anything",
    "Unwritten": "switch_t5.no_such_module:Unwritten",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str = "", *flags: str, files: tuple[str, ...] = (), **settings) -> Configuration:
    """Loads ``text`` as a.gin, after ``files``."""
    Path("a.gin").write_text(text)
    return Configuration.load([*files, "a.gin"], flags, configurables=TABLE, **settings)


def mistake(text: str = "", *flags: str, **settings) -> str:
    """Returns the sentence with which loading fails."""
    with pytest.raises(UserError) as raised:
        load(text, *flags, **settings)
    return str(raised.value)


def build_mistake(name: str, text: str = "", *flags: str) -> str:
    """Returns the sentence with which building fails; loading succeeds."""
    configuration = load(text, *flags)
    with pytest.raises(UserError) as raised:
        configuration.get(name)
    return str(raised.value)


# What a configuration means.


def test_parameters_come_from_the_file_and_defaults_fill_the_rest():
    model = load("Model.emb_dim = 4\nModel.layers = (1, 2)").get("Model")
    assert model == Model(emb_dim=4, dropout_rate=0.0, dtype="float32", layers=(1, 2))


def test_a_block_sets_the_parameters_of_one_configurable():
    assert load("Model:\n  emb_dim = 4\n  # wide\n  dtype = 'bfloat16'\n").get("Model") == Model(4, dtype="bfloat16")


def test_a_macro_is_read_where_it_stands_also_inside_containers_and_other_macros():
    text = "Data.lengths = {'inputs': %LENGTH, 'targets': %HALF}\nLENGTH = %TWICE\nTWICE = 16\nHALF = 8"
    assert load(text).get("Data").lengths == {"inputs": 16, "targets": 8}


def test_a_macro_may_be_set_before_or_after_it_is_read_and_the_last_value_wins():
    assert load("N = 1\nModel.emb_dim = %N\nN = 2\nN = 3").get("Model").emb_dim == 3


def test_a_call_reference_builds_and_a_plain_reference_is_called_by_the_program():
    text = """
    Run.model = @Model()
    Run.model_dir = '/tmp'
    Run.train_steps = 1
    Model.emb_dim = 4
    Model.optimizer = @optimizer
    optimizer.learning_rate = @decay()
    optimizer.beta = 0.5
    decay.rate = 2.0
    """
    run = load(text).get("Run")
    assert run.model.optimizer("axes") == ("axes", (2.0, None), 0.5)
    assert run.model.optimizer("axes", beta=0.1) == ("axes", (2.0, None), 0.1)
    assert repr(run.model.optimizer) == "@optimizer"


def test_a_scope_sets_parameters_for_what_is_built_in_it():
    text = """
    Run.data = (@Data(), @eval/Data(), @eval/short/Data())
    Run.model = @Model()
    Run.model_dir = 'd'
    Run.train_steps = 1
    Model.emb_dim = 1
    Data.clean = None
    eval/Data.split = 'validation'
    eval/short/Data.lengths = {}
    """
    configuration = load(text)
    long = {"inputs": 8}
    assert configuration.get("Run").data == (
        Data(long, "train", None),
        Data(long, "validation", None),
        Data({}, "validation", None),
    )
    assert configuration.get("eval/Data") == Data(long, "validation", None)


def test_what_is_built_in_a_scope_builds_its_parts_in_that_scope():
    text = "optimizer.learning_rate = @decay()\ndecay.rate = 1.0\neval/decay.rate = 2.0"
    configuration = load(text)
    assert configuration.get("optimizer", parameter_axes="a")[1] == (1.0, None)
    assert configuration.get("eval/optimizer", parameter_axes="a")[1] == (2.0, None)


def test_what_the_caller_gives_wins():
    assert load("Model.emb_dim = 4").get("Model", emb_dim=5).emb_dim == 5


def test_each_build_gets_containers_of_its_own():
    configuration = load("Data.lengths = {'inputs': 1}")
    configuration.get("Data").lengths["inputs"] = 2
    assert configuration.get("Data").lengths == {"inputs": 1}


def test_a_function_with_free_keywords_takes_any_parameter():
    assert load("takes_anything.colour = 'red'").get("takes_anything") == {"colour": "red"}


def test_configurations_do_not_leak_into_one_another():
    first, second = load("Model.emb_dim = 1"), load("Model.emb_dim = 2\nModel.dtype = 'bfloat16'")
    assert (first.get("Model"), second.get("Model")) == (Model(1), Model(2, dtype="bfloat16"))


def test_an_imported_module_gives_configurables_by_their_dotted_names(folder, monkeypatch):
    (folder / "own_parts_of_test.py").write_text("def halve(number, by=2):\n    return number / by\n")
    monkeypatch.syspath_prepend(str(folder))
    text = "import own_parts_of_test\nModel.emb_dim = 1\nModel.optimizer = @own_parts_of_test.halve()\n"
    configuration = load(text + "own_parts_of_test.halve.number = 8\nown_parts_of_test.halve.by = 4")
    assert configuration.get("Model").optimizer == 2
    assert "\nimport own_parts_of_test\n" in configuration.resolved()
    assert mistake(text + "own_parts_of_test.have.by = 1") == (
        "a.gin, line 4: own_parts_of_test has no 'have'. Did you mean 'halve'?"
    )


# Flags.


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("1", 1),
        ("-2.5e-3", -0.0025),
        ("True", True),
        ("None", None),
        ("true", "true"),
        ("/tmp/run", "/tmp/run"),
        ("gs://bucket/run-1", "gs://bucket/run-1"),
        ("c4_v301_span_corruption", "c4_v301_span_corruption"),
        ("'quoted'", "quoted"),
        ('"5"', "5"),
        ("5#6", "5#6"),
        ("2024-01-01", "2024-01-01"),
        ("1,2", "1,2"),
        ("10 20", "10 20"),
        ("08", "08"),
        ("", ""),
        ("a=b", "a=b"),
        ("(1, 2)", (1, 2)),
        ("(1,)", (1,)),
        ("{'inputs': 4}", {"inputs": 4}),
        ("{'inputs': 4", "{'inputs': 4"),
        ("{[1]: 2}", "{[1]: 2}"),
        ("it's", "it's"),
        ("%OTHER", 7),
        ("@decay()", (1.0, None)),
    ],
)
def test_a_flags_value_is_a_gin_literal_or_else_text(words, value):
    text = "takes_anything.value = %VALUE\ntakes_anything.other = %OTHER\nOTHER = 7"
    assert load(text, f"VALUE={words}").get("takes_anything")["value"] == value


def test_flags_override_files_and_later_files_override_earlier_ones(folder):
    (folder / "first.gin").write_text("Model.emb_dim = %DIM\nDIM = 1\nModel.dropout_rate = 0.1")
    (folder / "second.gin").write_text("DIM = 2\nModel.dropout_rate = 0.2")
    settings: dict[str, Any] = {"files": ("first.gin", "second.gin")}
    assert load(**settings).get("Model") == Model(2, 0.2)
    assert load("", "DIM=3", "Model.dropout_rate=0.3", **settings).get("Model") == Model(3, 0.3)
    assert load("", "DIM=3", "DIM=4", **settings).get("Model").emb_dim == 4


def test_a_flag_may_set_a_parameter_in_a_scope():
    assert load("", "eval/Data.split=test").get("eval/Data").split == "test"


@pytest.mark.parametrize("flag", ["DIM", "=3", "Model .emb_dim=3", "Model.=3", "3=3"])
def test_a_flag_that_is_no_binding_is_refused(flag):
    assert mistake("", flag) == f"--gin.{flag} is not --gin.NAME=VALUE with a macro or Configurable.parameter."


# Where gin files are.


def test_files_are_found_in_the_working_folder_then_the_search_paths_then_the_package(folder, monkeypatch):
    places = {"here": folder, "one": folder / "one", "two": folder / "two", "package": folder / "package"}
    for place in places.values():
        place.mkdir(exist_ok=True)
    monkeypatch.setattr(config_files, "packaged_configs", lambda: places["package"])
    for name in ("package", "two", "one", "here"):
        (places[name] / "m.gin").write_text(f"Model.emb_dim = 1\nModel.optimizer = '{name}'")
        found = Configuration.load(["m.gin"], [], ["one", "two"], configurables=TABLE).get("Model").optimizer
        assert found == name


def test_an_include_is_found_as_a_file_is_and_is_read_where_it_stands(folder):
    (folder / "one" / "models").mkdir(parents=True)
    (folder / "one" / "models" / "m.gin").write_text("Model.emb_dim = 1\nModel.dropout_rate = 0.1")
    text = "Model.emb_dim = 2\ninclude 'models/m.gin'\nModel.dropout_rate = 0.2"
    assert load(text, search_paths=["one"]).get("Model") == Model(1, 0.2)


def test_the_packaged_configs_of_a_checkout_are_the_repositorys():
    assert config_files.packaged_configs() == Path(config_files.__file__).resolve().parents[2] / "configs"


def test_a_missing_file_is_refused_with_the_nearest_one(folder, monkeypatch):
    monkeypatch.setattr(config_files, "packaged_configs", lambda: folder / "package")
    (folder / "package" / "runs").mkdir(parents=True)
    (folder / "package" / "runs" / "quickstart.gin").touch()
    (folder / "one").mkdir()
    assert mistake(files=("runs/quikstart.gin",), search_paths=["one"]) == (
        "--gin_file names 'runs/quikstart.gin', which is not in the working folder, one "
        "and the packaged configs. Did you mean 'runs/quickstart.gin'?"
    )
    assert mistake("\ninclude 'b.gin'") == (
        "a.gin, line 2: include names 'b.gin', which is not in the working folder and the packaged configs."
        " Did you mean 'a.gin'?"
    )
    assert mistake(files=("/nowhere/b.gin",)) == "--gin_file names '/nowhere/b.gin', which does not exist."
    assert mistake(files=("one",)) == "--gin_file names 'one', which is a folder, not a gin file."
    assert mistake(search_paths=["two"]) == "--gin_search_paths names 'two', which is not a folder."


def test_includes_in_a_circle_are_refused(folder):
    (folder / "b.gin").write_text("include 'a.gin'")
    assert mistake("include 'b.gin'") == (
        "b.gin, line 1: include names 'a.gin', which is being read: the includes go in a circle."
    )


def test_a_file_that_is_not_utf8_is_refused(folder):
    (folder / "b.gin").write_bytes(b"N = '\xff'")
    assert mistake(files=("b.gin",)) == "b.gin is not UTF-8 text (byte 5)."


# Mistakes found on loading.


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "Model.emb_dim = 1\n\nModel.emb_dimm = 3",
            "a.gin, line 3: Model has no parameter 'emb_dimm'. Did you mean 'emb_dim'?",
        ),
        ("Modell.emb_dim = 3", "a.gin, line 1: there is no configurable 'Modell'. Did you mean 'Model'?"),
        (
            "parts.Model.emb_dim = 3",
            "a.gin, line 1: there is no configurable 'parts.Model'. Did you mean 'Model'?",
        ),
        ("Zebra.x = 3", "a.gin, line 1: there is no configurable 'Zebra'."),
        ("Modle:\n  emb_dim = 3", "a.gin, line 1: there is no configurable 'Modle'. Did you mean 'Model'?"),
        ("Model:\n  emb_dim = 3\n  x = 3", "a.gin, line 3: Model has no parameter 'x'."),
        (
            "Model.emb_dim = 1\nModel.optimizer = [1, @optimiser()]",
            "a.gin, line 2: there is no configurable 'optimiser'. Did you mean 'optimizer'?",
        ),
        (
            "Model.emb_dimm = 3\nModel.emb_dim = %N",
            "a.gin, line 1: Model has no parameter 'emb_dimm'. Did you mean 'emb_dim'?",
        ),
        (
            "train/Data.split = 'a'\nevl/Data.split = 'b'",
            "a.gin, line 2: nothing is built in the scope 'evl'. Did you mean 'eval'?",
        ),
        (
            "decoder/Data.split = 'b'",
            "a.gin, line 1: nothing is built in the scope 'decoder'. "
            "A value such as @decoder/MoEConfig() would build in it.",
        ),
        ("N = %M\nM = %N\nModel.emb_dim = %N", "a.gin, line 1: macro N is made of itself (N -> M -> N)."),
        (
            "Model.emb_dim = %DIM\nDIM = 3\nDROPOUT = 0.5",
            "a.gin, line 3: nothing reads the macro 'DROPOUT'.",
        ),
        (
            "Data.split = %SPLIT\nSPLIT = 'a'\nSPLITS = 'b'",
            "a.gin, line 3: nothing reads the macro 'SPLITS'. Did you mean 'SPLIT'?",
        ),
        (
            "Data.split = 'a'\nsplit = 'b'",
            "a.gin, line 2: nothing reads the macro 'split'. Did you mean 'Data.split'?",
        ),
        (
            "Model = 3",
            (
                "a.gin, line 1: nothing reads the macro 'Model'. Model is a configurable: give one of its "
                "parameters, as in Model.PARAMETER."
            ),
        ),
        (
            "Run.model_dir = %MODEL_DIR",
            "MODEL_DIR has no value (a.gin, line 1): give it with --gin.MODEL_DIR=VALUE.",
        ),
        (
            "Run.model_dir = %MODEL_DIR\nRun.train_steps = %STEPS\nRun.data = [%DATA]",
            (
                "DATA, MODEL_DIR and STEPS have no value: "
                "give them with --gin.DATA=VALUE --gin.MODEL_DIR=VALUE --gin.STEPS=VALUE."
            ),
        ),
        (
            "Run.train_steps = %TRAIN_STEP\nTRAIN_STEPS = 3",
            (
                "TRAIN_STEP has no value (a.gin, line 1): give it with --gin.TRAIN_STEP=VALUE. "
                "Did you mean 'TRAIN_STEPS'?"
            ),
        ),
        (
            "Run.model_dir = %MODEL_DIR\nMODEL_DIR = %gin.REQUIRED",
            "MODEL_DIR has no value (a.gin, line 2): give it with --gin.MODEL_DIR=VALUE.",
        ),
        (
            "eval/Data.split = %gin.REQUIRED",
            "eval/Data.split has no value (a.gin, line 1): give it with --gin.eval/Data.split=VALUE.",
        ),
        (
            "import no_such_parts.of_it",
            ("a.gin, line 1: cannot import 'no_such_parts.of_it', there is no module 'no_such_parts' on PYTHONPATH."),
        ),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence_with_its_line(text, sentence):
    assert mistake(text) == sentence


@pytest.mark.parametrize(
    ("text", "line", "shown"),
    [
        ("N = 1\nModel.emb_dim = four", 2, "Model.emb_dim = four"),
        ("Model.emb_dim == 4", 1, "Model.emb_dim == 4"),
        ("Model.emb_dim", 1, "Model.emb_dim"),
        ("\nModel.emb_dim = 4 5", 2, "Model.emb_dim = 4 5"),
        ("Model.emb_dim = (4,\n\n\n", 1, "Model.emb_dim = (4,"),
        ("Model.dtype = 'open\nN = 1", 1, "Model.dtype = 'open"),
        ("Model:\nemb_dim = 4", 2, "emb_dim = 4"),
        ("Model:\n    emb_dim = 4\n  dtype = 'a'", 3, "dtype = 'a'"),
        ("include models", 1, "include models"),
        ("Model.optimizer = {[1]: 2}", 1, "Model.optimizer = {[1]: 2}"),
        ("Model.emb_dim = $4", 1, "Model.emb_dim = $4"),
        ("Model.optimizer = @", 1, "Model.optimizer = @"),
        ("a//b.c = 1", 1, "a//b.c = 1"),
    ],
)
def test_what_gin_cannot_read_is_shown_with_its_line(text, line, shown):
    assert mistake(text) == (
        f"a.gin, line {line}: cannot read {shown!r} as gin: text stands in quotes, brackets are closed, "
        "%NAME reads a macro, @name refers to a configurable."
    )


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("TRAIN_STEP=3", "--gin.TRAIN_STEP=3 gives a macro that nothing reads. Did you mean 'TRAIN_STEPS'?"),
        (
            "train_steps=3",
            "--gin.train_steps=3 gives a macro that nothing reads. Did you mean 'Run.train_steps'?",
        ),
        (
            "optimizer=3",
            (
                "--gin.optimizer=3 gives a macro that nothing reads. optimizer is a configurable: give one "
                "of its parameters, as in optimizer.PARAMETER."
            ),
        ),
        ("Steps=3", "--gin.Steps=3 gives a macro that nothing reads. Did you mean 'STEPS'?"),
        (
            "Run.train_step=3",
            "--gin.Run.train_step=3: Run has no parameter 'train_step'. Did you mean 'train_steps'?",
        ),
        (
            "Runn.train_steps=3",
            "--gin.Runn.train_steps=3: there is no configurable 'Runn'. Did you mean 'Run'?",
        ),
        (
            "TRAIN_STEPS=@decy()",
            "--gin.TRAIN_STEPS=@decy(): there is no configurable 'decy'. Did you mean 'decay'?",
        ),
        (
            "RATE=3",
            "--gin.RATE=3 has no effect: decay.rate, which read that macro, is set in a.gin, line 4.",
        ),
    ],
)
def test_a_mistake_in_a_flag_is_one_sentence_with_the_flag(flag, sentence):
    text = "Run.train_steps = %TRAIN_STEPS\nTRAIN_STEPS = 1\ndecay.rate = %RATE\ndecay.rate = 2.0\n"
    text += "decay.steps = %STEPS\n"
    assert mistake(text + "RATE = 1.0\nSTEPS = 1", flag) == sentence


def test_a_file_may_set_a_macro_whose_reader_a_later_file_overrides(folder):
    (folder / "first.gin").write_text("DIM = 1\nModel.emb_dim = %DIM")
    assert load("Model.emb_dim = 5", files=("first.gin",)).get("Model").emb_dim == 5


def test_a_macro_read_only_by_an_overridden_line_needs_no_value():
    assert load("Model.emb_dim = %DIM\nModel.emb_dim = 5").get("Model").emb_dim == 5


def test_what_a_gin_file_leaves_to_the_user_can_be_given_by_a_flag():
    text = "Data.split = %SPLIT\nSPLIT = %gin.REQUIRED"
    assert load(text, "SPLIT=test").get("Data").split == "test"


def test_a_flag_for_what_nothing_uses_is_refused_when_the_roots_are_known():
    text = "Model.emb_dim = 1\nModel.optimizer = %CHOSEN\nCHOSEN = @optimizer\n"
    text += "optimizer.beta = %BETA\nBETA = 0.5\ndecay.rate = %RATE\nRATE = %HALF\nHALF = 0.5\n"
    text += "takes_anything.colour = 'red'"
    load(text, "BETA=0.1", "optimizer.beta=%BETA", "CHOSEN=@optimizer", "Model.emb_dim=2").check_flags_have_effect(
        ["Model"]
    )
    for flag, unused in (
        ("decay.steps=2", "decay"),
        ("RATE=2", "decay"),
        ("HALF=2", "decay"),
        ("BETA=2", "optimizer"),
    ):
        configuration = load(text, flag)
        configuration.check_flags_have_effect(["Model", "decay"])
        with pytest.raises(UserError) as raised:
            configuration.check_flags_have_effect(["Data"])
        assert str(raised.value) == f"--gin.{flag} has no effect: nothing here uses {unused}."


# Mistakes found on building.


def test_a_refused_value_is_told_with_where_it_was_set():
    assert build_mistake("Model", "\nModel.emb_dim = 'abc'") == (
        "Model.emb_dim must be an integer, got 'abc' (set in a.gin, line 2)."
    )
    assert build_mistake("Model", "Model:\n  dtype = 'a'\n  emb_dim = 0") == (
        "Model.emb_dim must be at least 1, got 0 (set in a.gin, line 3)."
    )
    assert build_mistake("Model", "", "Model.emb_dim=abc") == (
        "Model.emb_dim must be an integer, got 'abc' (set by --gin.Model.emb_dim=abc)."
    )


def test_a_refused_value_is_traced_through_its_macros():
    text = "Model.emb_dim = %DIM\nDIM = %SIZE\nSIZE = 0"
    assert build_mistake("Model", text) == "Model.emb_dim must be at least 1, got 0 (macro SIZE, set in a.gin, line 3)."
    assert build_mistake("Model", text, "SIZE=-1") == "Model.emb_dim must be at least 1, got -1 (set by --gin.SIZE=-1)."
    assert build_mistake("Model", text, "DIM=-2") == "Model.emb_dim must be at least 1, got -2 (set by --gin.DIM=-2)."


def test_the_place_comes_before_the_suggestion():
    assert build_mistake("Model", "Model.emb_dim = 1\nModel.dtype = 'f32'") == (
        "Model.dtype must be a float, got 'f32' (set in a.gin, line 2). Did you mean 'float32'?"
    )


def test_the_place_is_told_once_however_deep_the_mistake_lies():
    text = "Run.model = @Model()\nRun.model_dir = 'd'\nRun.train_steps = 1\nModel.emb_dim = 0"
    assert build_mistake("Run", text) == "Model.emb_dim must be at least 1, got 0 (set in a.gin, line 4)."


def test_the_place_is_that_of_the_scope():
    text = "Model.emb_dim = 1\neval/Model.emb_dim = 0"
    assert build_mistake("eval/Model", text) == "Model.emb_dim must be at least 1, got 0 (set in a.gin, line 2)."


def test_a_functions_arguments_are_checked_against_its_annotations():
    assert build_mistake("decay", "decay.steps = 'ten'") == (
        "decay.steps must be an integer or None, got 'ten' (set in a.gin, line 1)."
    )
    assert load("decay.rate = 3\ndecay.steps = None").get("decay") == (3, None)


def test_a_mistake_found_after_building_can_be_located_too():
    configuration = load("Model.emb_dim = 3")
    with pytest.raises(ConfigError) as raised, configuration.locating_errors():
        raise ConfigError("Model.emb_dim", "does not divide 8.")
    assert str(raised.value) == "Model.emb_dim does not divide 8 (set in a.gin, line 1)."
    assert raised.value.parameter == "Model.emb_dim"


def test_a_mistake_in_what_was_not_set_stays_as_it_is():
    with pytest.raises(ConfigError) as raised, load().locating_errors():
        raise ConfigError("Model.emb_dim", "does not divide 8.")
    assert str(raised.value) == "Model.emb_dim does not divide 8."


def test_missing_parameters_are_named():
    assert (
        build_mistake("Model") == "Model.emb_dim has no value: give it in a gin file or with --gin.Model.emb_dim=VALUE."
    )
    assert build_mistake("Run", "Run.model_dir = 'd'") == (
        "Run.model and Run.train_steps have no value: give them in a gin file or with "
        "--gin.Run.model=VALUE --gin.Run.train_steps=VALUE."
    )


def test_what_is_made_of_itself_is_refused():
    assert build_mistake("decay", "decay.rate = @decay()") == (
        "decay is made of itself: one of its parameters refers to it."
    )


def test_an_error_that_is_not_the_users_passes():
    with pytest.raises(TypeError, match="unexpected"):
        load().get("decay", colour="red")


# The resolved text.


RESOLVED = """\
# The resolved configuration: macros replaced, defaults written out.

Data.lengths = {'inputs': 4, 'targets': 2}
Data.split = 'train'

eval/Data.split = 'validation'

Model.dropout_rate = 0.0
Model.dtype = 'it\\'s "odd"\\n'
Model.emb_dim = 4
Model.layers = (1,)
Model.optimizer = @optimizer

Run.data = (@Data(), @eval/Data())
Run.model = @Model()
Run.train_steps = 10

decay.rate = 1e999
decay.steps = None

optimizer.beta = 0.9
optimizer.learning_rate = @decay()
"""

UNRESOLVED = """
STEPS = 10
Run:
  train_steps = %STEPS
  model = @Model()
  data = %DATA
DATA = (@Data(), @eval/Data())
optimizer.learning_rate = @decay()
Model.optimizer = @optimizer
Model.emb_dim = %DIM
DIM = 4
Model.layers = (1,)
Model.dtype = 'it\\'s "odd"\\n'
Data.lengths = {'inputs': %DIM, 'targets': 2}
eval/Data.split = 'validation'
decay.rate = 1e999
"""


def test_the_resolved_text_has_macros_replaced_parameters_sorted_and_defaults_written():
    assert load(UNRESOLVED).resolved() == RESOLVED


def test_the_resolved_text_is_a_gin_file_that_means_the_same():
    again = load(RESOLVED)
    assert again.resolved() == RESOLVED
    assert again.difference(RESOLVED) == load(UNRESOLVED).difference(RESOLVED) == []


def test_the_resolved_text_includes_the_roots_that_are_asked_for():
    assert load().resolved(["decay"]).endswith("\n\ndecay.rate = 1.0\ndecay.steps = None\n")


def test_differences_are_told_by_parameter_with_where_the_new_value_was_set():
    now = load(UNRESOLVED, "STEPS=20", "DIM=8", "Model.dropout_rate=0.5", "decay.rate=3.0")
    assert now.difference(RESOLVED) == [
        (
            "Data.lengths was {'inputs': 4, 'targets': 2} and is now {'inputs': 8, 'targets': 2} "
            "(set in a.gin, line 14)."
        ),
        "Model.dropout_rate was 0.0 and is now 0.5 (set by --gin.Model.dropout_rate=0.5).",
        "Model.emb_dim was 4 and is now 8 (set by --gin.DIM=8).",
        "Run.train_steps was 10 and is now 20 (set by --gin.STEPS=20).",
        "decay.rate was 1e999 and is now 3.0 (set by --gin.decay.rate=3.0).",
    ]
    ignored = ["Run.train_steps", "Model.*", "Data.lengths", "decay.rate"]
    assert now.difference(RESOLVED, ignored) == []


def test_ignored_parameters_may_differ_in_any_scope():
    assert load("eval/Data.split = 'test'").difference("eval/Data.split = 'validation'", ["Data.split"]) == []


def test_a_default_and_the_same_value_set_do_not_differ():
    assert load().difference("decay.rate = 1.0\ndecay.steps = None") == []
    assert load("decay.rate = 1.0").difference("") == []
    assert load("eval/Data.split = 'train'").difference("") == []


def test_a_value_no_longer_set_differs_from_its_default():
    assert load().difference("decay.rate = 2.0") == ["decay.rate was 2.0 and is now 1.0."]
    assert load().difference("Model.emb_dim = 2") == ["Model.emb_dim was 2 and is now not set."]


def test_a_stored_name_that_is_no_longer_known_is_a_difference():
    assert load().difference("Gone.size = 2\nModel.gone = 3") == [
        "Gone.size was 2 and is now not set.",
        "Model.gone was 3 and is now not set.",
    ]


def test_a_stored_text_that_cannot_be_read_is_named():
    with pytest.raises(UserError, match=r"^run/config.gin, line 1: cannot read 'Model.emb_dim =' as gin: "):
        load().difference("Model.emb_dim =\n", place="run/config.gin")


# The project's own table.


def test_the_table_holds_what_there_is():
    catalogue = Catalogue(CONFIGURABLES)
    for name in CONFIGURABLES:
        assert catalogue.target(name).__name__ == name and catalogue.parameters(name)


def test_loading_imports_only_the_modules_of_what_is_set_and_referred_to():
    program = "import sys, switch_t5.cli.configuration as c; c.Configuration.load(); print('jax' in sys.modules)"
    root = Path(config_files.__file__).resolve().parents[2]
    printed = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert printed.stdout == "False\n"
