"""What people hold is often not a PreTrainedModel: what is inside is attached, and detached."""

import sys
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf

import headwise
from families import VOCABULARY, make
from headwise.hf.module_hook import NAME

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(8))


def _lora(model: Any) -> Any:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()


def _prefix(model: Any) -> Any:
    config = model.config
    prefix = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        num_layers=config.num_hidden_layers,
        token_dim=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
    )
    return peft.get_peft_model(model, prefix).eval()


class _User(torch.nn.Module):
    """A module of a user around two levels of others."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.policy = torch.nn.ModuleDict({"actor": torch.nn.DataParallel(model)})

    def forward(self, ids: torch.Tensor) -> Any:
        return self.policy["actor"](ids)


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "PEFT, LoRA": _lora,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": torch.nn.DataParallel,
    "a user's module": _User,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's calls of Transformers
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_model_inside_is_attached_and_detached(wrap: Callable[[Any], Any]) -> None:
    torch._dynamo.reset()
    model = make("llama-gqa")
    wrapped = wrap(model)
    with torch.no_grad():
        expected = wrapped(IDS).logits
        report = headwise.attach(wrapped, cache="paged")
        assert report.model == "LlamaForCausalLM"
        assert model.config._attn_implementation == NAME
        given = wrapped(IDS).logits
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    headwise.detach(wrapped)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("first", ["part", "whole"])
def test_a_model_that_is_held_beside_one_of_its_parts_is_one_model(first: str) -> None:
    model = make("llama-gqa")
    held = {"part": model.model, "whole": model}
    names = [first, *({"part", "whole"} - {first})]
    wrapped = torch.nn.ModuleDict({name: held[name] for name in names})
    assert headwise.attach(wrapped).model == "LlamaForCausalLM"


def test_the_model_of_a_distributed_one_is_attached() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make("llama-gqa")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        headwise.attach(wrapped)
        wrapped(IDS, labels=IDS).loss.backward()
        assert model.config._attn_implementation == NAME
    finally:
        torch.distributed.destroy_process_group()


def test_the_model_of_a_pipeline_is_attached() -> None:
    model = make("llama-gqa")

    class Pipeline:
        def __init__(self) -> None:
            self.model = model

    headwise.attach(Pipeline())
    assert model.config._attn_implementation == NAME


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["llama-mha", "falcon-40b", "bloom"])
def test_a_prefix_that_is_tuned_stays(family: str) -> None:
    wrapped = _prefix(make(family))
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "do_sample": False}
    loss = wrapped(IDS, labels=IDS).loss
    gradient = torch.autograd.grad(loss, wrapped.prompt_encoder.default.embedding.weight)[0]
    expected = wrapped.generate(input_ids=IDS, **options)
    headwise.attach(wrapped)
    ours = wrapped(IDS, labels=IDS).loss
    again = torch.autograd.grad(ours, wrapped.prompt_encoder.default.embedding.weight)[0]
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(again, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    assert torch.equal(wrapped.generate(input_ids=IDS, **options), expected)


NOTEBOOK = """
import torch, transformers as hf
class Reward(hf.LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = hf.LlamaModel(config)
        self.value = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()
    def forward(self, input_ids, **kwargs):
        return self.value(self.model(input_ids).last_hidden_state)
class Plain(hf.LlamaForCausalLM):
    pass
class MyAttention(torch.nn.Module):
    pass
class Other(hf.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].self_attn = MyAttention()
"""


@pytest.fixture
def cell() -> dict[str, Any]:
    """The classes of a notebook's cell, which no file holds."""
    names = {"__name__": "a_notebook_cell"}
    exec(NOTEBOOK, names)
    assert "a_notebook_cell" not in sys.modules
    return names


@pytest.mark.parametrize("name", ["Reward", "Plain"])
def test_a_class_that_is_defined_in_no_file_is_what_its_base_is(
    cell: dict[str, Any], name: str
) -> None:
    torch.manual_seed(0)
    model = cell[name](make("llama-gqa").config).eval()
    with torch.no_grad():
        expected = model(IDS)[0]
        report = headwise.attach(model, strict=True)
        given = model(IDS)[0]
    assert report.layers[0].decode
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    headwise.detach(model)
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_is_defined_in_no_file_is_refused(cell: dict[str, Any]) -> None:
    model = cell["Other"](make("llama-gqa").config)
    with pytest.raises(headwise.UnsupportedError, match=r"of its own, MyAttention.*in a file$"):
        headwise.attach(model)
    assert model.config._attn_implementation == "sdpa"


def _composite(encoder: hf.PreTrainedConfig, decoder: hf.PreTrainedConfig) -> Any:
    vision = isinstance(encoder, hf.ViTConfig)
    config_class = hf.VisionEncoderDecoderConfig if vision else hf.EncoderDecoderConfig
    config = config_class.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = (hf.VisionEncoderDecoderModel if vision else hf.EncoderDecoderModel)(config)
    for parameter in model.parameters():  # else all logits are alike, and ties
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODERS = {
    "BERT": hf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True),
    "GPT-2": hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        is_decoder=True,
        add_cross_attention=True,
    ),
}
ENCODERS = {
    "BERT": hf.BertConfig(**BERT),
    "ViT": hf.ViTConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    ),
}


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_composite_of_encoder_and_decoder_gives_the_tokens_of_stock(
    encoder: hf.PreTrainedConfig, decoder: hf.PreTrainedConfig, beams: int
) -> None:
    model = _composite(encoder, decoder)
    given = {"input_ids": IDS}
    if isinstance(encoder, hf.ViTConfig):
        given = {"pixel_values": torch.randn(2, 3, 16, 16)}
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    expected = model.generate(**given, **options)
    headwise.attach(model)
    assert torch.equal(model.generate(**given, **options), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_view_says_which_model_to_give() -> None:
    wrapped = _lora(make("llama-gqa"))
    with pytest.raises(headwise.UnsupportedError) as error:
        headwise.view(wrapped, None, "x")
    assert "its .base_model.model (LlamaForCausalLM)" in str(error.value)
