"""A hybrid of gated delta rules and full attention as a whole model: a prompt, and a step.

    python benchmarks/hybrid.py [--dtype bfloat16] [--prompt 2048] [--rounds 7] [--stock]

A random model of Qwen3.5's kind: 24 layers, three of the gated delta rule to one of full attention,
hidden 1,024, MLPs of 3,584, 8/2 heads of 256, 16 linear heads of 128 x 128, a convolution over 4
tokens, a tied vocabulary of 248,320. In turn in one process, on the same weights: attached, with
the linear layers as Transformers has them (which is what headwise did before it had an operator for
them); attached; with --stock Transformers alone, which takes minutes on AVX2.
"""

import argparse
import copy
from collections.abc import Callable

import torch
import transformers
from report import environment
from torch import nn
from transformers.cache_utils import DynamicCache

import headwise
from headwise.hf import use_own_layers
from headwise.hf.linear import LinearModule
from headwise.measure import interleaved, ratio
from headwise.measure.machine import read_bandwidth

CONFIG = {
    "vocab_size": 248_320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
    "tie_word_embeddings": True,
}
STEPS = 4


def on_the_same_weights(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters."""
    weights = {id(weight): weight for weight in model.parameters()}
    return copy.deepcopy(model, weights)


def without_linear(model: nn.Module) -> nn.Module:
    """An attached model whose linear layers run as Transformers has them."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), LinearModule):
            del module.forward
    return model


@torch.no_grad()
def main() -> None:
    """Print a line for the prompt and one for a step after it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stock", action="store_true")
    asked = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen3_5_text", **CONFIG)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    dtype = getattr(torch, asked.dtype)
    stock = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ours, before = on_the_same_weights(stock), on_the_same_weights(stock)
    headwise.attach(ours)
    headwise.attach(before)
    models = {"linear layers by stock": without_linear(before), "headwise": ours}
    if asked.stock:
        models["stock"] = stock
    size = sum(weight.numel() * weight.element_size() for weight in stock.parameters())
    print(f"{environment()}; sums over memory {read_bandwidth()[0] / 1e9:.1f} GB/s")
    print(f"{asked.dtype}: {size / 2**20:,.0f} MiB of weights")
    ids = torch.randint(0, config.vocab_size, (1, asked.prompt))

    def read(name: str) -> tuple[torch.Tensor, DynamicCache]:
        cache = DynamicCache(config=config)
        if name != "stock":
            cache = use_own_layers(cache)
        return models[name](ids, cache=cache, logits_to_keep=1).logits, cache

    def show(what: str, sides: dict[str, Callable[[], object]], each: int) -> None:
        timings = interleaved(sides, rounds=asked.rounds, warmup=1)
        for name, timing in timings.items():
            took = 1e3 * timing.median / each
            print(
                f"{what}, {name}: {took:.1f} ms, {ratio(timing, timings['headwise'])}", flush=True
            )

    found = {name: read(name) for name in models}
    expected, given = (found[name][0].float() for name in ("linear layers by stock", "headwise"))
    error = float((given - expected).abs().max() / expected.abs().max())
    print(f"logits differ by {error:.1e} of the largest", flush=True)

    def step(name: str) -> None:
        for _ in range(STEPS):
            models[name](ids[:, :1], cache=found[name][1])

    show("a step", {name: (lambda name=name: step(name)) for name in models}, STEPS)
    show("the prompt", {name: (lambda name=name: read(name)) for name in models}, 1)


if __name__ == "__main__":
    main()
