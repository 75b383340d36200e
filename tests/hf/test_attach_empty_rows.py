"""Queries that may attend to nothing: loss, gradients and weights as with the attention before.

Such a row can enter a loss: the last one of left padding predicts the first token.
"""

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import StaticCache
from transformers.masking_utils import create_causal_mask

import headwise
from families import ENCODERS, FAMILIES, KIN, VOCABULARY, WINDOW, make
from headwise.hf import empty_rows
from headwise.hf.stock_names import CACHE
from rounding import half_precision_error, relative_error

LENGTH = 23
IDS = torch.randint(3, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(6))
# left padding; right padding, longer than a window; holes, one at the start and one longer than a
# window; nothing but padding
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, LENGTH - WINDOW - 4 :] = 0
MASK[2, 0], MASK[2, 4 : 4 + WINDOW + 4] = 0, 0
MASK[3] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
LABELS[3] = IDS[3]

# stock has no SDPA for them
EAGER_ONLY = ("gemma2", "gpt_oss", "bloom")
CASES = [
    *((family, "eager") for family in (*FAMILIES, "inkling")),
    *((family, "sdpa") for family in (*FAMILIES, "inkling") if family not in EAGER_ONLY),
]
# stock's eager path adds ALiBi twice there, in every row; ours follows its sdpa path
CASES.remove(("falcon-rw", "eager"))
# what is nearly another family, in `make sweep`
CASES = [
    pytest.param(*case, marks=pytest.mark.sweep if case[0] in KIN else (), id="-".join(case))
    for case in CASES
]


def _make(family: str, implementation: str, **changes: Any) -> Any:
    if family != "inkling":
        return make(family, attn_implementation=implementation, **changes)
    torch.manual_seed(11)
    config = hf.InklingTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        swa_num_attention_heads=6,
        swa_num_key_value_heads=2,
        swa_head_dim=10,
        sliding_window_size=WINDOW,
        local_layer_ids=[0, 2],
        d_rel=4,
        rel_extent=16,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation=implementation,
    )
    return hf.InklingForCausalLM(config).eval()


def _loss(model: Any, family: str) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}
    if family in ENCODERS:
        states = model(**inputs).last_hidden_state
        return states.square().mean() + states[..., :5].mean()
    if family == "t5":
        # its decoder is padded in another order than its encoder
        inputs["decoder_attention_mask"] = MASK.flip(0)
    loss: torch.Tensor = model(**inputs, labels=LABELS, use_cache=False).loss
    return loss


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _exact_sdpa(implementation: str) -> Any:
    """SDPA's fused backward pass on a CPU is wrong for a float mask of the lowest number."""
    return sdpa_kernel(SDPBackend.MATH) if implementation == "sdpa" else nullcontext()


def _require_equal(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == stock.keys()
    for name, gradient in stock.items():
        # float32 rounding (2^-24) of sums over 92 tokens and some layers, relative to the largest
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * scale + 1e-7, rtol=0)


def _close(ours: torch.Tensor, stock: torch.Tensor, tolerance: float = 1e-4) -> None:
    scale = stock.float().abs().max().item()
    torch.testing.assert_close(ours, stock, atol=tolerance * scale, rtol=0)


# Inkling's convolutions are said to be slower without a package that is not needed
@pytest.mark.filterwarnings("ignore:.*causal_conv1d")
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_padding_and_holes_have_the_loss_and_gradients_of_before(
    family: str, implementation: str
) -> None:
    stock, model = _make(family, implementation), _make(family, implementation)
    headwise.attach(model)
    with _exact_sdpa(implementation):
        expected = _loss(stock, family)
        expected.backward()
    with torch.no_grad():
        torch.testing.assert_close(_loss(model, family), expected.detach(), atol=0, rtol=1e-5)
    loss = _loss(model, family)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=0, rtol=1e-5)
    _require_equal(_gradients(model), _gradients(stock))


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "deepseek_v3", "gpt2", "bloom", "t5"])
def test_output_attentions_gives_eagers_weights_of_an_empty_row(family: str) -> None:
    changes = {"initializer_factor": 1.0} if family == "t5" else {}
    model = _make(family, "eager", **changes)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "output_attentions": True}
    name = "attentions"
    if family == "t5":
        inputs |= {"decoder_input_ids": IDS, "decoder_attention_mask": MASK.flip(0)}
        name = "decoder_attentions"
    with torch.no_grad():
        expected = model(**inputs)[name]
        headwise.attach(model)
        given = model(**inputs)[name]
    assert len(given) == 3
    for ours, stock in zip(given, expected, strict=True):
        _close(ours, stock)


def test_output_attentions_gives_zeros_where_sdpa_does() -> None:
    model = _make("llama-gqa", "sdpa")
    headwise.attach(model)
    with torch.no_grad():
        weights = model(IDS, attention_mask=MASK, output_attentions=True).attentions[1]
    assert not weights[0, :, :5].any()
    torch.testing.assert_close(weights[0, :, 5:].sum(-1), torch.ones(6, LENGTH - 5))


