"""`attach(sparse=)`: against stock attention whose mask shows each query the keys that it gets."""

import copy
import re
from unittest import mock

import pytest
import torch
from transformers import AttentionInterface

import families
import headwise
from headwise import OptionError, UnsupportedError
from headwise.hf import sparse
from headwise.hf.stock_names import CACHE, AttentionMaskInterface
from headwise.ops import dequantize, quantize
from headwise.spec import SparseChoice

CACHES = ("contiguous", "paged:16", "int8", "int4", "int8:16", "int4:16")
SWEEP = pytest.mark.sweep
ASKED = "topk:24,sinks=2,recent=6,dense=1"


def weights_by_hand(query, key, scale, seen):
    """Softmax weights [B,K,G,S,L] in float64."""
    score = query.double().unflatten(1, (key.shape[1], -1)) @ key.double().unsqueeze(2).mT * scale
    score = score.masked_fill(~seen.unsqueeze(2), float("-inf"))
    return score.softmax(-1).nan_to_num(0)


def choice_by_hand(weights, seen, budget):
    """What a query gets [B,K,S,L], True where it does, loops over queries."""
    weights = weights.sum(2)
    taken = torch.zeros_like(weights, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, weights.shape[:3])).tolist():
        b, k, s = index
        places = seen[b, 0, s].nonzero().flatten().tolist()
        certain = set(places[: budget.sinks] + places[len(places) - budget.recent :])
        own = weights[b, k, s].tolist()
        order = sorted(places, key=lambda place: (place not in certain, -own[place], place))
        taken[b, k, s, order[: budget.most]] = True
    return taken


class StockSparse:
    """Stock attention that hides what a query does not get; in calls of up to 16 queries.

    What it does not get counts by the mean of all values that it could see.
    """

    def __init__(self, asked, rounded):
        self.rule, self.rounded, self.mass = SparseChoice.parse(asked), rounded, []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **asked):
        length, context = query.shape[2], key.shape[2]
        seen = torch.ones(1, 1, length, context, dtype=torch.bool).tril(context - length)
        if attention_mask is not None:
            seen = attention_mask
        groups = query.shape[1] // key.shape[1]
        rule = self.rule
        mask = seen.expand(query.shape[0], 1, -1, -1)
        if self.rounded:
            value = dequantize(*quantize(value, self.rounded), self.rounded)
            key = dequantize(*quantize(key, self.rounded), self.rounded)
        if length <= 16 and context > rule.least and module.layer_idx >= rule.dense:
            sketch = key if self.rounded == 4 else dequantize(*quantize(key, 4), 4)
            weights = weights_by_hand(query, sketch, scaling, mask)
            taken = choice_by_hand(weights, mask, rule)
            rest = weights.masked_fill(taken.unsqueeze(2), 0).sum(-1).flatten(1, 2).unsqueeze(-1)
            shown = mask.double() / mask.sum(-1, keepdim=True).clamp(min=1)
            means = (shown @ value.double()).repeat_interleave(groups, dim=1)
            mask = taken.repeat_interleave(groups, dim=1)
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling
        )
        if length <= 16 and context > rule.least and module.layer_idx >= rule.dense:
            out = (out * (1 - rest) + means * rest).to(out.dtype)
        return out.transpose(1, 2).contiguous(), None


def exactly(kv, query, options, mask):
    """`chosen_keys` with the weights of queries that are not rounded."""
    key = kv.sketch.dense(torch.float64)[0]
    length, context = query.shape[2], key.shape[2]
    seen = torch.ones(1, 1, length, context, dtype=torch.bool).tril(context - length)
    seen = (seen if mask is None else mask).expand(len(query), 1, length, context)
    weights = weights_by_hand(query, key, options.scale, seen)
    taken = choice_by_hand(weights, seen, kv.rule)
    rest = weights.masked_fill(taken.unsqueeze(2), 0).sum(-1).flatten(1, 2).float()
    order = torch.where(taken, torch.arange(context), context).sort(-1).values[..., : kv.rule.most]
    return order.masked_fill(order == context, -1).int(), rest


def model_of(name="llama-gqa", **changes):
    return families.make(name, **changes)


@pytest.fixture
def stock(request):
    """A function that has a model attend by `StockSparse`."""

    def use(model, asked, rounded=None):
        by_hand = StockSparse(asked, rounded)
        AttentionInterface.register("by_hand", by_hand)
        AttentionMaskInterface.register("by_hand", AttentionMaskInterface()["sdpa"])
        model.set_attn_implementation("by_hand")
        return by_hand

    return use


