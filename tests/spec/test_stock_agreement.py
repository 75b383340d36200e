"""What is read from a config equals what Transformers builds from it."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, DynamicCache, Gemma3Config

from headwise.spec import ModelSpec, StateSpec, Uncovered
from headwise.spec.families import FAMILIES
from spec.stock import CONFIGS, raw_config, stock_config, stock_layers

every_config = pytest.mark.parametrize("name", CONFIGS)
# Transformers has no PaLM.
every_family = pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "palm"])

# T5's and Whisper's cache is made of two others, and the encoders have none.
CACHED = [
    name
    for name in CONFIGS
    if name not in ("bert", "roberta", "t5", "whisper", "gemma3_text bidirectional")
]


def pairs(name):
    """Every (AttentionSpec, stock module) of a model: self, encoder and cross."""
    spec = ModelSpec.from_config(raw_config(name))
    own, encoder, cross = stock_layers(name)
    stacks = [(spec.layers or spec.encoder_layers, own)]
    if spec.layers:
        stacks.append((spec.encoder_layers, encoder))
    found = []
    for layers, modules in stacks:
        attentions = [layer.attention for layer in layers if layer.attention is not None]
        assert len(attentions) == len(modules)
        found += list(zip(attentions, modules))
    crossing = [layer.cross_attention for layer in spec.layers if layer.cross_attention]
    assert len(crossing) == len(cross)
    return found + list(zip(crossing, cross))


@every_config
def test_scale_equals_the_stock_modules_scaling(name):
    for attention, stock in pairs(name):
        if CONFIGS[name][0] == "mpt":
            assert attention.scale == stock.module.softmax_scale
        elif CONFIGS[name][0] in ("falcon", "bloom"):
            assert attention.scale == pytest.approx(stock.module.inv_norm_factor, rel=1e-15)
        else:
            assert attention.scale == stock.module.scaling


@every_config
def test_head_counts_and_sizes_fit_the_stock_projections(name):
    for attention, stock in pairs(name):
        assert attention.heads * attention.head_dim == stock.query
        assert stock.key in (attention.kv_heads * attention.head_dim, None)
        assert stock.value in (attention.kv_heads * attention.value_dim, None)
        module = stock.module
        sizes = (
            "head_dim",
            "attention_head_size",
            "key_value_proj_dim",
            "qk_head_dim",
            "head_size",
        )
        assert attention.head_dim in [getattr(module, size, None) for size in sizes]
        assert getattr(module, "num_key_value_groups", attention.group_size) in (
            attention.group_size,
        )


@every_config
def test_options_are_those_of_the_stock_module(name):
    for attention, stock in pairs(name):
        module = stock.module
        # those of Bloom and MPT do not say
        causal = getattr(module, "is_causal", True)
        assert attention.causal == (causal and not attention.cross)
        assert attention.sinks == hasattr(module, "sinks")
        norms = ("q_norm", "q_layernorm", "qk_norm", "query_layernorm")
        assert attention.qk_norm == any(hasattr(module, name) for name in norms)
        assert attention.softcap == getattr(module, "attn_logit_softcapping", None)
        if hasattr(module, "sliding_window"):
            # EXAONE's says of every layer what the sliding ones have
            slides = getattr(module, "is_sliding", True)
            assert attention.window == (module.sliding_window if slides else None)
        for field, attribute in [("latent_rank", "kv_lora_rank"), ("query_rank", "q_lora_rank")]:
            assert getattr(attention, field) == getattr(module, attribute, None)


@pytest.mark.parametrize("name", CACHED)
def test_windows_are_those_of_the_stock_cache(name):
    layers = ModelSpec.from_config(raw_config(name)).layers
    stock = DynamicCache(config=stock_config(name)).layers
    assert len(layers) == len(stock)
    for layer, cached in zip(layers, stock):
        kind = type(cached).__name__
        assert isinstance(layer.mixer, StateSpec) == (kind == "LinearAttentionLayer")
        keeps_none = layer.shares is not None or isinstance(layer.mixer, Uncovered)
        assert keeps_none == (kind == "DummyLayer")
        if layer.cached is not None:
            assert layer.cached.window == getattr(cached, "sliding_window", None)
            assert (layer.cached.indexer is not None) == (kind == "DynamicIndexedLayer")


def held(layer):
    """The tensors in a layer of Transformers' cache."""
    states = [*getattr(layer, "conv_states", {}).values()]
    states += getattr(layer, "recurrent_states", {}).values()
    rows = [getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")]
    return [tensor for tensor in (*states, *rows) if tensor is not None]


# Beside these: cross-attention has a cache of its own, Falcon caches more heads than it has, and
# these sizes do not fit positions of images (GLM-4V, Qwen-VL), DeepSeek-V2's complex numbers or the
# rotation of Mistral 4 with YaRN, which goes by its head dim.
FILLED = [
    name
    for name in CACHED
    if not name.startswith(("deepseek_v2", "glm4v", "qwen2_vl", "qwen2_5_vl", "falcon grouped"))
    and name not in ("bert decoder", "gpt2 by depth", "mistral4 yarn")
]
# Whose modules say least of what they cache.
QUICK = ("granitemoehybrid", "mpt", "cohere2", "opt", "gemma4", "llama4", "nemotron_h", "lfm2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.sweep) for name in FILLED],
)
def test_a_stock_cache_holds_the_bytes_of_the_spec(name):
    config = stock_config(name)
    model = AutoModel.from_config(config, experts_implementation="eager").eval()
    cache, ids = DynamicCache(config=config), torch.tensor([[1, 2, 3, 4, 5, 6, 7]] * 2)
    with torch.no_grad():
        model(input_ids=ids, cache=cache)
        model(input_ids=ids[:, :1], cache=cache)
    nbytes = sum(tensor.nbytes for layer in cache.layers for tensor in held(layer))
    assert ModelSpec.from_config(raw_config(name)).cache_bytes(8, 2, "float32") == nbytes


@pytest.mark.parametrize("name", ["gemma3n", "gemma4 shared"])
def test_layers_that_share_read_the_layer_that_stock_has_them_read(name):
    layers = ModelSpec.from_config(raw_config(name)).layers
    modes = stock_config(name).kv_sharing_modes
    assert [layer.shares is not None for layer in layers] == [mode == "reuse" for mode in modes]
    stored = {layers[at].attention.window: at for at, mode in enumerate(modes) if mode == "store"}
    assert len(stored) == 2
    for layer in layers:
        if layer.shares is not None:
            assert layer.shares == stored[layer.attention.window]


@every_config
def test_dict_object_and_attributes_read_the_same(name):
    config = stock_config(name)
    expected = ModelSpec.from_config(config)
    assert ModelSpec.from_config(raw_config(name)) == expected
    assert ModelSpec.from_config(config.to_dict()) == expected
    assert ModelSpec.from_config(json.loads(config.to_json_string())) == expected
    assert ModelSpec.from_config(SimpleNamespace(**config.to_dict())) == expected


# headwise_mla has no default sizes of its latents, lfm2_moe none of its kinds of layers.
@pytest.mark.parametrize(
    "model_type", [name for name in FAMILIES if name not in ("palm", "headwise_mla", "lfm2_moe")]
)
def test_a_config_of_defaults_reads_as_transformers_own(model_type):
    stock = AutoConfig.for_model(model_type)
    assert ModelSpec.from_config({"model_type": model_type}) == ModelSpec.from_config(stock)


@every_family
def test_each_default_is_that_of_the_config_class(model_type):
    stock = CONFIG_MAPPING[model_type]
    defaults = {field.name: field.default for field in dataclasses.fields(stock)}
    # Not fields of their classes: rope_scaling is renamed on reading, patterns, intervals and the
    # sizes of global layers have their defaults in __post_init__, and Qwen2Attention takes a
    # head_dim if there is one.
    renamed = {"rope_scaling": None, "head_dim": None, "hybrid_override_pattern": None}
    renamed |= {"global_head_dim": 512, "num_global_key_value_heads": None}
    renamed |= {"first_k_dense_replace": 0, "full_attention_interval": 4}
    renamed |= {"index_topk_pattern": None, "index_topk_freq": 1, "index_skip_topk_offset": 2}
    renamed["sliding_window_pattern"] = 6 if model_type.startswith("gemma") else 4
    defaults = renamed | defaults
    # Kimi's kin write their context under another name than that of the field.
    defaults["model_max_length"] = defaults.get("max_position_embeddings")
    for name, value in FAMILIES[model_type].defaults.items():
        assert (name, value) == (name, defaults[name])


@every_family
def test_aliases_are_those_of_the_config_class(model_type):
    stock = CONFIG_MAPPING[model_type]
    read = FAMILIES[model_type].defaults
    attribute_map = {other: name for other, name in stock.attribute_map.items() if name in read}
    if model_type == "glm4_moe_lite":
        del attribute_map["head_dim"]  # that of the rotary part, which has a name of its own
    # These config classes take other names apart by hand.
    by_hand = {"n_embed": "hidden_size"} if model_type in ("falcon", "bloom") else {}
    if model_type == "nemotron_h":
        by_hand = {"mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel"}
    assert FAMILIES[model_type].aliases == attribute_map | by_hand


def test_multimodal_gemma3_reads_its_text_part():
    text = raw_config("gemma3_text")
    expected = ModelSpec.from_config(text)
    assert ModelSpec.from_config({"model_type": "gemma3", "text_config": text}) == expected
    untyped = {key: value for key, value in text.items() if key != "model_type"}
    assert ModelSpec.from_config({"model_type": "gemma3", "text_config": untyped}) == expected
    assert ModelSpec.from_config(Gemma3Config(text_config=dict(text))) == expected
    assert ModelSpec.from_config({"model_type": "gemma3"}) == ModelSpec.from_config(Gemma3Config())


@pytest.mark.parametrize(
    ("outer", "text"),
    [("qwen2_vl", "qwen2_vl"), ("qwen2_5_vl", "qwen2_5_vl windows"), ("qwen3_vl", "qwen3_vl")],
)
def test_multimodal_configs_read_as_the_text_part_that_transformers_makes(outer, text):
    fields = {key: value for key, value in raw_config(text).items() if key != "model_type"}
    expected = ModelSpec.from_config(raw_config(text))
    nested = {"model_type": outer, "text_config": {**fields, "model_type": outer}}
    assert ModelSpec.from_config(nested) == expected
    assert ModelSpec.from_config(AutoConfig.for_model(outer, text_config=fields)) == expected
    if outer != "qwen3_vl":  # published with the fields of both parts beside one another
        flat = {**fields, "vision_config": {"hidden_size": 8}}
        assert ModelSpec.from_config({"model_type": outer, **flat}) == expected
        assert ModelSpec.from_config(AutoConfig.for_model(outer, **flat)) == expected


def test_kimi_k25_reads_a_text_part_that_is_deepseek_v3_under_another_name():
    text = raw_config("deepseek_v3")
    expected = ModelSpec.from_config(text)
    published = {"model_type": "kimi_k25", "text_config": text | {"model_type": "kimi_k2"}}
    assert ModelSpec.from_config(published) == expected
    made = AutoConfig.for_model("kimi_k25", text_config=text | {"model_type": "kimi_k2"})
    assert ModelSpec.from_config(made) == expected


@pytest.mark.parametrize(
    "model_type", ["mistral3", "cohere2_vision", "glm4v", "glm46v", "glm4v_moe"]
)
def test_a_multimodal_config_of_defaults_reads_as_transformers_own(model_type):
    stock = AutoConfig.for_model(model_type)
    assert ModelSpec.from_config({"model_type": model_type}) == ModelSpec.from_config(stock)


def test_multimodal_wrappers_of_a_known_text_model_read_it():
    text = raw_config("llama")
    wrapped = ModelSpec.from_config({"model_type": "llava", "text_config": text})
    assert wrapped == ModelSpec.from_config(text)


def test_yarn_changes_the_scale_only_with_mscale_all_dim():
    plain = ModelSpec.from_config(raw_config("deepseek_v3 yarn plain")).layers[0].attention
    scaled = ModelSpec.from_config(raw_config("deepseek_v3 yarn")).layers[0].attention
    assert plain.scale == 19**-0.5
    assert scaled.scale / plain.scale == pytest.approx((0.1 * math.log(40) + 1) ** 2, rel=1e-14)


def test_t5_encoder_alone_has_no_decoder_layers():
    spec = ModelSpec.from_config(raw_config("t5") | {"is_encoder_decoder": False})
    assert (len(spec.layers), len(spec.encoder_layers)) == (0, 2)


def test_roberta_positions_start_behind_the_padding_row():
    # The published roberta-base has 514 rows, pad_token_id 1, and takes 512 tokens.
    assert ModelSpec.from_config(raw_config("roberta")).max_context == 512
