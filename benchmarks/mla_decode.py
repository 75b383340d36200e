"""One decoding step of an attention module of MLA: headwise against stock Transformers.

    python benchmarks/mla_decode.py [--family longcat_flash] [--contexts 4096 16384]

The module has DeepSeek-V2-Lite's dimensions (16 heads, R 512, P 64, N 128, V 128, hidden 2048) and
random weights, whatever the family. Both sides get a cache that was filled in chunks; both modules
run in one process, in turn, on the same hidden state; the outputs are compared before anything is
timed. A step is the whole module: projections, rotary embedding, cache update and attention.
"""

import argparse
import copy
from typing import Any

import torch
import transformers as hf
from report import Row, environment, operators, print_table
from transformers.cache_utils import DynamicCache

import headwise
from headwise.hf import cache_nbytes, use_own_layers
from headwise.measure import interleaved, ratio

HEADS, RANK, ROPE, NOPE, VALUE, HIDDEN = 16, 512, 64, 128, 128, 2048
CHUNK = 1024


_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": RANK,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": VALUE,
    "n_routed_experts": 2,
    "moe_intermediate_size": 32,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "pad_token_id": 0,
}
_ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "intermediate_size": 256}
_ONE_LAYER |= {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
# V2-Lite projects its queries in one; those of which the model cannot are given the rank of V2.
_DIRECT, _COMPRESSED = {"q_lora_rank": None}, {"q_lora_rank": 1536}
_ATTENDS = {"layer_types": ["full_attention"]}
# name -> (its classes' prefix, what it asks for beside the sizes)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2", _ONE_LAYER | _DIRECT),
    "axk1": ("AXK1", _ONE_LAYER | _COMPRESSED),
    "youtu": ("Youtu", _ONE_LAYER | _DIRECT),
    "mistral4": ("Mistral4", _ONE_LAYER | _DIRECT),
    # two attentions in a layer, of which one is timed
    "longcat_flash": (
        "LongcatFlash",
        _COMPRESSED
        | {"num_layers": 1, "head_dim": ROPE, "ffn_hidden_size": 256, "moe_topk": 1}
        | {"zero_expert_num": 1, "expert_ffn_hidden_size": 32},
    ),
    "kimi_linear": ("KimiLinear", _ONE_LAYER | _DIRECT | _ATTENDS),
    "bailing_hybrid": ("BailingHybrid", _ONE_LAYER | _DIRECT | _ATTENDS),
}


def build(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    prefix, own = FAMILIES[family]
    sizes = _SIZES | own
    if family == "longcat_flash":
        del sizes["moe_intermediate_size"]  # another name of expert_ffn_hidden_size
    config = getattr(hf, f"{prefix}Config")(**sizes)
    return getattr(hf, f"{prefix}ForCausalLM")(config).eval().to(dtype)


def fill(model: Any, cache: Any, context: int) -> Any:
    """A cache of `context` tokens, in chunks, by the attention module alone."""
    generator = torch.Generator().manual_seed(1)
    for start in range(0, context, CHUNK):
        size = min(CHUNK, context - start)
        hidden = torch.randn(1, size, HIDDEN, generator=generator).to(model.dtype)
        step(model, hidden, cache, start)
    return cache


def step(model: Any, hidden: torch.Tensor, cache: Any, position: int) -> torch.Tensor:
    """The attention module on hidden [1, S, hidden] at `position`; appends to the cache."""
    size = hidden.shape[1]
    given: dict[str, Any] = {"position_ids": torch.arange(position, position + size)[None]}
    if hasattr(model.model, "rotary_emb"):  # Kimi Linear has none
        given["position_embeddings"] = model.model.rotary_emb(hidden, **given)
    mask = None
    if size > 1 and position > 0 and model.config._attn_implementation == "sdpa":
        mask = torch.ones(1, 1, size, position + size, dtype=torch.bool).tril(position)
    attention = next(module for module in model.modules() if hasattr(module, "expand_kv"))
    out, _ = attention(hidden, attention_mask=mask, cache=cache, **given)
    return out


def measure(family: str, context: int, dtype: torch.dtype, rounds: int) -> Row:
    stock = build(family, dtype)
    ours = copy.deepcopy(stock)
    headwise.attach(ours)
    # the same latents on both sides, so that only the step differs
    ours_cache = fill(ours, use_own_layers(DynamicCache(config=ours.config)), context)
    stock_cache = DynamicCache(config=stock.config)
    held = ours_cache.layers[0]
    stock_cache.update(held.keys.clone(), held.values.clone(), 0)
    assert cache_nbytes(ours_cache) == context * (RANK + ROPE) * held.keys.element_size()
    hidden = torch.randn(1, 1, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)

    def run(model: Any, cache: Any) -> torch.Tensor:
        out = step(model, hidden, cache, context)
        cache.crop(-1)
        return out

    expected, given = run(stock, stock_cache), run(ours, ours_cache)
    scale = expected.float().abs().max().item()
    error = (given - expected).float().abs().max().item() / scale
    # bf16 keeps 8 bits, and both sides round the expanded or folded heads to them
    assert error < (1e-4 if dtype == torch.float32 else 3e-2), f"wrong by {error}"
    timings = interleaved(
        {"stock": lambda: run(stock, stock_cache), "headwise": lambda: run(ours, ours_cache)},
        rounds=rounds,
    )
    expansion = 2 * context * RANK * HEADS * (NOPE + VALUE)
    attended = 2 * context * HEADS * (2 * RANK + ROPE)
    path = operators(lambda: run(stock, stock_cache))
    return Row(
        what=f"{family}, {context:,} tokens, {str(dtype).removeprefix('torch.')}",
        stock=timings["stock"].median,
        ours=timings["headwise"].median,
        ratio=ratio(timings["stock"], timings["headwise"]),
        note=(
            f"stock expands {expansion / 1e9:.1f} GFLOP, then {path}; "
            f"ours {attended / 1e9:.2f} GFLOP over {cache_nbytes(ours_cache) / 2**20:.1f} MiB; "
            f"max error {error:.1e}"
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="deepseek_v2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    print(environment())
    with torch.no_grad():
        rows = [
            measure(given.family, context, getattr(torch, dtype), given.rounds)
            for dtype in given.dtypes
            for context in given.contexts
        ]
    print_table("MLA, one decoding step of the attention module", "stock sdpa", rows)


if __name__ == "__main__":
    main()
