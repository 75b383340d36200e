"""`attach(model, cache=...)`: what each cache gives in every mode, in the report and on its own."""

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import headwise
from families import MLA, VOCABULARY, WINDOW, make
from headwise.caches import PagedCache, QuantizedCache, WindowCache
from headwise.hf import attend, cache_nbytes, latent
from headwise.hf.module_hook import NAME
from headwise.ops import AttentionCall, dequantize, quantize

NEW_TOKENS = 16
# float32 rounding of about 1e-7, through 3 layers whose activations grow to about 10
LOGIT_TOLERANCE = 1e-4
# Queries and weights are rounded to 16 bits for int8: an element of a later layer may then come to
# lie on the other side of a rounding edge, a step of 1/127 of its row's largest.
ROUNDED_TOLERANCE = 0.2  # of what the rounding of the cache changes

_generator = torch.Generator().manual_seed(3)
PROMPT = torch.randint(3, VOCABULARY, (1, 19), generator=_generator)
BATCH = torch.randint(3, VOCABULARY, (3, 19), generator=_generator)
ATTENTION_MASK = torch.ones_like(BATCH)
ATTENTION_MASK[0, :5] = 0
ATTENTION_MASK[1, :11] = 0
BATCH[ATTENTION_MASK == 0] = 0
REPEATING = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 5, 6, 7]])
TEXT = torch.randint(3, VOCABULARY, (1, 47), generator=_generator)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # models this small are slower on two
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _generate(ids: torch.Tensor, **options: Any) -> Callable[[Any], torch.Tensor]:
    return lambda model: model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


MODES = {
    "greedy": _generate(PROMPT),
    "left-padded batch": _generate(BATCH, attention_mask=ATTENTION_MASK),
    "three beams": _generate(BATCH, attention_mask=ATTENTION_MASK, num_beams=3),
    "prompt lookup": _generate(REPEATING, prompt_lookup_num_tokens=4),
    "chunked prefill": _generate(PROMPT, prefill_chunk_size=5),
}
MODELS = ("llama-gqa", "gemma3", "gpt_oss", "deepseek_v3", "falcon-40b", "t5")
EXACT = ("paged", "paged:16", "window:200", "window:200,sinks=4")
ROUNDED = ("int8", "int4", "int8:4")
SINKS = "window:9,sinks=3"


def _modes(family: str) -> list[str]:
    # stock refuses to prefill an encoder-decoder in chunks
    return [mode for mode in MODES if (family, mode) != ("t5", "chunked prefill")]


def _attached(family: str, cache: str, **changes: Any) -> Any:
    model = make(family, **changes)
    headwise.attach(model, cache=cache)
    return model


@pytest.mark.parametrize("family", MODELS)
def test_exact_caches_generate_the_tokens_of_the_contiguous_one(family: str) -> None:
    model = _attached(family, "contiguous")
    expected = {mode: MODES[mode](model) for mode in _modes(family)}
    for cache in EXACT:
        headwise.attach(model, cache=cache)
        for mode, tokens in expected.items():
            assert torch.equal(MODES[mode](model), tokens), (cache, mode)


def _logits(model: Any, ids: torch.Tensor, pieces: tuple[int, ...] = ()) -> torch.Tensor:
    """Of a text in one forward, or in pieces; what is left over goes token by token."""
    with torch.no_grad():
        if not pieces:
            return model(ids).logits
        sizes = [*pieces, *[1] * (ids.shape[1] - sum(pieces))]
        cache, parts = None, []
        for part in ids.split(sizes, dim=1):
            output = model(part, cache=cache, use_cache=True)
            cache = output.cache
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("family", [name for name in MODELS if name != "t5"])
def test_paged_logits_are_those_of_the_contiguous_cache_bit_for_bit(family: str) -> None:
    model = _attached(family, "contiguous")
    whole, pieces = _logits(model, TEXT), _logits(model, TEXT, (19, 1, 7))
    for cache in ("paged", "paged:16"):
        headwise.attach(model, cache=cache)
        assert torch.equal(_logits(model, TEXT), whole)
        assert torch.equal(_logits(model, TEXT, (19, 1, 7)), pieces)


@pytest.mark.parametrize("family", [name for name in MODELS if name != "t5"])
def test_logits_of_integers_in_pages_are_those_of_integers_bit_for_bit(family: str) -> None:
    model = _attached(family, "int8")
    whole, pieces = _logits(model, TEXT), _logits(model, TEXT, (19, 1, 7))
    for cache in ("int8:64", "int8:4"):
        headwise.attach(model, cache=cache)
        assert torch.equal(_logits(model, TEXT), whole)
        assert torch.equal(_logits(model, TEXT, (19, 1, 7)), pieces)


