"""The report of `attach`: every attention layer of a model that is about to be attached."""

from typing import Any

from transformers import PreTrainedModel

from headwise.caches import CacheChoice
from headwise.hf import families
from headwise.hf.cache import cache_name, use_own_layers
from headwise.hf.coverage import Coverage
from headwise.hf.linear import Kind
from headwise.hf.packed import Packing, packed_words
from headwise.hf.report import AttachReport, LayerReport
from headwise.hf.sparse import SparseLayers
from headwise.hf.stock_names import DynamicCache
from headwise.ops import Accepted, Problem, backends, explain_problem
from headwise.spec import AttentionSpec, ModelSpec

# Lengths that stand for a long context in the report; backends decide by shape.
_CONTEXT = 4096


def report_of(
    coverage: Coverage,
    choice: CacheChoice,
    packing: Packing | None,
    sparse: SparseLayers | None = None,
) -> AttachReport:
    """What will run where. packing: how weights were packed just now; sparse: who chooses keys."""
    model, spec = coverage.model, coverage.spec
    step = tuple(filter(None, (packed_words(model, packing), *map(str, coverage.step))))
    caches = _caches(model, choice) if coverage.grows_cache else ()
    left = tuple(
        LayerReport(name, None, (), (), reason, stock=True)
        for name, reason in coverage.left.items()
    )
    left = (*_linear_layers(coverage), *left)
    if spec is None:
        family = model.config.model_type
        note = f"no spec reader for {family!r}: what each call needs is read from its arguments"
        for said in dict.fromkeys(map(_latent_note, coverage.latents.values())):
            note += f"; {said}"
        own = tuple(name for name in caches if name != "none")
        every = LayerReport("all", None, (), (), note, cache=_joined(own))
        words = _words(caches, choice, True)
        return AttachReport(type(model).__name__, (every, *left), words, step)
    layers = (*_encoder_layers(coverage, spec), *_decoder_layers(coverage, spec, caches, sparse))
    words = _words(caches, choice, bool(spec.layers))
    return AttachReport(type(model).__name__, (*layers, *left), words, step)


def _words(caches: tuple[str, ...], choice: CacheChoice, decodes: bool) -> str:
    """What the report says of all layers' caches."""
    own = set(caches) - {"none"}
    if not own:
        return "none of ours" if decodes else "none (an encoder)"
    windows = own != {str(choice)}
    return choice.words + ("; in sliding layers what the window reaches" if windows else "")


def layer_report(
    name: str, spec: AttentionSpec, model: PreTrainedModel, note: str, absorbs: bool, cache: str
) -> LayerReport:
    """Ask the backends about decoding and prefill of one layer. `absorbs`: MLA that is absorbed."""
    layout = CacheChoice.layout(cache)
    where: dict[str, Any] = {
        "context": _CONTEXT,
        "dtype": model.dtype,
        "device": model.device.type,
    }
    latent = spec.mechanism == "MLA"
    decode = Problem.of(
        spec.absorbed() if absorbs else spec,
        query_length=1,
        # with no part of a key that is not rotated, the rope key is the whole key
        split_key=absorbs and spec.nope_dim > 0,
        # latents that are expanded are dense from there on
        layout="dense" if latent and not absorbs else layout,
        **where,
    )
    prefill = Problem.of(spec, query_length=_CONTEXT, layout="dense" if latent else layout, **where)
    one, many = explain_problem(decode).verdicts, explain_problem(prefill).verdicts
    return LayerReport(name, spec, one, many, note, cache=cache)


def _encoder_layers(coverage: Coverage, spec: ModelSpec) -> list[LayerReport]:
    return [
        layer_report(f"encoder.{layer.index}", layer.attention, coverage.model, "", False, "none")
        for layer in spec.encoder_layers
        if layer.attention is not None
    ]


def _decoder_layers(
    coverage: Coverage, spec: ModelSpec, caches: tuple[str, ...], sparse: SparseLayers | None
) -> list[LayerReport]:
    model, note = coverage.model, ""
    if coverage.own:
        note = families.cache_note(next(iter(coverage.own.values())), model.dtype)
    obstacles = {
        getattr(model.get_submodule(name), "layer_idx", None): obstacle
        for name, obstacle in coverage.latents.items()
    }
    skipped = {index for index, name in enumerate(coverage.own) if name in coverage.left}
    layers = []
    for layer in spec.layers:
        name, attention = f"decoder.{layer.index}", layer.attention
        stock = attention is not None and attention.indexer is not None and coverage.sparse
        if attention is not None and not stock and layer.index not in skipped:
            cache = caches[min(layer.index, len(caches) - 1)] if caches else "none"
            said, absorbs = note, False
            if layer.index in obstacles:
                obstacle = obstacles[layer.index]
                said, absorbs = _latent_note(obstacle), obstacle is None
            if attention.indexer is not None:
                chooser = "the layer before" if attention.indexer.shared else "its indexer"
                said += f"; a query attends to the {attention.indexer.topk:,} tokens that {chooser}"
                said += " chooses"
            if sparse is not None:
                said = "; ".join(filter(None, (said, sparse.words(layer.index))))
            layers.append(layer_report(name, attention, model, said, absorbs, cache))
        if layer.cross_attention is not None:
            cross = layer.cross_attention
            layers.append(layer_report(f"{name}.cross", cross, model, "", False, "none"))
    return layers


def _linear_layers(coverage: Coverage) -> list[LayerReport]:
    """The layers of linear attention that run on our operator."""
    found = []
    for name, kind in coverage.linear.items():
        if isinstance(kind, Kind):
            index = getattr(coverage.model.get_submodule(name), "layer_idx", None)
            where = name if index is None else f"decoder.{index}"
            runs = Accepted("torch", "chunks of 64 tokens by matrix products")
            built = any(at.name == "cpu" and at.available()[0] for at in backends())
            if built and coverage.model.device.type == "cpu":
                runs = Accepted("cpu", "C++, a state is read once and written once")
            note = f"{kind.name}; the state is kept in Transformers' cache"
            found.append(LayerReport(where, None, (runs,), (runs,), note, what="linear attention"))
    return found


def _latent_note(obstacle: str | None) -> str:
    if obstacle is None:
        return "absorbed: a step attends to the latents as they are cached"
    return f"the latents are expanded at every step: {obstacle}"


def _caches(model: PreTrainedModel, choice: CacheChoice) -> tuple[str, ...]:
    """What each layer of a fresh cache is held in; one for all where Transformers makes them late.

    A kind of layer that is not ours (a recurrent state) counts as none.
    """
    cache = use_own_layers(DynamicCache(config=model.config.get_text_config(decoder=True)), choice)
    return tuple(cache_name(layer) for layer in cache.layers) or (str(choice),)


def _joined(names: tuple[str, ...]) -> str:
    return "; ".join(dict.fromkeys(names)) or "none"
