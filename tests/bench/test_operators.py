"""Benchmarks of operators: every candidate is checked, and only right ones are timed."""

import functools
from dataclasses import replace

import pytest
import torch

from headwise import ops
from headwise.bench import bench_shape, headwise_candidates, pytorch_candidates
from headwise.bench import operators as bench_ops
from headwise.bench import peers as bench_peers
from headwise.bench.operators import judged
from headwise.bench.peers import select_peers
from headwise.bench.verify import TOLERANCES, error, expected
from headwise.errors import OptionError, UnsupportedError
from headwise.measure import Figures, Peak, inputs, parse_shape
from headwise.ops import attention, latent_attention

FIGURES = {
    threads: Figures(threads, 1e9, 2**20, {"bfloat16": Peak(1e9, 64), "float32": Peak(1e9, 64)})
    for threads in (1, torch.get_num_threads())
}
SHAPES = (
    *("decode:6/2:d16:47", "decode:6/6:d16:47:b3", "decode:6/2:d16:40:b3:ragged"),
    *("decode:6/2:d16:47:s5", "decode:6/2:d16:40:b3:ragged:s4", "prefill:6/2:d24/16:37"),
    *(
        "mla:7:r32+8:d16/24:41",
        "mla:7:r32+8:d16:41:s3",
        "mla:7:r32+8:d0/24:41",
        "mla:7:r32+8:d16:40:b3:ragged",
    ),
)


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "last_level_cache", lambda: 2**10)


def bench(text: str, dtype: torch.dtype = torch.float32, peers: tuple[str, ...] = ()):
    return bench_shape(
        parse_shape(text),
        dtype,
        peers=peers,
        figures=FIGURES,
        threads=torch.get_num_threads(),
        rounds=4,
    )


