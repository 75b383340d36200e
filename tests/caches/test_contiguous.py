"""The contiguous cache: what it holds, what it reserves, when it copies, and what it refuses."""

import copy
import math
import pickle
import re

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwise import AttentionSpec, CapacityError, ShapeError, UnsupportedError
from headwise.caches import ContiguousCache
from headwise.caches import contiguous as module
from headwise.caches.contiguous import grown_capacity
from headwise.ops.backend import torch as torch_backend
from headwise.ops.backend.cpu_library import ready

LIMIT = 64 * 2**20
B, K, D, V = 2, 3, 5, 7


def tokens(count, batch=B, dtype=torch.float32):
    return torch.randn(batch, K, count, D).to(dtype), torch.randn(batch, K, count, V).to(dtype)


def filled(*counts):
    """A cache after appends of `counts` tokens, and everything that went in."""
    cache, parts = ContiguousCache(), [tokens(count) for count in counts]
    for first, second in parts:
        cache.append(first, second)
    return cache, tuple(torch.cat(side, dim=2) for side in zip(*parts))


class AgainstPlainTensors(RuleBasedStateMachine):
    """Any sequence of calls leaves what concatenating plain tensors leaves."""

    @initialize(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3))
    def start(self, seed, batch):
        torch.manual_seed(seed)
        self.cache, self.batch = ContiguousCache(), batch
        self.held = tokens(0, batch)

    @rule(count=st.sampled_from([0, 1, 1, 1, 2, 13, 40]), inference=st.booleans())
    def append(self, count, inference):
        with torch.inference_mode(inference):
            new = tokens(count, self.batch)
            views = self.cache.append(*new)
        self.held = tuple(torch.cat(pair, dim=2) for pair in zip(self.held, new))
        self.agree(views)

    @rule(data=st.data())
    def crop(self, data):
        length = data.draw(st.integers(0, self.cache.length))
        self.cache.crop(length)
        self.held = tuple(side[:, :, :length] for side in self.held)

    @precondition(lambda self: self.cache.first is not None)
    @rule(data=st.data(), dtype=st.sampled_from([torch.int32, torch.int64]))
    def select(self, data, dtype):
        rows = st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=5)
        index = torch.tensor(data.draw(rows), dtype=dtype)
        self.cache.select(index)
        self.held, self.batch = tuple(side[index.long()] for side in self.held), len(index)

    @precondition(lambda self: self.cache.first is not None)
    @rule(data=st.data())
    def reorder(self, data):
        rows = st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch)
        index = torch.tensor(data.draw(rows))
        self.cache.reorder(index)
        self.held = tuple(side[index] for side in self.held)

    @rule()
    def reset(self):
        self.cache.reset()
        self.held = tokens(0, self.batch)
        assert self.cache.reserved_bytes == 0

    @rule()
    def move(self):
        self.cache.to("cpu")

    def agree(self, views):
        for view, side in zip(views, self.held):
            assert torch.equal(view, side)

    @invariant()
    def holds_what_plain_tensors_hold(self):
        length = self.held[0].shape[2]
        assert self.cache.length == length
        if self.cache.first is None:
            assert length == self.cache.nbytes == self.cache.capacity == 0
            return
        self.agree((self.cache.first, self.cache.second))
        assert self.cache.nbytes == sum(side.nbytes for side in self.held)
        assert self.cache.nbytes <= self.cache.reserved_bytes
        assert self.cache.capacity >= length


# a hundred sequences of up to 20 calls
AgainstPlainTensors.TestCase.settings = settings(
    max_examples=100, stateful_step_count=20, deadline=None
)
TestAgainstPlainTensors = AgainstPlainTensors.TestCase


def test_views_are_parts_of_one_buffer():
    cache, _ = filled(10)
    first, second = cache.append(*tokens(1))
    for view, dim in ((first, D), (second, V)):
        assert view.shape == (B, K, 11, dim)
        assert view.stride() == (K * cache.capacity * dim, cache.capacity * dim, dim, 1)
        assert view.untyped_storage().nbytes() == B * K * cache.capacity * dim * 4
    assert cache.first.data_ptr() == first.data_ptr()
    assert cache.second.data_ptr() == second.data_ptr()


