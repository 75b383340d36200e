"""What an attached model remembers: a folder of blocks, from which its caches begin."""

import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.base.files import FAULTS, local_path, reason
from headwise.base.mapped import reserve
from headwise.base.units import limit as limit_of
from headwise.errors import HeadwiseError, LoadError, OptionError, UnsupportedError
from headwise.hf.cache import use_own_layers
from headwise.hf.continued import obstacle_to_continue
from headwise.hf.own_cache import OwnCache
from headwise.hf.rotation import regime
from headwise.hf.stock_names import DynamicCache, LinearAttentionCacheLayerMixin
from headwise.hf.stored.build import cache_of, fixed_of, kept_of, memory_for, page_of
from headwise.hf.stored.identity import origin_of, stamp_of, touched
from headwise.hf.stored.layers import Kept, kind_of_choice, page_count
from headwise.hf.stored.save import versions
from headwise.stored.file import Contents
from headwise.stored.layout import PAGE, PageLayout
from headwise.stored.origin import Origin
from headwise.stored.store import (
    BLOCK,
    Found,
    Match,
    Store,
    forget_damaged,
    make_room,
    own_folder,
    touch,
)

LIMIT = "10GB"
# So many tokens apart what layers keep beside rows is stored while a prompt is read.
EVERY = 1024
_PADDED = "states and windows of a padded sequence are not stored"
_TRIES = 100  # damaged blocks that are passed over in one call


