"""`headwise_mla`: what Llama computes can be written in it, and it loads as any checkpoint does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import headwise
from families import VOCABULARY, make
from headwise.hf import HeadwiseMlaConfig, HeadwiseMlaForCausalLM
from headwise.hf.mla_model import HeadwiseMlaAttention

PROMPT = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(4))
# the first sequence is 5 tokens shorter
PADDING = (torch.arange(17) >= torch.tensor([[5], [0]])).long()


def exact(llama: Any) -> HeadwiseMlaForCausalLM:
    """The same model with all kv heads' keys and values side by side in the cache, by hand.

    The rope key of P = K D holds pair f of kv head k as pair k D/2 + f, the latent of R = K V the
    values; each head's rope query is not zero in its own kv head's pairs only.
    """
    config = llama.config
    layers, heads, kv_heads = config.num_hidden_layers, config.num_attention_heads, 2
    dim, half = config.head_dim, config.head_dim // 2
    biased = llama.model.layers[0].self_attn.q_proj.bias is not None
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if name in hf.LlamaConfig.__dataclass_fields__ and name != "num_key_value_heads"
    }
    model = HeadwiseMlaForCausalLM(
        HeadwiseMlaConfig(
            **kept | {"rope_parameters": dict(config.rope_parameters)},
            kv_lora_rank=[kv_heads * dim] * layers,
            qk_rope_head_dim=[kv_heads * dim] * layers,
            qk_nope_head_dim=[0] * layers,
            v_head_dim=dim,
            attention_scale=dim**-0.5,
            query_key_bias=biased,
        )
    ).eval()
    state = {name: tensor for name, tensor in llama.state_dict().items() if "_proj" not in name}
    state |= {name: tensor for name, tensor in llama.state_dict().items() if ".mlp." in name}
    for index, layer in enumerate(llama.model.layers):
        old, place = layer.self_attn, f"model.layers.{index}.self_attn"
        state[f"{place}.o_proj.weight"] = old.o_proj.weight
        for name in ("weight", "bias") if biased else ("weight",):
            state[f"{place}.q_proj.{name}"] = getattr(old.q_proj, name)
            key = getattr(old.k_proj, name).unflatten(0, (kv_heads, 2, half)).transpose(0, 1)
            cached = torch.cat([getattr(old.v_proj, name), key.flatten(0, 2)])
            state[f"{place}.kv_a_proj.{name}"] = cached
        mix = torch.zeros(heads, kv_heads, half, 2)
        selected = torch.zeros(heads, dim, kv_heads, dim)
        for head in range(heads):
            served = head // (heads // kv_heads)
            mix[head, served, :, 0] = 1.0
            selected[head, :, served] = torch.eye(dim)
        state[f"{place}.rope_mix"] = mix.flatten(1, 2)
        state[f"{place}.rope_planes"] = torch.arange(half).repeat(kv_heads)
        state[f"{place}.kv_b_proj.weight"] = selected.flatten(0, 1).flatten(1)
    model.load_state_dict(state)
    return model


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32, 3 layers of sums over at most 64 terms."""
    torch.testing.assert_close(ours, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "headwise"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_a_grouped_query_model_written_as_mla_gives_its_logits_and_tokens(
    family: str, implementation: str
) -> None:
    full = {"use_sliding_window": False} if family == "qwen2" else {}
    llama = make(family, head_dim=8, **full)
    for layer in llama.model.layers:
        if layer.self_attn.q_proj.bias is not None:  # fresh ones are zeros
            for name in ("q_proj", "k_proj", "v_proj"):
                torch.nn.init.normal_(getattr(layer.self_attn, name).bias)
    ours = exact(llama)
    if implementation == "headwise":
        headwise.attach(ours, strict=True)
    else:
        ours.set_attn_implementation(implementation)
    with torch.no_grad():
        close(ours(PROMPT).logits, llama(PROMPT).logits)
        padded = {"input_ids": PROMPT, "attention_mask": PADDING}
        seen = PADDING.bool()
        close(ours(**padded).logits[seen], llama(**padded).logits[seen])
    options = {"max_new_tokens": 15, "do_sample": False}
    for inputs in ({"input_ids": PROMPT}, padded):
        assert torch.equal(ours.generate(**inputs, **options), llama.generate(**inputs, **options))


def test_a_query_meets_a_pair_with_its_own_multiple_and_frequency() -> None:
    """Scores of one layer, written in complex numbers, at positions that do not start at 0."""
    model = make("headwise_mla")
    module = model.model.layers[0].self_attn
    with torch.no_grad():
        module.rope_planes.copy_(torch.tensor([4, 1, 1, 2]))  # others than a fresh model's
        hidden, positions = torch.randn(1, 5, 48), torch.arange(3, 8)
        rotary = model.model.rotary_emb(hidden, positions[None])
        query = module.q_proj(hidden).view(5, 6, 2, 5)
        query = torch.complex(query[:, :, 0], query[:, :, 1])[..., module.rope_planes]
        query = query * torch.view_as_complex(module.rope_mix.detach())
        key = module.kv_a_proj(hidden)[0, :, 20:].view(5, 2, 4)
        key = torch.complex(key[:, 0], key[:, 1])
        angle = positions[:, None] * model.model.rotary_emb.inv_freq[module.rope_planes]
        turn = torch.polar(torch.ones_like(angle), angle)
        rope = torch.einsum("shp,lp->hsl", query * turn[:, None], (key * turn).conj()).real
        content = module.kv_b_proj(module.kv_a_proj(hidden)[0, :, :20]).view(5, 6, 24)[..., :10]
        nope = torch.einsum("shn,lhn->hsl", module.q_proj(hidden).view(5, 6, 10), content)
        expected = (0.3 * (nope + rope)).softmax(-1)
        model.set_attn_implementation("eager")
        given = module(hidden, rotary)[1][0]
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


_RELOAD = """
import sys
import torch
import headwise
torch.set_num_threads(int(sys.argv[4]))  # PyTorch's own products may differ by it
model, tokenizer = headwise.load(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.sweep)]
)
def test_a_saved_model_gives_the_same_bits_in_a_fresh_process(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make("headwise_mla")
    for parameter in model.parameters():  # .to(dtype) would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:  # others than a fresh model's
            layer.self_attn.rope_planes.copy_(layer.self_attn.rope_planes.flip(0))
        expected = model(PROMPT).logits
    model.save_pretrained(tmp_path / "model")
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    torch.save(PROMPT, tmp_path / "prompt")
    given = [str(tmp_path / name) for name in ("model", "prompt", "logits")]
    given.append(str(torch.get_num_threads()))
    subprocess.run([sys.executable, "-c", _RELOAD, *given], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits"), expected)
    loaded, words = headwise.load(tmp_path / "model")
    assert type(loaded) is HeadwiseMlaForCausalLM
    assert (loaded.dtype, words("w5 w7").input_ids) == (dtype, [5, 7])
    assert loaded.to(torch.float16).model.layers[1].self_attn.rope_planes.dtype == torch.int64
    plan = headwise.plan(tmp_path / "model")
    assert plan.weights.total == sum(parameter.numel() for parameter in model.parameters())
    assert plan.bytes_per_token == (20 + 8 + 12 + 14 + 24 + 6) * dtype.itemsize


def test_a_fresh_model_is_initialised_from_the_meta_device_too() -> None:
    with torch.device("meta"):
        model = HeadwiseMlaForCausalLM(make("headwise_mla").config)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(77)
    model._init_weights(module := model.model.layers[1].self_attn)
    assert module.rope_planes.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert module.rope_mix.square().sum(-1).mean().item() == pytest.approx(1.0, abs=0.3)


def test_training_reaches_every_parameter() -> None:
    model = make("headwise_mla").train()
    model.activation_checkpointing_enable()
    model(PROMPT, labels=PROMPT).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_only_the_sizes_that_the_config_needs_have_to_be_given() -> None:
    with pytest.raises(headwise.SpecError, match="kv_lora_rank=None: expected a list of 32"):
        HeadwiseMlaConfig()
    good = make("headwise_mla").config.to_dict()
    with pytest.raises(headwise.SpecError, match="query_key_bias='no'") as caught:
        HeadwiseMlaConfig(**good | {"query_key_bias": "no"})
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_wrong_config_is_refused_in_one_line(tmp_path: Path) -> None:
    make("headwise_mla").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"v_head_dim": 14', '"v_head_dim": 0'))
    with pytest.raises(headwise.LoadError, match="v_head_dim=0: expected an integer") as caught:
        headwise.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_layers_too_wide_for_the_cpu_kernels_say_what_runs_and_why() -> None:
    config = make("headwise_mla").config.to_dict()
    sizes = {"kv_lora_rank": [500, 700, 500], "qk_rope_head_dim": [64, 64, 500]}
    wide = HeadwiseMlaForCausalLM(
        HeadwiseMlaConfig(**config | sizes | {"qk_nope_head_dim": [10, 0, 0]})
    ).eval()
    expected = wide.generate(PROMPT, max_new_tokens=5, do_sample=False)
    report = headwise.attach(wide)
    assert [at.decode[0].accepted for at in report.layers] == [True, False, True]
    assert "no kernel for head dims above 576" in str(report)
    assert torch.equal(wide.generate(PROMPT, max_new_tokens=5, do_sample=False), expected)


def test_attention_that_returns_weights_is_recorded() -> None:
    model = make("headwise_mla", attn_implementation="eager")
    with torch.no_grad():
        found = model(PROMPT, output_attentions=True, output_hidden_states=True)
    assert [tuple(each.shape) for each in found.attentions] == [(2, 6, 17, 17)] * 3
    assert len(found.hidden_states) == 4
    assert all(isinstance(at.self_attn, HeadwiseMlaAttention) for at in model.model.layers)
