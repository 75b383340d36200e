"""K and V are never repeated for the heads of a group: counted by what PyTorch allocates."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from headwise import attention

HEADS, KV_HEADS, CONTEXT, DIM = 8, 2, 4096, 64


def allocations(run) -> list[int]:
    """Bytes of every allocation while `run` runs, those inside PyTorch's kernels too."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = prof.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return [size for size in sizes if size > 0]


def inputs(length, dtype, layout):
    query = torch.randn(1, HEADS, length, DIM, dtype=dtype)
    if layout == "cache":  # the held part of a larger buffer
        key, value = torch.randn(2, 1, KV_HEADS, CONTEXT + 99, DIM, dtype=dtype)[:, :, :, :CONTEXT]
    else:
        key, value = torch.randn(2, 1, KV_HEADS, CONTEXT, DIM, dtype=dtype)
    return query, key, value, HEADS * CONTEXT * DIM * query.element_size()


def test_the_count_sees_a_repeat():
    query, key, value, repeated = inputs(1, torch.float32, "contiguous")
    group = HEADS // KV_HEADS
    sizes = allocations(
        lambda: F.scaled_dot_product_attention(
            query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        )
    )
    assert len([size for size in sizes if size >= repeated]) >= 2


@pytest.mark.parametrize("layout", ["contiguous", "cache"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 9.0}], ids=["sdpa", "products"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_decode_allocates_less_than_a_quarter_of_the_unrepeated_keys(
    options, dtype, layout, backend
):
    query, key, value, repeated = inputs(1, dtype, layout)
    sizes = allocations(
        lambda: attention(query, key, value, causal=True, backend=backend, **options)
    )
    unrepeated = repeated * KV_HEADS // HEADS
    # bfloat16 keys of 2 heads, widened to float32, are 2 MiB
    assert max(sizes) <= max(unrepeated // 4, 2 * 2**20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_causal_prefill_allocates_nothing_as_large_as_repeated_keys_but_the_result(dtype):
    query, key, value, repeated = inputs(CONTEXT, dtype, "cache")
    sizes = allocations(lambda: attention(query, key, value, causal=True))
    # the result has as many elements as the repeated keys
    assert len([size for size in sizes if size >= repeated]) == 1


def test_chunked_prefill_allocates_nothing_as_large_as_repeated_keys():
    query, key, value, repeated = inputs(256, torch.float32, "cache")
    sizes = allocations(lambda: attention(query, key, value, causal=True))
    assert max(sizes) < repeated


def test_scores_never_exist_in_full():
    query, key, value, _ = inputs(2048, torch.float32, "contiguous")
    sizes = allocations(lambda: attention(query, key, value, causal=True, softcap=9.0))
    assert max(sizes) <= 4 * 2**24
