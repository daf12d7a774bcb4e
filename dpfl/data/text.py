"""Text as federated classification: predict the next character, or the next word, from those before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Of TFF's tutorial on text generation, and of its Shakespeare task: tff.simulation.baselines.shakespeare.
SHAKESPEARE_CHARACTERS = "dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their numbers, which are also the classes, numbered as in TFF's tasks on text.

    0 is padding, then come the tokens, what is not among them, the beginning and the end.

    Attributes:
        tokens: the tokens, each once.
    """

    tokens: tuple[str, ...]

    @property
    def unknown(self) -> int:
        """Number of everything that is not among the tokens."""
        return len(self.tokens) + 1

    @property
    def beginning(self) -> int:
        """Number of the beginning of a sequence."""
        return len(self.tokens) + 2

    @property
    def end(self) -> int:
        """Number of the end of a sequence."""
        return len(self.tokens) + 3

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each number, (numbers,)."""
        return ("<padding>", *self.tokens, "<unknown>", "<beginning>", "<end>")

    def sequences(self, texts: Iterable[Sequence[str]], longest: int | None = None) -> list[np.ndarray]:
        """Turns texts into numbers, each from its beginning to its end.

        Args:
            texts: the tokens of each text.
            longest: how many tokens of a text are kept; a text of so many or more gets no end. None for all.

        Returns:
            For each text float32 (tokens + 1 or 2,).
        """
        number = {token: k for k, token in enumerate(self.tokens, start=1)}
        sequences = []
        for text in texts:
            numbers = [number.get(token, self.unknown) for token in text[:longest]]
            ends = [] if longest is not None and len(numbers) >= longest else [self.end]
            sequences.append(np.array([self.beginning, *numbers, *ends], np.float32))
        return sequences


def next_tokens(
    sequences: Sequence[np.ndarray], length: int, never_predicted: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts sequences into examples: some tokens, and the one that comes next.

    Every token after a sequence's first is predicted once. What comes before it is cut to the last `length` tokens of
    the same sequence, or filled up with 0 at the left.

    Args:
        sequences: float32 (tokens,) each, at least one token.
        length: tokens of an example.
        never_predicted: tokens that are seen, but are the class of no example.

    Returns:
        x float32 (examples, length), y int32 (examples,), and the sequence of each example, int64 (examples,).
    """
    # Each sequence follows `length` zeros, so that no window reaches into the one before.
    starts = np.cumsum([length + len(sequence) for sequence in sequences]) - [len(sequence) for sequence in sequences]
    flat = np.zeros(starts[-1] + len(sequences[-1]), np.float32)
    sequence_of = np.full(len(flat), -1, np.int64)
    for number, (start, sequence) in enumerate(zip(starts, sequences, strict=True)):
        flat[start : start + len(sequence)] = sequence
        sequence_of[start + 1 : start + len(sequence)] = number
    predicted = np.flatnonzero((sequence_of >= 0) & ~np.isin(flat, never_predicted))
    x = np.lib.stride_tricks.sliding_window_view(flat, length)[predicted - length]
    return x, flat[predicted].astype(np.int32), sequence_of[predicted]