def test_the_report_names_pages_of_integers() -> None:
    report = headwise.attach(make("llama-gqa"), cache="int8:64")
    assert report.cache == "int8, one scale per row, 64 tokens per page"
    assert "paged int8 in place" in str(report)
    assert "paged int8 dequantised first" in str(report)


@pytest.mark.parametrize("cache", [*EXACT, *ROUNDED, SINKS])
@pytest.mark.parametrize("family", MODELS)
def test_tokens_do_not_depend_on_how_the_text_is_fed(family: str, cache: str) -> None:
    model = _attached(family, cache)
    expected = MODES["greedy"](model)
    if family != "t5":
        assert torch.equal(MODES["chunked prefill"](model), expected)
    looked_up = MODES["prompt lookup"](model)
    assert torch.equal(looked_up, _generate(REPEATING)(model))
    beams = MODES["three beams"](model)
    assert beams.shape[1] == (1 if family == "t5" else BATCH.shape[1]) + NEW_TOKENS


@pytest.mark.parametrize("cache", [*EXACT, *ROUNDED])
@pytest.mark.parametrize("family", [name for name in MODELS if name != "t5"])
def test_a_left_padded_row_gives_the_tokens_of_its_prompt_alone(family: str, cache: str) -> None:
    model = _attached(family, cache)
    padded = MODES["left-padded batch"](model)
    for row, mask, given in zip(BATCH, ATTENTION_MASK, padded[:, BATCH.shape[1] :], strict=True):
        prompt = row[mask.bool()][None]
        alone = _generate(prompt)(model)[0, prompt.shape[1] :]
        assert torch.equal(given, alone)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_batch_whose_latents_are_expanded_from_pages_is_stock(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(family)
    expected = MODES["left-padded batch"](model)
    monkeypatch.setattr(latent, "choose_paradigm", lambda **_: "expanded")
    for cache in EXACT:
        headwise.attach(model, cache=cache)
        assert torch.equal(MODES["left-padded batch"](model), expected), cache


def _seen(length: int, window: int, sinks: int) -> torch.Tensor:
    """[1, 1, L, L]: causal, and the last `window` tokens or the first `sinks`."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    return ((key <= query) & ((key > query - window) | (key < sinks)))[None, None]


@pytest.mark.parametrize(("window", "sinks"), [(9, 3), (5, 0), (1, 4)])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "deepseek_v2", "deepseek_v3"])
def test_a_window_with_sinks_is_stock_with_that_mask(family: str, window: int, sinks: int) -> None:
    model = make(family)
    with torch.no_grad():
        mask = _seen(TEXT.shape[1], window, sinks)
        expected = model(TEXT, attention_mask=mask, use_cache=False).logits
        full = model(TEXT, use_cache=False).logits
    tolerance = LOGIT_TOLERANCE * expected.abs().max().item()
    assert (expected - full).abs().max() > 100 * tolerance, "the mask has to matter"
    headwise.attach(model, cache=f"window:{window},sinks={sinks}")
    for pieces in ((), (1,), (13,), (4, 1, 17, 2, 6)):
        given = _logits(model, TEXT, pieces)
        torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)


def _gemma4() -> Any:
    """Its last layers read the keys of earlier ones, and only for the tokens whose logits count."""
    torch.manual_seed(11)
    config = hf.Gemma4TextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=64,
        hidden_size_per_layer_input=16,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        initializer_range=0.2,
        eos_token_id=None,
    )
    return hf.Gemma4ForCausalLM(config).eval()


@pytest.mark.parametrize("cache", ["window:100", "window:100,sinks=2", "paged:4"])
@pytest.mark.parametrize("mode", ["greedy", "left-padded batch", "prompt lookup"])
def test_layers_that_share_keys_take_the_last_queries_alone(mode: str, cache: str) -> None:
    model = _gemma4()
    expected = MODES[mode](model)
    headwise.attach(model, cache=cache)
    assert torch.equal(MODES[mode](model), expected)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("make_hybrid", [lambda: make("gemma3"), _gemma4], ids=["gemma3", "gemma4"])
def test_a_window_with_sinks_cuts_the_full_layers_of_a_hybrid_down(
    make_hybrid: Callable[[], Any], kept: int
) -> None:
    model, length = make_hybrid(), TEXT.shape[1]
    masks = {"full_attention": _seen(length, 9, 3), "sliding_attention": _seen(length, WINDOW, 0)}
    with torch.no_grad():
        expected = model(TEXT, attention_mask=masks, use_cache=False).logits
        tolerance = LOGIT_TOLERANCE * expected.abs().max().item()
        headwise.attach(model, cache=SINKS)
        given = model(TEXT, logits_to_keep=kept).logits
    torch.testing.assert_close(given, expected[:, -kept:], atol=tolerance, rtol=0)
    for pieces in ((13,), (4, 1, 17, 2, 6)):
        given = _logits(model, TEXT, pieces)
        torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "falcon-40b", "falcon-rw", "bloom"])
def test_a_window_with_sinks_generates_what_that_mask_over_a_whole_context_does(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = _attached(family, SINKS), make(family)
    headwise.attach(plain, step="attention")  # all of which goes through what is replaced here
    given = {mode: MODES[mode](model) for mode in MODES}
    own = attend.run_call

    def masked(call: AttentionCall) -> Any:
        seen = _seen(call.key.shape[2], 9, 3)[:, :, -call.query.shape[2] :]
        mask = seen if call.options.mask is None else seen & call.options.mask
        options = replace(call.options, mask=mask, causal=False)
        return own(replace(call, options=options))

    monkeypatch.setattr(attend, "run_call", masked)
    for mode, tokens in given.items():
        assert torch.equal(tokens, MODES[mode](plain)), mode


def _rounded(rows: torch.Tensor, cache: str) -> torch.Tensor:
    bits: Any = int(cache[len("int")])
    return dequantize(*quantize(rows, bits), bits).to(rows.dtype)


@pytest.fixture(params=ROUNDED)
def rounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a cache, also that of stock's sdpa with keys and values rounded as there."""
    cache = request.param

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        if options.get("sliding_window") is None:
            key, value = _rounded(key, cache), _rounded(value, cache)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, cache, attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, cache, sdpa_mask)
    return cache


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha", "gemma3", "gpt2", *MLA])
def test_logits_of_integers_are_those_of_stock_over_rounded_keys_and_values(
    family: str, rounded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(family)
    exact = _logits(model, TEXT)
    if family in MLA:  # what is cached, and rounded, is the latent and the rope key
        attention = type(next(at for at in model.modules() if hasattr(at, "expand_kv")))
        own = attention.expand_kv
        monkeypatch.setattr(
            attention,
            "expand_kv",
            lambda module, *held: own(module, *(_rounded(at, rounded) for at in held)),
        )
    else:
        model.set_attn_implementation(rounded)
    expected = _logits(model, TEXT)
    monkeypatch.undo()
    model.set_attn_implementation("sdpa")
    rounding = (expected - exact).norm()
    assert rounding > 1e-3 * exact.norm(), "the rounding has to matter"
    headwise.attach(model, cache=rounded)
    for pieces in ((), (19, 1, 7)):
        given = _logits(model, TEXT, pieces)
        assert (given - expected).norm() < ROUNDED_TOLERANCE * rounding


KINDS = {"paged": PagedCache, "paged:16": PagedCache, "int8": QuantizedCache}
KINDS |= {"int4": QuantizedCache, "int8:4": PagedCache, "window:200,sinks=4": WindowCache}


@pytest.mark.parametrize("cache", KINDS)
def test_the_report_and_the_layers_hold_what_was_asked_for(cache: str) -> None:
    model = make("llama-gqa")
    report = headwise.attach(model, cache=cache)
    name = "paged:64" if cache == "paged" else cache
    assert [layer.cache for layer in report.layers] == [name] * 3
    with torch.no_grad():
        held = model(PROMPT, use_cache=True).cache
    assert {type(layer.cache) for layer in held.layers} == {KINDS[cache]}


def test_sliding_layers_keep_their_window() -> None:
    report = headwise.attach(make("gemma3"), cache="int8")
    sliding = f"window:{WINDOW}"
    assert [layer.cache for layer in report.layers] == [sliding, "int8", sliding]
    assert report.cache.endswith("; in sliding layers what the window reaches")
    assert sliding in str(report)


def test_the_encoder_and_the_cross_attention_of_t5_have_none_of_the_caches() -> None:
    layers = {at.name: at.cache for at in headwise.attach(make("t5"), cache="int4").layers}
    assert layers["decoder.0"] == "int4"
    assert layers["encoder.0"] == layers["decoder.0.cross"] == "none"


def test_the_kernels_read_pages_and_integers_where_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("llama-gqa")
    views = {"paged": headwise.PagedKV, "int4": headwise.QuantKV, "int4:16": headwise.QuantKV}
    for cache, view in views.items():
        headwise.attach(model, cache=cache)
        monkeypatch.setattr(view, "dense", lambda *_: pytest.fail("copied the context"))
        assert MODES["greedy"](model).shape == (1, 19 + NEW_TOKENS)


# elements of 8 and of 8 bits, and scales of 4 bytes: 2 kv heads of dim 8 in 3 layers
BYTES = {"contiguous": 2 * 8 * 4, "paged": 2 * 8 * 4, "int8": 2 * (8 + 4), "int4": 2 * (4 + 4)}
BYTES |= {"int8:4": BYTES["int8"], "int4:16": BYTES["int4"]}


@pytest.mark.parametrize("cache", BYTES)
def test_a_token_of_the_model_costs_what_the_cache_says(cache: str) -> None:
    model = _attached("llama-gqa", cache)
    with torch.no_grad():
        held = model(PROMPT, use_cache=True).cache
    assert cache_nbytes(held) == 3 * 2 * PROMPT.shape[1] * BYTES[cache]


@pytest.mark.parametrize("cache", ["paged", "int8", "int4"])
def test_beams_share_the_pages_of_their_prompt(cache: str) -> None:
    model = _attached("llama-gqa", f"{cache}:1")
    output = model.generate(
        PROMPT, max_new_tokens=4, do_sample=False, num_beams=3, return_dict_in_generate=True
    )
    one = cache_nbytes(output.cache) // (3 * 2 * BYTES[cache])
    # the last token is not appended any more
    assert PROMPT.shape[1] + 3 <= one <= PROMPT.shape[1] + 3 * 3


@pytest.mark.parametrize(
    ("family", "cache"),
    [("llama-gqa", cache) for cache in ("paged", "int8", "int8:4", SINKS)]
    + [("mistral", "contiguous")],
)
def test_an_attached_assistant_that_takes_tokens_back_gives_the_tokens_of_the_model(
    family: str, cache: str
) -> None:
    model, assistant = make("llama-gqa"), _attached(family, cache, num_hidden_layers=1)
    expected = MODES["greedy"](model)
    assert torch.equal(_generate(PROMPT, assistant_model=assistant)(model), expected)


def test_attaching_with_another_cache_attaches_again() -> None:
    model = make("llama-gqa")
    first = headwise.attach(model, cache="int8")
    assert headwise.attach(model, cache="int8") is first
    assert headwise.attach(model, cache="paged").layers[0].cache == "paged:64"
    with torch.no_grad():
        assert isinstance(model(PROMPT, use_cache=True).cache.layers[0].cache, PagedCache)
    assert len(model._forward_pre_hooks) == 1
    headwise.detach(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("cache", [*ROUNDED, "paged", SINKS])
@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3", "t5", "falcon-40b"])
def test_detach_leaves_nothing(family: str, cache: str) -> None:
    model = make(family)
    before = [(set(at.__dict__), list(at._forward_pre_hooks)) for at in model.modules()]
    expected, implementation = MODES["greedy"](model), model.config._attn_implementation
    headwise.attach(model, cache=cache)
    MODES["greedy"](model)
    headwise.detach(model)
    after = [(set(at.__dict__), list(at._forward_pre_hooks)) for at in model.modules()]
    assert after == before
    assert model.config._attn_implementation == implementation
    assert torch.equal(MODES["greedy"](model), expected)


@pytest.mark.parametrize("cache", ["paged", *ROUNDED])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "gpt2", "deepseek_v3"])
def test_a_cache_made_while_attached_goes_on_after_detach(family: str, cache: str) -> None:
    model = _attached(family, cache)
    plain = _attached(family, "contiguous")
    with torch.no_grad():
        exact = plain(TEXT[:, :26]).logits[:, 19:]
        held = model(TEXT[:, :19], use_cache=True).cache
        twin = copy.deepcopy(held)
        expected = [model(part, cache=twin).logits for part in TEXT[:, 19:26].split([1, 5, 1], 1)]
        headwise.detach(model)
        given = [model(part, cache=held).logits for part in TEXT[:, 19:26].split([1, 5, 1], 1)]
    ours, stock = torch.cat(expected, 1), torch.cat(given, 1)
    if cache in ROUNDED:
        assert (ours - stock).norm() < ROUNDED_TOLERANCE * (stock - exact).norm()
    else:
        tolerance = LOGIT_TOLERANCE * stock.abs().max().item()
        torch.testing.assert_close(ours, stock, atol=tolerance, rtol=0)
    assert held.layers[1].keys.shape[2] == 26


