"""Steps are those of `model.generate`: its logits, token for token, whatever the model."""

from typing import Any

import pytest
import torch

import families
import headwise
from generation.models import LIMIT, WHOLE, make
from headwise.errors import UnsupportedError
from headwise.generation.session import LOGIT_TOLERANCE
from headwise.generation.stepper import Stepper

NEW = 7


def prompt(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(3, families.VOCABULARY, (1, count), generator=draw)


def stock(model: Any, ids: torch.Tensor) -> Any:
    """The tokens and their logits by `generate`."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, 71) for name in (*WHOLE[:4], "qwen3_5", "lfm2", "jamba", "llama-gqa", "mistral")),
        *((name, LIMIT - 3) for name in WHOLE[:4]),
    ],
)
@pytest.mark.parametrize("attached", [False, True], ids=["stock", "headwise"])
@pytest.mark.usefixtures("short_chunks")
def test_logits_of_each_step_are_those_of_generate(name: str, count: int, attached: bool) -> None:
    ids = prompt(count)
    expected = stock(make(name), ids)
    model = make(name)
    if attached:
        headwise.attach(model)
    stepper, given = Stepper(model), ids
    with torch.no_grad():
        for at, logits in enumerate(expected.logits):
            found = stepper.read(given)
            assert (found - logits).norm() <= LOGIT_TOLERANCE[torch.float32] * logits.norm()
            given = expected.sequences[:, count + at : count + at + 1]
    assert stepper.ids.shape[1] == stepper.cache.get_seq_length() == count + NEW - 1


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope", "jamba"])
def test_a_whole_text_is_read_at_once_where_parts_would_differ(name: str) -> None:
    ids = prompt(71)
    with torch.no_grad():
        expected = make(name)(ids, use_cache=False).logits
        (found,) = Stepper(make(name)).read_all(ids, 16)
    assert (found - expected).norm() <= LOGIT_TOLERANCE[torch.float32] * expected.norm()


def test_a_model_without_a_cache_gives_its_first_logits_and_then_says_so() -> None:
    model, ids = make("recurrent_gemma"), prompt(11)
    stepper = Stepper(model)
    with torch.no_grad():
        found = stepper.read(ids)
        with pytest.raises(UnsupportedError, match="RecurrentGemmaForCausalLM gives no cache"):
            stepper.read(ids[:, :1])
    expected = stock(make("recurrent_gemma"), ids).logits[0]
    assert (found - expected).norm() <= LOGIT_TOLERANCE[torch.float32] * expected.norm()
