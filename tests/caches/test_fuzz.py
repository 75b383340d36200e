"""Every cache after random calls, against plain lists of rows; attention over it, all else NaN.

In a third of the sequences what was handed out is kept, and shallow copies are made that go their
own ways: at the end the kept views are what they were when they were taken, and each copy holds its
own rows. In the others what nobody may look at is spoilt.
"""

import copy
import random
import tempfile
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from headwise import UnsupportedError, attention
from headwise.caches import ContiguousCache, DiskCache, PagedCache, QuantizedCache, WindowCache
from headwise.caches.resident import Resident
from headwise.ops import QuantKV, dequantize, quantize

KINDS = (
    *("contiguous", "window", "sinks", "paged-1", "paged-4", "paged-16", "int8", "int4"),
    *("int8-4", "int4-4", "int4-16", "disk-4"),
)
SEQUENCES, STEPS = 200, 12  # of each kind; 2,400 in all
MOST_COPIES = 3
FOLDER = tempfile.gettempdir()
H, K = 6, 3
# rotated in blocks of 4, of which sums of integers are exact; 36 are a whole group of 32 and a part
DIMS = {"int4": (36, 12)}
# float32, whose rounding of 6e-8 sums of up to 64 keys and of 36 products add up
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
# the kernel rounds queries and weights to 16 bits where it multiplies int8
SHORT_TOLERANCE = {"atol": 2**-11, "rtol": 2e-5}


@pytest.fixture(autouse=True)
def _one_thread():
    # tensors this small are slower on two
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stacked(rows, side, dim):
    """Rows of one sequence as [K, L, dim]."""
    parts = [row[side] for row in rows]
    return torch.stack(parts, dim=1) if parts else torch.zeros(K, 0, dim)


def bits_of(taken):
    """What a view that was handed out shows now: tensors of their own."""
    if isinstance(taken, torch.Tensor):
        return [taken.clone()]
    parts = [*taken.dense(torch.float32)]
    if taken.page_table is not None:
        parts += [taken.page_table] + ([] if taken.lengths is None else [taken.lengths])
    elif isinstance(taken, QuantKV):
        parts += [taken.key, taken.key_scales, taken.value, taken.value_scales]
    return [at.clone() for at in parts]


class Kept:
    """Views that somebody holds, and what they showed when they were taken."""

    def __init__(self, views):
        self.views = views
        self.bits = self.now()

    def now(self):
        return [bits for view in self.views for bits in bits_of(view)]

    def check(self):
        for now, then in zip(self.now(), self.bits, strict=True):
            assert torch.equal(now, then)


