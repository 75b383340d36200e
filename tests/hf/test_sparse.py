"""Sparse attention in Transformers: models whose layers attend to the keys that indexers choose."""

import copy
import importlib
import io
import pickle

import pytest
import torch

import headwise
from headwise.caches import ContiguousCache
from headwise.hf import cache_nbytes
from headwise.hf.chosen_mask import ChosenMask
from headwise.hf.indexed_layers import IndexedLayer, IndexKeys
from headwise.hf.indexers import lightning, pooled
from headwise.hf.indexers.lightning import LightningIndexer
from viewing.words import Words

pytest.importorskip("transformers.models.mistral_large4")
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

TOP, DIM, LAYERS, VOCABULARY = 8, 32, 3, 97
# What of it a family's config has; at least 16 heads, so that no two sums of relus are equal.
FIELDS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "swa_num_attention_heads": 6,
    "swa_num_key_value_heads": 6,
    "swa_q_lora_rank": 20,
    "swa_kv_lora_rank": 20,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
    "sliding_window": 7,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "index_topk": TOP,
    "index_head_dim": DIM,
    "index_n_heads": 16,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Which layers choose for themselves; and which of them have no rotation, or a window.
CHANGES = {
    "deepseek_v32": {},
    "axk2": {},
    "dots3_note": {"layer_types": ["sliding_attention", "indexed_attention", "indexed_attention"]},
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full"]},
    "mistral_large4": {
        "indexer_types": ["full", "shared", "full"],
        "no_rope_layers": [1, 0, 1],
        "kv_source_layers": [0, 1, 2],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "hy_v4": {"indexer_types": ["full", "shared", "full"]},
    "glm5_next": {
        "indexer_types": ["full", "shared", "full"],
        "layer_types": ["indexed_attention", "indexed_attention", "linear_attention"],
        "index_topk": 8,
        "index_kpool": 4,
        "qk_rope_head_dim": 0,
    },
    "qwen4_exp": {
        "layer_types": ["indexed_attention", "linear_attention", "indexed_attention"],
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "minimax_m3_vl": {
        "layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"],
        "num_key_value_heads": 2,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 3,
        "index_local_blocks": 1,
    },
}
# Those whose indexers choose the keys with the largest weighted sums, one by one.
LIGHTNING = ("deepseek_v32", "axk2", "dots3_note", "glm_moe_dsa", "mistral_large4", "hy_v4")
HEADS = {
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "axk2": "AXK2ForCausalLM",
    "dots3_note": "Dots3NoteForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "hy_v4": "HYV4ForCausalLM",
    "glm5_next": "Glm5NextForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForCausalLM",
    "minimax_m3_vl": "MiniMaxM3VLForCausalLM",
}


def make(family, **changes):
    """A small random model, the same at every call."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = getattr(module, HEADS[family])
    parts = kind.config_class.sub_configs
    text = parts.get("text_config", kind.config_class)
    known = vars(text()).keys() | set(text.attribute_map)
    fields = {**{name: at for name, at in FIELDS.items() if name in known}, **CHANGES[family]}
    config = text(**(fields | changes))
    if text is not kind.config_class:
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        small |= {"num_attention_heads": 2, "head_dim": 8, "patch_size": 4, "image_size": 8}
        config = kind.config_class(text_config=config, vision_config=small)
    torch.manual_seed(3)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and sinks that change something
            torch.nn.init.normal_(parameter.data, mean=float(parameter.data.mean()), std=0.1)
    return model


PROMPT = torch.randint(3, VOCABULARY, (1, 19), generator=torch.Generator().manual_seed(5))
BATCH = torch.randint(3, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(6))
SEEN = torch.ones_like(BATCH)
SEEN[0, :9] = 0
MODES = {
    "one token at a time": {"input_ids": PROMPT},
    "left-padded batch": {"input_ids": BATCH, "attention_mask": SEEN},
    "static cache": {"input_ids": PROMPT, "cache_implementation": "static"},
    "padded static cache": {
        "input_ids": BATCH,
        "attention_mask": SEEN,
        "cache_implementation": "static",
    },
    "beams": {"input_ids": BATCH, "attention_mask": SEEN, "num_beams": 3},
    "prompt lookup": {"input_ids": PROMPT, "prompt_lookup_num_tokens": 3},
    "no cache": {"input_ids": PROMPT, "use_cache": False},
    "prompt in chunks": {"input_ids": BATCH[1:], "prefill_chunk_size": 8},
}


def generated(model, mode, tokens=12):
    return model.generate(
        **MODES[mode],
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=2,
    )


def assert_same(ours, stock):
    for given, expected in zip(ours.logits, stock.logits, strict=True):
        scale = float(expected[expected.isfinite()].abs().max())
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-4 * scale)
    assert torch.equal(ours.sequences, stock.sequences)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", CHANGES)
def test_tokens_are_stock_s_in_every_mode(family, mode):
    model = make(family)
    try:
        stock = generated(model, mode)
    except ValueError as error:
        pytest.skip(f"stock refuses: {error}")
    report = headwise.attach(model)
    # of the hybrids the layers with a state stay
    left = [layer.note for layer in report.layers if layer.stock]
    assert all("recurrent or linear" in note for note in left)
    assert_same(generated(model, mode), stock)


@pytest.mark.parametrize("cache", ["paged:4", "int8", "int4", "int8:4"])
@pytest.mark.parametrize("family", CHANGES)
def test_every_cache_holds_the_keys_of_an_indexer(family, cache):
    model = make(family)
    headwise.attach(model)
    whole = generated(model, "left-padded batch", 4)
    headwise.attach(model, cache=cache)
    ours = generated(model, "left-padded batch", 4)
    if cache.startswith("paged"):
        assert_same(ours, whole)
        return
    # rounded rows change choices; the first tokens are chosen from keys that nothing rounded
    error = (ours.logits[0] - whole.logits[0]).norm() / whole.logits[0].norm()
    assert 0 < error < (0.9 if cache == "int4" else 0.1)


@pytest.mark.parametrize("family", LIGHTNING)
def test_indexers_choose_by_our_operator_and_latents_are_absorbed(family, monkeypatch):
    chosen, absorbed = [], []
    own, latent = lightning.index_topk, headwise.hf.latent.latent_attention

    def choose(*tensors, mask):
        chosen.append(own(*tensors, mask=mask))
        return chosen[-1]

    def attend(*tensors, indices, **options):
        absorbed.append(indices)
        return latent(*tensors, indices=indices, **options)

    monkeypatch.setattr(lightning, "index_topk", choose)
    monkeypatch.setattr(headwise.hf.latent, "latent_attention", attend)
    model = make(family)
    headwise.attach(model)
    with torch.no_grad():
        cache = model(PROMPT).cache
        chosen.clear(), absorbed.clear()
        model(PROMPT[:, :1], cache=cache)
    types = model.config.get_text_config().to_dict().get("indexer_types")
    own_choice = LAYERS - 1 if family == "dots3_note" else LAYERS
    assert len(chosen) == (types.count("full") if types else own_choice)
    assert all(indices.shape == (1, 1, TOP) for indices in chosen)
    assert all(indices.min() >= 0 for indices in chosen)
    assert len(absorbed) == LAYERS
    assert sum(indices is not None for indices in absorbed) == own_choice


@pytest.mark.parametrize("family", LIGHTNING)
def test_what_is_below_the_budget_is_attended_to_whole(family, monkeypatch):
    def refuse(*tensors, mask):
        raise AssertionError("nothing is to be chosen")

    monkeypatch.setattr(lightning, "index_topk", refuse)
    model = make(family, index_topk=64)
    stock = generated(model, "left-padded batch")
    headwise.attach(model)
    seen, run = [], headwise.hf.latent.latent_attention

    def attend(*tensors, indices, **options):
        seen.append(indices)
        return run(*tensors, indices=indices, **options)

    monkeypatch.setattr(headwise.hf.latent, "latent_attention", attend)
    assert_same(generated(model, "left-padded batch"), stock)
    assert seen
    assert all(indices is None for indices in seen)


def test_a_cache_counts_the_keys_of_indexers():
    model = make("glm_moe_dsa")
    headwise.attach(model)
    with torch.no_grad():
        cache = model(BATCH).cache
    assert [isinstance(layer, IndexKeys) for layer in cache.layers] == [True] * LAYERS
    # two layers choose, one reuses what the first chose
    latents = 2 * 21 * (20 + 16) * LAYERS
    assert cache_nbytes(cache) == 4 * (latents + 2 * 21 * DIM * 2)
    twin = copy.copy(cache.layers[0])
    twin.crop(-5)
    assert twin.indexer_keys.shape == (2, 16, DIM)
    assert cache.layers[0].indexer_keys.shape == (2, 21, DIM)
    twin.batch_repeat_interleave(2)
    assert twin.indexer_keys.shape == (4, 16, DIM)
    assert torch.equal(twin.indexer_keys[1], cache.layers[0].indexer_keys[0, :16])
    twin.batch_select_indices(torch.tensor([3]))
    assert torch.equal(twin.indexer_keys[0], cache.layers[0].indexer_keys[1, :16])
    twin.reset()
    assert twin.indexer_keys is None
    assert cache_nbytes(cache) == 4 * (latents + 2 * 21 * DIM * 2)


def test_with_gradients_the_cache_is_stock_s_and_goes_on():
    model = make("deepseek_v32")
    with torch.no_grad():
        expected = model(PROMPT).logits[:, -3:]
    headwise.attach(model)
    with torch.no_grad():
        cache = model(PROMPT[:, :-3]).cache
    given = model(PROMPT[:, -3:], cache=cache).logits
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    given.sum().backward()
    assert type(cache.layers[0]).__name__ == "DynamicIndexedLayer"
    assert model.model.layers[0].self_attn.kv_b_proj.weight.grad is not None


def test_weights_that_are_asked_for_are_those_of_the_chosen_keys():
    model = make("deepseek_v32")
    headwise.attach(model)
    with torch.no_grad():
        (weights, *_) = model(PROMPT, output_attentions=True).attentions
    assert int((weights[0, :, -1] > 0).sum(-1).max()) == TOP
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6, 19))


def test_attached_models_copy_and_pickle_and_detach_leaves_nothing():
    model = make("glm_moe_dsa")
    stock = generated(model, "one token at a time")
    headwise.attach(model)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    other = pickle.load(buffer)
    for each in (model, twin, other):
        hook = each.model.layers[0].self_attn.indexer.__dict__["forward"]
        assert isinstance(hook, LightningIndexer)
        assert hook.owner is each.model.layers[0].self_attn.indexer
        assert_same(generated(each, "one token at a time"), stock)
        headwise.detach(each)
        assert "forward" not in each.model.layers[0].self_attn.indexer.__dict__
        assert torch.equal(generated(each, "one token at a time").sequences, stock.sequences)


def test_an_indexer_that_does_something_else_stays_and_is_named():
    model = make("deepseek_v32")
    for layer in model.model.layers:
        forward = layer.self_attn.indexer.forward
        layer.self_attn.indexer.forward = lambda *args, own=forward, **kw: own(*args, **kw)
    message = "every layer of DeepseekV32ForCausalLM .* which headwise does not do: its indexer has"
    with pytest.raises(headwise.UnsupportedError, match=message):
        headwise.attach(model)


def test_a_cache_that_drops_tokens_is_refused():
    with pytest.raises(headwise.UnsupportedError, match="has indexers, which choose among all"):
        headwise.attach(make("deepseek_v32"), cache="window:16")


def test_a_cache_of_the_caller_stays_as_it_is():
    model = make("deepseek_v32")
    stock = generated(model, "one token at a time")
    headwise.attach(model)
    given = DynamicCache(config=model.config)
    ours = model.generate(
        PROMPT,
        cache=given,
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert type(given.layers[0]).__name__ == "DynamicIndexedLayer"
    assert_same(ours, stock)


@pytest.mark.parametrize("family", ["glm5_next", "qwen4_exp"])
def test_groups_of_keys_are_pooled_once(family, monkeypatch):
    pooled_counts, chosen = [], []
    pool, choose = pooled.PooledIndexer._pooled, pooled.index_topk

    def counted(states, first, start, stop, *rest):
        pooled_counts.append(max(0, stop - start))
        return pool(states, first, start, stop, *rest)

    def seen(query, pools, *rest, **options):
        chosen.append(pools.shape[1])
        return choose(query, pools, *rest, **options)

    monkeypatch.setattr(pooled.PooledIndexer, "_pooled", staticmethod(counted))
    monkeypatch.setattr(pooled, "index_topk", seen)
    model = make(family)
    stock = generated(model, "one token at a time")
    headwise.attach(model)
    pooled_counts.clear(), chosen.clear()  # of the trial
    assert_same(generated(model, "one token at a time"), stock)
    # 19 tokens of the prompt are 4 groups of 4, and of the 11 after them each fourth ends one
    layers = 1 if family == "glm5_next" else 2
    assert pooled_counts == [4] * layers + [
        int(token % 4 == 0) for token in range(20, 31) for _ in range(layers)
    ]
    assert chosen == [4] * layers + [token // 4 for token in range(20, 31) for _ in range(layers)]


def test_blocks_reach_the_operator(monkeypatch):
    model, calls = make("minimax_m3_vl"), []
    headwise.attach(model)
    run = headwise.hf.attend.run_call

    def seen(call):
        calls.append(call.options)
        return run(call)

    monkeypatch.setattr(headwise.hf.attend, "run_call", seen)
    with torch.no_grad():
        model(PROMPT)
    assert [options.block_size for options in calls] == [4, None, 4]
    assert calls[0].block_indices.shape == (1, 2, 19, 3)
    assert calls[0].mask is None


def test_a_mask_with_holes_is_left_to_the_indexer_s_own_forward():
    seen = SEEN.clone()
    seen[1, 5:8] = 0
    for family in ("glm5_next", "qwen4_exp", "deepseek_v32"):
        model = make(family)
        with torch.no_grad():
            expected = model(BATCH, attention_mask=seen).logits[:, -1]
            headwise.attach(model)
            given = model(BATCH, attention_mask=seen).logits[:, -1]
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_mask_of_chosen_keys_is_booleans_to_all_else():
    chosen = torch.tensor([[[2, 0, -1], [1, -1, -1]]], dtype=torch.int32)
    mask = ChosenMask(chosen, 4)
    expected = torch.tensor([[[[True, False, True, False], [False, True, False, False]]]])
    assert mask.shape == expected.shape
    assert torch.equal(mask | torch.zeros_like(expected), expected)
    rest = torch.tensor([True, True, False, True]).expand(1, 1, 2, 4)
    both = rest & (mask & rest)
    assert isinstance(both, ChosenMask)
    assert torch.equal(both.dense(), expected & rest)
    assert torch.equal(copy.deepcopy(both), expected & rest)
    assert "of 3 chosen" in repr(both)


@pytest.mark.parametrize("family", ["deepseek_v32", "minimax_m3_vl"])
def test_the_view_shows_what_was_chosen(family):
    words = [f"w{index}" for index in range(VOCABULARY)]
    model = make(family)
    seen = headwise.view(model, Words(*words), " ".join(words[3:22]), heads=[0])
    weights = seen.layers[0].weights[0, -1]
    visible = int((weights > 0).sum())
    # 8 tokens; or 2 blocks of 4 tokens and the last one, which has 3 of them
    assert visible == TOP if family == "deepseek_v32" else visible in (11, 12)
    torch.testing.assert_close(weights.nan_to_num().sum(), torch.tensor(1.0))


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def assert_near(given, expected):
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", CHANGES)
def test_inference_mode_is_as_no_grad(family):
    model = make(family)
    expected = logits(model, BATCH, attention_mask=SEEN)[:, -1]
    headwise.attach(model)
    with torch.inference_mode():
        given = model(BATCH, attention_mask=SEEN).logits[:, -1]
    assert_near(given.clone(), expected)


def test_a_mask_whose_last_query_sees_fewest_keys_pools_for_the_others():
    model = make("qwen4_exp")
    mask = torch.ones(1, 1, 21, 21, dtype=torch.bool).tril()
    mask[..., -1, 4:] = False
    expected = logits(model, BATCH[1:], attention_mask=mask)
    headwise.attach(model)
    assert_near(logits(model, BATCH[1:], attention_mask=mask), expected)


@pytest.mark.parametrize("start", [0, 1, "packed"])
def test_blocks_follow_the_positions_that_a_caller_gives(start):
    model = make("minimax_m3_vl")
    position = torch.arange(21) + (0 if start == "packed" else start)
    if start == "packed":
        position[11:] -= 11
    expected = logits(model, BATCH[1:], position_ids=position[None])
    headwise.attach(model)
    assert_near(logits(model, BATCH[1:], position_ids=position[None]), expected)


def gradients(model):
    model.zero_grad()
    out = model(BATCH, attention_mask=SEEN, use_cache=False).logits
    out.square().mean().backward()
    return {name: at.grad for name, at in model.named_parameters() if at.grad is not None}


@pytest.mark.parametrize("family", ["minimax_m3_vl", "qwen4_exp", "deepseek_v32"])
def test_gradients_are_those_of_stock_where_rows_see_nothing(family):
    blocks = family == "minimax_m3_vl"
    model = make(family, **({"layer_types": 3 * ["minimax_m3_sparse"]} if blocks else {}))
    # rows that average: SDPA's own backward pass goes wrong for them
    model.set_attn_implementation("eager" if blocks else "sdpa")
    expected = gradients(model)
    model.set_attn_implementation("sdpa")
    headwise.attach(model)
    given = gradients(model)
    assert given.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_near(given[name], wanted)


def test_weights_of_rows_whose_blocks_are_padding_are_averages():
    model = make("minimax_m3_vl")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(BATCH, attention_mask=SEEN, output_attentions=True).attentions
        headwise.attach(model)
        given = model(BATCH, attention_mask=SEEN, output_attentions=True).attentions
    for ours, stock in zip(given, expected):
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


def test_rows_of_padding_average_where_stock_was_eager():
    model = make("glm5_next")
    model.set_attn_implementation("eager")
    expected = logits(model, BATCH, attention_mask=SEEN)
    headwise.attach(model)
    assert_near(logits(model, BATCH, attention_mask=SEEN), expected)


@pytest.mark.parametrize("family", ["qwen4_exp", "minimax_m3_vl", "deepseek_v32"])
def test_a_cache_made_without_gradients_goes_on_with_them(family):
    model = make(family)
    expected = logits(model, PROMPT)[:, -3:]
    headwise.attach(model)
    with torch.no_grad():
        cache = model(PROMPT[:, :-3], use_cache=True).cache
    assert_near(model(PROMPT[:, -3:], cache=cache).logits.detach(), expected)


@pytest.mark.parametrize("family", ["minimax_m3_vl", "deepseek_v32"])
def test_a_padded_batch_compiles_whole(family):
    model = make(family)
    expected = logits(model, BATCH, attention_mask=SEEN, use_cache=False)[:, -1]
    headwise.attach(model)
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        states = compiled(BATCH, attention_mask=SEEN, use_cache=False).last_hidden_state
        given = model.lm_head(states)[:, -1]
    assert_near(given, expected)


def test_a_layer_that_was_reset_has_no_pools_of_before():
    layer = IndexedLayer(ContiguousCache(), DynamicLayer)
    rows = torch.zeros(1, 1, 4, 2)
    with torch.no_grad():
        layer.update(rows, rows)
        layer.update_indexer(rows[:, 0])
        layer.pools((0,)).append(rows[:, :, :1], rows[:, :, :1, :0])
        assert layer.index_nbytes == 4 * (4 * 2 + 2)
        layer.reset()
        four = rows.expand(4, 1, 4, 2)
        layer.update(four, four)
        layer.update_indexer(four[:, 0])
        layer.reorder_cache(torch.tensor([3, 2, 1, 0]))
    assert layer.indexer_keys.shape == (4, 4, 2)


def test_a_cache_of_stock_s_counts_its_index_keys_too():
    model = make("minimax_m3_vl")
    with torch.no_grad():
        stock = cache_nbytes(model(PROMPT).cache)
        headwise.attach(model)
        assert cache_nbytes(model(PROMPT).cache) == stock
