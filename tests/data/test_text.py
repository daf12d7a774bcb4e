"""Sequences of tokens as examples of a classification: the tokens before, and the one that comes."""

import numpy as np

from dpfl.data.text import SHAKESPEARE_CHARACTERS, Vocabulary, next_tokens

WORDS = Vocabulary(("the", "code"))  # 1 and 2; 3 is unknown, 4 the beginning, 5 the end


def test_words_are_numbered_with_padding_first_and_the_ends_last() -> None:
    assert (WORDS.unknown, WORDS.beginning, WORDS.end) == (3, 4, 5)
    assert WORDS.names == ("<padding>", "the", "code", "<unknown>", "<beginning>", "<end>")
    found = WORDS.sequences([["code", "a", "the"], []])
    assert [sequence.tolist() for sequence in found] == [[4, 2, 3, 1, 5], [4, 5]]
    assert len(set(SHAKESPEARE_CHARACTERS)) == len(SHAKESPEARE_CHARACTERS) == 86


def test_a_text_that_fills_the_sequence_has_no_end() -> None:
    texts = [["the"] * count for count in (1, 2, 3)]
    assert [sequence.tolist() for sequence in WORDS.sequences(texts, 2)] == [[4, 1, 5], [4, 1, 1], [4, 1, 1]]


def test_every_token_after_the_first_is_predicted_from_those_before_it() -> None:
    x, y, sequence = next_tokens([np.array([4, 1, 2, 3, 5], np.float32), np.array([4, 5], np.float32)], 3)
    assert x.tolist() == [[0, 0, 4], [0, 4, 1], [4, 1, 2], [1, 2, 3], [0, 0, 4]]
    assert y.tolist() == [1, 2, 3, 5, 5]
    assert sequence.tolist() == [0, 0, 0, 0, 1]
    assert (x.dtype, y.dtype, sequence.dtype) == (np.float32, np.int32, np.int64)


def test_tokens_that_are_never_predicted_are_still_seen() -> None:
    x, y, sequence = next_tokens([np.array([4, 3, 2, 5], np.float32), np.array([4, 3, 5], np.float32)], 2, (3, 5))
    assert (x.tolist(), y.tolist(), sequence.tolist()) == ([[4, 3]], [2], [0])


def test_examples_equal_a_slow_reference() -> None:
    rng = np.random.default_rng(0)
    for length in (1, 4, 9):
        sequences = [rng.integers(1, 6, rng.integers(1, 12)).astype(np.float32) for _ in range(20)]
        expected = [
            ([0] * max(0, length - t) + sequence[max(0, t - length) : t].tolist(), sequence[t], number)
            for number, sequence in enumerate(sequences)
            for t in range(1, len(sequence))
            if sequence[t] != 3
        ]
        for found, wanted in zip(next_tokens(sequences, length, (3,)), zip(*expected, strict=True), strict=True):
            assert found.tolist() == list(wanted)


def test_sequences_without_anything_to_predict_give_no_example() -> None:
    x, y, sequence = next_tokens([np.array([4], np.float32)], 3)
    assert (x.shape, y.shape, sequence.shape) == ((0, 3), (0,), (0,))