def test_an_append_that_fits_moves_nothing():
    cache, held = filled(20)
    before = cache.first.data_ptr(), cache.second.data_ptr()
    # bytes of held tokens that an append does not touch keep even an outside change
    cache.first[:, :, 0] = 99.0
    while cache.length < cache.capacity:
        cache.append(*tokens(1))
    assert (cache.first.data_ptr(), cache.second.data_ptr()) == before
    assert (cache.first[:, :, 0] == 99.0).all()
    assert torch.equal(cache.first[:, :, 1:20], held[0][:, :, 1:])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["fastest", "torch"])
def test_sequences_change_places_where_they_lie_unless_somebody_looks(
    backend, threads, monkeypatch
):
    if backend == "torch":
        monkeypatch.setattr(
            module, "choose_offer", lambda *given: torch_backend.BACKEND.reorder.run
        )
    many = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for index in ([0, 0, 0, 0], [1, 2, 3, 0], [0, 1, 2, 3], [3, 1, 1, 2]):
            # rows of 5 and 7 numbers, more of them than one block has
            cache, held = ContiguousCache(), tokens(1500, batch=4)
            cache.append(*held)
            before = cache.first.data_ptr()
            cache.reorder(torch.tensor(index))
            assert cache.first.data_ptr() == before
            assert torch.equal(cache.first, held[0][index])
            assert torch.equal(cache.second, held[1][index])
            view = cache.append(*tokens(1, batch=4))[1]
            seen = view.clone()
            cache.reorder(torch.tensor(index))
            assert torch.equal(view, seen)
            assert torch.equal(cache.second, seen[index])
    finally:
        torch.set_num_threads(many)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.tensor([0, 2])}, "sequence 2 of 2"),
        ({"index": torch.tensor([0, -1])}, "sequence -1 of 2"),
        ({"index": torch.tensor([0])}, "index is not a contiguous CPU tensor of 2 int64"),
        ({"index": torch.tensor([0, 1]).int()}, "index is not a contiguous CPU tensor"),
        ({"length": 5}, "first does not have 2 sequences of 3 heads and at least 5 rows"),
        ({"length": -1}, "first does not have 2 sequences"),
        ({"second": torch.zeros(2, 2, 4, 6)}, "second does not have 2 sequences of 3 heads"),
        ({"second": torch.zeros(2, 3, 4)}, "second is not a CPU tensor of 4 dims"),
        ({"first": torch.zeros(2, 3, 8, 4).mT}, "first is not a CPU tensor of 4 dims"),
    ],
)
def test_the_operator_checks_what_it_is_given_before_it_moves_anything(changes, message):
    if ready():
        pytest.skip(ready())
    given = {"first": torch.randn(2, 3, 4, 6), "second": torch.randn(2, 3, 4, 6)}
    given |= {"index": torch.tensor([1, 0]), "length": 4, **changes}
    before = given["first"].clone()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.headwise.reorder_(*given.values())
    assert torch.equal(given["first"], before)


def test_5000_tokens_one_by_one_are_moved_a_logarithmic_number_of_times():
    cache, moves, last = ContiguousCache(), 0, None
    one = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    for _ in range(5000):
        first, _ = cache.append(*one)
        moves += first.data_ptr() != last
        last = first.data_ptr()
    assert cache.length == 5000
    # from 16 on, each buffer is at least twice the last
    assert moves <= 1 + math.ceil(math.log2(5000 / 16))


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("start", [0, 3000])
def test_reserved_bytes_stay_within_a_quarter_above_64_mib(start, chunk):
    # 32 KiB a token, on the meta device: the same arithmetic without the memory
    cache, moves, reserved = ContiguousCache(), 0, 0
    with torch.device("meta"):
        new = torch.empty(1, 8, chunk, 512), torch.empty(1, 8, chunk, 512)
        if start:
            cache.append(torch.empty(1, 8, start, 512), torch.empty(1, 8, start, 512))
        while cache.nbytes < 8 * LIMIT:
            cache.append(*new)
            moves += cache.reserved_bytes != reserved
            reserved = cache.reserved_bytes
            assert cache.nbytes <= reserved
            assert reserved <= max(LIMIT, 1.25 * cache.nbytes, cache.nbytes + 16 * 2**15)
    # doubling to the limit, then by a quarter: log2(2048 / 16) + log1.25(8)
    assert moves <= 1 + 7 + 11


@pytest.mark.parametrize("bytes_per_token", [1, 192, 1152, 2**15, 3 * 10**6, LIMIT, 10**9])
def test_a_grown_buffer_fits_and_is_bounded(bytes_per_token):
    for needed in [1, 2, 3, 15, 16, 17, 100, 1023, 1024, 4097, 10**5, 10**6 + 3]:
        capacity = grown_capacity(needed, bytes_per_token)
        assert capacity >= needed
        if capacity * bytes_per_token > LIMIT:
            assert capacity <= 1.25 * needed
        else:
            assert capacity <= max(16, 2 * needed)


