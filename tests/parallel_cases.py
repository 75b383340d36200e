"""What the processes of a test of context parallelism run; each function is one case."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import headwise
from families import VOCABULARY, make

FAMILIES = ("llama-gqa", "gemma3", "deepseek_v3", "gpt_oss")
NEW_TOKENS = 10

_generator = torch.Generator().manual_seed(3)
PROMPT = torch.randint(3, VOCABULARY, (1, 19), generator=_generator)
BATCH = torch.randint(3, VOCABULARY, (3, 19), generator=_generator)
MASK = torch.ones_like(BATCH)
MASK[0, :5] = 0
MASK[1, :11] = 0
BATCH[MASK == 0] = 0
REPEATING = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 5, 6, 7]])


def _generate(ids: Tensor, **options: Any) -> Callable[[Any], Tensor]:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    return lambda model: model.generate(ids, **options)


def _sampled(model: Any) -> Tensor:
    torch.manual_seed(5)
    return _generate(PROMPT, do_sample=True, temperature=0.8, top_p=0.9)(model)


def _assisted(model: Any) -> Tensor:
    torch.manual_seed(5)
    assistant = make("llama-gqa", num_hidden_layers=1)
    return _generate(PROMPT, assistant_model=assistant)(model)


def _turns(model: Any) -> Tensor:
    """Three turns on one cache; what a window has not passed is taken back in part."""
    output = _generate(PROMPT, return_dict_in_generate=True)(model)
    ids, kept = output.sequences, []
    for question in ([7, 8, 9], [11, 12]):
        ids = torch.cat([ids, torch.tensor([question])], dim=1)
        given = {"cache": output.cache, "return_dict_in_generate": True}
        output = _generate(ids, **given)(model)
        kept.append(output.sequences)
        if not any(layer.is_sliding for layer in output.cache.layers):
            output.cache.crop(-6)
        ids = output.sequences[:, : output.cache.get_seq_length()]
    return torch.cat(kept, dim=1)


MODES: dict[str, Callable[[Any], Tensor]] = {
    "one sequence": _generate(PROMPT),
    "left-padded batch": _generate(BATCH, attention_mask=MASK),
    "three beams": _generate(BATCH, attention_mask=MASK, num_beams=3),
    "prompt lookup": _generate(REPEATING, prompt_lookup_num_tokens=4),
    "assisted": _assisted,
    "sampled": _sampled,
    "chunked prefill": _generate(PROMPT, prefill_chunk_size=5),
    "several turns": _turns,
    "static cache": _generate(PROMPT, cache_implementation="static"),
}


@cache
def _model(family: str) -> Any:
    return make(family)


def attached(family: str, **options: Any) -> Any:
    """The family's model; in a group, with its contexts over all of it."""
    model = _model(family)
    group = dist.group.WORLD if dist.is_initialized() else None
    headwise.attach(model, context_parallel=group, **options)
    return model


def tokens(family: str, mode: str, **options: Any) -> Tensor:
    """What a mode of generation gives."""
    return MODES[mode](attached(family, **options))


def forward(family: str, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    """Logits, and the bytes that the cache of each layer takes."""
    asked = {"cache": options.pop("cache")} if "cache" in options else {}
    model = attached(family, **asked)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True, **options)
    weights = None if output.get("attentions") is None else output.attentions
    return output.logits, weights, [layer.cache.nbytes for layer in output.cache.layers]


def drawn_unlike(family: str) -> Tensor:
    """Sampled tokens, where every rank would draw others."""
    torch.manual_seed(5 if dist.get_rank() == 0 else 77)
    return _generate(PROMPT, do_sample=True)(attached(family))


def unlike(what: str) -> None:
    """Give the ranks something else each."""
    rank = dist.get_rank()
    if what == "model":
        model = make("llama-gqa", num_key_value_heads=6 if rank else 2)
        headwise.attach(model, context_parallel=dist.group.WORLD)
        return
    if what == "cache":
        attached("llama-gqa", cache="int8" if rank else "contiguous")
        return
    model = attached("llama-gqa")
    ids, mask = BATCH.clone(), MASK.clone()
    if what == "ids" and rank:
        ids[2, 4] += 1
    if what == "mask" and rank:
        mask[2, 0] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=what != "use_cache" or not rank)


def waits(rank: int, seconds: float) -> Tensor | None:
    """Generate, but in one rank that stalls."""
    if dist.get_rank() == rank:
        time.sleep(seconds)
        return None
    return tokens("llama-gqa", "one sequence")


def refused(family: str, **options: Any) -> str:
    """Why a family's model is not attached."""
    return refused_model(make(family), **options)


def refused_model(model: Any, **options: Any) -> str:
    """Why a model is not attached."""
    try:
        headwise.attach(model, context_parallel=dist.group.WORLD, **options)
    except headwise.HeadwiseError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def of_meshes() -> list[Any]:
    """What a mesh does, and one of two dims."""
    from torch.distributed.device_mesh import init_device_mesh

    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, count), mesh_dim_names=("other", "context"))
    model = make("llama-gqa")
    said = []
    try:
        headwise.attach(model, context_parallel=mesh)
    except headwise.OptionError as error:
        said.append(str(error))
    said.append(headwise.attach(model, context_parallel=mesh["context"]).cache)
    given = MODES["one sequence"](model)
    headwise.detach(model)
    assert not model._forward_hooks
    return [*said, given, MODES["one sequence"](model)]


def kept_and_copied() -> list[str]:
    """What saving, pickling and copying do."""
    import copy
    import pickle

    model = attached("llama-gqa")
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).cache
    said = []
    for attempt in (lambda: headwise.save_cache(cache, "cache"), lambda: pickle.dumps(model)):
        try:
            attempt()
        except headwise.HeadwiseError as error:
            said.append(str(error))
    twin, branch = copy.deepcopy(model), copy.deepcopy(cache)
    assert torch.equal(MODES["one sequence"](twin), MODES["one sequence"](model))
    with torch.no_grad():
        one = model(PROMPT[:, :2], cache=branch).logits
        other = model(PROMPT[:, :2], cache=cache).logits
        rows = cache.layers[0].keys  # a dense copy, gathered
        assert torch.equal(rows + 0, branch.layers[0].keys + 0)
        assert rows.shape[2] == PROMPT.shape[1] + 2
    assert torch.equal(one, other)
    return said


def sent(family: str, length: int, batch: int) -> tuple[int, int]:
    """Bytes that this rank's cache holds after a context, and that a step of one token sends."""
    from headwise.hf.parallel.ranks import Ranks

    model = attached(family)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    total = 0
    gather, broadcast = Ranks.gather, Ranks.broadcast

    def counting(send: Any) -> Any:
        def counted(self: Ranks, tensor: Tensor) -> Tensor:
            nonlocal total
            total += (self.count - 1) * tensor.nbytes
            return send(self, tensor)

        return counted

    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).cache
        Ranks.gather, Ranks.broadcast = counting(gather), counting(broadcast)  # type: ignore[method-assign]
        try:
            model(ids[:, -1:], cache=cache)
        finally:
            Ranks.gather, Ranks.broadcast = gather, broadcast  # type: ignore[method-assign]
    return headwise.hf.cache_nbytes(cache), total