@dataclass
class Remembered:
    """The folder, and what came of it the last time.

    Args:
        folder: of the blocks of all models.
        limit: bytes that they may take.
        asked: tokens that were to be read.
        known: how many of them were there.
        stored: tokens that were new, and are there now.
        notes: what was not used or not stored and why, in words.
    """

    folder: Path
    limit: int
    asked: int = 0
    known: int = 0
    stored: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, folder: "str | Path | bool | Remembered", limit: str | int) -> "Remembered":
        """From what `attach` is given; True is the folder that the commands take.

        Raises:
            OptionError: a folder that cannot be one, or a limit that is no size.
        """
        if isinstance(folder, Remembered):
            return folder
        if not isinstance(folder, str | bool | os.PathLike):
            kind = type(folder).__name__
            raise OptionError(
                f"remember is a {kind}, expected a folder, or True for the user's own"
            )
        most = limit_of("remember_limit", limit)
        own = isinstance(folder, bool)
        place = own_folder() if own else local_path(str(folder), kind=OptionError)
        if place.exists() and not place.is_dir():
            raise OptionError(f"remember is {str(folder)!r}, which is a file; give a folder")
        return cls(place.absolute(), most)

    def __str__(self) -> str:
        lines = [f"remember: in {self.folder}, at most {self.limit / 1e9:.3g} GB"]
        if self.asked:
            known = f"{self.known:,} of {self.asked:,} tokens were known"
            lines.append(f"{known}, {self.stored:,} new ones stored")
        return "\n          ".join([*lines, *self.notes])

    def begin(self, *notes: str) -> None:
        """Forget what came of it the last time."""
        self.asked = self.known = self.stored = 0
        self.notes = list(notes)

    def _note(self, words: str) -> None:
        if words not in self.notes:
            self.notes.append(words)

    @torch.inference_mode(False)
    def recall(
        self, model: Any, ids: Tensor, mask: Tensor | None = None
    ) -> tuple[OwnCache | None, int, bool]:
        """A cache of the longest beginning of ids [B, S] that is known, and its length, below S.

        And whether anything could have been known: what is read is to be stored then.
        """
        self.begin()
        length = ids.shape[1]
        padding = _left_padding(mask, ids)
        origin = self._origin(model, length, length)
        obstacle = _padding_obstacle(model, padding)
        if obstacle is not None:
            self._note(f"not used: {obstacle}")
        if origin is None or padding is None or obstacle is not None:
            return None, 0, False
        self.asked = sum(length - pad for pad in padding)
        texts = [ids[row, pad : length - 1].cpu() for row, pad in enumerate(padding)]
        store, fixed = Store(self.folder, origin), has_fixed(model)
        for _ in range(_TRIES):
            try:
                found = [store.find(text) for text in texts]
                for each in found:
                    for words in each.damaged:
                        self._note(f"passed over: {words}")
                known = _known_length(found, padding, length - 1, fixed=fixed)
                if not any(known > pad for pad in padding):
                    break
                cache = _assembled(model, origin.cache, found, padding, ids[:, :known], fixed=fixed)
            except _DamagedError as error:
                self._note(f"passed over: {error}")
                continue
            except FAULTS as error:
                self._note(f"not used: {reason(error)}")
                break
            self.known = sum(max(0, known - pad) for pad in padding)
            return cache, known, True
        return None, 0, True

    def keep(self, model: Any, cache: OwnCache) -> None:
        """Store what a cache has read and is not there yet; where that fails, say so."""
        read = cache.read
        why = read.unknown
        if why is None and (read.model is not model or read.stamp != stamp_of(model)):
            why = "the model was changed meanwhile"
        if why is None and not read.length:
            return
        padding = None if why is not None else _left_padding(read.real, read.ids)
        if padding is None:
            self._note(f"nothing was stored: {why or 'the padding is not on the left'}")
            return
        origin = self._origin(model, read.first, read.length)
        if origin is None:
            return
        try:
            store, wrote = Store(self.folder, origin), False
            kept, layout = kept_of(cache)
            for row, pad in enumerate(padding):
                wrote |= self._keep_row(store, cache, kept, layout, row, pad)
            if wrote:
                make_room(self.folder, self.limit)
        except (HeadwiseError, *FAULTS) as error:  # what was generated must not be lost by it
            self._note(f"not everything was stored: {reason(error)}")

    def _keep_row(
        self,
        store: Store,
        cache: OwnCache,
        kept: Sequence[Kept],
        layout: PageLayout,
        row: int,
        pad: int,
    ) -> bool:
        """Store one sequence; whether anything was written."""
        text = cache.read.ids[row, pad:]
        fixed = dict(fixed_of(kept))
        if fixed and pad:
            raise UnsupportedError(_PADDED)
        missing = store.missing(text, fixed=bool(fixed))
        reach = store.find(text).reach if missing else len(text)
        if not fixed:  # a longer block may hold them
            missing = [block for block in missing if block[1] > reach]
        for begin, end, parent in missing:
            last = end == len(text)
            contents = Contents(
                origin=store.origin,
                layers=tuple(each.facts for each in kept),
                layout=layout,
                tokens=text[None, begin:end],
                real=torch.ones(1, end - begin, dtype=torch.bool),
                table=torch.arange(page_count(end - begin), dtype=torch.int32)[None],
                start=begin,
                parent=parent,
                made_by=versions(),
            )
            pages = (
                page_of(cache, kept, layout, row, pad + at, pad + min(at + PAGE, end))
                for at in range(begin, end, PAGE)
            )
            tensors = {n: t[row : row + 1] for n, t in fixed.items()} if last else {}
            store.put(contents, pages, tensors)
        if missing:
            store.touch(text)
        self.stored += len(text) - reach
        return bool(missing)

    def _origin(self, model: Any, first: int, length: int) -> Origin | None:
        """What the blocks of a text are of; None where there are none."""
        obstacle = touched(model) or obstacle_to_continue(model)
        if torch.is_autocast_enabled(model.device.type):
            obstacle = "under autocast keys and values differ in dtype"
        within = regime(model, first, length)
        if obstacle is None and within is None:
            obstacle = f"its rotation changes within {length:,} tokens"
        try:
            held = model._headwise
            kind = kind_of_choice(held.choice)
            # tokens that a step has read see less than those of a prompt
            kind = kind if held.sparse is None else f"{kind}; {held.sparse.choice}"
            origin = origin_of(model, kind)
        except UnsupportedError as error:
            obstacle = obstacle or str(error)
        if obstacle is not None:
            self._note(f"not used: {obstacle}")
            return None
        if not within:
            return origin
        return Origin(**{**origin.as_json(), "rope": f"{origin.rope}, {within}"})


def _known_length(found: Sequence[Found], padding: Sequence[int], most: int, *, fixed: bool) -> int:
    """The positions that all sequences know, at most `most`."""
    if fixed:
        common = set.intersection(
            *({pad + point for point in each.points} for each, pad in zip(found, padding))
        )
        return max((length for length in common if length <= most), default=0)
    return min(most, *(pad + each.reach for each, pad in zip(found, padding, strict=True)))


def _padding_obstacle(model: Any, padding: Sequence[int] | None) -> str | None:
    """Why padding before the sequences hides what is remembered; None if it does not."""
    if padding is None:
        return "the padding is not on the left"
    if not any(padding):
        return None
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "the model is given no positions, which its padding moves"
    return _PADDED if has_fixed(model) else None


def has_fixed(model: Any) -> bool:
    """Whether some layer of the model's caches keeps more than rows: a window or a state."""
    config = model.config.get_text_config(decoder=True)
    cache = use_own_layers(DynamicCache(config=config), model._headwise.choice)
    return any(
        isinstance(layer, LinearAttentionCacheLayerMixin)
        or getattr(getattr(layer, "cache", None), "gives", "rows") == "part"
        for layer in cache.layers
    )


