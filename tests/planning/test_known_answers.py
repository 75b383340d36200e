"""What other calculators get wrong, with the arithmetic written out."""

import pytest

from headwise.planning import plan
from headwise.planning.cached import CacheFormat
from headwise.planning.model import find_model
from headwise.planning.workload import Workload

BF16 = CacheFormat("bfloat16")
K, MIB, GIB = 1024, 2**20, 2**30


def held(name: str, context: int, batch: int = 1, encoder: int = 0) -> int:
    return Workload(BF16, context, batch, encoder).cache_bytes(find_model(name).spec)


def test_deepseek_v3_caches_one_latent_and_one_rope_key_a_layer() -> None:
    # not 128 heads of 192 + 128: 61 layers of a latent of 512 and a rope key of 64, in 2 bytes
    assert BF16.token_bytes(find_model("deepseek-v3").spec) == 61 * (512 + 64) * 2 == 70_272


def test_deepseek_v2_report_counts_the_same_elements() -> None:
    # arXiv 2405.04434, table 9: 34.6K elements a token, and 15.6K for the small one
    assert BF16.token_bytes(find_model("deepseek-v2").spec) == 2 * 60 * (512 + 64) == 2 * 34_560
    assert BF16.token_bytes(find_model("deepseek-v2-lite").spec) == 2 * 27 * 576 == 2 * 15_552


def test_deepseek_v32_caches_the_indexers_keys_too() -> None:
    # an indexer has one key of 128 for each token and layer
    assert BF16.token_bytes(find_model("deepseek-v3.2").spec) == 61 * (512 + 64 + 128) * 2


def test_gemma_3_27b_holds_a_window_in_five_of_six_layers() -> None:
    row = 16 * (128 + 128) * 2  # kv heads, key and value, bytes
    # 62 layers: every sixth is global; a window of 1024 needs the 1023 tokens before the next one
    assert held("gemma-3-27b", 128 * K) == 10 * 128 * K * row + 52 * 1023 * row
    assert held("gemma-3-27b", 128 * K) < held("gemma-3-27b", 1) * 128 * K / 5.9


def test_gpt_oss_holds_a_window_in_every_other_layer() -> None:
    row = 8 * (64 + 64) * 2
    assert held("gpt-oss-20b", 128 * K) == 12 * 128 * K * row + 12 * 127 * row
    # what the full layers take is what others log for it: 3072 MiB
    assert 12 * 128 * K * row == 3072 * MIB


def test_qwen3_next_has_a_cache_in_every_fourth_layer_and_states_in_the_others() -> None:
    token = 12 * 2 * (256 + 256) * 2
    # the last 4 inputs of 2 x 16 key and 32 value heads of 128 channels, and 32 matrices in float32
    state = 4 * (2 * 16 * 128 + 32 * 128) * 2 + 32 * 128 * 128 * 4
    assert BF16.token_bytes(find_model("qwen3-next-80b-a3b").spec) == token == 24_576
    assert held("qwen3-next-80b-a3b", 256 * K) == 256 * K * token + 36 * state


def test_gemma_3n_caches_nothing_in_layers_that_share_keys() -> None:
    row = 2 * (256 + 256) * 2
    # 35 layers, every fifth global; the last 15 read the keys of layers 18 and 19
    assert held("gemma-3n-e4b", 32 * K) == 4 * 32 * K * row + 16 * 511 * row


def test_falcon_40b_has_8_kv_heads_and_transformers_caches_128() -> None:
    found = plan("falcon-40b", device="h100", context=2048)
    token = 60 * 8 * (64 + 64) * 2
    assert found.cached.needed == 2048 * token == 240 * MIB
    assert found.cached.stock == 16 * found.cached.needed
    assert any("128 kv heads" in note for note in found.notes)


def test_falcon_7b_has_one_kv_head_whatever_its_config_says() -> None:
    assert held("falcon-7b", 2048) == 2048 * 32 * (64 + 64) * 2 == 16 * MIB


def test_t5_keeps_the_encoders_keys_beside_its_own() -> None:
    row = 12 * (64 + 64) * 2
    assert held("t5-base", 100, batch=3, encoder=700) == 3 * 12 * (100 + 700) * row


def test_an_encoder_has_no_cache() -> None:
    found = plan("bert-base", device="h100")
    assert (found.cached.needed, found.bytes_per_token, found.decode) == (0, 0, None)
    assert found.alternatives == ()


@pytest.mark.parametrize(
    ("name", "kib"),
    [
        # arXiv 2505.09343, table 1: 516.096 KB; others: 2 x layers x kv heads x D x 2 bytes
        ("llama-3.1-405b", 504),
        ("llama-2-7b", 512),
        ("llama-2-70b", 320),
        ("llama-3-8b", 128),
        ("mistral-7b-v0.1", 128),
        ("palm-540b", 118),
        ("smollm2-135m", 22.5),
    ],
)
def test_published_bytes_a_token(name: str, kib: float) -> None:
    assert BF16.token_bytes(find_model(name).spec) == kib * K


def test_mistral_holds_its_window_and_no_more() -> None:
    assert held("mistral-7b-v0.1", 32 * K) == 4095 * 128 * K


def test_integers_take_a_byte_an_element_and_a_scale_a_row() -> None:
    spec = find_model("llama-3-8b").spec
    assert CacheFormat("bfloat16", 8).token_bytes(spec) == 32 * 8 * 2 * (128 + 4)
    assert CacheFormat("bfloat16", 4).token_bytes(spec) == 32 * 8 * 2 * (64 + 4 * 4)
