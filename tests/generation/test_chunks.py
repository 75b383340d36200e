"""Which models may read a text in chunks: what is on the list is exact, what is unknown is not."""

import pytest
import torch
import transformers as hf

import families
from generation.models import CUT, DYNAMIC, LONGROPE, WHOLE, make
from headwise.generation.session import LOGIT_TOLERANCE
from headwise.generation.stepper import Stepper
from headwise.hf.continued import reads_in_chunks


@pytest.mark.parametrize("family", families.DECODERS)
def test_whatever_reads_in_chunks_gives_the_logits_of_one_piece(family: str) -> None:
    model = families.make(family)
    # layers that share keys are not on it, nor those that keep a state
    in_chunks = family not in ("gemma3n", *families.LINEAR)
    assert reads_in_chunks(model) == in_chunks
    ids = torch.randint(3, families.VOCABULARY, (1, 61))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        parts = list(Stepper(model).read_all(ids, 13))
    assert [part.shape[1] for part in parts] == ([13] * 4 + [9] if in_chunks else [61])
    difference = torch.cat(parts, dim=1) - whole
    assert difference.norm() <= LOGIT_TOLERANCE[torch.float32] * whole.norm()


@pytest.mark.parametrize("name", WHOLE)
def test_what_depends_on_the_length_or_keeps_a_state_does_not(name: str) -> None:
    assert not reads_in_chunks(make(name))


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "longrope"}},
        {"rope_scaling": {"type": "su"}},
        {"rope_scaling": {"type": "invented"}},
        {"rope_parameters": {"full_attention": LONGROPE}},
        {"rope_parameters": {"rope_type": "default", "full_attention": [DYNAMIC]}},
        {"local_rope_parameters": {"rope_type": None}},
        {"is_causal": False},
        {
            "layer_types": ["full_attention", "chunked_attention", "full_attention"],
            "attention_chunk_size": 8,
        },
        {"layer_types": ["conv", "full_attention", "full_attention"]},
    ],
)
def test_a_config_that_says_so_in_whatever_way_is_taken_at_its_word(fields: dict) -> None:
    model = make("llama-gqa")
    assert reads_in_chunks(model)
    for name, value in fields.items():
        # past the config's own checks, as a config of another version or of remote code is
        model.config.__dict__[name] = value
    assert not reads_in_chunks(model)


def test_a_module_that_turns_by_the_length_is_found_whatever_the_config_says() -> None:
    model = make("llama-dynamic")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    assert not reads_in_chunks(model)


def test_code_that_is_not_transformers_own_is_not_known() -> None:
    class Changed(hf.LlamaForCausalLM):
        pass

    assert not reads_in_chunks(Changed(make("llama-gqa").config))


def test_a_model_that_sees_images_reads_the_whole_prompt() -> None:
    text = make("gemma3-dynamic").config.to_dict() | {"rope_parameters": None}
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1}
    vision = sizes | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    assert not reads_in_chunks(hf.Gemma3ForConditionalGeneration(config))


def test_an_encoder_decoder_reads_the_whole_prompt() -> None:
    assert not reads_in_chunks(families.make("t5"))


@pytest.mark.parametrize("name", CUT)
def test_attention_to_all_tokens_or_a_window_reads_in_chunks(name: str) -> None:
    assert reads_in_chunks(make(name))
