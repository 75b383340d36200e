"""`--to mha`: an MLA checkpoint and what it is expanded to give the same logits and tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import headwise
from cli.checkpoints import save_tiny
from families import VOCABULARY, make
from headwise.conversion import Target, convert
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.checkpoint.weights import StoredWeights, write_weights
from headwise.conversion.coverage import check
from headwise.conversion.methods.expansion import expand
from headwise.errors import ConversionError
from rounding import half_precision_error, relative_error

PROMPT = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(4))
# the first sequence is 5 tokens shorter
PADDING = (torch.arange(17) >= torch.tensor([[5], [0]])).long()
DEEPSEEK = ("deepseek_v2", "deepseek_v3", "deepseek_v3-yarn")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 64}


def latent_model(**changes: Any) -> Any:
    """A random headwise_mla whose biases and frequencies are not those of a fresh one."""
    model = make("headwise_mla", **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.rope_planes.copy_(attention.rope_planes.flip(0))
            for projection in (attention.q_proj, attention.kv_a_proj):
                if projection.bias is not None:
                    projection.bias.normal_()
    return model


def expanded(model: Any, folder: Path) -> Any:
    """The model, written, expanded and loaded again by Transformers."""
    model.save_pretrained(folder / "mla")
    (folder / "mha").mkdir()
    expand(Checkpoint(folder / "mla"), folder / "mha")
    made, info = hf.AutoModelForCausalLM.from_pretrained(folder / "mha", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return made


def same(ours: Any, original: Any) -> None:
    """Logits and greedy tokens, with and without padding in front."""
    padded, seen = {"input_ids": PROMPT, "attention_mask": PADDING}, PADDING.bool()
    with torch.no_grad():
        for inputs, kept in (({"input_ids": PROMPT}, seen.logical_or(~seen)), (padded, seen)):
            logits, expected = ours(**inputs).logits[kept], original(**inputs).logits[kept]
            # float32 through 3 layers, sums over at most 64 terms
            error = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(logits, expected, atol=error, rtol=0)
            tokens = [
                model.generate(**inputs, max_new_tokens=20, do_sample=False)
                for model in (ours, original)
            ]
            assert torch.equal(*tokens)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "query_key_bias": False},
        {"v_head_dim": 10, "rope_parameters": LLAMA3},
        {"v_head_dim": 20, "rope_parameters": YARN},
    ],
    ids=["biases", "tied", "llama3", "yarn"],
)
def test_a_headwise_mla_becomes_a_stock_model_with_the_same_output(
    changes: dict, attached: bool, tmp_path: Path
) -> None:
    original = latent_model(**changes)
    made = expanded(original, tmp_path)
    assert type(made) is hf.GlmForCausalLM
    assert (made.config.num_key_value_heads, made.config.head_dim) == (6, 20)
    if attached:
        report = headwise.attach(made, strict=True)
        assert str(report.layers[0].spec) == "MHA 6 heads, D 20"
    same(made, original)


def test_half_precision_stays_and_is_as_close_as_its_rounding(tmp_path: Path) -> None:
    exact = latent_model()
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        truth = exact(PROMPT).logits
        stored = latent_model()
        for parameter in stored.parameters():
            parameter.data = parameter.data.bfloat16()
        rounded = stored(PROMPT).logits.float()
        made = expanded(stored, tmp_path)
        assert made.dtype == torch.bfloat16
        logits = made(PROMPT).logits.float()
    # keys and values are made of rounded weights, where they were made of rounded latents
    bound = half_precision_error(torch.bfloat16, exact.config.num_hidden_layers)
    assert relative_error(logits, truth) <= bound
    assert relative_error(rounded, truth) <= bound


def test_a_model_without_an_end_does_not_get_one(tmp_path: Path) -> None:
    """GLM's config has three end tokens of its own."""
    made = expanded(latent_model(), tmp_path)
    assert made.generation_config.eos_token_id is None
    assert made.generation_config.pad_token_id == 0


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("family", DEEPSEEK)
def test_a_deepseek_caches_keys_and_values_and_has_the_same_output(
    family: str, attached: bool, tmp_path: Path
) -> None:
    original = make(family)
    made = expanded(original, tmp_path)
    assert made.config.model_type == f"headwise_{family.removesuffix('-yarn')}_mha"
    if attached:
        headwise.attach(made, strict=True)
    same(made, original)
    with torch.no_grad():
        cache = made(PROMPT, use_cache=True).cache
    # of each token 6 heads with keys of 12 + 8 and values of 14, in 3 layers, 4 bytes each
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cached == 2 * 17 * 3 * 6 * (12 + 8 + 14) * 4
    spec = headwise.ModelSpec.from_config(made.config)
    assert cached == 2 * 17 * spec.cache_bytes_per_token("float32")
    assert spec.layers[0].attention.mechanism == "MHA"


