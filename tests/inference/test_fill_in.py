"""Blanks to sentinels, and answers back into blanks."""

from __future__ import annotations

import numpy as np
import pytest

from switch_t5.inference.fill_in import encode_blanks, filled, spans


class Letters:
    """A vocabulary of lower-case letters (2 to 27), and three sentinels at the end."""

    eos_id = 1
    vocab_size = 31

    def encode(self, text: str) -> list[int]:
        return [2 + ord(letter) - ord("a") for letter in text if letter.isalpha()]


def encode(text: str, length: int = 8) -> list[int]:
    return encode_blanks(text, Letters(), 3, length).tolist()


def test_each_blank_becomes_the_next_sentinel_from_the_end_of_the_vocabulary() -> None:
    assert encode("ab ___ c") == [2, 3, 30, 4, 1, 0, 0, 0]
    assert encode("___ a _____ b ___") == [30, 2, 29, 3, 28, 1, 0, 0]


def test_two_underscores_are_not_a_blank() -> None:
    assert encode("a __ b ___") == [2, 3, 30, 1, 0, 0, 0, 0]


def test_a_text_may_fill_its_length_exactly() -> None:
    assert encode("abcd ___", 6) == [2, 3, 4, 5, 30, 1]
    assert encode_blanks("a ___", Letters(), 3, 4).dtype == np.int32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc", "has no blank; write ___ where words are missing"),
        ("___ ___ ___ ___", "has 4 blanks, more than the vocabulary's 3 sentinels"),
        ("abcdefg ___", "takes 9 tokens, more than the 8 of the model's inputs"),
    ],
)
def test_a_text_that_cannot_be_asked_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(text)


def test_the_words_after_a_sentinel_are_its_answer() -> None:
    text = "<extra_id_0> the people <extra_id_1>of<extra_id_2>"
    assert spans(text) == {0: "the people", 1: "of", 2: ""}


def test_words_before_the_first_sentinel_belong_to_none() -> None:
    assert spans("nonsense <extra_id_0> yes") == {0: "yes"}
    assert spans("nonsense") == {}


def test_answers_stand_in_brackets_where_their_sentinels_stood() -> None:
    masked = "We, <extra_id_0>, in order to <extra_id_1> a more"
    assert filled(masked, {0: "the people", 2: "unused"}) == "We, [the people], in order to [...] a more"