def read(model, ids, parts, mask=None):
    """The logits of a text that is read in parts."""
    cache, logits, at = None, [], 0
    with torch.no_grad():
        for part in parts:
            given = {} if mask is None else {"attention_mask": mask[:, : at + part]}
            if mask is not None:
                places = (mask.long().cumsum(1) - 1).clamp(min=0)
                given["position_ids"] = places[:, at : at + part]
            output = model(ids[:, at : at + part], use_cache=True, **{CACHE: cache}, **given)
            cache, at = output[CACHE], at + part
            logits.append(output.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize(
    ("cache", "padded"),
    [
        pytest.param(cache, padded, marks=SWEEP if padded and "int" in cache else [])
        for cache in CACHES
        for padded in (False, True)
    ],
)
def test_a_step_attends_to_the_keys_that_weigh_most(cache, padded, stock):
    model, ids = model_of(), torch.randint(2, 90, (2, 60))
    mask = None
    if padded:
        mask = torch.ones(2, 60, dtype=torch.long)
        mask[1, :13] = 0
    parts = (30, 1, 1, 5, 20, 1, 2)
    own = copy.deepcopy(model)
    rounded = headwise.caches.CacheChoice.parse(cache).declared.bits
    stock(model, ASKED, rounded)
    expected = read(model, ids, parts, mask)[0]
    headwise.attach(own, cache=cache, sparse=ASKED, step="attention")
    with mock.patch.object(sparse, "chosen_keys", exactly):
        given = read(own, ids, parts, mask)[0]
    real = slice(None) if mask is None else mask.bool()
    # with keys of 8 bits the kernels round queries and weights to 16 bits; and where two keys weigh
    # next to the same, rounding decides which is chosen. Another choice is 0.05 apart and more.
    bound = 1e-3
    assert (given[real] - expected[real]).norm() / expected[real].norm() < bound
    with mock.patch.object(sparse, "chosen_keys", wraps=sparse.chosen_keys) as chosen:
        rounded_queries = read(own, ids, parts, mask)[0]
    assert chosen.call_count == 2 * 5  # two layers of three, in the calls of up to 16 tokens
    apart = (rounded_queries[real] - expected[real]).norm() / expected[real].norm()
    assert apart < 0.05
    # a layer in one operator chooses as the others do
    headwise.attach(own, cache=cache, sparse=ASKED)
    whole = read(own, ids, parts, mask)[0]
    apart = (whole[real] - rounded_queries[real]).norm() / whole[real].norm()
    assert apart < bound


def generated(model, ids, **how):
    torch.manual_seed(3)
    with torch.no_grad():
        return model.generate(
            ids, max_new_tokens=12, return_dict_in_generate=True, output_logits=True, **how
        )


MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3, "do_sample": False},
    "sequences": {"num_return_sequences": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "assisted": {"do_sample": False},
}


# Every mode with one cache, and every cache with one mode; the rest in `make sweep`.
PAIRS = [
    pytest.param(mode, cache, marks=[] if mode == "beams" or cache == CACHES[0] else SWEEP)
    for mode in MODES
    for cache in CACHES
]


def in_mode(mode):
    """A model and its copy, a prompt, and what `generate` takes for a mode."""
    dense, ids = model_of(), torch.randint(2, 90, (1, 30))
    own = copy.deepcopy(dense)
    how = dict(MODES[mode])
    if mode == "assisted":
        how["assistant_model"] = model_of("mistral", sliding_window=None)
    return dense, own, ids, how


@pytest.mark.parametrize(("mode", "cache"), PAIRS)
def test_below_the_budget_everything_has_the_bits_of_dense_attention(mode, cache):
    dense, own, ids, how = in_mode(mode)
    headwise.attach(dense, cache=cache)
    headwise.attach(own, cache=cache, sparse="topk:64,dense=0,sinks=2,recent=6")
    expected, given = generated(dense, ids, **how), generated(own, ids, **how)
    assert torch.equal(given.sequences, expected.sequences)
    assert all(map(torch.equal, given.logits, expected.logits))


@pytest.mark.parametrize(("mode", "cache"), PAIRS)
def test_the_sketch_follows_what_happens_to_the_cache(mode, cache):
    """Above the budget, with every key chosen all the same, the tokens are those of dense."""
    dense, own, ids, how = in_mode(mode)
    headwise.attach(dense, cache=cache)
    expected = generated(dense, ids, **how)
    asked = "topp:1,min=9,max=200,dense=0,sinks=2,recent=6"
    for step in ("attention", "all"):
        headwise.attach(own, cache=cache, sparse=asked, step=step)
        with mock.patch.object(sparse, "chosen_keys", wraps=sparse.chosen_keys) as chosen:
            given = generated(own, ids, **how)
        assert step == "all" or chosen.call_count >= 3 * 4
        assert torch.equal(given.sequences, expected.sequences)
        for one, other in zip(given.logits, expected.logits):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", CACHES)