@pytest.mark.parametrize("family", ["deepseek_v2-mha", "deepseek_v3-mha"])
def test_an_expanded_deepseek_is_saved_and_trained_as_any(family: str, tmp_path: Path) -> None:
    model = make(family)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(PROMPT).logits, model(PROMPT).logits)
    model.train()(PROMPT, labels=PROMPT).loss.backward()
    assert model.model.layers[0].self_attn.kv_b_proj.weight.grad.abs().max() > 0


def test_published_weights_one_tensor_an_expert_are_read(tmp_path: Path) -> None:
    make("deepseek_v3").save_pretrained(tmp_path)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in StoredWeights(tmp_path)


def latent_folder(folder: Path, **changes: Any) -> Path:
    """A small headwise_mla with a tokenizer."""
    save_tiny(folder)
    latent_model(vocab_size=258, **changes).save_pretrained(folder)
    return folder


def test_the_whole_conversion_says_how_to_load_and_what_it_costs(tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    folder = latent_folder(tmp_path / "mla")
    text.write_text("the way of the wind " * 200, encoding="utf-8")
    verdict = convert(folder, "mha", out=out, calibration=text, tokens=400, length=40)
    # cached before: R + P of each layer; after: keys and values of 6 heads, 2 x 10 each
    assert verdict.cache.original == (28 + 26 + 30) * 4
    assert verdict.cache.converted == 3 * 6 * (20 + 20) * 4
    assert verdict.converted.perplexity == pytest.approx(verdict.original.perplexity, rel=1e-4)
    assert verdict.converted.agreement == 1
    assert verdict.conclusion.startswith("mha takes 8.6 times the cache")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "ordinary Transformers checkpoint, of model_type `glm`" in card
    loaded, tokenizer = headwise.load(out)
    original, _ = headwise.load(folder)
    ids = tokenizer("the wind", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-3)


def test_a_grouped_query_model_to_mla_and_to_mha_is_what_it_was(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    convert(folder, "mla", out=tmp_path / "mla")
    convert(tmp_path / "mla", "mha", out=tmp_path / "mha")
    models = [headwise.load(path)[0] for path in (folder, tmp_path / "mha")]
    with torch.no_grad():
        expected, logits = (model(torch.arange(30)[None]).logits for model in models)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.LlamaConfig(), "'llama' is MHA already, and caches keys and values as they are"),
        (hf.LlamaConfig(num_key_value_heads=8), "'llama' is GQA already"),
        (make("deepseek_v2-mha").config, "is MHA already"),
        (make("minicpm3").config, "'minicpm3' is not covered: expected headwise_mla, deepseek_v2"),
        (make("headwise_mla", attention_bias=True).config, "attention_bias is true: no stock MHA"),
        (make("headwise_mla", mlp_bias=True).config, "mlp_bias is true"),
        (make("headwise_mla", v_head_dim=21).config, "v_head_dim is 21: expected at most 20"),
        (
            make("headwise_mla", quantization_config={"quant_method": "x"}).config,
            "the checkpoint is quantised",
        ),
    ],
)
def test_what_cannot_be_expanded_is_refused_in_one_line(config: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        check(config, Target.parse("mha"))
    assert "\n" not in str(caught.value)


def test_frequencies_that_half_rotated_heads_have_not_are_refused() -> None:
    rope = {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    config = make("headwise_mla", rope_parameters=rope).config
    with pytest.raises(ConversionError, match="rope_type is 'proportional'"):
        check(config, Target.parse("mha"))


def test_layers_are_streamed_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_weights, "__defaults__", (30_000,))
    original = latent_model()
    made = expanded(original, tmp_path)
    assert len(list((tmp_path / "mha").glob("model-*-of-*.safetensors"))) > 2
    same(made, original)
