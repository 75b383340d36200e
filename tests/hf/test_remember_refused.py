"""What a cache cannot be known by is not used: hooks, foreign code, padding, autocast, adapters."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import headwise
from families import make
from headwise.errors import UnsupportedError
from headwise.hf.stock_names import CACHE
from headwise.stored.store import all_blocks
from hf.test_remember import generate, pair, text


def padded(ids: Tensor, count: int) -> dict[str, Tensor]:
    """The same text behind `count` tokens of padding."""
    before = torch.zeros(len(ids), count, dtype=torch.int64)
    both = torch.cat([before, ids], dim=1)
    mask = torch.cat([before, torch.ones_like(ids)], dim=1)
    return {"ids": both, "attention_mask": mask}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("count", [1, 5, 70])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "kimi_linear"])
def test_padding_before_every_sequence(
    family: str, count: int, stored: bool, tmp_path: Path
) -> None:
    model, remembered, twin = pair(family, tmp_path)
    ids = text(model, 90)
    if stored:
        generate(model, ids)
    given = padded(ids, count)
    assert torch.equal(
        generate(model, given["ids"], attention_mask=given["attention_mask"]),
        generate(twin, given["ids"], attention_mask=given["attention_mask"]),
    )
    assert remembered.known == (89 if stored and family == "llama-gqa" else 0)


def test_padding_that_moves_positions(tmp_path: Path) -> None:
    """Bart's decoder counts positions by itself, padding among them."""
    torch.manual_seed(0)
    config = hf.BartConfig(
        vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=4, init_std=0.4,
        decoder_ffn_dim=48, max_position_embeddings=300, pad_token_id=0, eos_token_id=None,
        bos_token_id=1, is_decoder=True, is_encoder_decoder=False, forced_eos_token_id=None,
    )  # fmt: skip
    model, twin = (hf.BartForCausalLM(config).eval() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    headwise.attach(twin)
    remembered = headwise.attach(model, remember=tmp_path).remembered
    ids = text(model, 40)
    generate(model, ids)
    given = padded(ids, 7)
    assert torch.equal(
        generate(model, given["ids"], attention_mask=given["attention_mask"]),
        generate(twin, given["ids"], attention_mask=given["attention_mask"]),
    )
    assert "no positions" in remembered.notes[0]


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "deepseek_v3", "kimi_linear"])
def test_under_autocast_nothing_is_used(family: str, tmp_path: Path) -> None:
    model, remembered, twin = pair(family, tmp_path)
    ids = text(model, 90)
    generate(model, ids)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(generate(model, ids), generate(twin, ids))
        assert "autocast" in remembered.notes[0]
    generate(model, ids)
    assert remembered.known == 89


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, given, out: out + 0.5)