def test_the_sketch_is_that_of_the_keys_after_any_change(cache):
    model = model_of()
    headwise.attach(model, cache=cache, sparse=ASKED)
    ids = torch.randint(2, 90, (2, 90))
    _, made = read(model, ids, (40, 1, 3, 8, 1))
    for change in (
        lambda: made.crop(-9),
        lambda: made.reorder_cache(torch.tensor([1, 1])),
        lambda: made.batch_repeat_interleave(2),
        lambda: made.batch_select_indices(torch.tensor([3, 0, 2])),
        lambda: made.crop(-1),
    ):
        change()
        twin = copy.copy(made)
        for held in (made, twin):
            rows = len(held.layers[1].keys)
            with torch.no_grad():
                model(torch.randint(2, 90, (rows, 2)), use_cache=True, **{CACHE: held})
            for layer in held.layers[1:]:
                keys = layer.keys.dense() if hasattr(layer.keys, "dense") else layer.keys
                sketch = layer.sketch.view(layer.cache).dense(torch.float32)[0]
                fresh = dequantize(*quantize(keys, 4), 4)
                wanted = keys if "int4" in cache else fresh
                torch.testing.assert_close(sketch, wanted, rtol=1e-5, atol=1e-5)


def test_a_saved_cache_is_chosen_from_when_it_is_loaded(tmp_path):
    model, ids = model_of(), torch.randint(2, 90, (1, 60))
    headwise.attach(model)
    _, cache = read(model, ids[:, :50], (50,))
    headwise.save_cache(cache, tmp_path / "x.safetensors")
    headwise.attach(model, sparse=ASKED)
    expected, _ = read(model, ids, (50, 1, 9))
    loaded = headwise.load_cache(tmp_path / "x.safetensors", model)
    with torch.no_grad():
        parts = ids[:, 50:].split([1, 9], dim=1)
        logits = [model(part, use_cache=True, **{CACHE: loaded}).logits for part in parts]
    torch.testing.assert_close(torch.cat(logits, 1), expected[:, 50:], rtol=1e-4, atol=1e-4)
    assert loaded.layers[1].sketch.nbytes > 0


def test_it_is_pickled_copied_changed_and_taken_off():
    model, ids = model_of(), torch.randint(2, 90, (1, 60))
    headwise.attach(model)
    dense = read(model, ids, (50, 1, 9))[0]
    report = headwise.attach(model, sparse=ASKED)
    assert "gets the 24 keys that weigh most by a sketch of 4 bits" in str(report)
    assert "a query sees all keys: one of the first 1 layers" in str(report)
    chosen = read(model, ids, (50, 1, 9))[0]
    assert not torch.equal(chosen, dense)
    assert torch.equal(read(copy.deepcopy(model), ids, (50, 1, 9))[0], chosen)
    assert headwise.attach(model, sparse=ASKED) is report
    headwise.attach(model)
    assert torch.equal(read(model, ids, (50, 1, 9))[0], dense)
    headwise.attach(model, sparse=ASKED)
    headwise.detach(model)
    assert "_headwise" not in model.__dict__


def test_a_prompt_of_more_than_16_tokens_and_a_call_with_weights_see_what_they_should():
    model, ids = model_of(), torch.randint(2, 90, (1, 60))
    headwise.attach(model)
    dense = read(model, ids, (30, 30))[0]
    headwise.attach(model, sparse=ASKED)
    assert torch.equal(read(model, ids, (30, 30))[0], dense)
    _, cache = read(model, ids, (59,))
    with torch.no_grad():
        output = model(ids[:, 59:], use_cache=True, output_attentions=True, **{CACHE: cache})
    weights = output.attentions[1]
    assert weights.gt(0).sum(-1).eq(24).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert output.attentions[0].gt(0).sum(-1).eq(60).all()


