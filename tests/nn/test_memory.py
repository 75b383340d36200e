"""A layer with a memory against loops over rows, itself, and a published package."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import headwise
from headwise import AttentionSpec, HeadwiseError, OptionError, ShapeError, UnsupportedError
from headwise.caches import ContiguousCache, PagedCache, WindowCache
from headwise.measure.memory import peak_memory
from headwise.nn import Attention, Decoder, Memory, Rope
from headwise.nn import memory as implementation
from headwise.spec import SparseChoice

GQA = AttentionSpec(heads=6, kv_heads=2, head_dim=8, value_dim=8)
SPECS = {
    "plain": GQA,
    "norms and caps": replace(GQA, qk_norm=True, softcap=2.0),
    "a window and sinks": replace(GQA, window=5, sinks=True),
    "other values, another scale": replace(GQA, value_dim=5, kv_heads=6, scale=0.9),
}
EMBEDDING = 48


def build(spec: AttentionSpec = GQA, memory: Memory | None = None, **options: Any) -> Attention:
    torch.manual_seed(0)
    layer = Attention(spec, EMBEDDING, rope=Rope(8), memory=memory, **options)
    with torch.no_grad():
        for each in (layer.sinks, None if memory is None else memory.gate):
            if each is not None:
                each.normal_()
        for norm in (layer.q_norm, layer.k_norm):
            if norm is not None:
                norm.weight.uniform_(0.5, 1.5)
    return layer


def hidden(batch: int = 2, length: int = 23, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, EMBEDDING, generator=generator, dtype=torch.float64)


def by_hand(layer: Attention, calls: list[torch.Tensor], hide: Any = None) -> list[torch.Tensor]:
    """Row by row, in float64: each call a segment, or in a window as many tokens as it has."""
    spec, memory = layer.spec, layer.memory
    assert memory is not None
    batch, group = calls[0].shape[0], spec.heads // spec.kv_heads
    past: list[list[list[tuple]]] = [[[] for _ in range(spec.kv_heads)] for _ in range(batch)]
    outs = []

    def score(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        raw = spec.scale * (q @ k)
        return raw if spec.softcap is None else spec.softcap * torch.tanh(raw / spec.softcap)

    for number, x in enumerate(calls):
        length = x.shape[1]
        q, k, v = (
            proj(x).view(batch, length, heads, -1)
            for proj, heads in (
                (layer.q_proj, spec.heads),
                (layer.k_proj, spec.kv_heads),
                (layer.v_proj, spec.kv_heads),
            )
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = (
                y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
                for y, norm in ((q, layer.q_norm), (k, layer.k_norm))
            )
        assert layer.rope is not None  # which has tests of its own
        rq, rk = (
            layer.rope(y.transpose(1, 2), torch.arange(length)).transpose(1, 2) for y in (q, k)
        )
        out = torch.zeros(batch, length, spec.heads, spec.value_dim, dtype=torch.float64)
        segment = memory.segment or length
        for start in range(0, length, segment):
            stop = min(length, start + segment)
            for b in range(batch):
                for h in range(spec.heads):
                    own = past[b][h // group][-memory.size :]
                    for s in range(start, stop):
                        first = 0 if spec.window is None else max(0, s - spec.window + 1)
                        local = [
                            (score(rq[b, s, h], rk[b, j, h // group]), v[b, j, h // group])
                            for j in range(first, s + 1)
                        ]
                        found = [(score(q[b, s, h], k0), v0) for k0, v0, kept in own if kept]
                        found = sorted(found, key=lambda pair: -float(pair[0]))[: memory.top]
                        sink = None if layer.sinks is None else layer.sinks[h]
                        out[b, s, h] = joined(memory, h, local, found, sink)
            for b in range(batch):
                for kv in range(spec.kv_heads):
                    for s in range(start, stop):
                        kept = hide is None or not bool(hide[number][b, s])
                        past[b][kv].append((k[b, s, kv], v[b, s, kv], kept))
        outs.append(layer.o_proj(out.flatten(2)))
    return outs


def joined(memory: Memory, head: int, local: list, found: list, sink: Any) -> torch.Tensor:
    """The paper's formula, or one softmax over both."""

    def weighed(pairs: list, sink: Any) -> torch.Tensor:
        scores = [score for score, _ in pairs] + ([] if sink is None else [sink])
        weights = torch.stack(scores).softmax(0)
        return sum(w * value for w, (_, value) in zip(weights, pairs))  # type: ignore[return-value]

    if not found:
        return weighed(local, sink)
    if memory.gate is None:
        return weighed(local + found, sink)
    g = 1 / (1 + torch.exp(-memory.gate[head]))
    return g * weighed(found, None) + (1 - g) * weighed(local, sink)


