"""Local copies in every layout to rows, and rows back out of the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from switch_t5.cli.main import main
from switch_t5.data.prepare import prepare
from switch_t5.data.rows import FOLDER_VARIABLE, read_rows
from switch_t5.data.text_to_text import get_task
from switch_t5.errors import ConfigError, UserError

CB = [
    {"premise": "He left.", "hypothesis": "He went.", "idx": 0, "label": 1},
    {"premise": "It is.", "hypothesis": "It was.", "idx": 1, "label": 0},
]


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that tasks read."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "data"


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_arrow(path: Path, records: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), path)


def in_words(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"label": ("entailment", "contradiction", "neutral")[row["label"]]}


@pytest.mark.parametrize(
    "layout",
    ["cb/validation-00000-of-00001.parquet", "super_glue/cb/validation/data-00000-of-00001.arrow", "CB/val.jsonl"],
)
def test_every_layout_gives_the_same_rows(layout: str, output: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy" / layout
    write = {".parquet": write_parquet, ".arrow": write_arrow, ".jsonl": write_lines}[path.suffix]
    write(path, [in_words(row) for row in CB] if path.suffix == ".jsonl" else CB)
    (done,) = prepare("super_glue", tmp_path / "copy", output)
    assert (done.dataset, done.split, done.rows) == ("super_glue/cb", "validation", 2)
    assert list(read_rows(get_task("super_glue_cb_v102"), "validation")) == CB


def test_the_benchmarks_nested_files_become_flat_rows(output: Path, tmp_path: Path) -> None:
    copy = tmp_path / "downloads"
    answers = [{"text": "Ann", "label": 1, "idx": 0}, {"text": "Bob", "label": 0, "idx": 1}]
    questions = [{"question": "Who?", "answers": answers, "idx": 4}]
    write_lines(copy / "MultiRC/train.jsonl", [{"idx": 7, "passage": {"text": "Ann ran.", "questions": questions}}])
    text = "Ann met Bob. Ann ran."
    spans = [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 13, "end": 15}]
    query = {"query": "@placeholder ran.", "answers": [{"text": "Ann", "start": 0, "end": 2}] * 2, "idx": 3}
    passage = {"text": text, "entities": spans}
    write_lines(copy / "ReCoRD/val.jsonl", [{"idx": 2, "passage": passage, "qas": [query]}])
    target = {"span1_index": 0, "span1_text": "Mark", "span2_index": 2, "span2_text": "he"}
    write_lines(copy / "WSC/train.jsonl", [{"text": "Mark said he ran .", "target": target, "idx": 0, "label": True}])
    write_lines(copy / "BoolQ/train.jsonl", [{"question": "q", "passage": "p", "idx": 0, "label": False}])
    write_lines(copy / "AX-b/AX-b.jsonl", [{"sentence1": "A", "sentence2": "B", "idx": 0, "label": "not_entailment"}])
    prepare("super_glue", copy, output)

    multirc = read_rows(get_task("super_glue_multirc_v102"), "train")
    assert [(row["answer"], row["label"]) for row in multirc] == [("Ann", 1), ("Bob", 0)]
    assert multirc[1]["idx"] == {"paragraph": 7, "question": 4, "answer": 1}
    (record,) = read_rows(get_task("super_glue_record_v102"), "validation")
    assert record["entities"] == ["Ann", "Bob"]
    assert record["answers"] == ["Ann"]
    assert record["idx"] == {"passage": 2, "query": 3}
    wsc = get_task("super_glue_wsc_v102_simple_train")
    assert wsc.examples(read_rows(wsc, "train")[0])[0].inputs == "wsc: Mark said *he* ran ."
    assert read_rows(get_task("super_glue_boolq_v102"), "train")[0]["label"] == 0
    assert read_rows(get_task("super_glue_axb_v102"), "test")[0]["label"] == 1


def test_names_of_other_publishers_are_mended(output: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "boolq/train.parquet", [{"question": "q", "passage": "p", "answer": True}])
    write_parquet(tmp_path / "rte/train.parquet", [{"sentence1": "A", "sentence2": "B", "label": 1, "idx": 0}])
    prepare("super_glue", tmp_path, output)
    assert read_rows(get_task("super_glue_boolq_v102"), "train")[0]["label"] == 1
    assert read_rows(get_task("super_glue_rte_v102"), "train")[0]["premise"] == "A"


def test_the_two_validation_splits_of_mnli_are_kept_apart(output: Path, tmp_path: Path) -> None:
    row = {"premise": "A", "hypothesis": "B", "label": 0, "idx": 0}
    for split in ("validation_matched", "validation_mismatched"):
        write_parquet(tmp_path / f"mnli/{split}-00000-of-00001.parquet", [row | {"premise": split}])
    prepare("glue", tmp_path, output)
    rows = read_rows(get_task("glue_mnli_mismatched_v002"), "validation")
    assert [row["premise"] for row in rows] == ["validation_mismatched"]


def test_absent_data_is_told_of_in_one_sentence(output: Path) -> None:
    from switch_t5.data.tensorflow_runtime import tfds

    with pytest.raises(UserError) as error:
        read_rows(get_task("super_glue_copa_v102"), "train")
    # TFDS reads TFDS_DATA_DIR once, when it is imported.
    folders: Any = tfds.core.utils.file_utils.list_data_dirs()  # pyright: ignore[reportAttributeAccessIssue]
    searched = " or ".join(f"{folder}/super_glue/copa/1.0.2" for folder in folders)
    assert str(error.value) == (
        f"The data of super_glue_copa_v102 is not in {output}/super_glue/copa or {searched}: make it of a local "
        "copy by `switch-t5 data prepare --dataset=super_glue --input=FOLDER`, or set SWITCH_T5_DATA_DIR or "
        "TFDS_DATA_DIR."
    )


def test_a_split_that_a_task_lacks_is_refused(output: Path) -> None:
    with pytest.raises(ConfigError, match="is 'train', but super_glue_axb_v102 has test"):
        read_rows(get_task("super_glue_axb_v102"), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"premise": "A"\n', r"train.jsonl:1 is not JSON: Expecting ',' delimiter at column 1"),
        (b'{"premise": "A", "hypothesis": "B", "label": "maybe"}\n', "train.jsonl:1 has the label 'maybe'"),
        (b'\n\n{"premise": "A", "label": 0}\n', "train.jsonl:1 is empty"),
        (b'{"premise": "\xff"}\n', "train.jsonl:1 is not UTF-8 at byte 14"),
        (b"[]\n", "train.jsonl:1 must be a JSON object, got list"),
        (b'{"premise": "\\ud800", "hypothesis": "B", "label": 0}\n', "train.jsonl:1 has half of a surrogate pair"),
        (b'{"premise": "A", "hypothesis": "B", "label": NaN}\n', "train.jsonl:1 .* NaN is no number of JSON"),
        (b"[" * 100_000 + b"\n", "train.jsonl:1 is not JSON that can be read"),
        (b"1" * 5000 + b"\n", "train.jsonl:1 is not JSON that can be read"),
        (b'{"premise": null, "hypothesis": "B", "label": 0}\n', "train.jsonl:1 has null in the field 'premise'"),
        (b"\n", "The train split of super_glue/cb has no row in .*train.jsonl."),
    ],
)
def test_a_malformed_line_is_named_and_nothing_written(
    content: bytes, message: str, output: Path, tmp_path: Path
) -> None:
    (tmp_path / "CB").mkdir()
    (tmp_path / "CB" / "train.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare("super_glue", tmp_path, output)
    assert not output.exists()


def refused(family: str, source: Path, output: Path) -> str:
    """The sentence that refuses a copy."""
    with pytest.raises(UserError) as caught:
        prepare(family, source, output)
    return str(caught.value)


BAD = CB[0] | {"label": 7}
IS_BAD = "has the label 7; those of super_glue/cb are [0, 1, 2] or -1 for unknown"
LEFT_OUT = "; --skip_malformed leaves such records out."


def test_a_bad_row_of_a_table_is_named_by_its_number(output: Path, tmp_path: Path) -> None:
    path = tmp_path / "cb/train.parquet"
    write_parquet(path, [CB[0], BAD])
    assert refused("super_glue", tmp_path, output) == f"{path}:2 {IS_BAD}{LEFT_OUT}"


def test_text_of_a_table_that_is_not_utf8_is_named(output: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy/cb/train.parquet"
    rows = [{"premise": premise, "hypothesis": b"B", "label": 0} for premise in (b"A", b"caf\xe9")]
    write_parquet(path, rows)
    assert refused("super_glue", tmp_path / "copy", output) == f"{path}:2 is not UTF-8 at byte 4{LEFT_OUT}"
    # A column that says it is text, and is not: Arrow itself would read none of it.
    texts = pyarrow.array([b"A", b"caf\xe9"]).view(pyarrow.utf8())
    table = pyarrow.table({"premise": texts, "hypothesis": ["B", "B"], "label": [0, 0]})
    parquet.write_table(table, path)
    assert refused("super_glue", tmp_path / "copy", output) == f"{path}:2 is not UTF-8 at byte 4{LEFT_OUT}"
    (done,) = prepare("super_glue", tmp_path / "copy", output, skip_malformed=True)
    assert (done.rows, len(done.malformed)) == (1, 1)
    spans = pyarrow.ListArray.from_arrays([0, 1], pyarrow.StructArray.from_arrays([texts[1:]], ["text"]))
    parquet.write_table(pyarrow.table({"premise": ["A"], "hypothesis": ["B"], "label": [0], "spans": spans}), path)
    told = f"{path} has text inside of lists or records that is not UTF-8."
    assert refused("super_glue", tmp_path / "copy", output) == told


def test_malformed_rows_are_left_out_by_choice_and_counted(output: Path, tmp_path: Path) -> None:
    path = tmp_path / "cb/train.jsonl"
    write_lines(path, [CB[0], BAD, CB[1]])
    path.write_text(path.read_text() + "\n{\n")
    (done,) = prepare("super_glue", tmp_path, output, skip_malformed=True)
    assert done.rows == 2
    assert done.malformed[0] == f"{path}:2 {IS_BAD}"
    assert [sentence.split(" ")[0] for sentence in done.malformed] == [f"{path}:2", f"{path}:4", f"{path}:5"]
    assert list(read_rows(get_task("super_glue_cb_v102"), "train")) == CB


def test_a_bad_row_of_json_lines_is_named_by_its_line(output: Path, tmp_path: Path) -> None:
    path = tmp_path / "cb/train.jsonl"
    write_lines(path, [*CB[:2], BAD])
    assert refused("super_glue", tmp_path, output) == f"{path}:3 {IS_BAD}{LEFT_OUT}"


def test_a_bad_row_of_a_prepared_file_is_named_by_its_line(output: Path) -> None:
    path = output / "super_glue/cb/train.jsonl"
    write_lines(path, [*CB[:2], BAD])
    with pytest.raises(UserError) as caught:
        read_rows(get_task("super_glue_cb_v102"), "train")
    assert str(caught.value) == f"{path}:3 {IS_BAD}."
    path.write_text(f"{json.dumps(CB[0])}\n\n[]\n")
    with pytest.raises(UserError) as caught:
        read_rows(get_task("super_glue_cb_v102"), "train")
    assert str(caught.value) == f"{path}:2 is empty."


def test_a_byte_order_mark_and_a_whole_surrogate_pair_are_read(output: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy/cb/train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('\ufeff{"premise": "\\ud83d\\ude00", "hypothesis": "B", "label": 0}\n', encoding="utf-8")
    prepare("super_glue", tmp_path / "copy", output)
    assert read_rows(get_task("super_glue_cb_v102"), "train")[0]["premise"] == "\U0001f600"


def test_nothing_is_written_of_a_dataset_with_a_bad_split(output: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "CB/train.jsonl", CB)
    write_lines(tmp_path / "CB/val.jsonl", [CB[0], BAD])
    assert refused("super_glue", tmp_path, output) == f"{tmp_path}/CB/val.jsonl:2 {IS_BAD}{LEFT_OUT}"
    assert not output.exists()


@pytest.mark.parametrize(
    "error", [KeyError("text"), TypeError("text"), IndexError("text"), AttributeError("text"), ValueError("text")]
)
def test_a_record_of_another_layout_is_named(
    error: Exception, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows_of(config: str, record: Any) -> Iterator[dict[str, Any]]:
        yield CB[0]
        raise error

    monkeypatch.setattr("switch_t5.data.superglue_files.rows_of", rows_of)
    write_lines(tmp_path / "CB/train.jsonl", CB)
    message = f"{tmp_path}/CB/train.jsonl:1 is not laid out as super_glue/cb is (at {error}){LEFT_OUT}"
    assert refused("super_glue", tmp_path, output) == message


WINOGRANDE = {"sentence": "_ ran.", "option1": "Ann", "option2": "Bob", "answer": "1"}
QUESTION = {"question": "Who?", "answer": {"value": "Ann", "aliases": []}}


@pytest.mark.parametrize(
    ("dataset", "row", "folders", "file"),
    [
        ("winogrande", WINOGRANDE, ("winogrande_xl", "winogrande_xs"), "train-00000-of-00001.parquet"),
        ("winogrande", WINOGRANDE, ("winogrande_xl", "winogrande_xs"), "train/data-00000-of-00001.parquet"),
        ("trivia_qa", QUESTION, ("rc", "unfiltered.nocontext"), "train-00000-of-00001.parquet"),
        ("cnn_dailymail", {"article": "A", "highlights": "B"}, ("1.0.0", "3.0.0"), "train-00000-of-00003.parquet"),
        ("super_glue/cb", CB[0], ("cb/1.0.2/a1", "cb/1.0.3/b2"), "super_glue-train.parquet"),
        ("super_glue/cb", CB[0], ("one/cb", "two/cb"), "train/part-0.parquet"),
    ],
)
def test_versions_of_a_dataset_are_not_merged(
    dataset: str, row: dict[str, Any], folders: tuple[str, str], file: str, output: Path, tmp_path: Path
) -> None:
    family = dataset.split("/")[0]
    source = tmp_path / family
    for folder in folders:
        write_parquet(source / folder / file, [row])
    message = f"The train split of {dataset} is both in {source}/{folders[0]} and in {source}/{folders[1]}"
    assert refused(family, source, output) == f"{message}: give one of them as --input."
    assert not output.exists()
    (done,) = prepare(family, source / folders[1], output)
    assert (done.dataset, done.split, done.rows) == (dataset, "train", 1)


def test_a_copy_within_a_dataset_is_not_merged(output: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "cb/train.jsonl", CB)
    write_lines(tmp_path / "cb/train/part-0.jsonl", CB)
    message = f"The train split of super_glue/cb is both in {tmp_path}/cb and in {tmp_path}/cb/train"
    assert refused("super_glue", tmp_path, output) == f"{message}: keep only one of them."


def test_the_parts_of_a_split_are_joined(output: Path, tmp_path: Path) -> None:
    for part, row in enumerate(CB):
        write_lines(tmp_path / f"cb/train/part-{part}.jsonl", [row])
        write_lines(tmp_path / f"cb/validation-0000{part}-of-00002.jsonl", [row])
    done = prepare("super_glue", tmp_path, output)
    assert {split.split: split.rows for split in done} == {"train": 2, "validation": 2}
    assert list(read_rows(get_task("super_glue_cb_v102"), "train")) == CB


def test_an_empty_line_between_records_is_malformed_and_one_at_the_end_is_none(output: Path, tmp_path: Path) -> None:
    path = tmp_path / "cb/train.jsonl"
    write_lines(path, [CB[0]])
    text = path.read_text().rstrip()
    path.write_text(f"{text}\n \n{text}\n\n\n")
    with pytest.raises(UserError) as caught:
        prepare("super_glue", tmp_path, output)
    assert str(caught.value) == f"{path}:2 is empty{LEFT_OUT}"
    (done,) = prepare("super_glue", tmp_path, output, skip_malformed=True)
    assert (done.rows, done.malformed) == (2, (f"{path}:2 is empty",))


def test_the_command_says_how_many_records_it_left_out(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cb/train.jsonl"
    write_lines(path, [BAD, CB[0], BAD])
    command = ["data", "prepare", "--dataset=super_glue", f"--input={tmp_path}"]
    assert main(command) == 2
    assert main([*command, "--skip_malformed"]) == 0
    said = capsys.readouterr()
    assert said.err.endswith(f"2 malformed records left out, the first: {path}:1 {IS_BAD}.\n")
    assert said.out == f"super_glue/cb train: 1 rows in {output}/super_glue/cb/train.jsonl\n"


def test_a_split_of_malformed_rows_alone_is_refused_and_an_older_one_stays(output: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "copy/cb/train.jsonl", CB)
    prepare("super_glue", tmp_path / "copy", output)
    write_lines(tmp_path / "copy/cb/train.jsonl", [BAD])
    with pytest.raises(
        UserError, match=r"^The train split of super_glue/cb has no row in .*, but malformed ones such as .*:1 has"
    ):
        prepare("super_glue", tmp_path / "copy", output, skip_malformed=True)
    assert list(read_rows(get_task("super_glue_cb_v102"), "train")) == CB


@pytest.mark.parametrize("folders", [("wsc", "wsc.fixed"), ("wsc.fixed",)])
def test_the_fixed_winograd_schemas_are_preferred(folders: tuple[str, ...], output: Path, tmp_path: Path) -> None:
    row = {"span1_index": 0, "span1_text": "Mark", "span2_index": 2, "span2_text": "he", "idx": 0, "label": 1}
    for folder in folders:
        write_parquet(tmp_path / folder / "train-00000-of-00001.parquet", [row | {"text": f"Mark said he {folder}"}])
    (done,) = prepare("super_glue", tmp_path, output)
    assert (done.dataset, done.rows) == ("super_glue/wsc", 1)
    (read,) = read_rows(get_task("super_glue_wsc_v102_simple_train"), "train")
    assert read["text"] == "Mark said he wsc.fixed"


@pytest.mark.parametrize(
    "layout",
    [
        "plain_text/{split}_r{number}-00000-of-00001.parquet",
        "{split}_r{number}-00000-of-00001.parquet",
        "{split}_r{number}/data-00000-of-00001.parquet",
        "r{number}/{split}.parquet",
    ],
)
def test_the_rounds_of_anli_are_kept_apart(layout: str, output: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        for split in ("train", "dev", "test"):
            row = {"uid": "u", "premise": "A", "hypothesis": f"{split} {number}", "label": 0, "reason": ""}
            write_parquet(tmp_path / "anli" / layout.format(split=split, number=number), [row])
    assert len(prepare("anli", tmp_path / "anli", output)) == 9
    for number in (1, 2, 3):
        task = get_task(f"anli_r{number}")
        read = {split: [row["hypothesis"] for row in read_rows(task, split)] for split in task.splits}
        assert read == {"train": [f"train {number}"], "validation": [f"dev {number}"], "test": [f"test {number}"]}


def test_what_cannot_be_prepared_is_refused(output: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no dataset called 'superglue'\. Did you mean 'super_glue'\?"):
        prepare("superglue", tmp_path, output)
    with pytest.raises(UserError, match=r"has no \.parquet, \.arrow, \.jsonl, \.json file of a split of glue/cola"):
        prepare("glue", tmp_path, output)
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"train\.parquet cannot be read"):
        prepare("glue", tmp_path, output)