@pytest.mark.parametrize(
    ("family", "implementation", "cache"),
    [
        ("llama-gqa", "eager", "contiguous"),
        ("llama-gqa", "sdpa", "contiguous"),
        ("llama-gqa", "eager", "paged:4"),
        ("llama-gqa", "eager", "int8"),
        ("llama-gqa", "eager", "window:64,sinks=2"),
        ("mistral", "eager", "contiguous"),
        ("gemma2", "eager", "paged:4"),
        ("bloom", "eager", "contiguous"),
        ("deepseek_v3", "eager", "contiguous"),
        ("deepseek_v3", "eager", "paged:4"),
        ("deepseek_v3", "sdpa", "contiguous"),
    ],
)
def test_a_decoded_token_that_sees_nothing(family: str, implementation: str, cache: str) -> None:
    """The last sequence is nothing but padding, and the steps of the second end in it."""
    steps = torch.cat([MASK, MASK[:, :2]], dim=1)
    steps[0, -2:], steps[1, -2:], steps[2, -2:] = 1, 0, 1

    def decode(model: Any) -> torch.Tensor:
        with torch.no_grad():
            output = model(IDS, attention_mask=MASK, use_cache=True)
            logits = [output.logits]
            for length in (LENGTH + 1, LENGTH + 2):
                given = {"attention_mask": steps[:, :length], "cache": output.cache}
                output = model(IDS[:, :1], **given)
                logits.append(output.logits)
        return torch.cat(logits, dim=1)

    stock, model = _make(family, implementation), _make(family, implementation)
    headwise.attach(model, cache=cache)
    # one int8 rounding is up to 1/254 of a row's largest element, in three layers
    _close(decode(model), decode(stock), 5e-2 if cache == "int8" else 1e-4)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_an_average_takes_in_the_unwritten_part_of_a_static_cache(family: str) -> None:
    def run(model: Any) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 6)
        with torch.no_grad():
            return model(IDS, attention_mask=MASK, cache=cache).logits

    stock, model = _make(family, "eager"), _make(family, "eager")
    headwise.attach(model)
    _close(run(model), run(stock))


def _step(model: Any, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(IDS, attention_mask=mask, use_cache=False).logits
    model.zero_grad()
    logits.square().mean().backward()
    return logits.detach(), _gradients(model)


@pytest.mark.parametrize(
    ("family", "implementation", "lowest"),
    [
        ("llama-gqa", "eager", torch.finfo(torch.float32).min),
        ("llama-gqa", "sdpa", torch.finfo(torch.float32).min),
        ("llama-gqa", "eager", -1e9),
        ("llama-gqa", "sdpa", -1e9),
        ("llama-gqa", "sdpa", -1e4),
        ("deepseek_v3", "eager", torch.finfo(torch.float32).min),
    ],
)
def test_a_float_mask_of_the_user_that_hides_a_whole_row(
    family: str, implementation: str, lowest: float
) -> None:
    mask = torch.randn(4, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2))
    mask = mask.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), lowest)
    mask[0, :, :5], mask[2, :, 7] = lowest, lowest
    stock, model = _make(family, implementation), _make(family, implementation)
    headwise.attach(model)
    with _exact_sdpa(implementation):
        expected, gradients = _step(stock, mask)
    with torch.no_grad():
        _close(model(IDS, attention_mask=mask).logits, expected)
    given, ours = _step(model, mask)
    _close(given, expected)
    _require_equal(ours, gradients)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_row_of_minus_infinity_is_nan_in_eager_and_zero_in_sdpa(implementation: str) -> None:
    mask = torch.zeros(4, 1, LENGTH, LENGTH)
    mask[0, :, :5], mask[2, :, 7] = -torch.inf, -torch.inf
    model = _make("llama-gqa", implementation, num_hidden_layers=1)
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
        headwise.attach(model)
        given = model(IDS, attention_mask=mask).logits
    hidden = (mask == -torch.inf).all(-1).squeeze(1)
    assert torch.equal(expected.isnan().any(-1), hidden & (implementation == "eager"))
    assert torch.equal(given.isnan(), expected.isnan())
    _close(given.nan_to_num(), expected.nan_to_num())


def test_a_boolean_mask_of_the_user_is_eagers_float_mask() -> None:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().repeat(4, 1, 1, 1)
    mask[0, :, :5], mask[2, :, 7] = False, False
    stock, model = _make("llama-gqa", "eager"), _make("llama-gqa", "eager")
    headwise.attach(model)
    lowest = torch.finfo(torch.float32).min
    with torch.no_grad():
        for _ in range(2):
            expected = stock(IDS, attention_mask=torch.zeros(mask.shape).masked_fill(~mask, lowest))
            _close(model(IDS, attention_mask=mask).logits, expected.logits)
            # the user's own tensor may be written to between two calls
            mask[1, :, 3] = False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "bloom", "t5"])