@pytest.mark.parametrize("gate", ["head", None])
@pytest.mark.parametrize("name", SPECS)
def test_segments_find_what_loops_over_all_rows_find(name: str, gate: Any) -> None:
    # 7 rows of 9 and more: some queries see none, some all, and the oldest leave
    layer = build(SPECS[name], Memory(size=11, top=4, gate=gate)).double()
    calls = list(hidden(length=23).split([9, 7, 6, 1], dim=1))
    with torch.no_grad():
        for ours, expected in zip([layer(x) for x in calls], by_hand(layer, calls)):
            torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("gate", ["head", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_find_what_float64_finds(gate: Any, dtype: torch.dtype) -> None:
    # all rows are retrieved: which ones are nearest may differ by rounding
    layer = build(GQA, Memory(size=64, top=64, gate=gate)).to(dtype)
    exact = copy.deepcopy(layer).double()
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    for x in hidden(length=40).to(dtype).split(10, dim=1):
        expected = exact(x.double())
        assert (layer(x) - expected).abs().max() <= 8 * unit * expected.abs().max()


@pytest.mark.parametrize("make", [ContiguousCache, PagedCache, lambda: WindowCache(6)])
@pytest.mark.parametrize("gate", ["head", None])
def test_calls_of_any_lengths_give_the_same_with_a_cache(make: Any, gate: Any) -> None:
    spec = replace(GQA, window=6)
    whole = build(spec, Memory(size=17, top=3, gate=gate)).double()
    x = hidden(length=31)
    expected = whole(x)
    for lengths in ([1] * 31, [4, 13, 1, 1, 12], [6] * 5 + [1]):
        layer, cache = build(spec, Memory(size=17, top=3, gate=gate)).double(), make()
        with torch.no_grad():
            parts = [layer(part, cache=cache) for part in x.split(lengths, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-12, rtol=0)


def test_a_call_longer_than_the_memory_leaves_its_last_rows() -> None:
    layer = build(GQA, Memory(size=7, top=7))
    layer(hidden(length=23).float())
    assert layer.memory is not None and layer.memory.keys is not None
    last = layer.k_proj(hidden(length=23).float())[:, -7:].view(2, 7, 2, 8).transpose(1, 2)
    kept = layer.memory.keys.sort(dim=2).values
    torch.testing.assert_close(kept, last.sort(dim=2).values, atol=1e-5, rtol=0)
    assert layer.memory.rows == 7


@pytest.mark.parametrize("gate", ["head", None])
@pytest.mark.parametrize("grad", [False, True])
def test_without_rows_it_is_the_layer_without_a_memory_to_the_bit(gate: Any, grad: bool) -> None:
    for spec in (GQA, replace(GQA, window=30, softcap=3.0)):
        plain, layer = build(spec), build(spec, Memory(gate=gate))
        layer.load_state_dict(plain.state_dict(), strict=False)
        with torch.set_grad_enabled(grad):
            assert torch.equal(layer(hidden().float()), plain(hidden().float()))


@pytest.mark.parametrize("gate", ["head", None])
def test_a_sequence_without_rows_has_its_local_part_beside_one_with_rows(gate: Any) -> None:
    layer, plain = build(GQA, Memory(gate=gate)), build(GQA)
    plain.load_state_dict(layer.state_dict(), strict=False)
    layer(hidden().float())
    assert layer.memory is not None
    layer.memory.clear([1])
    x = hidden(seed=2).float().requires_grad_()
    out, local = layer(x), plain(x)
    torch.testing.assert_close(out[1], local[1], atol=1e-6, rtol=0)
    assert not torch.allclose(out[0], local[0], atol=1e-2)
    out.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    # the next call finds the rows of this one
    assert not torch.allclose(layer(x)[1], local[1], atol=1e-3)


@pytest.mark.parametrize("gate", ["head", None])
def test_gradients_reach_queries_gate_and_local_part_and_no_past_segment(gate: Any) -> None:
    spec = replace(GQA, heads=4, kv_heads=2, head_dim=4, value_dim=4, sinks=True, softcap=2.0)
    memory = Memory(size=8, top=3, gate=gate)
    torch.manual_seed(0)
    layer = Attention(spec, 8, rope=Rope(4), memory=memory).double()
    past = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    layer(past)
    state = copy.deepcopy(layer.memory)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        layer.memory = copy.deepcopy(state)
        return torch.func.functional_call(layer, dict(zip(names, weights)), (x,))

    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weights = [weight.detach().clone().requires_grad_() for weight in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)
    run(x, *weights).sum().backward()
    grads = dict(zip(names, (weight.grad for weight in weights)))
    assert past.grad is None
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads.values()), grads


def test_within_a_call_nothing_flows_back_into_an_earlier_segment() -> None:
    layer = build(replace(GQA, window=4), Memory(size=64, top=64))
    x = hidden(1, 20).float().requires_grad_()
    layer(x)[:, 19].sum().backward()
    assert x.grad is not None
    reached = x.grad[0].abs().sum(-1) > 0
    # the token reads all before it, and learns from its window alone
    assert reached.tolist() == [False] * 16 + [True] * 4
    changed = x.detach().clone()
    changed[:, 3] += 1
    assert layer.memory is not None
    layer.memory.clear()
    before = layer(x.detach())
    layer.memory.clear()
    assert not torch.allclose(layer(changed)[:, 19], before[:, 19], atol=1e-4)


def test_a_hidden_row_of_nan_reaches_nothing() -> None:
    layer = build(GQA, Memory(size=16, top=16))
    memory = layer.memory
    assert memory is not None
    rows = torch.randn(2, 2, 2, 5, 8)
    rows[:, :, :, 0] = float("nan")
    seen = torch.ones(2, 5, dtype=torch.bool)
    seen[:, 0] = False
    memory.remember(rows[0], rows[1], seen)
    x = hidden().float().requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert x.grad is not None
    assert bool(out.isfinite().all() and x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "queries"), [(12, 1), (12, 9), (400, 1), (400, 9)])
def test_what_is_read_does_not_depend_on_whether_anything_is_learnt(
    rows: int, queries: int, dtype: torch.dtype
) -> None:
    memory = Memory(size=rows, top=8)
    memory.serve(GQA)
    key, value = torch.randn(2, 2, GQA.kv_heads, rows, GQA.head_dim, dtype=dtype)
    seen = torch.rand(2, rows) > 0.2
    # neither what is hidden nor the values of what is not found
    key[~seen[:, None].expand_as(key[..., 0])] = torch.nan
    value[:, :, rows // 2] = torch.nan
    key[:, :, rows // 2] = 0
    memory.remember(key, value, seen)
    x = torch.randn(2, queries, GQA.heads, GQA.head_dim, dtype=dtype).transpose(1, 2)
    given = memory._read(x, value, 0.5, 3.0)
    learning = memory._read(x.clone().requires_grad_(), value, 0.5, 3.0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(given, learning, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance, equal_nan=True)


def test_rows_that_wait_are_cleared_too() -> None:
    spec = replace(GQA, window=6)
    layer, caches = build(spec, Memory()), [ContiguousCache(), ContiguousCache()]
    x = hidden().float()
    with torch.no_grad():
        layer(x[:, :5], cache=caches[0])
        assert layer.memory is not None
        layer.memory.clear(1)
        with pytest.raises(ShapeError, match=r"clear\(2\): expected sequences of the 2 held"):
            layer.memory.clear([0, 2])
        ours = layer(x[:, 5:], cache=caches[0])
        layer.memory.clear()
        layer(x[:, :5], cache=caches[1])
        theirs = layer(x[:, 5:], cache=caches[1])
    assert torch.equal(ours[0], theirs[0])
    assert not torch.allclose(ours[1], theirs[1], atol=1e-4)


@pytest.mark.parametrize("how", ["mask", "mask of keys", "bias"])
def test_padding_is_not_remembered(how: str) -> None:
    layer, alone = build(GQA, Memory(size=64, top=64)), build(GQA, Memory(size=64, top=64))
    x, padded = hidden(2, 12).float(), torch.zeros(2, 12, dtype=torch.bool)
    padded[1, :5] = True
    mask = ~padded[:, None, None]
    options: dict[str, Any] = {"mask": mask.expand(2, 1, 12, 12)}
    if how == "mask of keys":
        options = {"mask": mask}
    if how == "bias":
        options = {"bias": torch.zeros(2, 1, 1, 12).masked_fill(~mask, float("-inf"))}
    layer(x, **options)
    alone(x[1:, 5:])
    after = hidden(2, 4, seed=3).float()
    torch.testing.assert_close(layer(after)[1:], alone(after[1:]), atol=1e-5, rtol=0)


def test_a_joint_softmax_is_attention_to_both_kinds_of_keys() -> None:
    spec = replace(GQA, softcap=3.0)
    layer = Attention(spec, EMBEDDING, memory=Memory(size=64, top=64, gate=None))
    first, second = hidden().float().split([12, 11], dim=1)
    layer(first)
    q, k, v = (
        proj(x).view(2, -1, heads, 8).transpose(1, 2)
        for proj, x, heads in (
            (layer.q_proj, second, 6),
            (layer.k_proj, torch.cat([first, second], 1), 2),
            (layer.v_proj, torch.cat([first, second], 1), 2),
        )
    )
    # without rotation what is remembered is what a cache would hold
    out = headwise.attention(q, k, v, causal=True, softcap=3.0)
    expected = layer.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(second), expected, atol=1e-5, rtol=0)


def test_no_more_rows_exist_at_once_than_are_allowed(monkeypatch: Any) -> None:
    layer, twin = build(GQA, Memory(size=64, top=8)), build(GQA, Memory(size=64, top=8))
    monkeypatch.setattr(implementation, "_MOST", 1)
    parts = [layer(x) for x in hidden().float().split(8, dim=1)]
    monkeypatch.undo()
    whole = [twin(x) for x in hidden().float().split(8, dim=1)]
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_a_segment_of_training_does_not_score_all_rows_at_once() -> None:
    spec = AttentionSpec(heads=8, kv_heads=2, head_dim=16, value_dim=16)
    layer = Attention(spec, memory=Memory(size=65_536, top=4))
    with torch.no_grad():
        layer.memory.remember(*torch.randn(2, 1, 2, 65_536, 16))  # type: ignore[union-attr]

    def step() -> None:
        layer(torch.randn(1, 512, 128)).sum().backward()

    step()
    _, peak = peak_memory(step)
    assert peak is None or peak < 2**28  # a GiB of scores


def test_what_inference_mode_left_can_be_trained_on() -> None:
    layer = build(GQA, Memory(size=20, top=4))
    with torch.inference_mode():
        layer(hidden().float())
    layer(hidden().float()).sum().backward()
    layer(hidden().float()).sum().backward()


def test_rows_are_saved_with_a_persistent_memory_and_found_again() -> None:
    spec = replace(GQA, window=6)
    layer = build(spec, Memory(size=40, top=4, persistent=True))
    cache = ContiguousCache()
    with torch.no_grad():
        layer(hidden().float(), cache=cache)  # 18 rows entered, 5 wait
        twin = build(spec, Memory(size=40, top=4, persistent=True))
        twin(hidden(3, 30).float())  # what it held is replaced
        twin.load_state_dict(layer.state_dict())
        after, twins = hidden(seed=5).float(), copy.copy(cache)
        assert torch.equal(twin(after, cache=twins), layer(after, cache=cache))
        assert twin.memory is not None and layer.memory is not None
        apart = Memory(size=40, top=4, persistent=True)
        apart.serve(spec)
        apart.load_state_dict(twin.memory.state_dict())
        assert apart.rows == twin.memory.rows
        empty = build(spec, Memory(size=40, top=4, persistent=True))
        twin.load_state_dict(empty.state_dict())
        assert twin.memory.rows == 0
    assert not any("keys" in name for name in build(GQA, Memory()).state_dict())


def test_stored_rows_of_another_memory_are_refused() -> None:
    full = build(GQA, Memory(size=10, top=4, persistent=True))
    full(hidden().float())
    stored = full.state_dict()
    for size in (9, 11, 64):
        other = build(GQA, Memory(size=size, top=4, persistent=True))
        with pytest.raises(ShapeError, match=f"expected a memory of this size, {size}"):
            other.load_state_dict(stored)
    one = {name: rows[:1] if name == "memory.values" else rows for name, rows in stored.items()}
    with pytest.raises(ShapeError, match="differ in their sequences or rows"):
        full.load_state_dict(one)
    del stored["memory.values"]
    with pytest.raises(ShapeError, match="without the others"):
        full.load_state_dict(stored)


def test_a_fresh_mistake_changes_nothing() -> None:
    layer = build(GQA, Memory())
    layer(hidden().float())
    with pytest.raises(ShapeError, match=re.escape("of B=2, K=2 and 8 dims in torch.float32")):
        layer(hidden(3).float())
    cache = ContiguousCache()
    with pytest.raises(UnsupportedError), torch.no_grad():
        layer(hidden().float(), cache=cache)
    assert layer.memory is not None and layer.memory.rows == 23 and cache.length == 0
    layer.memory.clear()
    layer(hidden(3).float())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ShapeError, match=r"in torch\.float32 on cpu, and these are .*bfloat16"),
    ):
        layer(hidden(3).float())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_second_forward_for_the_backward_is_refused(reentrant: bool) -> None:
    layer = build(GQA, Memory())
    x = hidden().float().requires_grad_()
    out = checkpoint(layer, x, use_reentrant=reentrant)
    with pytest.raises(UnsupportedError, match="leave it out of checkpointing"):
        out.sum().backward()


def filled() -> Memory:
    memory = Memory()
    memory.remember(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8))
    return memory


