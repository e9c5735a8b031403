"""Next-character data sets: plain text with roles, each of which is an owner of rows. What others prepared in LEAF's
form is in `leaf.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fldist.data import cache
from fldist.data.datasets import Dataset, checked, from_files
from fldist.data.windows import Windows

ALPHABET = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""The 80 characters of LEAF's Shakespeare (Caldas et al., arXiv 1812.01097) in the order of its `language_utils.py`."""

NAMES = tuple({" ": "space", "\n": "newline"}.get(c, c) for c in ALPHABET)
"""What the characters are called where they are shown."""

Tokens = NDArray[np.uint8]
Rows = NDArray[np.int64]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]

_OUTSIDE = ALPHABET.index(" ")
_NOT_ASCII = 127
_TOKEN_OF = np.full(_NOT_ASCII + 1, _OUTSIDE, dtype=np.uint8)
_TOKEN_OF[[ord(c) for c in ALPHABET]] = np.arange(len(ALPHABET))
_KNOWN = np.isin(np.arange(_NOT_ASCII + 1), [ord(c) for c in ALPHABET])


def tokens_of(text: str) -> tuple[Tokens, str]:
    """The place of each character in ALPHABET, uint8 [len(text)], and the characters that have none, each once.

    Those are read as a space.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    ascii_codes = np.minimum(codes, _NOT_ASCII)
    outside = np.unique(codes[~_KNOWN[ascii_codes]])
    return _TOKEN_OF[ascii_codes], "".join(map(chr, outside))


def note_outside(characters: str) -> list[str]:
    """What a user should be told of characters that ALPHABET has not."""
    if not characters:
        return []
    shown = characters[:20] + ("..." if len(characters) > 20 else "")
    return [f"characters that are not among the 80 of the alphabet are read as a space: {shown!r}"]


def in_order(n: int, train_share: float, gap: int) -> tuple[int, int]:
    """Of n samples in order: how many of the first train, and the number of the first that tests, `gap` later."""
    train = int(n * train_share + 1e-9)  # 1e-9: 0.29 of 100 is 29, whatever binary fractions make of it
    return train, min(n, train + gap)


@dataclass(frozen=True)
class Roles:
    """Plain text with roles: `ROLE:` on a line, what is spoken on the next ones, an empty line. A role owns its rows.

    Roles that speak at least min_speeches times take part, in the order of their first speeches. A role's text is its
    speeches, one a line or more, joined by newlines; its samples are windows of `window` characters at every
    `stride`-th place, the label is the character that follows. The first train_share of a role's windows train; then
    come ceil(window / stride) - 1 that nobody uses, so that no test window overlaps a training one; the rest test.
    Characters are numbers of ALPHABET; one that it has not is read as a space. Of windows, only the places are stored.

    path: relative to the working directory, else to FLDIST_DATA. Source: after LEAF's Shakespeare (Caldas et al.,
    arXiv 1812.01097), whose users are speaking roles of the plays.
    """

    path: str = "tinyshakespeare.txt"
    min_speeches: Count = 10
    window: Count = 80
    stride: Count = 1
    train_share: Share = 0.9

    def entry(self, place: Path) -> cache.Entry:
        """Its place in the cache when it is read from `place`."""
        said = ", ".join(
            f"{name} {getattr(self, name)}" for name in ("min_speeches", "window", "stride", "train_share")
        )
        return cache.Entry("roles", f"{place} ({said})")

    def load(self) -> Dataset:
        """Map the cache, which is made when it is not there or when the file has changed.

        ValueError says what the text lacks. When the file is gone, a cache of it is used.
        """
        return from_files(self.path, self.entry, lambda place: [(place.name, place.stat())], self._decode)

    def _decode(self, place: Path) -> Dataset:
        speeches = speeches_in(_read(place), f"task.data.path: {place}")
        told = {role: said for role, said in speeches.items() if len(said) >= self.min_speeches}
        if not told:
            most = max(map(len, speeches.values()))
            raise ValueError(
                f"task.data.min_speeches: no role of {place} speaks {self.min_speeches} times, the busiest does "
                f"{most}; lower it"
            )
        texts = {role: "\n".join(filter(None, said)) for role, said in told.items()}
        stream, outside = tokens_of("".join(texts.values()))
        starts = dict(zip(texts, self._starts(map(len, texts.values())), strict=True))
        notes = note_outside(outside)
        short = [role for role, (first, _) in starts.items() if not len(first)]
        if short:
            notes.append(f"roles whose text is too short to train on are left out: {', '.join(short)}")
        owners = tuple(role for role in starts if role not in short)
        train, test = ([starts[role][part] for role in owners] for part in (0, 1))
        if not sum(map(len, test)):
            raise ValueError(
                f"task.data.window: no role of {place} has text enough to train and test on windows of {self.window} "
                "characters; lower it, or task.data.train_share"
            )
        return checked(
            Dataset(
                Windows(stream, np.concatenate(train), self.window),
                _labels(stream, train, self.window),
                Windows(stream, np.concatenate(test), self.window),
                _labels(stream, test, self.window),
                len(ALPHABET),
                NAMES,
                notes=tuple(notes),
                kind="tokens",
                train_owner=np.repeat(np.arange(len(owners)), [len(starts) for starts in train]),
                test_owner=np.repeat(np.arange(len(owners)), [len(starts) for starts in test]),
                owners=owners,
            ),
            f"task.data.path: {place}",
        )

    def _starts(self, lengths: Iterable[int]) -> Iterator[tuple[Rows, Rows]]:
        """Where each role's training and test windows begin in the stream of all; lengths: of the roles' texts."""
        begin = 0
        for length in lengths:
            starts = np.arange(begin, begin + length - self.window, self.stride)
            first, later = in_order(len(starts), self.train_share, -(-self.window // self.stride) - 1)
            yield starts[:first], starts[later:]
            begin += length


def _labels(stream: Tokens, starts: list[Rows], window: int) -> Rows:
    return stream[np.concatenate(starts) + window].astype(np.int64)


def _read(place: Path) -> str:
    try:
        return place.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"task.data.path: {place} cannot be read as text ({error}); give a file in UTF-8") from None


def speeches_in(text: str, where: str) -> dict[str, list[str]]:
    """Each role's speeches, roles in the order of their first ones; ValueError, beginning with `where`.

    A block whose first line does not end in a colon goes on with the speech before it. Where a role has its line and
    nothing below it, it speaks an empty string.
    """
    speeches: dict[str, list[str]] = {}
    last = None
    for block in re.split(r"\n\s*\n", text.strip()):
        head, _, said = block.partition("\n")
        if head.rstrip().endswith(":"):
            last = speeches.setdefault(head.rstrip()[:-1], [])
            last.append(said)
        elif last:
            last[-1] += f"\n{block}" if last[-1] else block
        else:
            raise ValueError(
                f"{where} is no text with roles: it must begin with a role on a line of its own that ends in a colon, "
                f"not with {head[:40]!r}"
            )
    return speeches