class Fuzz:
    """A cache, and for every sequence what it must hold: a list of rows ([K, D], [K, V])."""

    def __init__(self, kind, seed):
        self.random = random.Random(f"{kind} {seed}")
        torch.manual_seed(seed)
        self.dims = DIMS.get(kind.partition("-")[0], (5, 7))
        self.cache = self.make()
        self.alone = self.random.random() < 0.65
        self.copies, self.kept = [self], []
        self.start()

    def start(self):
        self.batch = self.random.randint(1, 3)
        self.rows = [[] for _ in range(self.batch)]
        self.filled = False

    def run(self):
        names = [name.removeprefix("do_") for name in dir(self) if name.startswith("do_")]
        if self.alone:
            names = [name for name in names if name not in ("keep", "let_go", "fork")]
        # a reset now and then only, so that there is something to lose
        weights = [{"append": 12, "keep": 6, "reset": 0.5}.get(name, 3) for name in names]
        self.log = []
        for _ in range(STEPS if self.alone else STEPS * 3 // 2):
            (name,) = self.random.choices(names, weights)
            one = self.random.choice(self.copies)
            if one.filled or name in ("append", "reset"):
                self.log.append(f"{name} {self.copies.index(one)}")
                getattr(one, f"do_{name}")()
                one.check()
        for one in (*self.copies, *self.kept):
            one.check()

    def do_keep(self):
        """What the cache shows now: all of it, a part, or what an append returns."""
        views = self.shown_views()
        if self.random.random() < 0.3:
            result = self.append(*self.tokens(2), self.added(2))
            views = result if isinstance(result, tuple) else (result,)
        elif isinstance(views[0], torch.Tensor) and self.random.random() < 0.5:
            views = [self.random.choice(views)[:, 1:, ::2]]
        self.kept.append(Kept(views))

    def do_let_go(self):
        if self.kept:
            self.kept.pop(self.random.randrange(len(self.kept)))

    def do_fork(self):
        if len(self.copies) == MOST_COPIES:
            self.copies.pop(self.copies.index(self) - 1)
            return
        twin = copy.copy(self)  # the lists of all copies and kept views stay common
        twin.cache = copy.copy(self.cache)
        twin.rows = [list(rows) for rows in self.rows]
        self.copies.append(twin)

    def shown_views(self):
        return self.cache.first, self.cache.second

    def tokens(self, count):
        return tuple(torch.randn(self.batch, K, count, dim) for dim in self.dims)

    def expected_row(self, row):
        return row

    def do_append(self):
        count = self.random.choice((0, 1, 1, 1, 2, 3, 5, 17))
        attends = count and self.random.random() < 0.5
        if attends and self.filled and self.alone:
            self.spoil()
        first, second = self.tokens(count)
        with torch.inference_mode() if self.random.random() < 0.3 else nullcontext():
            result = self.append(first, second, self.added(count))
        self.filled = True
        if attends:
            if self.alone:
                self.spoil_behind()
            self.attend(result, count)

    def added(self, count):
        """How many tokens each sequence gets."""
        return [count] * self.batch

    def append(self, first, second, added):
        """To the cache and to the lists."""
        result = self.append_to_cache(first, second, added)
        for sequence, count in enumerate(added):
            for token in range(first.shape[2] - count, first.shape[2]):
                row = first[sequence, :, token].clone(), second[sequence, :, token].clone()
                self.rows[sequence].append(self.expected_row(row))
        return result

    def append_to_cache(self, first, second, added):
        return self.cache.append(first, second)

    def attend(self, result, count):
        query = torch.randn(self.batch, H, count, self.dims[0])
        backend = self.random.choice((None, None, "torch"))
        given = self.attention(result, query, backend)
        for sequence, rows in enumerate(self.rows):
            key, value = (stacked(rows, side, self.dims[side])[None] for side in (0, 1))
            one = query[sequence, None]
            expected = attention(one, key, value, backend="reference", **self.rule(count))
            short = getattr(self.cache, "bits", None) == 8 and backend is None
            close = SHORT_TOLERANCE if short else TOLERANCE
            torch.testing.assert_close(given[sequence, None], expected, **close)

    def rule(self, count):
        """What a query sees, for the reference backend over all rows."""
        return {"causal": True}

    def do_crop(self):
        length = self.random.choice((self.random.randint(0, self.length()), self.length()))
        self.cache.crop(length)
        self.rows = [rows[:length] for rows in self.rows]

    def do_select(self):
        size = self.random.randint(1, 4)
        self.choose([self.random.randrange(self.batch) for _ in range(size)], self.cache.select)

    def do_reorder(self):
        chosen = [self.random.randrange(self.batch) for _ in self.rows]
        self.choose(chosen, self.cache.reorder)

    def choose(self, chosen, method):
        method(torch.tensor(chosen, dtype=self.random.choice((torch.int32, torch.int64))))
        self.rows = [list(self.rows[at]) for at in chosen]
        self.batch = len(chosen)

    def do_reset(self):
        self.cache.reset()
        assert self.cache.reserved_bytes == 0
        self.start()

    def length(self):
        return max(map(len, self.rows))

    def row_bytes(self):
        """Of one token of one sequence."""
        return K * sum(self.dims) * 4

    def check(self):
        assert self.cache.length == self.cache.held == self.length()
        assert self.cache.nbytes == sum(map(len, self.rows)) * self.row_bytes()
        assert self.cache.nbytes <= self.cache.reserved_bytes
        if self.filled:
            for sequence, rows in enumerate(self.rows):
                for side, dim in enumerate(self.dims):
                    self.agree(self.held(side)[sequence], stacked(rows, side, dim))

    def agree(self, given, expected):
        assert torch.equal(given, expected)


class FuzzContiguous(Fuzz):
    def make(self):
        return ContiguousCache()

    def held(self, side):
        return (self.cache.first, self.cache.second)[side]

    def spoil(self):
        """Put NaN wherever no held token is."""
        for buffer in self.cache._buffers:
            buffer[:, :, self.cache.length :] = torch.nan

    spoil_behind = spoil

    def attention(self, result, query, backend):
        return attention(query, *result, causal=True, backend=backend)


class FuzzWindow(Fuzz):
    """The lists go on holding every row; what is compared is what the window reaches of them."""

    sinks = 0

    def make(self):
        self.window = self.random.randint(1, 9)
        return WindowCache(self.window, self.sinks)

    def start(self):
        super().start()
        self.recording, self.kept_from = False, 0

    def reach(self, length):
        """The first position behind the sinks that the next token sees, after `length`."""
        return max(min(self.sinks, length), length - (self.window - 1))

    def columns(self, begin):
        return [*range(min(self.sinks, begin)), *range(begin, self.length())]

    def shown(self):
        return self.columns(self.kept_from if self.recording else self.reach(self.length()))

    def append_to_cache(self, first, second, added):
        before, count = self.length(), first.shape[2]
        result = self.cache.append(first, second)
        seen = [*range(min(self.sinks, before)), *range(self.reach(before), before + count)]
        assert self.cache.columns(count).tolist() == seen
        self.seen = seen
        return result

    def attend(self, result, count):
        for side, dim in enumerate(self.dims):
            for sequence, rows in enumerate(self.rows):
                expected = stacked([rows[at] for at in self.seen], side, dim)
                assert torch.equal(result[side][sequence], expected)
        super().attend(result, count)

    def attention(self, result, query, backend):
        if self.sinks:
            mask = self.cache.mask(query.shape[2])
            return attention(query, *result, mask=mask, backend=backend)
        return attention(query, *result, causal=True, window=self.window, backend=backend)

    def rule(self, count):
        key = torch.arange(self.length())
        query = torch.arange(self.length() - count, self.length())[:, None]
        visible = (key <= query) & ((key > query - self.window) | (key < self.sinks))
        return {"mask": visible[None, None]}

    def do_record(self):
        on = self.random.random() < 0.7
        if on and not self.recording:
            self.kept_from = self.reach(self.length())
        self.cache.recording = self.recording = on

    def do_crop(self):
        before, kept = self.length(), set(self.shown())
        length = self.random.choice((self.random.randint(0, before), max(0, before - 1), before))
        needed = {*range(min(self.sinks, length)), *range(self.reach(length), length)}
        outgrown = before >= self.window + self.sinks and not self.recording
        try:
            self.cache.crop(length)
        except UnsupportedError:
            # where nothing but sinks is needed it refuses more than it must
            assert not needed <= kept or outgrown or self.reach(length) == length
            return
        assert needed <= kept
        self.rows = [rows[:length] for rows in self.rows]
        if length < before or self.recording:
            self.kept_from = self.reach(length)

    def check(self):
        assert self.cache.length == self.length()
        assert self.cache.held == min(self.length(), self.sinks + self.window - 1)
        assert self.cache.recording == self.recording
        shown = self.shown()
        assert self.cache.nbytes == len(shown) * self.batch * self.row_bytes()
        assert self.cache.nbytes <= self.cache.reserved_bytes
        if self.filled:
            for side, given in enumerate((self.cache.first, self.cache.second)):
                for sequence, rows in enumerate(self.rows):
                    expected = stacked([rows[at] for at in shown], side, self.dims[side])
                    assert torch.equal(given[sequence], expected)

    def spoil(self):
        self.spoil_behind()
        passed = self.cache._passed
        if passed and not self.recording:
            for buffer in self.cache._buffer._buffers:
                buffer[:, :, : passed + self.sinks] = torch.nan

    def spoil_behind(self):
        inner = self.cache._buffer
        for buffer in inner._buffers:
            buffer[:, :, inner.length :] = torch.nan


class FuzzSinks(FuzzWindow):
    def make(self):
        self.sinks = self.random.randint(1, 5)
        return super().make()


class FuzzPaged(Fuzz):
    """`pages`: for every sequence the names of its pages, new ones where sharing ends."""

    def __init__(self, kind, seed):
        self.page_size = int(kind.partition("-")[2])
        super().__init__(kind, seed)

    def make(self):
        return PagedCache(self.page_size)

    def start(self):
        super().start()
        self.pages = [[] for _ in self.rows]

    def do_fork(self):
        super().do_fork()
        twin = self.copies[-1]
        twin.pages = [list(pages) for pages in twin.pages]

    def shown_views(self):
        return (self.cache.view,)

    def pages_of(self, length):
        return (length + self.page_size - 1) // self.page_size

    def added(self, count):
        if self.random.random() < 0.6:
            return [count] * self.batch
        return [self.random.randint(0, count) for _ in self.rows]

    def append_to_cache(self, first, second, added):
        whole = len(set(added)) == 1 and added[0] == first.shape[2]
        result = self.cache.append(first, second, None if whole else added)
        for sequence, count in enumerate(added):
            length, pages = len(self.rows[sequence]), self.pages[sequence]
            others = [other for at, other in enumerate(self.pages) if at != sequence]
            if count and length % self.page_size and any(pages[-1] in other for other in others):
                pages[-1] = object()
            missing = self.pages_of(length + count) - len(pages)
            pages.extend(object() for _ in range(missing))
        return result

    def attention(self, result, query, backend):
        return attention(query, kv=result, causal=True, backend=backend)

    def cut(self):
        self.pages = [
            list(pages[: self.pages_of(len(rows))]) for pages, rows in zip(self.pages, self.rows)
        ]

    def do_crop(self):
        super().do_crop()
        self.cut()

    def choose(self, chosen, method):
        super().choose(chosen, method)
        self.pages = [self.pages[at] for at in chosen]
        self.cut()

    def do_share(self):
        source = self.random.randrange(self.batch)
        length = self.random.randint(0, len(self.rows[source]))
        targets = [at for at in range(self.batch) if self.random.random() < 0.5]
        self.cache.share(source, length, targets)
        for at in targets:
            if at != source:
                self.rows[at], self.pages[at] = self.rows[source][:length], self.pages[source]
        self.cut()

    def held(self, side):
        view = self.cache.view
        return self.gathered((view.key, view.value)[side])

    def gathered(self, pool):
        """Of every sequence the rows [K, L, dim], read through the page table."""
        view, held = self.cache.view, []
        lengths = [view.context] * self.batch if view.lengths is None else view.lengths.tolist()
        assert lengths == [len(rows) for rows in self.rows]
        for pages, length in zip(view.page_table.tolist(), lengths):
            # [pages, K, page size, dim] to [K, L, dim]
            rows = pool[pages[: self.pages_of(length)]]
            held.append(rows.transpose(0, 1).flatten(1, 2)[:, :length])
        return held

    def slots(self, pages):
        """The places that tokens take: (page, row)."""
        return {
            (pages[sequence][at // self.page_size], at % self.page_size)
            for sequence, rows in enumerate(self.rows)
            for at in range(len(rows))
        }

    def check(self):
        assert self.cache.lengths == (tuple(map(len, self.rows)) if self.filled else ())
        assert self.cache.length == self.cache.held == self.length()
        if not self.filled:
            assert self.cache.nbytes == 0
            return
        table = self.cache.view.page_table.tolist()
        slots = self.slots(table)
        assert len(slots) == len(self.slots(self.pages))
        assert self.cache.nbytes == len(slots) * self.row_bytes() <= self.cache.reserved_bytes
        users = Counter(
            page
            for pages, rows in zip(table, self.rows)
            for page in pages[: self.pages_of(len(rows))]
        )
        own, total = self.cache._pages, self.cache._pools.tensors[0].shape[1]
        assert own.users == [users[page] for page in range(total)]
        assert sorted(own.free) == [page for page in range(total) if not users[page]]
        assert self.cache.reserved_bytes == total * self.page_size * self.row_bytes()
        for side, dim in enumerate(self.dims):
            for given, rows in zip(self.held(side), self.rows):
                self.agree(given, stacked(rows, side, dim))

    def spoil(self):
        pools, table = self.cache._pools.tensors, self.cache._pages.table
        free = torch.ones(pools[0].shape[1], self.page_size, dtype=torch.bool)
        for page, row in self.slots(table.tolist()):
            free[page, row] = False
        for pool in pools:
            pool[:, free] = torch.nan if pool.is_floating_point() else 77
        for pages, rows in zip(table, self.rows):
            pages[self.pages_of(len(rows)) :] = 2**30

    spoil_behind = spoil


class FuzzDisk(FuzzPaged):
    """In a file, of which as much as one layer's rows at a time may be in memory."""

    def make(self):
        resident = Resident(self.random.choice((None, 200_000)))
        return DiskCache(FOLDER, self.page_size, resident)

    def spoil(self):
        super().spoil()
        if self.random.random() < 0.5:
            self.cache.let_go()
        if self.random.random() < 0.2:  # as after pages that came from the disk
            self.cache._resident._cold = 3

    def attend(self, result, count):
        self.cache.read_ahead()
        super().attend(result, count)


class Rounded:
    """What is the same of both caches that round: the rows that go in, and what they come to."""

    def __init__(self, kind, seed):
        self.bits = int(kind.removeprefix("int").partition("-")[0])
        super().__init__(kind, seed)

    def shown_views(self):
        return (self.cache.view,)

    def tokens(self, count):
        shapes = ((self.batch, K, count, dim) for dim in self.dims)
        return tuple(torch.randint(-99, 99, shape).float() / 64 for shape in shapes)

    def expected_row(self, row):
        return tuple(dequantize(*quantize(side, self.bits), self.bits) for side in row)

    def row_bytes(self):
        scales = 2 if self.bits == 8 else 2 + 1  # of 36 and of 12 elements
        return K * (sum(self.dims) * self.bits // 8 + scales * 4)

    def agree(self, given, expected):
        # rotating back adds the products of a block in an order that depends on how many rows
        assert ((given - expected).abs() <= (0 if self.bits == 8 else 1e-6)).all()

    def attention(self, result, query, backend):
        return attention(query, kv=result, causal=True, backend=backend)


class FuzzQuantized(Rounded, Fuzz):
    def make(self):
        return QuantizedCache(self.bits)

    def held(self, side):
        view = self.cache.view
        parts = ((view.key, view.key_scales), (view.value, view.value_scales))
        return dequantize(*parts[side], self.bits)

    def spoil(self):
        for inner, waste in ((self.cache._integers, 77), (self.cache._scales, torch.nan)):
            for buffer in inner._buffers:
                buffer[:, :, self.cache.length :] = waste

    spoil_behind = spoil


class FuzzPagedRounded(Rounded, FuzzPaged):
    def make(self):
        return PagedCache(self.page_size, bits=self.bits)

    def held(self, side):
        view = self.cache.view
        parts = ((view.key, view.key_scales), (view.value, view.value_scales))[side]
        pairs = zip(*map(self.gathered, parts))
        return [dequantize(integers, scales, self.bits) for integers, scales in pairs]


def fuzz_of(kind):
    families = {
        "paged": FuzzPaged,
        "disk": FuzzDisk,
        "int": FuzzQuantized,
        "window": FuzzWindow,
        "sinks": FuzzSinks,
    }
    if kind.startswith("int") and "-" in kind:
        return FuzzPagedRounded
    return families.get(kind.rstrip("0123456789-"), FuzzContiguous)


@pytest.mark.parametrize("kind", KINDS)
def test_random_calls_leave_what_plain_lists_hold(kind):
    for seed in range(SEQUENCES):
        fuzz = fuzz_of(kind)(kind, seed)
        try:
            fuzz.run()
        except Exception as error:
            error.add_note(f"{kind}, seed {seed}: {', '.join(fuzz.log)}")
            raise
