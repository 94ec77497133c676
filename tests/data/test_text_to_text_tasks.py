"""GLUE and the other tasks of the paper's table 5, on rows made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from switch_t5.data.metrics_question_answering import normalized, word_f1
from switch_t5.data.question_answering import padded_punctuation
from switch_t5.data.text_to_text import get_task, tasks
from switch_t5.errors import UserError
from switch_t5.inference.task_scores import score

PAIR = {"sentence1": "A.", "sentence2": "B.", "idx": 0}
TEXTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "glue_cola_v002": ({"sentence": "A.", "label": 1}, "cola sentence: A.", "acceptable"),
    "glue_sst2_v002": ({"sentence": "A.", "label": 0}, "sst2 sentence: A.", "negative"),
    "glue_mrpc_v002": (PAIR | {"label": 1}, "mrpc sentence1: A. sentence2: B.", "equivalent"),
    "glue_qqp_v002": ({"question1": "A", "question2": "B", "label": 1}, "qqp question1: A question2: B", "duplicate"),
    "glue_stsb_v002": (PAIR | {"label": 2.57}, "stsb sentence1: A. sentence2: B.", "2.6"),
    "glue_mnli_v002": (
        {"premise": "A", "hypothesis": "B", "label": 1},
        "mnli hypothesis: B premise: A",
        "neutral",
    ),
    "glue_qnli_v002": ({"question": "A", "sentence": "B", "label": 0}, "qnli question: A sentence: B", "entailment"),
    "glue_rte_v002": (PAIR | {"label": 1}, "rte sentence1: A. sentence2: B.", "not_entailment"),
    "squad_v010_allanswers": (
        {"question": "Who?", "context": "It's Ann.", "answers": {"text": ["Ann.", "Ann"], "answer_start": [5, 5]}},
        "question: Who ? context: It ' s Ann . ",
        "Ann . ",
    ),
    "anli_r3": ({"premise": "A", "hypothesis": "B", "label": 2}, "anli hypothesis: B premise: A", "contradiction"),
    "arc_easy": (
        {"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        "arc choice1: x choice2: y question: Q",
        "choice2",
    ),
    "winogrande": (
        {"sentence": "_ ran", "option1": "Ann", "option2": "Bob", "answer": "2"},
        "winogrande option1: Ann option2: Bob sentence: _ ran",
        "option2",
    ),
    "natural_questions_open": ({"question": "who", "answer": ["Ann", "A"]}, "nq question: who", "Ann"),
    "web_questions_open": ({"question": "who", "answers": ["Ann"]}, "wq question: who", "Ann"),
    "trivia_qa_open": (
        {"question": "who", "answer": {"value": "Ann", "aliases": ["Ann", "Annie"]}},
        "trivia_qa question: who",
        "Ann",
    ),
    "cnn_dailymail_v002": ({"article": "Long.", "highlights": "Short one."}, "summarize: Long.", "Short one."),
    "xsum_v110": ({"document": "Long.", "summary": "Short one."}, "summarize: Long.", "Short one."),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_row_becomes_this_text(name: str) -> None:
    row, inputs, targets = TEXTS[name]
    task = get_task(name)
    task.check(row)
    (example,) = task.examples(row)
    assert (example.inputs, example.targets) == (inputs, targets)


def test_every_task_has_metrics_that_a_perfect_prediction_satisfies() -> None:
    for name, (row, _, _) in TEXTS.items():
        task = get_task(name)
        if name in ("glue_cola_v002", "glue_stsb_v002"):  # Correlations need more than one value.
            continue
        examples = task.examples(row)
        found = task.metrics(examples, [example.targets for example in examples])
        positive_only = {"f1"} if row.get("label") == 0 else set()
        assert {round(value) for key, value in found.items() if key not in positive_only} == {100}, name


def scores(name: str, rows: list[dict[str, Any]], predictions: list[str]) -> dict[str, float]:
    task = get_task(name)
    return {key: round(value, 3) for key, value in task.metrics(task.to_evaluate(rows), predictions).items()}


def test_cola_has_matthews_correlation() -> None:
    rows = [{"sentence": "s", "label": label} for label in (1, 1, 0, 0)]
    # Of 4 rows 3 are right. Of three labels, no label being one, 2, 2, 0 are to be said and 2, 1, 1 are:
    # (3 x 4 - 2 x 2 - 2 x 1) / sqrt((16 - 4 - 4) (16 - 4 - 1 - 1)).
    said = ["acceptable", "acceptable", "unacceptable", "nonsense"]
    assert scores("glue_cola_v002", rows, said) == {"matthews_corrcoef": round(100 * 6 / 80**0.5, 3)}


def test_similarities_correlate_by_value_and_by_rank() -> None:
    rows = [PAIR | {"label": label} for label in (0.0, 1.0, 2.0, 5.0)]
    assert scores("glue_stsb_v002", rows, ["1.0", "2.0", "3.0", "5.0"]) == {
        # Deviations of -2, -1, 0, 3 and of -1.75, -0.75, 0.25, 2.25.
        "pearson_corrcoef": round(100 * 11 / (14 * 8.75) ** 0.5, 3),
        "spearman_corrcoef": 100.0,
    }
    assert scores("glue_stsb_v002", rows, ["high"] * 4) == {"pearson_corrcoef": 0, "spearman_corrcoef": 0}


def test_squads_answers_are_normalized() -> None:
    assert normalized("The  Cat's, a hat!") == "cats hat"
    assert word_f1("old cat", "old dog") == 0.5
    assert padded_punctuation("a_b, c-d") == "a_b , c - d"
    assert padded_punctuation("Caf\u00e9 \u2013 5\n%\u00a0x") == "Caf \u00e9 \u2013 5 % \u00a0 x"
    row = TEXTS["squad_v010_allanswers"][0]
    assert scores("squad_v010_allanswers", [row], ["the ann"]) == {"em": 100, "f1": 100}


def test_closed_book_questions_take_any_alias() -> None:
    row = TEXTS["trivia_qa_open"][0]
    assert scores("trivia_qa_open", [row, row], ["annie", "Bob"]) == {"em": 50, "f1": 50}
    row = {"question": "who", "answer": ["Spider-Man"]}
    # Punctuation is a space there, and nothing at all for SQuAD.
    assert scores("natural_questions_open", [row, row], ["the spider man", "man"]) == {"em": 50, "f1": 83.333}
    assert normalized("Spider-Man") == "spiderman"


def test_rouge_of_a_known_pair() -> None:
    row = {"article": "x", "highlights": "the cat sat"}
    # Of three words two are shared; of two pairs one.
    assert scores("cnn_dailymail_v002", [row], ["the cat ran"]) == {
        "rouge1": round(200 / 3, 3),
        "rouge2": 50.0,
        "rougeLsum": round(200 / 3, 3),
    }


def test_rouge_takes_a_full_stop_between_spaces_for_a_sentences_end() -> None:
    row = {"document": "x", "summary": "a b . c d"}
    # The sentences are the same in another order; of three pairs of words two are shared.
    assert scores("xsum_v110", [row], ["c d . a b"]) == {"rouge1": 100.0, "rouge2": 66.667, "rougeLsum": 100.0}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("arc_easy", {"answerKey": "Z"}),
        ("winogrande", {"answer": "3"}),
        ("winogrande", {"answer": "x"}),
        ("glue_stsb_v002", {"label": 7.0}),
        ("glue_stsb_v002", {"label": "x"}),
        ("arc_easy", {"choices": ["x", "y"]}),
        ("squad_v010_allanswers", {"answers": ["Ann"]}),
        ("squad_v010_allanswers", {"context": 7}),
        ("squad_v010_allanswers", {"answers": {"text": "Ann"}}),
        ("natural_questions_open", {"question": ["q"]}),
        ("natural_questions_open", {"answer": [7]}),
        ("trivia_qa_open", {"answer": {"value": 3}}),
        ("trivia_qa_open", {"answer": {"value": "x", "aliases": "abc"}}),
        ("arc_easy", {"choices": {"text": ["x", 2], "label": ["A", "B"]}}),
        ("xsum_v110", {"document": 7}),
        ("xsum_v110", {"summary": ["a"]}),
        ("natural_questions_open", {"answer": []}),
    ],
)
def test_a_row_whose_answer_or_layout_is_unknown_is_refused(name: str, changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"is not laid out as|has no answer that"):
        get_task(name).check({**TEXTS[name][0], **changed})


@pytest.mark.parametrize("label", [3, "neutral", 1.7])
def test_a_label_outside_its_set_is_told_with_the_set(label: object) -> None:
    with pytest.raises(UserError) as caught:
        get_task("anli_r3").check({**TEXTS["anli_r3"][0], "label": label})
    assert str(caught.value) == f"has the label {label!r}; those of anli/r3 are [0, 1, 2] or -1 for unknown"


@pytest.mark.parametrize("name", ["anli_r3", "arc_easy", "winogrande"])
def test_predictions_that_are_no_choice_are_counted(name: str) -> None:
    task = get_task(name)
    (example,) = task.examples(TEXTS[name][0])
    assert score(task, [example], ["gibberish"])["unparsed"] == 1
    assert "unparsed" not in score(task, [example], [example.targets])


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_what_is_to_be_predicted_may_be_missing_where_it_is_asked_for(name: str) -> None:
    row, inputs, _ = TEXTS[name]
    answers = {"label", "answer", "answers", "answerKey", "summary", "highlights", "idx"}
    bare = {key: value for key, value in row.items() if key not in answers}
    task = get_task(name)
    assert task.inputs(bare) == inputs
    assert all(map(task.is_secret, task.examples(bare)))


def test_a_name_that_is_no_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'super_glue_boolq_v102'"):
        get_task("super_glue_boolq")
    assert len(tasks()) == 12 + 10 + 10 + 2
