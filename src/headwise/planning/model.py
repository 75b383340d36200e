"""The model to plan for: a named one, a folder, a config.json, a .gguf file or a hub id, by config.

Only the config is read, never the weights.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwise.base.files import kind_of, local_path, read_json
from headwise.base.progress import Progress, silent
from headwise.errors import LoadError, OptionError
from headwise.loading.gguf.conversion import read_config as read_gguf_config
from headwise.loading.hub import download_config
from headwise.loading.source import ALIASES, check_gguf, find_source
from headwise.planning.named_models import named_model, named_models, near_names
from headwise.spec import ModelSpec

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class PlannedModel:
    """A model as data.

    Args:
        name: what to call it.
        spec: its attention.
        config: its config, as a dict; of a multimodal model the text part.
        dtype: that its config names, None where it names none.
        sources: where the facts were read, for a named model.
        notes: what a reader of its numbers should know.
    """

    name: str
    spec: ModelSpec
    config: dict[str, Any]
    dtype: str | None = None
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_model(name: str | Path, progress: Progress = silent) -> PlannedModel:
    """Read the config of the model that `name` stands for.

    >>> find_model("llama-3-8b").spec.layers[0].attention.mechanism
    'GQA'

    Raises:
        LoadError: nothing of that name, with the named models that are near; a file or folder
            that is no config.
        SpecError: a config that is not covered or contradicts itself.
        OptionError: no name at all.
    """
    if not isinstance(name, str | Path):
        raise OptionError(f"model is a {type(name).__name__}, expected a name or a path")
    name = str(name)
    path, kind = _place(name)
    if kind == "none" and name in ALIASES:
        source = find_source(name)
        return replace(find_model(source.place, progress), name=source.name)
    if kind == "folder":
        return _model(path.resolve().name, _read(path / "config.json"))
    if kind != "none":
        if path.suffix == ".json":
            inner = path.name == "config.json"
            return _model(path.resolve().parent.name if inner else path.stem, _read(path))
        check_gguf(path)
        progress(f"reading the header of {path.name}", 0, 0)
        planned = _model(path.stem, read_gguf_config(path))
        note = "the file's own quantisation is not counted: weights are in --dtype"
        return replace(planned, notes=(*planned.notes, note))
    if name in named_models():
        known = named_model(name)
        return _model(known.title, known.config, known.sources)
    near = near_names(name)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if _HUB_ID.fullmatch(name) and Path(name).suffix not in (".gguf", ".json", ".safetensors"):
        try:
            return _model(name, _read(download_config(name, progress)))
        except LoadError as error:
            raise LoadError(f"{error}{hint}") from error
    raise LoadError(
        f"no model {name!r}: expected a folder, a config.json, a .gguf file, a hub id (owner/name) "
        f"or a name of headwise plan --list{hint}"
    )


def _place(name: str) -> tuple[Path, str]:
    """The path that a name would be, and what is there: a "folder", a "file", "other" or "none"."""
    try:
        path = local_path(name)
        return path, kind_of(path) if name else "none"
    except LoadError:  # too long, no such user, a null byte
        return Path("."), "none"


def _read(file: Path) -> dict[str, Any]:
    if kind_of(file) == "none":
        gguf = sorted(file.parent.glob("*.gguf"))
        hint = f"give {gguf[0].name}, which it holds" if gguf else "give a model's folder"
        raise LoadError(f"{file.parent} has no config.json; {hint}")
    return read_json(file)


def _model(name: str, config: dict[str, Any], sources: tuple[str, ...] = ()) -> PlannedModel:
    spec, notes = ModelSpec.from_config(config), []
    inner, outer = config.get("text_config"), config
    if isinstance(inner, dict):
        notes.append("the text part alone is counted")
        tied = {key: outer[key] for key in ("tie_word_embeddings",) if key in outer}
        config = {**tied, **inner}
    elif spec.family != outer.get("model_type"):
        notes.append("the text part alone is counted")
    quantised = config.get("quantization_config") or outer.get("quantization_config")
    parts = (config, outer)
    dtypes = [part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
    if isinstance(quantised, dict):
        how = quantised.get("quant_method", "quantised")
        notes.append(f"the checkpoint's weights are stored as {how}; they are counted in --dtype")
    fields = {**config, "model_type": spec.family}
    dtype = str(dtypes[0]) if dtypes else None
    return PlannedModel(name, spec, fields, dtype, sources, tuple(notes))
