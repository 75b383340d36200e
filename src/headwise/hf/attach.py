"""`attach` and `detach`: put a Transformers model on headwise, and take it off again.

Everything that attaching leaves is on the model object itself (and the name in Transformers'
registry): the name in its configs, and a few kinds of instance attributes that pickle, copy and
vanish with `detach`.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from headwise.base.units import limit as limit_of
from headwise.caches import CacheChoice
from headwise.errors import OptionError
from headwise.hf.attach_report import report_of
from headwise.hf.attachment import put_on, set_remembered, take_off
from headwise.hf.coverage import cover, require_cache
from headwise.hf.inner_model import inner_model
from headwise.hf.module_hook import NAME
from headwise.hf.packed import Packing, check_request, pack_model, unpack_model
from headwise.hf.parallel.attached import require_split, split_choice
from headwise.hf.parallel.ranks import SplitChoice
from headwise.hf.report import AttachReport
from headwise.hf.sparse import SparseLayers, choice_of, sparse_layers
from headwise.hf.stored.remembered import LIMIT, Remembered
from headwise.spec import ModelSpec, SparseChoice

# How much of a decoding step is run: attention alone, or all that can be.
STEPS = ("all", "attention")


def attach(
    model: PreTrainedModel | Any,
    *,
    cache: str = "contiguous",
    cache_limit: str | int | None = None,
    step: str = "all",
    sparse: str | None = None,
    context_parallel: Any = None,
    weights: str | None = None,
    keep: bool = False,
    remember: str | Path | bool | Remembered | None = None,
    remember_limit: str | int = LIMIT,
    strict: bool = False,
) -> AttachReport:
    """Run a Transformers model's decoding step on headwise: its attention, cache and products.

    Example:
        >>> import headwise, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=99,
        ...     hidden_size=64,
        ...     intermediate_size=96,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> report = headwise.attach(model)
        >>> report.layers[0].spec.mechanism
        'GQA'
        >>> headwise.detach(model)

    Afterwards `model.generate(...)` and `model(...)` work as before, with the same results. A model
    that is attached already stays as it is, or takes another cache. Nothing of headwise is saved
    with the model.

    Args:
        model: any `PreTrainedModel` whose attention is on Transformers' attention interface, and
            Falcon, Bloom, MPT, GPT-Neo and GPT-NeoX Japanese; or what holds one such model, which
            is then attached: a PEFT model,
            what torch.compile or DistributedDataParallel return, a pipeline, a module of yours.
        cache: what holds the tokens of the layers that see all of them: "contiguous"; "paged" or
            "paged:16", pages of 64 or 16 tokens, which beams share; "int8" or "int4", rounded, or
            "int8:64", rounded and in pages; "window:2048" or "window:2048,sinks=4", the last 2048
            tokens and the first 4 only; "disk:FOLDER", in files in that folder, of which steps
            read what `sparse` chooses. Layers with a sliding window hold what it reaches, whatever
            is chosen.
        cache_limit: what a cache on disk may have in memory, as "4GB", with the sketches by which
            keys are chosen: of all caches of the model together. None leaves it to the system.
        step: "all": decoder layers, and products with weights, of up to 16 rows run on headwise as
            well, where that is faster; "attention": attention and its cache alone.
        sparse: how many keys a query of a decoding step (of up to 16 queries) gets: "topk:1024",
            those 1,024 that weigh most by a sketch of the keys in 4 bits, or
            "topp:0.95,min=256,max=4096", as few as have 0.95 of the weight. Behind either
            "sinks=4,recent=64,dense=2", which are the defaults: the first 4 and the last 64 tokens
            are always among them, and the first 2 layers see all. What is not chosen counts by the
            mean of all values. Up to so many tokens the results have the bits of dense attention.
            None or "all": every query sees all; of a cache on disk None is "topk:1024".
        context_parallel: a DeviceMesh of one dim, or a ProcessGroup, whose processes call this
            alike, each with the whole model: the tokens of layers that see all of them are spread
            over the ranks in blocks of 64, and every rank gives the same results. Sliding windows
            and states are on every rank. See the guide.
        weights: "int8" or "int4" round the weights of products and embeddings to so many bits, in
            blocks of 32 (embedding, head and routers to 8 bits), in which they stay: a step reads
            less. None leaves them. Rows are rounded to 8 bits before a product.
        keep: hold on to the weights that were there, which `detach` then puts back; without it,
            `detach` raises.
        remember: a folder in which `generate` stores what it has read, and from which it goes on
            where a text begins with what is there, in any process; see `headwise.recall`. It holds
            the user's text. True is the folder of the commands, None remembers nothing.
        remember_limit: what the folder may hold, as "10GB"; what was not used for longest goes.
        strict: raise where some attention would be left to Transformers. Without it the rest is
            attached, and the report says what is left and why.

    Returns:
        Per layer: its spec, the backend that runs it, and why the others do not; prints as a table.

    Raises:
        UnsupportedError: not a Transformers model, nor what holds one; or one of whose attention
            nothing (with `strict`: not everything) can be replaced; or a cache, or a
            sparse attention, or ranks, that the model cannot use; or weights none of which can be
            packed.
        OptionError: no such cache, step, sparse attention or weights, or a limit of a cache that
            has none, or the model's are packed otherwise already; or `keep` without weights to
            keep; or `remember` is no folder, or beside a cache on disk; or `context_parallel` is
            no group, or beside an option that needs whole contexts.
        RankError: another rank has another model or other options, has ended, or stalls.
        SpecError: the model's config contradicts itself.
    """
    model = inner_model("attach", model)
    limit = None if cache_limit is None else limit_of("cache_limit", cache_limit)
    choice = CacheChoice.parse(cache, limit)
    if step not in STEPS:
        raise OptionError(f"step is {step!r}, expected one of {', '.join(map(repr, STEPS))}")
    asked = choice_of(sparse, choice)
    if context_parallel is not None:
        said, others = f"step={step}, weights={weights}", {"sparse": asked, "remember": remember}
        choice = split_choice(model, choice, context_parallel, said, **others)
    remembered = Remembered.parse(remember, remember_limit) if remember else None
    if remembered is not None and choice.folder:
        raise OptionError(
            f"remember= keeps what was read in memory, and cache={cache!r} on disk: leave one out"
        )
    attachment = model.__dict__.get("_headwise")
    packing: Packing | None = None if attachment is None else attachment.packing
    check_request(weights, keep, packing)
    fresh = packing is None and weights is not None
    if attachment is not None:
        stays = not attachment.previous or model.config._attn_implementation == NAME
        before = attachment.sparse
        same = (attachment.choice, attachment.step, before and before.choice)
        if stays and not fresh and same == (choice, step, asked):
            if not _same(remembered, attachment.remembered):
                set_remembered(model, remembered)
            report: AttachReport = attachment.report
            return report
        _choosers(model, choice, asked, *require_cache(model, choice))
        # another attention was set since, or another cache, step or weights are asked for
        take_off(model, model.__dict__.pop("_headwise"))
    try:
        coverage = cover(model, choice, step=step, strict=strict)
        if isinstance(choice, SplitChoice):
            require_split(coverage, choice)
        choosers = _choosers(model, choice, asked, coverage.spec, coverage.grows_cache)
        if fresh:
            assert weights is not None
            packing = pack_model(model, weights, keep=keep)
            coverage = cover(model, choice, step=step, strict=strict)
    except BaseException:
        if fresh and packing is not None and packing.kept is not None:
            unpack_model(model, packing)
        if attachment is not None:
            was = attachment.choice, attachment.step
            known = cover(model, was[0], step=was[1], strict=False)
            rest = attachment.sparse, attachment.packing, attachment.remembered
            put_on(known, attachment.report, *was, *rest)
        raise
    made = report_of(coverage, choice, packing, choosers)
    put_on(coverage, made, choice, step, choosers, packing, remembered)
    fresh_report: AttachReport = model._headwise.report
    return fresh_report


def _choosers(
    model: PreTrainedModel,
    choice: CacheChoice,
    asked: SparseChoice | None,
    spec: ModelSpec | None,
    grows_cache: bool,
) -> SparseLayers | None:
    """The layers that choose their keys; None where nobody asked.

    Raises:
        UnsupportedError: none can choose.
    """
    return None if asked is None else sparse_layers(model, spec, choice, asked, grows_cache)


def _same(one: Remembered | None, other: Remembered | None) -> bool:
    """Whether both are the same folder, with the same limit."""
    if one is None or other is None:
        return one is other
    return (one.folder, one.limit) == (other.folder, other.limit)


def detach(model: PreTrainedModel | Any) -> None:
    """Undo `attach`: the model is as it was before. A model that is not attached stays as it is.

    Raises:
        UnsupportedError: not a Transformers model, nor what holds one; or one whose weights were
            packed and not kept, which stays as it is.
    """
    model = inner_model("detach", model)
    attachment = model.__dict__.get("_headwise")
    if attachment is not None:
        if attachment.packing is not None:
            unpack_model(model, attachment.packing)
        take_off(model, model.__dict__.pop("_headwise"))