def test_a_window_that_has_lost_tokens_says_so_after_detach() -> None:
    model = _attached("llama-gqa", SINKS)
    with torch.no_grad():
        held = model(PROMPT, use_cache=True).cache
        headwise.detach(model)
        with pytest.raises(headwise.UnsupportedError, match="holds no whole context"):
            model(PROMPT[:, :1], cache=held)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_a_window_that_has_lost_nothing_goes_on_after_detach(family: str) -> None:
    model = _attached(family, "window:200,sinks=4")
    expected = _logits(model, TEXT[:, :20])[:, -1:]
    with torch.no_grad():
        held = model(TEXT[:, :19], use_cache=True).cache
        headwise.detach(model)
        given = model(TEXT[:, 19:20], cache=held).logits
    tolerance = LOGIT_TOLERANCE * expected.abs().max().item()
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("cache", [*ROUNDED, "paged:16", SINKS])
def test_copies_of_an_attached_model_keep_the_choice(cache: str, duplicate: Any) -> None:
    model = _attached("llama-gqa", cache)
    twin = duplicate(model)
    expected = MODES["greedy"](model)
    headwise.detach(model)
    assert twin.config._attn_implementation == NAME
    assert torch.equal(MODES["greedy"](twin), expected)
    with torch.no_grad():
        held = twin(PROMPT, use_cache=True).cache
    assert type(held.layers[0].cache) is (KINDS | {SINKS: WindowCache})[cache]
    # still the same choice, so nothing to do
    report = headwise.attach(twin, cache=cache)
    assert report is headwise.attach(twin, cache=cache)


