"""A decoding step of random models of families that are not Llama's, next to stock.

    python benchmarks/families.py [FAMILY ...] [--dtype bfloat16] [--context 100]

Each model is made from a config of Transformers, of a size that a step's time is in its weights:
a mixture of experts, one with latent attention, one with linear attention, one with norms behind
attention. Timed in turn in one process: stock, `attach(step="attention")`, `attach()`.
"""

import argparse
import copy

import torch
import transformers
from report import environment
from torch import nn
from transformers.cache_utils import DynamicCache

import headwise
from headwise.hf import use_own_layers
from headwise.measure import interleaved, ratio

SIZES = {"vocab_size": 32000, "hidden_size": 1024, "num_attention_heads": 16}
EXPERTS = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
FAMILIES = {
    "qwen3_moe": {"num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 64, **EXPERTS},
    "gpt_oss": {
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "intermediate_size": 1024,
    },
    "deepseek_v3": {
        "num_hidden_layers": 12,
        "num_key_value_heads": 16,
        "intermediate_size": 3072,
        "moe_intermediate_size": 512,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 384,
        "kv_lora_rank": 256,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "first_k_dense_replace": 1,
    },
    "olmo2": {"num_hidden_layers": 16, "num_key_value_heads": 16, "intermediate_size": 4096},
    "qwen3_next": {
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        **EXPERTS,
        "num_experts": 32,
    },
}


def read_per_token(model: nn.Module) -> int:
    """Bytes of the weights that a token is multiplied with."""
    config, total = model.config, 0
    for name, weight in model.named_parameters():
        if name.endswith("embed_tokens.weight") and not config.tie_word_embeddings:
            continue
        share = 1.0
        if ".experts." in name:
            share = config.num_experts_per_tok / weight.shape[0]
        total += int(weight.numel() * weight.element_size() * share)
    return total


@torch.no_grad()
def compare(family: str, dtype: torch.dtype, context: int, rounds: int) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    ours = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    stock, attention = copy.deepcopy(ours), copy.deepcopy(ours)
    report = headwise.attach(ours)
    headwise.attach(attention, step="attention")
    models = {"headwise": ours, "attention alone": attention, "stock": stock}
    ids = torch.randint(0, 32000, (1, context))
    caches = {}
    for name, model in models.items():
        cache = DynamicCache(config=config)
        caches[name] = cache if name == "stock" else use_own_layers(cache)
        model(ids, cache=caches[name], logits_to_keep=1)

    def step(name: str) -> torch.Tensor:
        logits: torch.Tensor = models[name](ids[:, :1], cache=caches[name]).logits
        return logits.float()

    expected, given = step("stock"), step("headwise")
    error = float((given - expected).abs().max() / expected.abs().max())
    print(f"\n{family}, {dtype}: {read_per_token(ours) / 2**20:.0f} MiB of weights per token")
    print(*report.step, sep="\n")
    print(f"logits differ by {error:.1e} of the largest")
    timings = interleaved({name: (lambda name=name: step(name)) for name in models}, rounds=rounds)
    for name, timing in timings.items():
        print(f"{name}: {1e3 * timing.median:.1f} ms, {ratio(timing, timings['headwise'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    print(environment())
    for family in asked.families:
        compare(family, getattr(torch, asked.dtype), asked.context, asked.rounds)


if __name__ == "__main__":
    main()
