"""Random chains of prompts: donors that decode, and consumers whose prompts hold pieces of what donors decoded.

What a consumer may reuse is known exactly: its fresh tokens never continue a piece on either side the way the donor
does, so each piece is a maximal run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple


class Donor(NamedTuple):
    """A finished request. Its path is prompt + output; the KV of the last output token was never computed."""

    prompt: list[int]
    output: list[int]

    @property
    def path(self) -> list[int]:
        return self.prompt + self.output


class Piece(NamedTuple):
    """``length`` tokens at ``start`` of a prompt that equal the path of ``donor`` (an index) from ``source`` on."""

    start: int
    length: int
    donor: int
    source: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class Prompt(NamedTuple):
    tokens: list[int]
    pieces: list[Piece]

    @property
    def matched(self) -> int:
        """Tokens that donors hold."""
        return sum(p.length for p in self.pieces)


class Cut(NamedTuple):
    """Which part of a donor's output to use; ``gap`` fresh tokens stand before it."""

    donor: int
    start: int
    length: int
    gap: int


def random_tokens(n: int, rng: random.Random, vocab: int) -> list[int]:
    """Ids from 3 on: those below are special in the models of the tests."""
    return [rng.randrange(3, vocab) for _ in range(n)]


def compose(donors: Sequence[Donor], cuts: Sequence[Cut], tail: int, rng: random.Random, vocab: int) -> Prompt:
    """A prompt of ``cuts`` with random fresh tokens between them and ``tail`` (at least 1) after the last."""
    tokens: list[int] = []
    pieces: list[Piece] = []
    for cut in cuts:
        path, source = donors[cut.donor].path, len(donors[cut.donor].prompt) + cut.start
        assert cut.gap > 0 and source + cut.length < len(path), cut
        tokens += random_tokens(cut.gap, rng, vocab)
        if tokens[-1] == path[source - 1]:
            tokens[-1] = _other(tokens[-1], vocab)
        if pieces:
            _end(tokens, pieces[-1], donors, vocab)
        pieces.append(Piece(len(tokens), cut.length, cut.donor, source))
        tokens += path[source : source + cut.length]
    tokens += random_tokens(tail, rng, vocab)
    if pieces:
        _end(tokens, pieces[-1], donors, vocab)
    return Prompt(tokens, pieces)


def random_prompt(
    donors: Sequence[Donor], rng: random.Random, vocab: int, *, lengths: tuple[int, int] = (40, 90), spare: int = 1
) -> Prompt:
    """1-3 pieces, each from another donor, at random places of their outputs, the last ``spare`` tokens left out."""
    cuts = []
    for donor in rng.sample(range(len(donors)), rng.randint(1, 3)):
        room = len(donors[donor].output) - spare
        length = rng.randint(lengths[0], min(lengths[1], room))
        # Two fresh tokens at least: one differs from what precedes this piece, one from what follows the one before.
        cuts.append(Cut(donor, rng.randint(0, room - length), length, rng.randint(2, 40)))
    return compose(donors, cuts, rng.randint(1, 30), rng, vocab)


def _end(tokens: list[int], piece: Piece, donors: Sequence[Donor], vocab: int) -> None:
    """See to it that the token after ``piece`` is not the donor's next."""
    following = donors[piece.donor].path[piece.source + piece.length]
    if tokens[piece.stop] == following:
        tokens[piece.stop] = _other(following, vocab)


def _other(token: int, vocab: int) -> int:
    return token + 1 if token + 1 < vocab else 3