REFUSED = {
    "mistral": "a window of 7 tokens",
    "deepseek_v3": "latent attention (MLA)",
    "falcon-rw": "ALiBi",
    "t5": "a bias by position",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_none_of_whose_layers_can_choose_is_refused(family):
    model = model_of(family)
    with pytest.raises(UnsupportedError, match=re.escape(REFUSED[family])) as error:
        headwise.attach(model, sparse="topk:100")
    assert "\n" not in str(error.value)
    assert "_headwise" not in model.__dict__


def test_a_family_without_a_reader_is_refused():
    """Its layers may have latents, indexers or biases, of which nothing is known."""
    import sweep_families

    for family in ("sarvam_mla", "dots3_note_text", "diffllama"):
        model = sweep_families.make(family)
        with pytest.raises(UnsupportedError, match="no spec reader says which layers"):
            headwise.attach(model, sparse="topk:100")


def test_layers_that_share_keys_do_as_the_layer_that_has_them():
    model = model_of("gemma3n")  # layer 4 reads the keys of layer 1
    with pytest.raises(UnsupportedError, match="one of the first 2 layers"):
        headwise.attach(model, sparse="topk:12,sinks=1,recent=3")
    report = headwise.attach(model, sparse="topk:12,sinks=1,recent=3,dense=1")
    assert "decoder.4: a query of a step that has read more than 12 tokens gets" in str(report)


@pytest.mark.parametrize("cache", ["contiguous", "paged:16", "int8"])
def test_the_mean_under_padding_is_of_what_is_seen_in_any_dtype(cache):
    """Sums of float16 would be infinite."""
    model = model_of(attention_bias=True, max_position_embeddings=4096)
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias.data.fill_(20.0)
    ids = torch.randint(2, 90, (2, 4000))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits = []
    for dtype in (torch.float16, torch.float32):
        headwise.attach(model.to(dtype), cache=cache, sparse="topk:100,dense=0")
        read_all = read(model, ids, (3990, 1, 9), mask)[0][:, 3990:]
        assert read_all.isfinite().all()
        logits.append(read_all.float())
    apart = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert apart < 0.05


def test_a_cache_that_drops_tokens_and_an_encoder_are_refused():
    with pytest.raises(UnsupportedError, match="cache='window:64' drops some"):
        headwise.attach(model_of(), cache="window:64", sparse="topk:100")
    with pytest.raises(UnsupportedError, match="has no cache that grows: leave it out"):
        headwise.attach(model_of("bert"), sparse="topk:100")
    model = model_of()
    report = headwise.attach(model, sparse="topk:100")
    with pytest.raises(UnsupportedError, match="drops some"):
        headwise.attach(model, cache="window:64", sparse="topk:100")
    assert headwise.attach(model, sparse="topk:100") is report


BAD = ("topk", "topk:x", "topk:0", "topk:68", "topp:2", "topp:0", "topk:100,min=3", "top:5", "", 7)
BAD += ("topk:100,sinks=1,sinks=2", "topk:100 ", "topp:0.9,min=500,max=400", "topk:-5", "topp:0.0")


@pytest.mark.parametrize("asked", BAD)
def test_a_text_that_says_nothing_is_refused_in_one_line(asked):
    with pytest.raises(OptionError, match=r"^sparse is ") as error:
        headwise.attach(model_of(), sparse=asked)
    assert "\n" not in str(error.value)


# One family of each kind of layer that can choose; the others in `make sweep`.
OFTEN = ("qwen2", "gemma3", "gpt_oss", "gpt2", "falcon-7b", "gemma3n")
FAMILIES = [
    *("llama-mha", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3", "glm", "gemma2", "gemma3"),
    *("gemma3n", "gpt_oss", "gpt2", "gpt_bigcode", "falcon-7b", "falcon-40b"),
]


@pytest.mark.parametrize(
    "family", families.all_but_sweep(FAMILIES, {name for name in FAMILIES if name not in OFTEN})
)
def test_every_family_attends_to_all_keys_where_all_are_chosen(family):
    # layers with windows see all of those
    changes = {"sliding_window": None} if family in ("mixtral", "phi3") else {}
    dense, ids = model_of(family, **changes), torch.randint(2, 90, (2, 40))
    own = copy.deepcopy(dense)
    headwise.attach(dense)
    expected = read(dense, ids, (30, 1, 4, 1, 1))[0]
    for step in ("attention", "all"):
        report = headwise.attach(
            own, sparse="topp:1,min=9,max=200,dense=0,sinks=2,recent=6", step=step
        )
        with mock.patch.object(sparse, "chosen_keys", wraps=sparse.chosen_keys) as chosen:
            given = read(own, ids, (30, 1, 4, 1, 1))[0]
        assert step == "all" or chosen.call_count > 0
        assert "keys with 1 of the weight" in str(report)
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)
    headwise.attach(own, sparse="topk:9,dense=0,sinks=2,recent=6")
    fewer = read(own, ids, (30, 1, 4, 1, 1))[0]
    assert torch.equal(fewer[:, :30], expected[:, :30]) and not torch.equal(fewer, expected)


def test_what_is_remembered_of_sparse_attention_is_kept_apart(tmp_path):
    model = model_of(max_position_embeddings=1024)
    ids = torch.randint(2, 90, (1, 600))
    headwise.attach(model, remember=tmp_path)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    report = headwise.attach(model, remember=tmp_path, sparse=ASKED)
    given = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert report.remembered.known == 0
    again = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert report.remembered.known >= 512
    assert torch.equal(again, given)