def _shallow(cache: Any) -> Any:
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


@pytest.mark.parametrize(
    "duplicate", [_shallow, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
@pytest.mark.parametrize("cache", ["contiguous", *ROUNDED, "paged", SINKS])
def test_a_copy_of_a_filled_cache_goes_on_alone(cache: str, duplicate: Any) -> None:
    model = _attached("llama-gqa", cache)
    with torch.no_grad():
        held = model(PROMPT, use_cache=True).cache
        twin = duplicate(held)
        given = model(TEXT[:, :3], cache=twin).logits
        assert held.get_seq_length() == PROMPT.shape[1]
        assert torch.equal(model(TEXT[:, :3], cache=held).logits, given)


def test_filled_under_inference_mode_caches_go_on_outside() -> None:
    model = make("llama-gqa")
    for cache in ("paged:4", *ROUNDED, SINKS):
        headwise.attach(model, cache=cache)
        expected = _logits(model, TEXT[:, :24], (20, 4))[:, 20:]
        with torch.inference_mode():
            held = model(TEXT[:, :20], use_cache=True).cache
        with torch.no_grad():
            given = model(TEXT[:, 20:24], cache=held).logits
        assert torch.equal(given, expected), cache


def _trained(model: Any, held: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and a gradient of one step behind 19 tokens."""
    model.zero_grad()
    output = model(TEXT[:, 19:20], cache=held)
    output.logits.logsumexp(-1).sum().backward()
    gradient = next(at.grad for at in model.parameters() if at.grad is not None and at.ndim == 2)
    return output.logits.detach(), gradient.clone()


@pytest.mark.parametrize("cache", ["paged", *ROUNDED])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "deepseek_v3", "falcon-40b"])
def test_with_gradients_a_layer_becomes_that_of_stock(family: str, cache: str) -> None:
    model = _attached(family, cache)
    with torch.no_grad():
        held = model(TEXT[:, :19], use_cache=True).cache
        plain = DynamicCache(config=model.config)
        for index, layer in enumerate(held.layers):
            plain.update(layer.keys + 0, layer.values + 0, index)  # a sum is a plain tensor
    given, expected = _trained(model, held), _trained(model, plain)
    assert {type(layer) for layer in held.layers} == {DynamicLayer}
    assert held.get_seq_length() == 20
    for ours, stock in zip(given, expected, strict=True):
        assert torch.equal(ours, stock)
    assert given[1].abs().max() > 0


def test_with_gradients_a_window_that_has_lost_nothing_becomes_that_of_stock() -> None:
    model = _attached("llama-gqa", "window:200,sinks=4")
    expected = _logits(model, TEXT[:, :20])[:, -1:]
    with torch.no_grad():
        held = model(TEXT[:, :19], use_cache=True).cache
    given, _ = _trained(model, held)
    assert {type(layer) for layer in held.layers} == {DynamicLayer}
    tolerance = LOGIT_TOLERANCE * expected.abs().max().item()
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)


def test_a_window_that_has_lost_tokens_refuses_gradients() -> None:
    model = _attached("llama-gqa", SINKS)
    with torch.no_grad():
        held = model(PROMPT, use_cache=True).cache
    with pytest.raises(headwise.UnsupportedError, match=r"use torch\.no_grad\(\)"):
        model(PROMPT[:, :1], cache=held)


@pytest.mark.parametrize("cache", ["paged", "int8", SINKS])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "falcon-40b"])
def test_attention_weights_are_to_be_had(family: str, cache: str) -> None:
    model = _attached(family, cache)
    with torch.no_grad():
        plain = model(PROMPT)
        asked = model(PROMPT, output_attentions=True)
    assert torch.equal(asked.logits, plain.logits)
    assert [at.shape for at in asked.attentions] == [(1, 6, 19, 19)] * 3
    torch.testing.assert_close(asked.attentions[0].sum(-1), torch.ones(1, 6, 19))


@pytest.mark.parametrize(
    "cache", ["", "page", "paged:", "paged:0", "paged:12", "int2", "int8:0", "int8:12", "int4:",
              "window", "window:0", "window:-1", "window:8,sinks=", "paged:16,sinks=2",
              "int8:4,sinks=2", "contiguous:3", "int4 "]
)  # fmt: skip
def test_an_unknown_cache_is_refused_in_one_line_and_changes_nothing(cache: str) -> None:
    model = make("llama-gqa")
    with pytest.raises(headwise.OptionError) as caught:
        headwise.attach(model, cache=cache)
    message = str(caught.value)
    assert message.startswith(f"cache is {cache!r}")
    assert "\n" not in message
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


def test_an_encoder_has_no_cache_to_choose() -> None:
    model = make("bert")
    with pytest.raises(
        headwise.UnsupportedError,
        match=r"^cache='paged:64', and BertModel has no cache that grows: leave it out$",
    ):
        headwise.attach(model, cache="paged")
    assert model.config._attn_implementation == "sdpa"
    assert headwise.attach(model).cache == "none (an encoder)"


def test_int4_needs_even_head_dims() -> None:
    model = make("gpt2", n_embd=42)
    message = "cache='int4' packs two numbers per byte, and GPT2LMHeadModel caches rows of 7 and 7"
    with pytest.raises(headwise.UnsupportedError, match=message):
        headwise.attach(model, cache="int4")
    assert headwise.attach(model, cache="int8").layers[0].cache == "int8"


def test_a_cache_that_the_user_passes_is_left_alone() -> None:
    model = _attached("llama-gqa", "int8")
    own = DynamicCache(config=model.config)
    model.generate(PROMPT, max_new_tokens=3, do_sample=False, cache=own)
    assert {type(layer) for layer in own.layers} == {DynamicLayer}


def test_rows_that_were_handed_out_cannot_be_written_to() -> None:
    model = _attached("llama-gqa", "paged")
    with torch.no_grad():
        keys = model(PROMPT, use_cache=True).cache.layers[0].keys
        with pytest.raises(headwise.UnsupportedError, match="writes to keys or values"):
            keys.mul_(2)
        assert torch.equal(copy.deepcopy(keys) + 0, keys + 0)


def test_a_refused_cache_leaves_the_model_attached() -> None:
    model = make("gpt2", n_embd=42)  # whose head dim is odd
    first = headwise.attach(model)
    with pytest.raises(headwise.UnsupportedError, match="int4"):
        headwise.attach(model, cache="int4")
    assert headwise.attach(model) is first
    for wrong in (None, 8):
        with pytest.raises(headwise.OptionError, match="expected a name"):
            headwise.attach(model, cache=wrong)  # type: ignore[arg-type]
    with pytest.raises(headwise.OptionError, match="1 to 2"):
        headwise.attach(model, cache="window:99999999999999999999")
    assert headwise.attach(model) is first
