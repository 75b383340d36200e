"""`save_cache` and `load_cache`: one cache in one file, of one model and its tokens."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from headwise.base.files import local_path
from headwise.base.written import check_writable
from headwise.errors import LoadError, OptionError, UnsupportedError
from headwise.hf.inner_model import inner_model
from headwise.hf.own_cache import OwnCache
from headwise.hf.stored.build import cache_of, fixed_of, kept_of, memory_for, page_of
from headwise.hf.stored.identity import origin_of, stamp_of, touched
from headwise.hf.stored.layers import kind_of_cache, page_count
from headwise.stored.file import CacheFile, Contents, write
from headwise.stored.layout import PAGE


def save_cache(cache: Any, path: str | Path) -> None:
    """Write the cache of an attached model to a file, from which `load_cache` has it again.

    Example:
        >>> import headwise, torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=99,
        ...     hidden_size=64,
        ...     intermediate_size=96,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ... )
        >>> model = transformers.LlamaForCausalLM(config).eval()
        >>> report = headwise.attach(model)
        >>> document = torch.arange(50)[None]
        >>> with torch.no_grad():
        ...     output = model(document, use_cache=True)
        >>> headwise.save_cache(output.cache, "document.safetensors")
        >>> cache = headwise.load_cache("document.safetensors", model)
        >>> question = torch.cat([document, torch.tensor([[7, 8, 9]])], dim=1)
        >>> tokens = model.generate(question, cache=cache, max_new_tokens=2)

    (`past_key_values` before Transformers 5.24.)

    The file is safetensors: the rows of all layers in pages of 64 tokens, what layers keep beside
    rows, the tokens, and what model they are of. It is written whole or not at all, and only its
    user may read it, since it holds the text.

    Args:
        cache: what an attached model returned, or `generate` with return_dict_in_generate=True: of
            any kind that `attach` offers, of any model that writes text.
        path: of the file; one that is there is replaced.

    Raises:
        UnsupportedError: it is not known what the cache is of: no attached model made it, or it has
            read more than tokens (embeddings, images, positions of its own), or the model was
            changed since.
        OptionError: the file cannot be written.
    """
    if not isinstance(cache, OwnCache):
        raise UnsupportedError(
            f"cache is a {type(cache).__name__}, expected one that a model made after "
            "headwise.attach(model)"
        )
    read, model = cache.read, known_model(cache)
    target = local_path(path, kind=OptionError)
    check_writable(target)
    kept, layout = kept_of(cache)
    ids, real = read.ids, read.real
    table, pages = _shared_pages(ids, real)
    contents = Contents(
        origin=origin_of(model, kind_of_cache(cache.layers)),
        layers=tuple(each.facts for each in kept),
        layout=layout,
        tokens=ids,
        real=real,
        table=table,
        made_by=versions(),
    )

    def written() -> Iterator[bytearray]:
        for sequence, begin in pages:
            end = min(begin + PAGE, read.length)
            yield page_of(cache, kept, layout, sequence, begin, end)

    try:
        write(target, contents, written(), dict(fixed_of(kept)))
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror or error}") from error


@torch.inference_mode(False)
def load_cache(path: str | Path, model: Any) -> OwnCache:
    """The cache that `save_cache` wrote, for the model that made it.

    Its pages are the file's own, mapped: processes that load one file share its memory, and only
    pages that are written to are copied, as the last one at the next token. One that is repeated
    (`batch_repeat_interleave`) serves many sequences. The file may be removed or replaced
    meanwhile; it must not be written to where it is.

    Args:
        path: of the file.
        model: an attached model: of the same class, config and weights, to the last bit.

    Returns:
        A cache with the tokens of the file. `model.generate(ids, cache=cache)` takes ids
        that begin with them and have at least one more.

    Raises:
        LoadError: not such a file, one that is damaged, or one of another model; says what differs.
        UnsupportedError: the model is not attached.
        CapacityError: there is no memory for it.
    """
    inner = inner_model("load_cache", model)
    if getattr(inner, "_headwise", None) is None:
        raise UnsupportedError(
            f"{type(inner).__name__} is not attached: call headwise.attach(model) first"
        )
    place = local_path(path)
    file = CacheFile(place)
    contents = file.contents
    origin = contents.origin
    reason = touched(inner)
    if reason is not None:
        raise UnsupportedError(f"whether {path} is of this model is not known: {reason}")
    difference = origin.difference(origin_of(inner, origin.cache))
    if difference is not None:
        raise LoadError(f"{path} was not made by this model: {difference}")
    if contents.start:
        raise LoadError(f"{path} is a block of remembered tokens, not a cache: use headwise.recall")
    layout = contents.layout
    memory = memory_for(layout, file.pages)
    file.map(memory, 0, 0, file.pages)
    pools = layout.pools(memory)
    try:
        return cache_of(
            inner,
            origin.cache,
            contents.layers,
            pools,
            contents.table,
            file.fixed(),
            contents.tokens,
            contents.real,
        )
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise LoadError(f"{path} is not a readable cache file: {error}") from error


def known_model(cache: OwnCache) -> Any:
    """The attached model that a cache is of.

    Raises:
        UnsupportedError: it is not known what the cache is of.
    """
    read = cache.read
    reason = read.unknown
    model = read.model
    if reason is None and not read.length:
        reason = "no tokens were read into it"
    if reason is None and (model is None or getattr(model, "_headwise", None) is None):
        reason = "its model is not there any more, or not attached"
    if reason is None:
        reason = touched(model)
    if reason is None and read.stamp != stamp_of(model):
        reason = "the model was changed since it was made"
    if reason is not None:
        raise UnsupportedError(f"what the cache is of is not known: {reason}")
    return model


def versions() -> dict[str, str]:
    """What wrote a file."""
    return {
        "headwise": version("headwise"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _shared_pages(ids: Tensor, real: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """The pages of each sequence, [B, n], and of each page its sequence and first token.

    Sequences that begin with the same tokens share pages.
    """
    batch, length = ids.shape
    table = torch.empty(batch, page_count(length), dtype=torch.int32)
    known, pages = dict[tuple[int, bytes], int](), list[tuple[int, int]]()
    both = torch.stack([ids, real.long()], dim=2)
    for sequence in range(batch):
        page = -1
        for index in range(table.shape[1]):
            tokens = both[sequence, index * PAGE : (index + 1) * PAGE].numpy().tobytes()
            page = known.setdefault((page, tokens), len(pages))
            if page == len(pages):
                pages.append((sequence, index * PAGE))
            table[sequence, index] = page
    return table, pages
