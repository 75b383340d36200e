"""Sequences of one prompt: it is read once where that gives the same, else as stock reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import headwise
from families import VOCABULARY, make
from headwise.hf import shared_prompt
from headwise.hf.stock_names import CACHE

_generator = torch.Generator().manual_seed(5)
PROMPTS = torch.randint(3, VOCABULARY, (2, 47), generator=_generator)
MASK = torch.ones_like(PROMPTS)
PADDED = MASK.clone()
PADDED[0, :5] = 0
# learned positions, parallel blocks, windows, sinks, latents, ALiBi
FAMILIES = ("llama-gqa", "gpt2", "falcon-40b", "gemma3", "gpt_oss", "deepseek_v3", "bloom")
CACHES = ("contiguous", "paged", "window:200", "disk")
MODES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several of the beams": {"num_beams": 3, "num_return_sequences": 2, "attention_mask": MASK},
    "samples": {"do_sample": True, "num_return_sequences": 4, "top_k": 5},
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The sequences that were read ahead, and from which token to which."""
    parts, stock = [], shared_prompt.read_part

    def read_part(model: Any, cache: Any, ids: torch.Tensor, begin: int, end: int) -> None:
        parts.append((len(ids), begin, end))
        stock(model, cache, ids, begin, end)

    monkeypatch.setattr(shared_prompt, "read_part", read_part)
    return parts


def generate(model: Any, ids: torch.Tensor = PROMPTS, **options: Any) -> Any:
    torch.manual_seed(7)
    given = {"do_sample": False, "max_new_tokens": 8, **options}
    return model.generate(ids, **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_stock(family: str, read: list[Any]) -> None:
    model = make(family)
    expected = {name: generate(model, **mode) for name, mode in MODES.items()}
    headwise.attach(model)
    for name, tokens in expected.items():
        read.clear()
        assert torch.equal(generate(model, **MODES[name]), tokens), name
        assert read == [(2, 0, 46)], name
    headwise.detach(model)
    assert "_prefill" not in vars(model)


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_repeats_what_it_holds(cache: str, read: list[Any], tmp_path: Path) -> None:
    model = make("gemma3")
    expected = [generate(model, **mode) for mode in MODES.values()]
    sparse = {"sparse": "all"} if cache == "disk" else {}
    headwise.attach(model, cache=f"disk:{tmp_path}" if cache == "disk" else cache, **sparse)
    for mode, tokens in zip(MODES.values(), expected, strict=True):
        assert torch.equal(generate(model, **mode), tokens)
    assert len(read) == len(MODES)


def hooked(model: Any) -> dict[str, Any]:
    model.model.layers[0].register_forward_hook(lambda *given: None)
    return {}


def replaced(model: Any) -> dict[str, Any]:
    module = model.model.layers[0].mlp
    stock = module.forward
    module.forward = lambda hidden: stock(hidden)
    return {}


def open_both_ways(model: Any) -> dict[str, Any]:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return {}


def prepared(model: Any) -> dict[str, Any]:
    stock = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **given: stock(*args, **given)
    return {}


def rounded(model: Any) -> dict[str, Any]:
    from torch.ao.nn.quantized.dynamic import Linear

    class Alike(Linear):  # what rounds by all tokens of a call, on any machine
        def __init__(self, weight: torch.Tensor) -> None:
            torch.nn.Module.__init__(self)
            self.own = torch.nn.Parameter(weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = x.abs().amax() / 15
            return (x / scale).round() * scale @ self.own.mT

    Alike.__module__ = Linear.__module__
    for layer in model.model.layers:
        layer.mlp.down_proj = Alike(layer.mlp.down_proj.weight.detach())
    return {}


AS_STOCK: dict[str, Callable[[Any], dict[str, Any]]] = {
    "padding": lambda model: {"attention_mask": PADDED},
    "hidden states": lambda model: {
        "output_hidden_states": True,
        "return_dict_in_generate": True,
    },
    "positions": lambda model: {"position_ids": 2 * torch.arange(47).expand(2, -1)},
    "chunks": lambda model: {"prefill_chunk_size": 20},
    "a static cache": lambda model: {"cache_implementation": "static"},
    "no cache": lambda model: {"use_cache": False},
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(PROMPTS)},
    "few tokens": lambda model: {"ids": PROMPTS[:, :12]},
    "one sequence each": lambda model: {"num_beams": 1},
    "a hook": hooked,
    "another forward": replaced,
    "attention to both sides": open_both_ways,
    "inputs of the caller's": prepared,
    "modules that round by the call": rounded,
}


@pytest.mark.parametrize("name", AS_STOCK)
def test_what_may_differ_is_read_as_stock_reads_it(name: str, read: list[Any]) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        given = {"num_beams": 3, **AS_STOCK[name](model)}
    ids = given.pop("ids", None if "inputs_embeds" in given else PROMPTS)
    expected = generate(model, ids, **given)
    headwise.attach(model)
    tokens = generate(model, ids, **given)
    if name == "hidden states":
        assert [len(each) for each in tokens.hidden_states] == [
            len(each) for each in expected.hidden_states
        ]
        assert tokens.hidden_states[0][0].shape == expected.hidden_states[0][0].shape
        tokens, expected = tokens.sequences, expected.sequences
    assert torch.equal(tokens, expected)
    assert not read


@pytest.mark.parametrize("name", ["_prefill", "_prepare_model_inputs"])
def test_a_method_of_somebodys_own_stays(name: str, read: list[Any]) -> None:
    model, calls = make("llama-gqa"), list[int]()
    stock = getattr(model, name)

    def own(*args: Any, **given: Any) -> Any:
        calls.append(1)
        return stock(*args, **given)

    setattr(model, name, own)
    headwise.attach(model)
    generate(model, num_beams=3)
    headwise.detach(model)
    assert (len(calls), vars(model)[name]) == (1, own)
    assert bool(read) == (name != "_prefill")


def test_states_and_choices_among_keys_read_as_stock_does(read: list[Any]) -> None:
    states = make("kimi_linear")
    expected = generate(states, num_beams=3)
    headwise.attach(states)
    assert torch.equal(generate(states, num_beams=3), expected)
    chooses = make("llama-gqa")
    headwise.attach(chooses, sparse="topk:16,sinks=1,recent=4")
    generate(chooses, num_beams=3)
    assert not read


def test_a_cache_that_is_given_is_gone_on_with(read: list[Any]) -> None:
    model = make("llama-gqa")
    expected = generate(model, num_beams=3)
    headwise.attach(model)
    with torch.no_grad():
        cache = model(PROMPTS[:, :30], use_cache=True)[CACHE]
    cache.batch_repeat_interleave(3)
    assert torch.equal(generate(model, num_beams=3, **{CACHE: cache}), expected)
    assert not read