def test_a_wider_batch_keeps_the_bound():
    # beam search repeats the prompt's sequence: what was small enough to double no longer is
    cache = ContiguousCache()
    cache.append(*torch.empty(2, 1, 8, 2000, 256, device="meta"))
    cache.append(*torch.empty(2, 1, 8, 1, 256, device="meta"))
    assert cache.reserved_bytes <= LIMIT
    cache.select(torch.zeros(8, dtype=torch.int64))
    assert cache.nbytes > LIMIT
    assert cache.reserved_bytes <= 1.25 * cache.nbytes


SPECS = {
    "GQA": AttentionSpec(heads=9, kv_heads=3, head_dim=64, value_dim=64),
    "GQA with another value dim": AttentionSpec(heads=10, kv_heads=5, head_dim=13, value_dim=11),
    "MLA": AttentionSpec(
        heads=16, kv_heads=16, head_dim=192, value_dim=128, latent_rank=512, rope_dim=64
    ),
}
# elements a token: K (D + V), and R + P for MLA (DeepSeek-V2, arXiv 2405.04434, table 1)
ELEMENTS = {"GQA": 3 * 128, "GQA with another value dim": 5 * 24, "MLA": 576}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SPECS)
def test_a_token_costs_what_the_spec_says_to_the_byte(name, batch, dtype):
    spec, cache = SPECS[name], ContiguousCache()
    if spec.latent_rank is None:
        shapes = (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.value_dim)
    else:
        shapes = (1, spec.latent_rank), (1, spec.rope_dim)
    for count in (17, 1, 1, 5):
        before = cache.nbytes
        cache.append(*(torch.zeros(batch, heads, count, dim, dtype=dtype) for heads, dim in shapes))
        grown = cache.nbytes - before
        assert grown == count * batch * ELEMENTS[name] * dtype.itemsize
        assert grown == count * batch * spec.cache_elements_per_token * dtype.itemsize
    cache.crop(4)
    assert cache.nbytes == 4 * batch * ELEMENTS[name] * dtype.itemsize


def test_filled_under_inference_mode_it_works_on_outside():
    with torch.inference_mode():
        cache, held = filled(5)
        cache.select(torch.tensor([1, 0]))
    outside = tokens(30)
    first, _ = cache.append(*outside)
    assert not first.is_inference()
    assert torch.equal(first, torch.cat([held[0][[1, 0]], outside[0]], dim=2))
    cache.reorder(torch.tensor([1, 0]))
    cache.to("cpu")
    query = torch.randn(B, K, 1, D, requires_grad=True)
    # what it holds can stand in a graph, as a constant
    (query @ cache.first.transpose(-1, -2)).sum().backward()
    assert query.grad.isfinite().all()


def test_the_appended_tensors_are_copied():
    first, second = tokens(3)
    cache = ContiguousCache()
    cache.append(first, second)
    expected = first.clone()
    first.zero_()
    assert torch.equal(cache.first, expected)


def test_tokens_laid_out_as_a_model_gives_them_are_held():
    # [B, S, K, D] seen as [B, K, S, D], and a value that is a part of a wider product
    key = torch.randn(B, 4, K, D).transpose(1, 2)
    value = torch.randn(B, K, 4, 2 * V)[..., V:]
    cache = ContiguousCache()
    first, second = cache.append(key, value)
    assert torch.equal(first, key)
    assert torch.equal(second, value)


def test_the_two_sides_may_differ_in_dtype():
    cache = ContiguousCache()
    cache.append(torch.zeros(1, 1, 3, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 3, 4))
    assert cache.nbytes == 3 * 4 * (2 + 4)
    assert (cache.first.dtype, cache.second.dtype) == (torch.bfloat16, torch.float32)


def test_an_empty_cache():
    cache = ContiguousCache()
    assert cache.first is cache.second is None
    assert cache.length == cache.capacity == cache.nbytes == cache.reserved_bytes == 0
    cache.crop(0)
    cache.reset()
    cache.to("cpu")
    # a batch is not known yet, so there is nothing to select from
    cache.select(torch.tensor([3]))
    cache.reorder(torch.tensor([1, 0]))
    assert cache.first is None