def test_rows_in_half_precision_are_eagers(family: str, dtype: torch.dtype) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 1}
    if family == "t5":
        changes = {"num_layers": 1, "num_decoder_layers": 1, "initializer_factor": 1.0}
    stock = _make(family, "eager", **changes).to(dtype)
    model = _make(family, "eager", **changes).to(dtype)
    headwise.attach(model)
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}
    if family == "t5":
        inputs |= {"decoder_input_ids": IDS, "decoder_attention_mask": MASK.flip(0)}
    with torch.no_grad():
        expected = stock(**inputs).logits
        # some roundings of the dtype, relative to the largest logit
        bound = 16 * torch.finfo(dtype).eps
        _close(model(**inputs).logits, expected, bound)
    _close(model(**inputs).logits.detach(), expected, bound)


def test_rows_under_autocast_are_eagers() -> None:
    stock, model = _make("gemma2", "eager"), _make("gemma2", "eager")
    headwise.attach(model)
    with torch.no_grad():
        exact = stock(IDS, attention_mask=MASK).logits[MASK == 0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        given = model(IDS, attention_mask=MASK).logits[MASK == 0]
    layers = model.config.num_hidden_layers
    assert relative_error(given, exact) <= half_precision_error(torch.bfloat16, layers)


@pytest.mark.parametrize(
    "family", [pytest.param("llama-gqa", marks=pytest.mark.sweep), "gemma2", "bloom"]
)
# Bloom's own GELU
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_averages_too(family: str) -> None:
    stock, model = _make(family, "eager"), _make(family, "eager")
    headwise.attach(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = stock(IDS, attention_mask=MASK, use_cache=False).logits
        _close(compiled(IDS, attention_mask=MASK, use_cache=False).logits, expected)
    _step(stock, MASK)
    compiled(IDS, attention_mask=MASK, use_cache=False).logits.square().mean().backward()
    _require_equal(_gradients(model), _gradients(stock))


@pytest.mark.parametrize(("text", "vision"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_each_part_of_a_model_keeps_its_own_attention(text: str, vision: str) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "initializer_range": 0.2}

    def llava() -> Any:
        torch.manual_seed(3)
        config = hf.LlavaConfig(
            text_config=hf.LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes),
            vision_config=hf.CLIPVisionConfig(image_size=8, patch_size=4, **sizes),
            image_token_id=1,
        )
        parts = {"text_config": text, "vision_config": vision}
        return hf.LlavaForConditionalGeneration._from_config(config, attn_implementation=parts)

    stock, model = llava().eval(), llava().eval()
    headwise.attach(model)
    with torch.no_grad():
        expected = stock(IDS, attention_mask=MASK).logits
        _close(model(IDS, attention_mask=MASK).logits, expected)


def test_a_copy_and_a_pickled_model_know_what_was_there_before() -> None:
    stock, model = _make("llama-gqa", "eager"), _make("llama-gqa", "eager")
    headwise.attach(model)
    with torch.no_grad():
        expected = stock(IDS, attention_mask=MASK).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            _close(twin(IDS, attention_mask=MASK).logits, expected)


def test_many_rows_are_averaged_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # of the scores of all 4 sequences and 6 heads, two rows at a time
    monkeypatch.setattr(empty_rows, "_SCORES", 2 * 4 * 6 * LENGTH)
    stock, model = _make("llama-gqa", "eager"), _make("llama-gqa", "eager")
    headwise.attach(model)
    expected, gradients = _step(stock, MASK)
    given, ours = _step(model, MASK)
    _close(given, expected)
    _require_equal(ours, gradients)


def test_weights_while_dropout_is_on_are_zero_where_sdpa_is() -> None:
    model = make("llama-gqa", attention_dropout=0.3).train()
    headwise.attach(model)
    output = model(IDS, attention_mask=MASK, output_attentions=True, use_cache=False)
    assert all(not weights[0, :, :5].any() for weights in output.attentions)
    assert all(weights[0, :, 5:].any() for weights in output.attentions)


def test_a_mask_of_transformers_that_is_written_to_is_looked_through_again() -> None:
    def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(6))
        seen = torch.ones_like(ids)
        seen[0, 2] = 0
        mask = create_causal_mask(
            config=model.config,
            inputs_embeds=torch.zeros(1, 9, model.config.hidden_size),
            attention_mask=seen,
            position_ids=torch.arange(9)[None],
            **{CACHE: None},
        )
        with torch.no_grad():
            first = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            mask[0, :, :4] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            return first, model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    model = make("llama-gqa", attn_implementation="eager")
    expected = run(model)
    headwise.attach(model)
    for given, right in zip(run(model), expected, strict=True):
        torch.testing.assert_close(given, right, rtol=1e-4, atol=1e-4)