def replaced(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * 0.3


def other_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.ReLU()


class Steer(nn.Module):
    """A module of a user's, whose tensor is no parameter and no buffer."""

    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.inner, self.by = inner, torch.full((48,), by)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.by


def steered(model: Any) -> None:
    layer = model.model.layers[0]
    layer.mlp = Steer(layer.mlp, 0.7)


def used_again(model: Any) -> None:
    layer = model.model.layers[0].mlp.down_proj
    shape = layer.weight.shape
    layer.weight = None
    layer.weight = nn.Parameter(torch.full(shape, 0.05), requires_grad=False)


def traced(model: Any) -> None:
    layer = model.model.layers[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        layer.mlp = torch.jit.trace(layer.mlp, torch.randn(1, 3, 48), check_trace=False)


CHANGES: tuple[Callable[[Any], None], ...] = (
    *(hooked, replaced, other_activation, steered, used_again),
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_does_something_else_is_another(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model, remembered, twin = pair("llama-gqa", tmp_path)
    ids = text(model, 90)
    before = generate(model, ids)
    for each in (model, twin):
        change(each)
    tokens = generate(model, ids)
    assert torch.equal(tokens, generate(twin, ids))
    assert not torch.equal(tokens, before)
    assert remembered.known == 0


@pytest.mark.parametrize("change", [hooked, replaced, steered, traced])
def test_what_a_foreign_part_made_is_not_saved(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model, _, _ = pair("llama-gqa", tmp_path / "folder")
    ids = text(model, 90)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
    headwise.save_cache(cache, tmp_path / "before")
    change(model)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
    with pytest.raises(UnsupportedError, match="what the cache is of is not known"):
        headwise.save_cache(cache, tmp_path / "cache")
    with pytest.raises(UnsupportedError, match="is not known"):
        headwise.load_cache(tmp_path / "before", model)


def test_a_patched_class_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, remembered, twin = pair("llama-gqa", tmp_path)
    ids = text(model, 90)
    generate(model, ids)
    kind = type(model.model.layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * 0.4)
    assert torch.equal(generate(model, ids), generate(twin, ids))
    assert (remembered.known, "was replaced" in remembered.notes[0]) == (0, True)


def of_peft(test: Any) -> Any:
    """What PEFT warns of, where it meets the newest Transformers."""
    for words in (".*gradient_checkpointing:FutureWarning", "Position ids are not:UserWarning"):
        test = pytest.mark.filterwarnings(f"ignore:{words}")(test)
    return test


def adapted(seed: int) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(make("llama-gqa"), config, adapter_name="one")
    model.add_adapter("two", config)
    return model.eval()


@of_peft
def test_adapters_are_told_apart(tmp_path: Path) -> None:
    model, twin = adapted(0), adapted(0)
    headwise.attach(twin)
    remembered = headwise.attach(model, remember=tmp_path).remembered
    ids = torch.randint(3, 90, (1, 90), generator=torch.Generator().manual_seed(0))

    def check(known: int, **arguments: Any) -> None:
        tokens = [generate(each, None, input_ids=ids, **arguments) for each in (model, twin)]
        assert torch.equal(*tokens)
        assert remembered.known == known

    check(0)
    check(89)
    for each in (model, twin):
        each.set_adapter("two")
    check(0)
    for name in ("one", "two", "__base__"):  # by hooks that are there for a call
        check(0, adapter_names=[name])
    with model.disable_adapter(), twin.disable_adapter():
        check(0)
        check(89)


@of_peft
def test_a_learned_prompt_is_no_beginning(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = make("llama-gqa")
    remembered = headwise.attach(base, remember=tmp_path).remembered
    ids = text(base, 60)
    generate(base, ids)
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(base, config).eval()
    tokens = generate(model, None, input_ids=ids)
    assert "depends on where a prompt begins" in remembered.notes[0]
    headwise.attach(base)
    assert torch.equal(tokens, generate(model, None, input_ids=ids))


def test_a_way_of_generating_of_the_user_s_own(tmp_path: Path) -> None:
    model, remembered, _ = pair("llama-gqa", tmp_path)
    ids = text(model, 60)
    generate(model, ids)

    def own(model: Any, input_ids: Tensor, **given: Any) -> Tensor:
        assert given[CACHE].get_seq_length() == 0
        return input_ids

    generate(model, ids, custom_generate=own)
    assert remembered.notes[0] == "not used: custom_generate reads the prompt itself"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("what", ["folder", "loop"])
def test_what_is_no_block_is_passed_over(what: str, tmp_path: Path) -> None:
    model, _, twin = pair("llama-gqa", tmp_path)
    ids = text(model, 90)
    generate(model, ids)
    (block,) = (used.entry.path for used in all_blocks(tmp_path))
    if what == "folder":
        block.unlink()
        block.mkdir()
    else:
        block.unlink()
        block.parent.rmdir()
        block.parent.symlink_to(block.parent.name)
    for _ in range(2):
        assert torch.equal(generate(model, ids), generate(twin, ids))


@pytest.mark.parametrize("family", ["llama-gqa", "kimi_linear"])
def test_a_cache_that_was_repeated_is_for_beams(family: str, tmp_path: Path) -> None:
    model = make(family)
    headwise.attach(model)
    ids = text(model, 60)
    with torch.no_grad():
        cache = model(ids[:, :50], use_cache=True)[CACHE]
    cache.batch_repeat_interleave(3)
    mode = {"num_beams": 3, "num_return_sequences": 2}
    tokens = generate(model, ids, **mode, **{CACHE: cache})
    assert torch.equal(tokens, generate(model, ids, **mode))


@pytest.mark.parametrize("family", ["llama-gqa", "kimi_linear"])
def test_a_cache_of_embeddings_is_repeated_and_chosen_from(family: str) -> None:
    model = make(family)
    headwise.attach(model)
    embedded = model.get_input_embeddings()(text(model, 20)).detach().repeat(3, 1, 1)
    with torch.no_grad():
        cache = model(inputs_embeds=embedded, use_cache=True)[CACHE]
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.batch_repeat_interleave(2)
        out = model(torch.tensor([[5]] * 4), use_cache=True, **{CACHE: cache}).logits
    assert len(out) == 4


def test_recall_in_inference_mode_goes_on_outside(tmp_path: Path) -> None:
    model, _, _ = pair("kimi_linear", tmp_path)
    ids = text(model, 60)
    generate(model, ids)
    with torch.inference_mode():
        cache, known = headwise.recall(model, ids)
    assert known == 59
    with torch.no_grad():
        model(ids[:, known:], use_cache=True, **{CACHE: cache})