BAD: dict[str, tuple[Any, type[HeadwiseError], str]] = {
    "no size": (lambda: Memory(size=0), HeadwiseError, "size"),
    "half a row": (lambda: Memory(size=2.5), HeadwiseError, "size"),  # type: ignore[arg-type]
    "no top": (lambda: Memory(top=0), HeadwiseError, "top"),
    "top above size": (lambda: Memory(size=8, top=9), OptionError, "top is 9, expected at most"),
    "gate": (lambda: Memory(gate="token"), OptionError, "gate is 'token'"),  # type: ignore[arg-type]
    "segment": (lambda: Memory(segment=0), HeadwiseError, "segment"),
    "no memory": (lambda: build(GQA, 5), OptionError, "memory is a int, expected a Memory"),  # type: ignore[arg-type]
    "two layers": (
        lambda: build(GQA, build(GQA, Memory()).memory),
        OptionError,
        "memory is another layer's",
    ),
    "both sides": (
        lambda: build(replace(GQA, causal=False), Memory()),
        UnsupportedError,
        "a memory is for causal self-attention",
    ),
    "an encoder's": (
        lambda: build(replace(GQA, causal=False, cross=True), Memory()),
        UnsupportedError,
        "a memory is for causal self-attention",
    ),
    "sparse": (
        lambda: build(replace(GQA, sparse=SparseChoice(8, 8, sinks=0, recent=1)), Memory()),
        UnsupportedError,
        "without sparse choice",
    ),
    "keys and values apart": (
        lambda: Memory().remember(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 4, 8)),
        ShapeError,
        "key [1, 2, 5, 8], value [1, 2, 4, 8] and seen [1, 5] in torch.bool: expected",
    ),
    "cleared by a mask": (lambda: filled().clear(True), ShapeError, "clear(True): expected"),
    "cleared too far": (lambda: Memory().clear([0]), ShapeError, "of the 0 held"),
    "MLA in a decoder": (
        lambda: Decoder(
            replace(GQA, kv_heads=6, latent_rank=8, rope_dim=4),
            layers=1,
            vocabulary=9,
            memory=Memory(),
        ),
        UnsupportedError,
        "cannot have one",
    ),
    "checkpointing": (
        lambda: Decoder(GQA, layers=1, vocabulary=9, memory=Memory(), checkpointing=True),
        UnsupportedError,
        "memory and checkpointing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_in_one_line(name: str) -> None:
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_decoder_generates_with_memories_what_it_computes() -> None:
    torch.manual_seed(0)
    spec = replace(GQA, window=4)
    model = Decoder(spec, layers=2, vocabulary=19, memory=Memory(size=30, top=3))
    prompt = torch.randint(19, (2, 13))
    made = model.generate(prompt, max_new_tokens=9)
    model.clear_memory()
    with torch.no_grad():
        logits = model(made)
    assert torch.equal(logits[:, 12:-1].argmax(-1), made[:, 13:])
    with pytest.raises(UnsupportedError, match="use_cache=False, and a memory"):
        model.generate(prompt, max_new_tokens=1, use_cache=False)


# Of the package memorizing-transformers-pytorch 0.4.1, in float64: what it was given, and gave.
# benchmarks/memory_judge.py says how.
NUMBERS = Path(__file__).with_name("memory_numbers.json")


def test_retrieval_and_the_joint_softmax_are_a_published_packages() -> None:
    numbers = {
        name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
        for name, value in json.loads(NUMBERS.read_text()).items()
    }
    heads, dim, top = numbers["heads"], numbers["dim"], numbers["top"]
    # normalised queries and keys times a learned scale: norms by the root mean square give sqrt(D)
    spec = AttentionSpec(
        heads=heads,
        kv_heads=1,
        head_dim=dim,
        value_dim=dim,
        qk_norm=True,
        scale=numbers["scale"] / dim,
    )
    layer = Attention(
        spec, numbers["to_q"].shape[1], norm_eps=1e-30, memory=Memory(size=512, top=top, gate=None)
    ).double()
    key, value = numbers["to_kv"].chunk(2)
    with torch.no_grad():
        for proj, weight in (
            (layer.q_proj, numbers["to_q"]),
            (layer.k_proj, key),
            (layer.v_proj, value),
            (layer.o_proj, numbers["to_out"]),
        ):
            proj.weight.copy_(weight)
        for x, expected in zip(numbers["x"], numbers["out"]):
            # the package retrieves in float32
            torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)
