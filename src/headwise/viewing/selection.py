"""Which layers, heads and tokens a view is of: numbers, ranges and words, checked."""

import re
from collections.abc import Iterable, Sequence

from headwise.errors import OptionError

# Scores that a page carries by default, and at most; 4 bytes each, a third more as text.
PAIRS, MOST_PAIRS = 6_000_000, 60_000_000
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def numbers(name: str, text: str) -> list[int]:
    """Numbers and ranges joined by commas.

    >>> numbers("layers", "0,4-6")
    [0, 4, 5, 6]

    Raises:
        OptionError: anything else.
    """
    chosen: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise OptionError(f"{name} is {text!r}; expected numbers and ranges, as 0,4-6")
        start, stop = int(match[1]), int(match[2] or match[1])
        if not start <= stop < start + 1_000_000:
            raise OptionError(f"{name} is {text!r}; expected ranges from low to high, as 4-6")
        chosen += range(start, stop + 1)
    return chosen


def words(text: str) -> list[int | str]:
    """Positions, ranges of positions and words, joined by commas; a word in quotes is one.

    >>> words('0,it,4-6,"7"')
    [0, 'it', 4, 5, 6, '7']

    Raises:
        OptionError: an empty part.
    """
    chosen: list[int | str] = []
    for part in text.split(","):
        word = part.strip()
        if len(word) > 1 and word[0] == word[-1] == '"':
            chosen.append(word[1:-1])
        elif word.replace("-", "", 1).isdecimal():
            chosen += numbers("tokens", word)
        elif word:
            chosen.append(word)
        else:
            raise OptionError(f"tokens is {text!r}; expected positions, ranges and words, as 0,it")
    return chosen


def head_name(text: str) -> tuple[int, int]:
    """A head as layer and number.

    >>> head_name("5.2")
    (5, 2)

    Raises:
        OptionError: another form.
    """
    if match := re.fullmatch(r"(\d+)\.(\d+)", text.strip()):
        return int(match[1]), int(match[2])
    raise OptionError(f"head is {text!r}; expected layer and head, as 5.2")


def within(name: str, chosen: Iterable[int] | None, count: int) -> tuple[int, ...] | None:
    """The chosen numbers, each once and in order; None for all.

    Raises:
        OptionError: one that is not below `count`, or none at all.
    """
    if chosen is None:
        return None
    listed = list(chosen) if isinstance(chosen, Iterable) else []
    if not isinstance(chosen, Iterable) or not set(map(type, listed)) <= {int}:
        raise OptionError(f"{name} is {chosen!r}, expected numbers, as [0, 4]")
    listed = sorted(set(listed))
    if not listed or listed[0] < 0 or listed[-1] >= count:
        raise OptionError(f"{name} is {listed}; the model has 0 to {count - 1}")
    return tuple(listed)


def rows(
    chosen: Sequence[int | str] | None, texts: Sequence[str], new_tokens: int, heads: int
) -> tuple[int, ...]:
    """The positions of tokens to see in full.

    None is all that a page has room for, the last ones first; `heads` counts them over all layers.
    A word stands for every token of that text, a space before it and case aside.

    Raises:
        OptionError: no such token, or more than a page can carry.
    """
    total = len(texts) + new_tokens
    if chosen is None:
        return tuple(range(total - _room(total, heads, PAIRS), total))
    is_list = isinstance(chosen, Iterable) and not isinstance(chosen, str)
    if not is_list or not set(map(type, chosen)) <= {int, str}:
        raise OptionError(f"tokens is {chosen!r}, expected positions and words, as [0, 'it']")
    places: set[int] = set()
    for token in chosen:
        if isinstance(token, int):
            if not 0 <= token < total:
                raise OptionError(f"tokens has {token}; the text has tokens 0 to {total - 1}")
            places.add(token)
            continue
        same = [place for place, text in enumerate(texts) if _plain(text) == _plain(token)]
        if not same:
            raise OptionError(f"no token of the text is {token!r}; give its position")
        places.update(same)
    room = _room(total, heads, MOST_PAIRS)
    if len(places) > room:
        raise OptionError(
            f"{len(places)} tokens of {total} in {heads} heads are more than a page can carry: "
            f"choose at most {room}, or fewer layers and heads"
        )
    return tuple(sorted(places))


def _plain(text: str) -> str:
    return text.strip().casefold()


def _room(total: int, heads: int, pairs: int) -> int:
    """How many rows of at most `total` keys in `heads` heads are `pairs` pairs; at least one."""
    if total * (total + 1) // 2 * heads <= pairs:
        return total
    return max(1, min(total, pairs // (total * heads)))
