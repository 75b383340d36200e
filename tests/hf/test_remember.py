"""`attach(model, remember=FOLDER)`: the tokens of a model that remembers nothing, read once."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from torch import Tensor

import headwise
from families import DECODERS, all_but_sweep, make
from headwise.errors import OptionError, UnsupportedError
from headwise.hf.stock_names import CACHE
from headwise.stored.store import all_blocks

SOME = ("llama-gqa", "gemma3", "deepseek_v3", "kimi_linear", "gpt_oss", "bloom")
NEW = 6


def text(model: Any, length: int, seed: int = 0) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (1, length), generator=generator)


def generate(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    given = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    tokens: Tensor = model.generate(ids, **(given | arguments))
    return tokens


def pair(family: str, folder: Path, cache: str = "contiguous") -> tuple[Any, Any, Any]:
    """A model that remembers, its report, and one that does not."""
    model, twin = make(family), make(family)
    try:
        headwise.attach(twin, cache=cache)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return model, headwise.attach(model, cache=cache, remember=folder).remembered, twin


@pytest.mark.parametrize("cache", ["contiguous", "paged:16", "int8", "int4", "window:64,sinks=4"])
@pytest.mark.parametrize("family", all_but_sweep(DECODERS, set(DECODERS) - set(SOME)))
def test_a_text_that_goes_on_is_read_once(family: str, cache: str, tmp_path: Path) -> None:
    model, memory, twin = pair(family, tmp_path, cache)
    base = 300 if getattr(model.config, "n_positions", 900) >= 900 else 90
    ids, known = text(model, base), 0
    for turn in range(4):
        tokens = generate(model, ids)
        assert torch.equal(tokens, generate(twin, ids))
        if any("not used" in note for note in memory.notes):
            return  # with a reason; the tokens are right
        assert (memory.known, memory.asked, memory.notes) == (known, ids.shape[1], [])
        if turn == 0:  # the same again, of which the last token is read
            known = ids.shape[1] - 1
        else:  # a turn of a chat: what was generated, but for its last token, and a question
            known = tokens.shape[1] - 1
            ids = torch.cat([tokens, text(model, base // 9 * turn, seed=turn)], dim=1)


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3", "bloom"])
def test_full_attention_is_cut_anywhere(family: str, tmp_path: Path) -> None:
    model, memory, twin = pair(family, tmp_path)
    ids = text(model, 700)
    generate(model, ids)
    for common in (600, 301, 256, 64, 5):
        other = torch.cat([ids[:, :common], text(model, 30, seed=common)], dim=1)
        assert torch.equal(generate(model, other), generate(twin, other))
        assert memory.known >= common


def test_windows_are_cut_where_they_were_stored(tmp_path: Path) -> None:
    model, memory, twin = pair("gemma3", tmp_path)
    ids = text(model, 1100)
    generate(model, ids)
    for common, known in ((1099, 1099), (1060, 1024), (1000, 0)):
        other = torch.cat([ids[:, :common], text(model, 9, seed=common)], dim=1)
        assert torch.equal(generate(model, other), generate(twin, other))
        assert memory.known == known


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "kimi_linear"])
@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_share_a_prefix(family: str, mode: dict[str, int], tmp_path: Path) -> None:
    model, memory, twin = pair(family, tmp_path)
    ids = text(model, 300)
    for known in (0, 299):
        assert torch.equal(generate(model, ids, **mode), generate(twin, ids, **mode))
        assert memory.known == known


def test_samples_share_a_prefix(tmp_path: Path) -> None:
    model, memory, twin = pair("llama-gqa", tmp_path)
    ids = text(model, 300)
    generate(model, ids)
    given = {"do_sample": True, "num_return_sequences": 3, "top_k": 0}
    drawn = []
    for each in (model, twin):
        torch.manual_seed(3)
        drawn.append(generate(each, ids, **given))
    assert torch.equal(*drawn)
    assert memory.known == 299


def test_a_batch_takes_what_all_sequences_have_at_the_same_positions(tmp_path: Path) -> None:
    model, memory, twin = pair("llama-gqa", tmp_path)
    long, short = text(model, 300), text(model, 200, seed=1)
    generate(model, long)
    generate(model, short)
    batch, mask = torch.zeros(2, 300, dtype=torch.int64), torch.zeros(2, 300, dtype=torch.int64)
    batch[0], batch[1, 100:], mask[0], mask[1, 100:] = long, short, 1, 1
    for _ in range(2):
        tokens = generate(model, batch, attention_mask=mask)
        assert torch.equal(tokens, generate(twin, batch, attention_mask=mask))
        assert (memory.known, memory.asked) == (299 + 199, 500)
    other = batch.clone()
    other[0, 130:] = text(model, 170, seed=2)  # 130 tokens, of which the other row has 30
    tokens = generate(model, other, attention_mask=mask)
    assert torch.equal(tokens, generate(twin, other, attention_mask=mask))
    assert memory.known == 130 + 30
    right = mask.flip(1)
    generate(model, batch, attention_mask=right)
    assert memory.notes[0] == "not used: the padding is not on the left"


def test_another_process_and_another_model(tmp_path: Path) -> None:
    model, _, _ = pair("llama-gqa", tmp_path)
    ids = text(model, 300)
    generate(model, ids)
    again, memory, twin = pair("llama-gqa", tmp_path)
    assert torch.equal(generate(again, ids), generate(twin, ids))
    assert memory.known == 299
    for each in (again, twin):
        with torch.no_grad():
            each.model.layers[0].mlp.down_proj.weight[0, 0] += 0.5
    assert torch.equal(generate(again, ids), generate(twin, ids))
    assert memory.known == 0


def test_recall_is_for_a_plain_forward(tmp_path: Path) -> None:
    model, _, twin = pair("llama-gqa", tmp_path)
    ids = text(model, 300)
    assert headwise.recall(model, ids)[1] == 0
    generate(model, ids)
    cache, known = headwise.recall(model, ids)
    assert known == 299
    with torch.no_grad():
        logits = model(ids[:, known:], use_cache=True, **{CACHE: cache}).logits
        expected = twin(ids).logits[:, known:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    cache, known = headwise.recall(model, text(model, 20, seed=7))
    assert (cache.get_seq_length(), known) == (0, 0)
    headwise.attach(model)
    with pytest.raises(UnsupportedError, match="remember"):
        headwise.recall(model, ids)


def test_remember_stores_the_cache_of_a_plain_forward(tmp_path: Path) -> None:
    model, _, twin = pair("llama-gqa", tmp_path)
    ids = text(model, 300)
    with torch.no_grad():
        cache = model(ids[:, :280], use_cache=True)[CACHE]
    assert headwise.remember(model, cache) == 280
    assert headwise.remember(model, cache) == 0
    assert headwise.recall(model, ids)[1] == 280
    assert torch.equal(generate(model, ids), generate(twin, ids))
    with pytest.raises(UnsupportedError, match="a model made after"):
        headwise.remember(model, hf.DynamicCache())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"position_ids": torch.arange(300)[None]}, "position_ids"),
        ({"use_cache": False}, "made no cache"),
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
    ],
)
def test_what_is_not_used_says_why(arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    model, memory, twin = pair("llama-gqa", tmp_path)
    ids = text(model, 300)
    generate(model, ids)
    tokens, expected = (generate(each, ids, **arguments) for each in (model, twin))
    if not isinstance(tokens, Tensor):
        tokens, expected = tokens.sequences, expected.sequences
    assert torch.equal(tokens, expected)
    assert memory.known == 0
    assert says in memory.notes[0]
    assert says in str(memory)


def test_embeddings_and_given_caches_are_not_used(tmp_path: Path) -> None:
    model, memory, _ = pair("llama-gqa", tmp_path)
    ids = text(model, 300)
    generate(model, ids)
    embedded = model.get_input_embeddings()(ids).detach()
    model.generate(inputs_embeds=embedded, max_new_tokens=2, pad_token_id=0)
    assert memory.notes[0] == "not used: no input_ids [B, S] were given"
    generate(model, ids, **{CACHE: hf.DynamicCache()})
    assert memory.notes[0] == "not used: a cache was given"
    model.train()
    generate(model, ids)
    assert memory.notes[0] == "not used: the model is in training mode"


def test_an_encoder_decoder_is_not_used(tmp_path: Path) -> None:
    model = make("t5")
    report = headwise.attach(model, remember=tmp_path)
    generate(model, text(model, 20))
    assert "not used" in str(report)


def test_the_report_says_where_and_what(tmp_path: Path) -> None:
    model = make("llama-gqa")
    report = headwise.attach(model, remember=tmp_path, remember_limit="2GB")
    assert f"remember: in {tmp_path}, at most 2 GB" in str(report)
    ids = text(model, 300)
    generate(model, ids)
    generate(model, ids)
    assert "299 of 300 tokens were known, 0 new ones stored" in str(report)
    assert "remember" not in str(headwise.attach(model))


def test_the_folder_keeps_to_its_limit(tmp_path: Path) -> None:
    model = make("llama-gqa")
    headwise.attach(model, remember=tmp_path, remember_limit=200_000)
    for seed in range(6):
        generate(model, text(model, 300, seed))
    assert 0 < sum(used.nbytes for used in all_blocks(tmp_path)) <= 200_000


@pytest.mark.parametrize(
    ("folder", "limit", "says"),
    [
        ("file", "1GB", "is a file"),
        ("new", "much", "expected a size"),
        ("new", 0, "as 10GB"),
        ("new", 3.5, "remember_limit is 3.5, expected a size"),
    ],
)
def test_a_bad_folder_or_limit_is_one_line(
    folder: str, limit: Any, says: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    model = make("llama-gqa")
    with pytest.raises(OptionError, match=says):
        headwise.attach(model, remember=tmp_path / folder, remember_limit=limit)
    with pytest.raises(OptionError, match="remember is a int, expected a folder"):
        headwise.attach(model, remember=5)
    assert not hasattr(model, "_headwise")


def test_a_model_without_a_cache_says_so(tmp_path: Path) -> None:
    report = headwise.attach(make("bert"), remember=tmp_path)
    assert "not used: the model makes no cache that headwise holds" in str(report)


def test_a_folder_that_cannot_be_written_changes_no_token(tmp_path: Path) -> None:
    model, memory, twin = pair("llama-gqa", tmp_path / "new")
    ids = text(model, 300)
    (tmp_path / "new").write_text("a file where the folder was to be")
    assert torch.equal(generate(model, ids), generate(twin, ids))
    assert "stored" in memory.notes[0]


def length_of_rope(kind: str) -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        rope |= {"original_max_position_embeddings": 200}
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=200 if kind == "dynamic" else 800,
        initializer_range=0.3,
        rope_parameters=rope,
    )
    return hf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotations_of_the_length_match_within_one_regime(kind: str, tmp_path: Path) -> None:
    model = length_of_rope(kind)
    memory = headwise.attach(model, remember=tmp_path).remembered

    def check(ids: Tensor, known: int) -> None:
        twin = length_of_rope(kind)
        headwise.attach(twin)
        assert torch.equal(generate(model, ids), generate(twin, ids))
        assert memory.known == known

    ids = text(model, 500)
    check(ids[:, :100], 0)
    check(ids[:, :150], 100)
    check(ids[:, :300], 0)  # past the limit, where keys are rotated otherwise
    check(ids[:, :400], 300 if kind == "longrope" else 0)
    check(ids[:, :170], 150)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what is mapped")
def test_what_is_remembered_is_mapped_and_not_copied(tmp_path: Path) -> None:
    """Of the blocks' files nothing is this process's own, whatever is read of them."""
    model, _, _ = pair("llama-gqa", tmp_path)
    ids = text(model, 600)
    generate(model, ids)
    cache, known = headwise.recall(model, ids)
    with torch.no_grad():
        model(ids[:, known:], use_cache=True, **{CACHE: cache})
    rows = Path("/proc/self/smaps").read_text().split(str(tmp_path))[1:]
    sizes = dict.fromkeys(("Rss", "Anonymous"), 0)
    for row in rows:
        for name in sizes:
            sizes[name] += int(row.partition(f"\n{name}:")[2].split()[0])
    assert len(rows) >= 3
    # of the last page, which the new token was written to, 4 KiB per layer and tensor at most
    assert sizes["Anonymous"] <= 4 * 6 * 2 < sizes["Rss"]


def test_a_prefix_goes_on_inside_the_fused_layer(tmp_path: Path) -> None:
    """A step after a recall writes into pages where a step without one writes into a buffer."""
    operator = torch.ops.headwise.layer_attention
    model, _, twin = pair("llama-gqa", tmp_path)
    ids = text(model, 300)
    generate(model, ids)
    with mock.patch.object(operator, "default", side_effect=operator.default) as watched:
        tokens = generate(model, ids, max_new_tokens=40)
    layers = model.config.num_hidden_layers
    # but where a page has to be taken
    assert watched.call_count == (40 - 1) * layers
    assert torch.equal(tokens, generate(twin, ids, max_new_tokens=40))
