"""SuperGLUE's texts and scores on rows made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from switch_t5.data.superglue import refers_to
from switch_t5.data.text_to_text import Example, get_task, mixtures, tasks
from switch_t5.errors import UserError

TEXTS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "super_glue_boolq_v102": (
        {"question": "is it wet", "passage": "Rain fell.", "idx": 3, "label": 1},
        [("boolq passage: Rain fell. question: is it wet", "True")],
    ),
    "super_glue_cb_v102": (
        {"premise": "He left.", "hypothesis": "He went.", "idx": 0, "label": 2},
        [("cb hypothesis: He went. premise: He left.", "neutral")],
    ),
    "super_glue_copa_v102": (
        {
            "premise": "It broke.",
            "choice1": "It fell.",
            "choice2": "It sang.",
            "question": "cause",
            "idx": 1,
            "label": 0,
        },
        [("copa choice1: It fell. choice2: It sang. premise: It broke. question: cause", "choice1")],
    ),
    "super_glue_multirc_v102": (
        {
            "paragraph": "<b>Sent 1: </b>A cat.<br><b>Sent 2: </b>A dog.",
            "question": "Who?",
            "answer": "A <b>cat</b>",
            "idx": {"paragraph": 0, "question": 1, "answer": 2},
            "label": 1,
        },
        [("multirc question: Who? answer: A cat paragraph: Sent 1: A cat. Sent 2: A dog.", "True")],
    ),
    "super_glue_record_v102": (
        {
            "passage": "Ann met Bob.\n@highlight\nBob ran\n@highlight\nAnn hid",
            "query": "@placeholder ran",
            "entities": ["Ann", "Bob"],
            "answers": ["Bob", "Robert"],
        },
        [
            ("record query: @placeholder ran entities: Ann, Bob passage: Ann met Bob. Bob ran. Ann hid", answer)
            for answer in ("Bob", "Robert")
        ],
    ),
    "super_glue_rte_v102": (
        {"premise": "A.", "hypothesis": "B.", "idx": 0, "label": -1},
        [("rte hypothesis: B. premise: A.", "<unk>")],
    ),
    "super_glue_wic_v102": (
        {
            "sentence1": "A bank.",
            "sentence2": "The bank.",
            "word": "bank",
            "start1": 2,
            "end1": 6,
            "start2": 4,
            "end2": 8,
            "label": 0,
        },
        [("wic sentence1: A bank. sentence2: The bank. word: bank", "False")],
    ),
    "super_glue_axb_v102": (
        {"sentence1": "A.", "sentence2": "B.", "label": 1},
        [("rte hypothesis: B. premise: A.", "not_entailment")],
    ),
    "super_glue_axg_v102": (
        {"premise": "A.", "hypothesis": "B.", "label": 0},
        [("rte hypothesis: B. premise: A.", "entailment")],
    ),
    "dpr_v001_simple": (
        {
            "sentence": "The bee stung the shepherd because he was there.",
            "pronoun": "he",
            "candidates": ["a", "b"],
            "label": 1,
        },
        [("wsc: The bee stung the shepherd because *he* was there.", "b")],
    ),
}
WSC = {
    "text": "Mark told Pete many lies about himself , which he believed.",
    "span1_text": "Pete",
    "span2_text": "he",
    "span1_index": 2,
    "span2_index": 9,
    "label": 1,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_row_becomes_this_text(name: str) -> None:
    row, expected = TEXTS[name]
    task = get_task(name)
    task.check(row, labelled=row.get("label") != -1)
    assert [(example.inputs, example.targets) for example in task.examples(row)] == expected
    assert task.inputs(row) == expected[0][0]


def test_wsc_stars_its_pronoun_and_trains_on_true_candidates() -> None:
    text = "wsc: Mark told Pete many lies about himself , which *he* believed."
    for row, trained in ((WSC, [(text, "Pete")]), (WSC | {"label": 0}, [])):
        examples = get_task("super_glue_wsc_v102_simple_train").examples(row)
        assert [(example.inputs, example.targets) for example in examples] == trained
        (example,) = get_task("super_glue_wsc_v102_simple_eval").examples(row)
        assert (example.inputs, example.targets) == (text, "Pete")


@pytest.mark.parametrize(
    ("text", "index", "pronoun", "starred"),
    [
        ("Ann  saw Bob , but he ran .", 6, "he", "Ann  saw Bob , but *he* ran ."),
        ("Ann saw Bob before he, too, ran.", 4, "he", "Ann saw Bob before *he*, too, ran."),
        (
            "The boy continued to whip the pony , and eventually the pony threw him over. John laughed out quite loud. "
            '"Good for him," he said. ',
            23,
            "him",
            "The boy continued to whip the pony , and eventually the pony threw him over. John laughed out quite loud. "
            '"Good for *him* ," he said.',
        ),
        (
            "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the magic pebble in an "
            "iron safe . Some day they might want to use it , but really for now, what more could they wish for?",
            29,
            "it",
            "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the magic pebble in an "
            "iron safe . Some day they might want to use *it* , but really for now, what more could they wish for?",
        ),
    ],
    ids=["two spaces", "a comma at the pronoun", "a text that T5 mends", "an index that T5 mends"],
)
def test_wsc_texts_are_t5s_where_words_and_index_are_odd(text: str, index: int, pronoun: str, starred: str) -> None:
    row = WSC | {"text": text, "span2_index": index, "span2_text": pronoun}
    (example,) = get_task("super_glue_wsc_v102_simple_eval").examples(row)
    assert example.inputs == f"wsc: {starred}"


@pytest.mark.parametrize(
    ("sentence", "starred"),
    [
        ("Bob asked Tom if he can lend him money, he said.", "Bob asked Tom if *he* can lend him money, he said."),
        ("Bob saw what Tom knew, he, not Ann.", "Bob saw what Tom knew, *he*, not Ann."),
        ("he left Bob and he.", "he left Bob and *he*."),
        ("Bob says he's sure that he ran.", "Bob says he's sure that *he* ran."),
        ("Is Bob who he? No, the shepherd.", "Is Bob who he? No, the shepherd."),
    ],
    ids=["the first", "before a comma", "not at the start", "not before an apostrophe", "not before a question mark"],
)
def test_dpr_stars_the_first_pronoun_that_t5_sees(sentence: str, starred: str) -> None:
    row = {"sentence": sentence, "pronoun": "he", "candidates": ["Bob", "Tom"], "label": 0}
    (example,) = get_task("dpr_v001_simple").examples(row)
    assert (example.inputs, example.targets) == (f"wsc: {starred}", "Bob")


@pytest.mark.parametrize(
    ("candidate", "prediction", "same"),
    [
        ("Bob Smith", "Smith", 1),
        ("the old man", "man", 1),
        ("The man", "that man", 1),
        ("Bob's dog", "dog", 0),
        ("Bob", "Ann", 0),
        ("Bob", "", -1),
        ("Bob", "the", -1),
        ("cat", "big cat", 1),
    ],
)
def test_what_a_prediction_refers_to(candidate: str, prediction: str, same: int) -> None:
    assert refers_to(candidate, prediction) == same


def scores(name: str, rows: list[dict[str, Any]], predictions: list[str]) -> dict[str, float]:
    task = get_task(name)
    found = task.metrics(task.to_evaluate(rows), predictions)
    return {key: round(value, 4) for key, value in found.items()}


def test_accuracy_counts_what_is_no_label_as_wrong() -> None:
    rows = [{"passage": "p", "question": "q", "label": label} for label in (1, 0, 1, 0)]
    assert scores("super_glue_boolq_v102", rows, ["True", " False ", "yes", ""]) == {"accuracy": 50.0}


def test_commitment_bank_has_the_mean_of_three_f1() -> None:
    rows = [{"premise": "p", "hypothesis": "h", "label": label} for label in (0, 0, 1, 2)]
    said = ["entailment", "contradiction", "contradiction", "?"]
    # entailment: precision 1, recall 1/2; contradiction: 1/2 and 1; neutral: never said.
    assert scores("super_glue_cb_v102", rows, said) == {
        "mean_3class_f1": round(100 * (2 / 3 + 2 / 3 + 0) / 3, 4),
        "accuracy": 50.0,
    }


def test_multirc_has_f1_over_answers_and_exact_match_of_questions() -> None:
    rows = [
        {
            "paragraph": "p",
            "question": f"q{question}",
            "answer": "a",
            "idx": {"paragraph": 0, "question": question, "answer": answer},
            "label": label,
        }
        for question, answer, label in ((0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0))
    ]
    # Right, right; right, said True; no label, which is wrong and so a True.
    said = ["True", "False", "True", "True", "maybe"]
    assert scores("super_glue_multirc_v102", rows, said) == {
        "f1": round(100 * 2 * 2 / (2 + 4), 4),
        "exact_match": round(100 / 3, 4),
    }


def test_record_takes_the_best_answer_once_for_each_query() -> None:
    rows = [
        {"passage": "p", "query": "q1", "entities": ["x"], "answers": ["the Bob Smith", "Robert"]},
        {"passage": "p", "query": "q2", "entities": ["x"], "answers": ["Ann Lee"]},
    ]
    # "Bob Smith." is the first once normalized; "Ann" has precision 1 and recall 1/2.
    assert scores("super_glue_record_v102", rows, ["bob smith.", "Ann"]) == {
        "em": 50.0,
        "f1": round(100 * (1 + 2 / 3) / 2, 4),
    }


def test_wsc_compares_the_referent_with_the_label() -> None:
    rows = [WSC, WSC | {"label": 0}, WSC | {"label": 0}, WSC]
    assert scores("super_glue_wsc_v102_simple_eval", rows, ["Pete", "Pete", "Mark", "Mark"]) == {"accuracy": 50.0}
    # An empty prediction is wrong, whether the candidate is meant or not.
    assert scores("super_glue_wsc_v102_simple_eval", rows, ["", "the", "", "Pete"]) == {"accuracy": 25.0}


def test_dpr_wants_the_candidate_to_the_letter() -> None:
    row = {"sentence": "Bob saw that he won.", "pronoun": "he", "candidates": ["Bob Lee", "Tom"], "label": 0}
    assert scores("dpr_v001_simple", [row] * 3, ["Bob Lee", "Bob", "Tom"]) == {"accuracy": round(100 / 3, 4)}


def test_record_asks_once_for_each_number_of_a_query() -> None:
    row = {"passage": "p", "query": "q", "entities": ["x"], "answers": ["x", "y"]}
    rows = [row | {"idx": {"passage": 0, "query": number}} for number in (4, 5)]
    asked = get_task("super_glue_record_v102").to_evaluate(rows)
    assert [example.row["idx"]["query"] for example in asked] == [4, 5]


def test_the_mixture_has_t5s_weights() -> None:
    weights = mixtures()["super_glue_v102_proportional"].weights
    assert sum(weights.values()) == 1322 + 259 + 9427 + 250 + 400 + 27243 + 138854 + 2490 + 5428
    assert set(weights) <= set(tasks())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"passage": "p", "label": 1}, "lacks the field 'question' of super_glue/boolq; it has 'passage', 'label'$"),
        (
            {"passage": "p", "qestion": "q", "label": 1},
            r"it has 'passage', 'qestion', 'label' \(did you mean 'qestion'\?\)$",
        ),
        (
            {"passage": "p", "question": "q", "label": 2},
            r"has the label 2; those of super_glue/boolq are \[0, 1\] or -1",
        ),
        ({"passage": "p", "question": "q", "label": "maybe"}, "has the label 'maybe'; those of super_glue/boolq are"),
    ],
)
def test_a_malformed_row_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task("super_glue_boolq_v102").check(row)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("super_glue_wsc_v102_simple_eval", WSC | {"span2_index": 99}, "super_glue/wsc is (list index out of range)"),
        (
            "super_glue_wsc_v102_simple_eval",
            WSC | {"span2_index": 0},
            "super_glue/wsc is (the word at span2_index is 'Mark', not 'he')",
        ),
        (
            "super_glue_record_v102",
            {"passage": "p", "query": "q", "entities": 7, "answers": ["x"]},
            "super_glue/record is (its 'entities' is not a list of texts)",
        ),
        (
            "super_glue_multirc_v102",
            {
                "question": 1,
                "answer": "a",
                "paragraph": "p",
                "idx": {"paragraph": 0, "question": 1, "answer": 2},
                "label": 1,
            },
            "super_glue/multirc is (its 'question' is not a text but of type int)",
        ),
        (
            "super_glue_record_v102",
            {"passage": "p", "query": "q", "entities": ["Paris"], "answers": "Paris"},
            "super_glue/record is (its 'answers' is not a list of texts)",
        ),
        (
            "super_glue_axb_v102",
            {"sentence1": 7, "sentence2": "b", "label": 1},
            "super_glue/axb is (its 'sentence1' is not a text but of type int)",
        ),
        (
            "super_glue_wsc_v102_simple_train",
            WSC | {"span1_text": 7},
            "super_glue/wsc is (its 'span1_text' is not a text but of type int)",
        ),
        (
            "super_glue_boolq_v102",
            {"question": "q", "passage": ["p"], "label": 1},
            "super_glue/boolq is (its 'passage' is not a text but of type list)",
        ),
    ],
)
def test_a_row_of_other_kinds_is_refused(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        get_task(name).check(row)
    assert str(caught.value) == f"is not laid out as {message}"


@pytest.mark.parametrize(
    ("name", "index", "wanted"),
    [
        ("super_glue_multirc_v102", 5, "a record with the numbers paragraph, question, answer"),
        ("super_glue_multirc_v102", {"paragraph": 1}, "a record with the numbers paragraph, question, answer"),
        ("super_glue_record_v102", [1], "a record with the numbers passage, query"),
        ("super_glue_boolq_v102", [1, 2], "a number"),
    ],
)
def test_an_index_of_another_layout_is_refused(name: str, index: Any, wanted: str) -> None:
    task = get_task(name)
    with pytest.raises(UserError) as caught:
        task.check(TEXTS[name][0] | {"idx": index})
    assert str(caught.value) == f"has the idx {index!r}; in {task.dataset} it is {wanted}"


@pytest.mark.parametrize("row", [TEXTS["super_glue_rte_v102"][0], TEXTS["super_glue_rte_v102"][0] | {"label": None}])
def test_only_test_rows_may_lack_a_label(row: dict[str, Any]) -> None:
    task = get_task("super_glue_rte_v102")
    task.check(row, labelled=False)
    with pytest.raises(UserError, match=r"has no answer that super_glue_rte|(lacks|has null in) the field 'label'"):
        task.check(row)


def test_an_example_keeps_its_row() -> None:
    row = TEXTS["super_glue_rte_v102"][0]
    assert get_task("super_glue_rte_v102").examples(row) == [Example("rte hypothesis: B. premise: A.", "<unk>", row)]
