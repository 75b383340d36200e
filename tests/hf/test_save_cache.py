"""A cache that outlives its process: the tokens of the run that never saved, or one line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise
from families import DECODERS, all_but_sweep, make
from headwise.errors import HeadwiseError, LoadError, ShapeError, UnsupportedError
from headwise.hf import OwnCache
from headwise.hf.stock_names import CACHE

CACHES = ("contiguous", "paged:16", "int8", "int4", "int8:64", "window:64,sinks=4", "window:5")
SOME = ("llama-gqa", "gemma3", "deepseek_v3", "kimi_linear", "gpt_oss", "bloom")
LENGTH, NEW = 150, 6


def text(model: Any, length: int = LENGTH, batch: int = 1, seed: int = 0) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def read(model: Any, ids: Tensor, **arguments: Any) -> Any:
    """The cache after `ids`."""
    with torch.no_grad():
        return model(ids, use_cache=True, **arguments)[CACHE]


def generate(model: Any, ids: Tensor, cache: Any = None, **arguments: Any) -> Tensor:
    given = {} if cache is None else {CACHE: cache}
    tokens: Tensor = model.generate(
        ids,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **given,
        **arguments,
    )
    return tokens


def attached(family: str, cache: str = "contiguous") -> Any:
    model = make(family)
    try:
        headwise.attach(model, cache=cache)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return model


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", all_but_sweep(DECODERS, set(DECODERS) - set(SOME)))
def test_the_tokens_are_those_of_the_run_that_never_saved(
    family: str, cache: str, tmp_path: Path
) -> None:
    model, path = attached(family, cache), tmp_path / "cache"
    ids = text(model)
    expected = generate(model, ids, read(model, ids[:, :130]))
    headwise.save_cache(read(model, ids[:, :130]), path)
    loaded = headwise.load_cache(path, model)
    assert loaded.read.length == 130
    assert torch.equal(generate(model, ids, loaded), expected)
    if cache in ("contiguous", "paged:16"):
        headwise.detach(model)
        assert torch.equal(generate(model, ids), expected)


@pytest.mark.parametrize("family", SOME)
def test_another_process_loads_it(family: str, tmp_path: Path) -> None:
    """A model that is made again, as another process would."""
    model, path = attached(family), tmp_path / "cache"
    ids = text(model)
    read(model, ids[:, :100]).save(path)
    other = attached(family)
    assert torch.equal(generate(other, ids, headwise.load_cache(path, other)), generate(model, ids))


@pytest.mark.parametrize("cache", ["contiguous", "int8", "window:64,sinks=4"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "kimi_linear"])
def test_one_prefix_serves_many(family: str, cache: str, tmp_path: Path) -> None:
    model, path = attached(family, cache), tmp_path / "cache"
    ids = text(model, batch=3)
    ids[:, :130] = ids[0, :130]
    read(model, ids[:1, :130]).save(path)
    loaded = headwise.load_cache(path, model)
    before = path.read_bytes()
    loaded.batch_repeat_interleave(3)
    assert torch.equal(generate(model, ids, loaded), generate(model, ids))
    assert path.read_bytes() == before
    beams = headwise.load_cache(path, model)
    beams.batch_repeat_interleave(2)
    one = ids[:1]
    assert torch.equal(generate(model, one.repeat(2, 1), beams), generate(model, one).repeat(2, 1))


@pytest.mark.parametrize("family", ["llama-gqa", "deepseek_v3"])
def test_a_padded_batch_is_saved_with_its_padding(family: str, tmp_path: Path) -> None:
    model, path = attached(family), tmp_path / "cache"
    ids, mask = text(model, batch=2), torch.ones(2, LENGTH, dtype=torch.int64)
    ids[1, :37], mask[1, :37] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    part = slice(None), slice(0, 130)
    cache = read(model, ids[part], attention_mask=mask[part], position_ids=positions[part])
    headwise.save_cache(cache, path)
    loaded = headwise.load_cache(path, model)
    assert torch.equal(
        generate(model, ids, loaded, attention_mask=mask),
        generate(model, ids, attention_mask=mask),
    )


def test_sequences_that_begin_alike_share_pages(tmp_path: Path) -> None:
    model = attached("llama-gqa")
    ids = text(model, 200, batch=4)
    ids[:, :128] = ids[0, :128]
    for name, rows in (("one", ids[:1]), ("four", ids)):
        headwise.save_cache(read(model, rows), tmp_path / name)
    one, four = ((tmp_path / name).stat().st_size for name in ("one", "four"))
    assert four < 3 * one


def test_what_was_cropped_or_repeated_is_saved_as_it_is(tmp_path: Path) -> None:
    model, path = attached("llama-gqa"), tmp_path / "cache"
    ids = text(model, batch=2)
    cache = read(model, ids[:, :140])
    cache.crop(-40)
    cache.batch_select_indices(torch.tensor([1]))
    cache.save(path)
    loaded = headwise.load_cache(path, model)
    assert torch.equal(loaded.read.ids, ids[1:, :100])
    assert torch.equal(generate(model, ids[1:], loaded), generate(model, ids[1:]))
    loaded = headwise.load_cache(path, model)
    loaded.crop(-1)
    assert torch.equal(generate(model, ids[1:], loaded), generate(model, ids[1:]))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_goes_on_by_itself(copied: Any, tmp_path: Path) -> None:
    model, path = attached("llama-gqa"), tmp_path / "cache"
    ids = text(model)
    read(model, ids[:, :100]).save(path)
    loaded = headwise.load_cache(path, model)
    twin = copied(loaded)
    other = text(model, seed=1)
    other[:, :100] = ids[:, :100]
    assert torch.equal(generate(model, other, twin), generate(model, other))
    assert torch.equal(generate(model, ids, loaded), generate(model, ids))


def test_it_goes_on_to_be_saved_again(tmp_path: Path) -> None:
    model = attached("llama-gqa")
    ids = text(model)
    read(model, ids[:, :70]).save(tmp_path / "one")
    loaded = headwise.load_cache(tmp_path / "one", model)
    tokens = generate(model, ids, loaded)
    loaded.save(tmp_path / "two")
    again = headwise.load_cache(tmp_path / "two", model)
    assert torch.equal(again.read.ids, tokens[:, :-1])


def changed_value(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.25


def replaced_weight(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def other_rotation(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def other_epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.1


@pytest.mark.parametrize("change", [changed_value, replaced_weight, other_rotation, other_epsilon])
def test_another_model_is_refused(change: Any, tmp_path: Path) -> None:
    model, path = attached("llama-gqa"), tmp_path / "cache"
    read(model, text(model)).save(path)
    headwise.load_cache(path, model)
    change(model)
    if change is other_epsilon:  # of Transformers' modules it is looked at when they are attached
        headwise.detach(model)
        headwise.attach(model)
    with pytest.raises(LoadError, match="not made by this model"):
        headwise.load_cache(path, model)


@pytest.mark.parametrize(
    ("family", "says"),
    [("llama-mha", "weights|config"), ("qwen3", "its model is LlamaForCausalLM")],
)
def test_a_foreign_model_is_refused_by_name(family: str, says: str, tmp_path: Path) -> None:
    model, path = attached("llama-gqa"), tmp_path / "cache"
    read(model, text(model)).save(path)
    with pytest.raises(LoadError, match=says):
        headwise.load_cache(path, attached(family))
    other = make("llama-gqa").to(torch.bfloat16)
    headwise.attach(other)
    with pytest.raises(LoadError, match="its dtype is float32, not bfloat16"):
        headwise.load_cache(path, other)


def test_a_model_that_is_not_attached_is_refused(tmp_path: Path) -> None:
    model, path = attached("llama-gqa"), tmp_path / "cache"
    read(model, text(model)).save(path)
    headwise.detach(model)
    with pytest.raises(UnsupportedError, match=r"headwise.attach\(model\) first"):
        headwise.load_cache(path, model)


def test_a_loaded_cache_is_for_its_model_alone(tmp_path: Path) -> None:
    model, path = attached("llama-gqa"), tmp_path / "cache"
    ids = text(model)
    read(model, ids[:, :100]).save(path)
    with pytest.raises(UnsupportedError, match="loaded for another model"):
        generate(attached("llama-gqa"), ids, headwise.load_cache(path, model))
    loaded = headwise.load_cache(path, model)
    changed_value(model)
    with pytest.raises(UnsupportedError, match="was changed since"):
        generate(model, ids, loaded)


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    model, path = attached("llama-gqa"), tmp_path / "cache"
    ids = text(model)
    read(model, ids[:, :100]).save(path)
    other = ids.clone()
    other[0, 41] = (ids[0, 41] + 1) % 90
    with pytest.raises(ShapeError, match="token 41 of sequence 0"):
        generate(model, other, headwise.load_cache(path, model))
    with pytest.raises(ShapeError, match="have 100 tokens, and the cache 100"):
        generate(model, ids[:, :100], headwise.load_cache(path, model))
    with pytest.raises(ShapeError, match="have 2 sequences, and the cache 1"):
        generate(model, ids.repeat(2, 1), headwise.load_cache(path, model))


def unattached(model: Any) -> Any:
    headwise.detach(model)
    return read(model, text(model))


def of_embeddings(model: Any) -> Any:
    embedded = model.get_input_embeddings()(text(model))
    return read(model, None, inputs_embeds=embedded.detach())


def of_positions(model: Any) -> Any:
    ids = text(model)
    return read(model, ids, position_ids=torch.arange(5, 5 + LENGTH)[None])


def of_the_inner_model(model: Any) -> Any:
    ids = text(model)
    cache = read(model, ids[:, :100])
    with torch.no_grad():
        model.model(ids[:, 100:], use_cache=True, **{CACHE: cache})
    return cache


def of_a_changed_model(model: Any) -> Any:
    cache = read(model, text(model))
    changed_value(model)
    return cache


def of_a_padding_without_positions(model: Any) -> Any:
    mask = torch.ones(1, LENGTH, dtype=torch.int64)
    mask[:, :7] = 0
    return read(model, text(model), attention_mask=mask)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (unattached, "a model made after"),
        (of_embeddings, "embeddings"),
        (of_positions, "positions of its own"),
        (of_the_inner_model, "other means"),
        (of_a_changed_model, "was changed since"),
        (of_a_padding_without_positions, "without position_ids"),
    ],
)
def test_what_is_not_known_to_be_of_tokens_is_not_saved(
    made: Any, says: str, tmp_path: Path
) -> None:
    model = attached("llama-gqa")
    cache = made(model)
    with pytest.raises(UnsupportedError, match=says):
        headwise.save_cache(cache, tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    model = attached("llama-gqa")
    cache = read(model, text(model))
    with pytest.raises(HeadwiseError, match="does not exist"):
        headwise.save_cache(cache, tmp_path / "none" / "cache")


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    """Sizes that the file does not have, and layers that the model does not: no crash."""
    from headwise.stored.file import CacheFile, Contents, write
    from headwise.stored.layout import PageLayout, Rows

    model, path = attached("llama-gqa"), tmp_path / "cache"
    read(model, text(model)).save(path)
    honest = CacheFile(path).contents
    wider = tuple(Rows(r.layer, r.name, r.dtype, r.heads, 2 * r.dim) for r in honest.layout.rows)
    for layers, layout in (
        (honest.layers[:1], honest.layout),
        (({"kind": "window"},) * len(honest.layers), honest.layout),
        (honest.layers, PageLayout(honest.layout.rows[1:])),
    ):
        lie = Contents(honest.origin, layers, layout, honest.tokens, honest.real, honest.table)
        write(path, lie, [bytearray(layout.page_bytes)] * 3, {})
        with pytest.raises(LoadError):
            headwise.load_cache(path, model)
    lie = Contents(
        honest.origin, honest.layers, PageLayout(wider), honest.tokens, honest.real, honest.table
    )
    write(path, lie, [bytearray(lie.layout.page_bytes)] * 3, {})
    loaded = headwise.load_cache(path, model)
    with pytest.raises(HeadwiseError):
        generate(model, text(model, 200), None if loaded is None else loaded)


def test_what_a_file_is_of_can_be_read_without_headwise(tmp_path: Path) -> None:
    import safetensors

    model, path = attached("llama-gqa"), tmp_path / "cache"
    ids = text(model)
    read(model, ids).save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["headwise_cache"])
        assert torch.equal(file.get_tensor("tokens").long(), ids)
    assert said["origin"]["model"] == "LlamaForCausalLM"
    assert said["made_by"]["headwise"] == headwise.__version__


def test_an_attached_model_makes_caches_that_can_be_saved() -> None:
    model = attached("llama-gqa")
    output = generate(model, text(model), return_dict_in_generate=True)
    assert isinstance(output[CACHE], OwnCache)