def test_after_a_reset_anything_fits():
    cache, _ = filled(5)
    cache.reset()
    cache.append(torch.ones(5, 2, 1, 3, dtype=torch.float64), torch.ones(5, 2, 1, 3))
    assert cache.first.shape == (5, 2, 1, 3)


def test_moves_to_another_device_and_refuses_tokens_of_the_old_one():
    cache, _ = filled(5)
    cache.to("meta")
    assert cache.first.device.type == cache.second.device.type == "meta"
    assert cache.length == 5
    with pytest.raises(ShapeError, match=r"tokens are torch\.float32 on cpu, the cache holds"):
        cache.append(*tokens(1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_lives_on_its_own(duplicate):
    cache, held = filled(5)
    other = duplicate(cache)
    other.append(*tokens(1))
    other.first.zero_()
    assert cache.length == 5
    assert torch.equal(cache.first, held[0])


def zeros(*shape, **kinds):
    return torch.zeros(*shape, **kinds)


BAD_TOKENS = {
    "3 dims": (zeros(B, 1, D), zeros(B, K, 1, V), "first has shape [2, 1, 5], expected [B, heads"),
    "second of 5 dims": (
        zeros(B, K, 1, D),
        zeros(B, K, 1, V, 1),
        "second has shape [2, 3, 1, 7, 1], expected [B, heads, S, dim]",
    ),
    "unequal lengths": (
        zeros(B, K, 1, D),
        zeros(B, K, 2, V),
        "first has shape [2, 3, 1, 5] on cpu and second [2, 3, 2, 7] on cpu: B, heads, S and "
        "device must agree",
    ),
    "unequal devices": (
        zeros(B, K, 1, D),
        zeros(B, K, 1, V, device="meta"),
        "on cpu and second [2, 3, 1, 7] on meta: B, heads, S and device must agree",
    ),
    "another batch": (
        zeros(3, K, 1, D),
        zeros(3, K, 1, V),
        "tokens have batch, heads, dim [3, 3, 5], the cache holds [2, 3, 5]",
    ),
    "other heads": (zeros(B, 1, 1, D), zeros(B, 1, 1, V), "dim [2, 1, 5], the cache holds"),
    "another dim of the second": (
        zeros(B, K, 1, D),
        zeros(B, K, 1, D),
        "tokens have batch, heads, dim [2, 3, 5], the cache holds [2, 3, 7]",
    ),
    "another dtype": (
        zeros(B, K, 1, D).half(),
        zeros(B, K, 1, V).half(),
        "tokens are torch.float16 on cpu, the cache holds torch.float32 on cpu",
    ),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_tokens_that_do_not_fit_are_refused_and_change_nothing(name):
    first, second, message = BAD_TOKENS[name]
    cache, held = filled(16)
    with pytest.raises(ShapeError, match=re.escape(message)) as caught:
        cache.append(first, second)
    assert "\n" not in str(caught.value)
    assert cache.length == 16
    assert torch.equal(cache.first, held[0])
    assert torch.equal(cache.second, held[1])


@pytest.mark.parametrize("side", [0, 1])
def test_tokens_that_need_gradients_are_refused(side):
    cache, pair = ContiguousCache(), tokens(1)
    pair[side].requires_grad_()
    message = (
        f"^{('first', 'second')[side]} needs gradients, and a cache appends in place: use "
        r"torch\.no_grad\(\), or train without a cache$"
    )
    with pytest.raises(UnsupportedError, match=message):
        cache.append(*pair)
    assert cache.length == 0
    with torch.no_grad():
        cache.append(*pair)
    assert not cache.first.requires_grad


@pytest.mark.parametrize("length", [-1, 6, 100, "x", None, 2.0])
def test_a_crop_outside_what_is_held_is_refused(length):
    cache, _ = filled(5)
    message = f"^crop to {length!r} tokens, expected 0 to 5, those held$"
    with pytest.raises(ShapeError, match=message):
        cache.crop(length)
    assert cache.length == 5


BAD_INDEX = {
    "2 dims": (
        torch.zeros(2, 2, dtype=torch.int64),
        "index has shape [2, 2] and dtype torch.int64, expected [B'] of int32 or int64",
    ),
    "floats": (torch.zeros(2), "index has shape [2] and dtype torch.float32, expected [B']"),
    "a list": ([0, 1], "index is a list, expected a tensor [B'] of integers"),
    "booleans": (torch.ones(2, dtype=torch.bool), "dtype torch.bool"),
    "past the batch": (torch.tensor([0, 2]), "index runs from 0 to 2, expected 0 to 1, those held"),
    "negative": (torch.tensor([-1, 1]), "index runs from -1 to 1, expected 0 to 1"),
}


@pytest.mark.parametrize("method", ["select", "reorder"])
@pytest.mark.parametrize("name", BAD_INDEX)
def test_an_index_that_does_not_fit_is_refused_and_changes_nothing(name, method):
    index, message = BAD_INDEX[name]
    cache, held = filled(5)
    with pytest.raises(ShapeError, match=re.escape(message)):
        getattr(cache, method)(index)
    assert torch.equal(cache.first, held[0])


def test_a_reorder_that_would_change_the_batch_is_refused():
    cache, _ = filled(5)
    message = "index has shape [3], expected [2], one per sequence held"
    with pytest.raises(ShapeError, match=re.escape(message)):
        cache.reorder(torch.tensor([0, 1, 0]))


class Failing(torch.Tensor):
    """A tensor beside which nothing can be allocated."""

    error: Exception = RuntimeError("out of memory: tried to allocate 1 GiB\nframe #0: somewhere")

    def new_empty(self, *shape, **kinds):
        raise self.error


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("error", [Failing.error, MemoryError("no more")])
def test_a_growth_that_fails_says_what_it_needed_and_changes_nothing(side, error, monkeypatch):
    cache, held = filled(5)
    free, reserved = cache.capacity - 5, cache.reserved_bytes
    monkeypatch.setattr(Failing, "error", error)
    new = list(tokens(free + 1))
    new[side] = new[side].as_subclass(Failing)
    capacity = 2 * (cache.capacity + 1)
    needed = capacity * B * K * (D + V) * 4
    message = (
        f"the cache needs {needed:,} bytes for {capacity} tokens of a layer, beside the "
        f"{reserved:,} that it has: {str(error).splitlines()[0]}"
    )
    with pytest.raises(CapacityError) as caught:
        cache.append(*new)
    assert str(caught.value) == message
    assert caught.value.__cause__ is error
    assert (cache.length, cache.reserved_bytes) == (5, reserved)
    assert torch.equal(cache.first, held[0])
    # and it goes on working
    cache.append(*tokens(1))
    assert torch.equal(cache.second[:, :, :5], held[1])


def test_a_selection_that_fails_changes_nothing(monkeypatch):
    cache, held = filled(5)
    monkeypatch.setattr(
        module, "grown_capacity", lambda needed, bytes_per_token: 2**50 // bytes_per_token
    )
    monkeypatch.setattr(ContiguousCache, "capacity", property(lambda self: 2**50))
    with pytest.raises(CapacityError, match=r"the cache needs [\d,]+ bytes for [\d,]+ tokens"):
        cache.select(torch.tensor([0, 1, 1, 0]))
    assert cache.first.shape == (B, K, 5, D)
    assert torch.equal(cache.first, held[0])
    assert torch.equal(cache.second, held[1])


def test_an_append_larger_than_the_machine_is_a_capacity_error():
    # a stride of 0 stands in for 2^50 bytes of tokens
    huge = torch.zeros(1, 1, 1, 1).expand(1, 2**10, 2**38, 1)
    cache = ContiguousCache()
    with pytest.raises(CapacityError, match="the cache needs") as caught:
        cache.append(huge, huge)
    assert "\n" not in str(caught.value)
    assert cache.first is None
    assert cache.length == 0


def test_room_is_given_where_an_append_would_only_copy():
    cache, like = ContiguousCache(), torch.zeros(1)
    assert cache.room(2, 3, 1, like) is None  # the first append makes the buffers
    cache.append(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6))
    first, second, _ = cache.room(2, 3, 2, like)
    assert first.shape == (2, 3, cache.capacity, 4) and second.shape[3] == 6
    first[:, :, 5:7], second[:, :, 5:7] = 1.0, 2.0
    cache.wrote(2)
    assert cache.length == 7 and (cache.first[:, :, 5:] == 1).all()
    assert (cache.second[:, :, 5:] == 2).all()
    for batch, heads, count, given in [
        (1, 3, 1, like),
        (2, 2, 1, like),
        (2, 3, cache.capacity - 6, like),
        (2, 3, 1, like.half()),
        (2, 3, 1, like.to("meta")),
    ]:
        assert cache.room(batch, heads, count, given) is None
    cache.crop(6)  # what is behind may be held
    assert cache.room(2, 3, 1, like) is None
    cache.append(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 6))
    assert cache.room(2, 3, 1, like) is not None
    copy.copy(cache)
    assert cache.room(2, 3, 1, like) is None