def _left_padding(mask: Tensor | None, ids: Tensor) -> list[int] | None:
    """Tokens of padding before each sequence; None where it is somewhere else, or all there is."""
    if mask is None:
        return [0] * len(ids)
    real = mask.bool()
    padding = (~real).sum(1)
    left = real == (torch.arange(ids.shape[1], device=mask.device) >= padding[:, None])
    whole = bool(left.all()) and int(padding.max()) < ids.shape[1]
    return padding.tolist() if whole else None


def _assembled(
    model: Any,
    kind: str,
    found: Sequence[Found],
    padding: Sequence[int],
    ids: Tensor,
    *,
    fixed: bool,
) -> OwnCache:
    """A cache of ids [B, L] over the pages of blocks, which are mapped and verified.

    Raises:
        LoadError: a block is damaged; it is gone then.
    """
    length = ids.shape[1]
    taken = [
        each.take(length - pad, fixed=fixed) if length > pad else []
        for each, pad in zip(found, padding, strict=True)
    ]
    first = next(row for row in taken if row)[-1].file.contents
    for match in (match for row in taken for match in row):
        if match.file.contents.layout != first.layout:
            raise _gone(match, LoadError(f"{match.file.path} has other rows than its neighbours"))
    if any(padding):
        pools, table = _moved(first.layout, taken, padding, length)
    else:
        pools, table = _mapped(first.layout, taken, length)
    touch(match for row in reversed(taken) for match in reversed(row))
    tensors: dict[str, Tensor] = {}
    if fixed:
        rows = [_read_fixed(row[-1]) for row in taken]
        tensors = {name: torch.cat([each[name] for each in rows]) for name in rows[0]}
    real = torch.arange(length) >= torch.tensor(padding)[:, None]
    return cache_of(model, kind, first.layers, pools, table, tensors, ids.cpu(), real)


def _mapped(
    layout: PageLayout, taken: Sequence[Sequence[Match]], length: int
) -> tuple[dict[tuple[int, str], Tensor], Tensor]:
    """Pools over the files' own pages, and the pages of each sequence."""
    files = dict[Path, tuple[Match, int]]()
    pages = 0
    for match in (match for row in taken for match in row):
        if match.file.path not in files:
            files[match.file.path] = (match, pages)
            pages += match.file.pages
    memory = memory_for(layout, pages)
    for match, begin in files.values():
        _map(match, memory, begin * layout.page_bytes, match.file.pages)
    table = torch.tensor(
        [
            [
                files[match.file.path][1] + page
                for match in row
                for page in range(page_count(match.count))
            ]
            for row in taken
        ],
        dtype=torch.int32,
    )
    return layout.pools(memory), table


def _moved(
    layout: PageLayout, taken: Sequence[Sequence[Match]], padding: Sequence[int], length: int
) -> tuple[dict[tuple[int, str], Tensor], Tensor]:
    """Pools with copies of the rows, each sequence behind its padding."""
    each = page_count(length)
    table = torch.arange(len(taken) * each, dtype=torch.int32).view(len(taken), each)
    memory = memory_for(layout, len(taken) * each)
    pools = layout.pools(memory)
    for row, (matches, pad) in enumerate(zip(taken, padding, strict=True)):
        for at, match in enumerate(matches):
            own = reserve(match.file.pages * layout.page_bytes, "a block of remembered tokens")
            _map(match, own, 0, match.file.pages)
            sources = layout.pools(own)
            begin = pad + at * BLOCK
            places = torch.arange(begin, begin + match.count)
            pages, slots = table[row, places // PAGE].long(), places % PAGE
            for name, pool in pools.items():
                source = sources[name].flatten(1, 2)[:, : match.count]
                pool[:, pages, slots] = source
    return pools, table


def _map(match: Match, memory: Any, begin: int, count: int) -> None:
    try:
        match.file.map(memory, begin, 0, count)
    except LoadError as error:
        raise _gone(match, error) from error


def _read_fixed(match: Match) -> dict[str, Tensor]:
    try:
        return match.file.fixed()
    except LoadError as error:
        raise _gone(match, error) from error


class _DamagedError(LoadError):
    """A block that is not what was written, and is gone now."""


def _gone(match: Match, error: LoadError) -> LoadError:
    """The error, after the block has been removed, where it can be."""
    return _DamagedError(str(error)) if forget_damaged(match.file.path, error) else error


def points_of(begin: int, end: int) -> Iterator[int]:
    """Where what layers keep beside rows is stored while a prompt is read, and the last token."""
    yield from range((begin // EVERY + 1) * EVERY, end, EVERY)
    if end > begin:
        yield end
