"""Tiny random checkpoints, made on the spot: a Llama with a byte tokenizer, as folder or GGUF."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS, INNER = 6, 2, 10, 42, 3, 52
VOCAB = 258  # every byte, "th" and an end token
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def symbols_of_tokens() -> list[str]:
    """What byte-level BPE writes for each byte, ESC first, and one merged pair."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    escape = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\x1b")[0][0]
    symbols.remove(escape)
    return [escape, *symbols, "th"]


def save_tiny(
    folder: Path,
    *,
    limit: int = 211,
    zero_head: bool = False,
    chat: bool = False,
    hidden: int = HIDDEN,
) -> Path:
    """Write a random Llama; with `zero_head` it always answers ESC, the token 0."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=limit,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    if zero_head:
        torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    vocab = {symbol: token for token, symbol in enumerate(symbols_of_tokens())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


def save_tiny_gguf(path: Path, *, seed: int = 5) -> dict[str, np.ndarray]:
    """Write a random Llama as GGUF in float32; returns the tensors by their GGUF names."""
    import gguf

    rng = np.random.default_rng(seed)
    kv = KV_HEADS * HEAD_DIM
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "output": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k": (kv, HIDDEN),
            f"blk.{layer}.attn_v": (kv, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, INNER),
        }
    tensors = {
        f"{name}.weight": rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(211)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*symbols_of_tokens(), "<end>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