@pytest.mark.parametrize("text", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_the_expected_result_is_the_operators_own_reference(text: str, dtype: torch.dtype) -> None:
    """The blocks of the check, put together, are one call of the whole."""
    shape = parse_shape(text)
    given = inputs.make_inputs(shape, dtype)
    lengths = given.kv_lengths
    options = {"causal": True, "kv_lengths": lengths, "backend": "reference"}
    operator = latent_attention if shape.latent else attention
    whole = operator(*(tensor.double() for tensor in given.tensors), **options)
    torch.testing.assert_close(expected(given), whole.float(), atol=1e-5, rtol=1e-4)


def test_blocks_of_queries_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = parse_shape("prefill:6/2:d16:37")
    given = inputs.make_inputs(shape, torch.float32)
    whole = expected(given)
    monkeypatch.setattr("headwise.bench.verify._BLOCK_SCORES", 3 * 37 * 5)
    torch.testing.assert_close(expected(given), whole)


@pytest.mark.parametrize("text", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_peer_gives_the_right_result_or_says_why_it_cannot(
    text: str, dtype: torch.dtype
) -> None:
    # flex_attention takes seconds to compile
    peers = tuple(name for name in bench_peers.all_peers() if name != "flex")
    found = bench(text, dtype, peers)
    assert {at.name.partition(",")[0] for at in found.timed} >= {"headwise", "matmul"}
    assert all(0 <= at.error <= found.tolerance for at in found.timed)
    assert all(at.state == "absent" and at.reason for at in found.left_out)
    assert found.headwise_wrong is False
    assert found.bytes == parse_shape(text).bytes(dtype.itemsize)


@pytest.mark.parametrize(
    ("text", "bits", "size"),
    [
        ("decode:6/2:d16:47", 8, 47 * 2 * 2 * (16 + 4)),
        ("decode:6/2:d16:47", 4, 47 * 2 * 2 * (8 + 4)),
        ("decode:6/2:d80:47", 4, 47 * 2 * 2 * (40 + 3 * 4)),
        ("mla:4:d16/8:r64+16:47", 8, 47 * (64 + 4 + 16 + 4)),
        ("mla:4:d16/8:r64+16:47", 4, 47 * (32 + 2 * 4 + 8 + 4)),
    ],
)
def test_a_cache_of_integers_is_judged_by_its_own_bytes(text: str, bits: int, size: int) -> None:
    shape = parse_shape(text)
    cached = shape.tokens * shape.spec.cache_elements_per_token
    assert shape.bytes(4, bits) == shape.bytes(4) - 4 * cached + size
    timed = bench(text, peers=(f"int{bits}",)).timed[1]
    assert timed.bytes_per_second == pytest.approx(shape.bytes(4, bits) / timed.seconds)


@pytest.mark.parametrize("text", ["decode:6/2:d16:47:b3", "decode:6/2:d16:40:b3:ragged"])
def test_onnx_runtime_decodes_in_float32(text: str) -> None:
    names = [at.name for at in bench(text, peers=("onnxruntime",)).timed]
    assert names[:2] == ["headwise", "onnxruntime"]
    (refused,) = bench(text, torch.bfloat16, peers=("onnxruntime",)).left_out
    assert refused.reason == "GroupQueryAttention has no CPU kernel for bfloat16"


def test_figures_are_the_counted_work_over_the_median() -> None:
    found = bench("decode:6/2:d16:47", peers=("sdpa",))
    ours, peer = found.timed
    assert (ours.name, ours.ratio) == ("headwise", None)
    assert peer.ratio.low <= peer.ratio.median <= peer.ratio.high
    for row in found.timed:
        assert row.low <= row.seconds <= row.high
        assert row.bytes_per_second == found.bytes / row.seconds
        assert row.flops_per_second == found.flops / row.seconds
        least = max(found.bytes, found.flops) / 1e9
        assert row.roofline == pytest.approx(least / row.seconds)
    twice = {threads: replace(at, bytes_per_second=2e9) for threads, at in FIGURES.items()}
    twice = {
        threads: replace(at, peaks={"float32": Peak(2e9, 64)}) for threads, at in twice.items()
    }
    for row, other in zip(found.timed, judged(found, twice).timed):
        assert other.roofline == pytest.approx(row.roofline / 2)


def _break(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make a candidate's result wrong by 3 %, a little more than bfloat16 may be."""

    def wrong(candidate):
        def build(given):
            bind = candidate.build(given)
            return lambda other: lambda: bind(other)() * 1.03

        return replace(candidate, build=build)

    if name == "headwise":
        monkeypatch.setattr(bench_ops, "HEADWISE", wrong(bench_ops.HEADWISE))
    else:
        peers = tuple(wrong(at) if at.name == name else at for at in bench_peers.PEERS)
        monkeypatch.setattr(bench_peers, "PEERS", peers)


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, "sdpa")
    found = bench("decode:6/2:d16:47", torch.bfloat16, peers=("sdpa", "matmul"))
    assert [at.name for at in found.timed] == ["headwise", "matmul"]
    assert [(at.name, at.state) for at in found.left_out] == [("sdpa", "wrong")]
    assert "above the tolerance of 0.02" in found.left_out[0].reason
    assert found.headwise_wrong is False


@pytest.mark.parametrize("text", ["decode:6/2:d16:47", "decode:6/2:d16:40:b3:ragged"])
def test_headwise_wrong_is_told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    _break(monkeypatch, "headwise")
    found = bench(text, peers=("matmul",))
    assert found.headwise_wrong is True
    assert [at.name for at in found.timed] == ["matmul"]
    assert found.timed[0].ratio is None
    assert found.beside is None


def test_a_result_that_is_not_a_number_is_wrong() -> None:
    right = torch.ones(3)
    assert not error(torch.tensor([1.0, float("nan"), 1.0]), right) <= 1.0


def test_a_peer_that_fails_is_absent_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(given):
        raise RuntimeError("\nno such kernel\nand a long trace")

    def refuse(given):
        raise UnsupportedError("not today")

    broken = replace(bench_peers.PEERS[0], build=build)
    refused = replace(bench_peers.PEERS[1], build=refuse)
    monkeypatch.setattr(bench_peers, "PEERS", (broken, refused))
    found = bench("decode:6/2:d16:47", peers=(broken.name, refused.name))
    assert [at.reason for at in found.left_out] == ["no such kernel", "not today"]


def test_shapes_beside_share_the_rounds_and_cost_is_by_cached_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = bench("decode:6/2:d16:94:vs47")
    assert [at.name for at in found.timed] == ["headwise", "headwise, 47 tokens"]
    # both in the same time: half as much a cached token of the longer one
    clock = iter(range(10**6))
    monkeypatch.setattr("headwise.measure.timing.time.perf_counter", lambda: float(next(clock)))
    assert bench("decode:6/2:d16:94:vs47").beside.ratio.median == 0.5
    assert bench("decode:6/2:d16:40:b3:ragged").beside.ratio.median == 1.0


def test_one_thread_beside_all_runs_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen: dict[str, set[int]] = {}
    real = bench_ops.HEADWISE

    def build(given):
        bind = real.build(given)

        def noted(run):
            seen.setdefault(str(given.shape.vs_threads), set()).add(torch.get_num_threads())
            return run()

        return lambda other: functools.partial(noted, bind(other))

    monkeypatch.setattr(bench_ops, "HEADWISE", replace(real, build=build))
    found = bench("decode:6/2:d16:47:vs1t")
    assert found.timed[1].threads == found.beside.threads == 1
    assert seen["1"] == {before}
    assert 1 in seen["None"]
    assert torch.get_num_threads() == before


def test_candidates_take_the_next_copy_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """No candidate finds in the cache what another one has just read."""
    seen: list[int] = []

    def noted(candidate):
        def build(given):
            bind = candidate.build(given)

            def on(other):
                run = bind(other)
                return lambda: (seen.append(other.rows[0].data_ptr()), run())[1]

            return on

        return replace(candidate, build=build)

    monkeypatch.setattr(bench_ops, "HEADWISE", noted(bench_ops.HEADWISE))
    monkeypatch.setattr(bench_peers, "PEERS", tuple(map(noted, bench_peers.PEERS[:2])))
    copies = len(
        inputs.make_cold(inputs.make_inputs(parse_shape("decode:6/2:d2:8"), torch.float32)).copies
    )
    assert copies == 8
    bench("decode:6/2:d2:8", peers=("sdpa", "sdpa-packed"))
    timed = seen[3:]  # each was checked once
    assert len(timed) == 3 * (4 + 3)
    assert timed[8:] == timed[:-8]
    assert len(set(timed)) == 8


def test_unknown_and_missing_peers_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(bench_peers.PEERS[0], name="gone", missing=lambda: "it is not installed")
    here = bench_peers.PEERS[0]
    monkeypatch.setattr(bench_peers, "PEERS", (missing, here))
    shape = parse_shape("decode:6/2:d16:47")
    assert [at.name for at in select_peers([], [shape])[1]] == ["gone"]
    assert select_peers([], [shape])[0] == [here.name]
    assert select_peers(["none"], [shape]) == ([], [])
    with pytest.raises(OptionError, match="peer gone cannot run here: it is not installed"):
        select_peers(["gone"], [shape])
    with pytest.raises(OptionError, match="peer 'fast' is unknown; use"):
        select_peers(["fast"], [shape])


def test_a_peer_that_computes_no_shape_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str | None:
        raise AssertionError

    slow = replace(bench_peers.PEERS[0], name="slow", missing=missing)
    monkeypatch.setattr(bench_peers, "PEERS", (slow, *bench_peers.PEERS))
    latent = parse_shape("mla:7:41")
    caches = ["paged-16", "paged-64", "int8", "int4"]
    assert select_peers([], [latent]) == (["torch", "matmul", *caches], [])
    with pytest.raises(OptionError, match="peer slow computes none of these shapes"):
        select_peers(["slow"], [latent])


def test_flex_attention_is_compiled_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    # all of it but the C++ that Inductor would write, which takes half a minute
    real = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(real, backend="aot_eager"))
    with torch._dynamo.config.patch(recompile_limit=1):
        for text in ("decode:6/2:d16:47", "decode:6/2:d16:40:b3:ragged", "prefill:6/2:d16:37"):
            found = bench(text, peers=("flex",))
            assert [at.name for at in found.timed][:2] == ["headwise", "flex"], found.left_out


def test_flex_attention_that_does_not_compile_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(pytorch_candidates, "_compiled_flex", lambda: fails)
    reason = pytorch_candidates._flex_missing.__wrapped__()
    assert reason == "flex_attention does not compile: no C++ compiler"


def test_a_backend_is_a_peer_by_its_own_name_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """What headwise.ops lists is timed or left out without a word about it here."""
    listed = [backend.name for backend in ops.backends()]
    assert [peer.name for peer in headwise_candidates.BACKENDS] == listed[1:-1]
    gone = replace(ops.backends()[1], name="gone", available=lambda: (False, "no such device"))
    peers = (headwise_candidates.on_backend(gone), *headwise_candidates.BACKENDS)
    monkeypatch.setattr(bench_peers, "PEERS", peers)
    able, absent = select_peers([], [parse_shape("mla:7:41")])
    assert able == ["torch"]
    assert [(each.name, each.reason) for each in absent] == [("gone", "no such device")]
