"""What a model has beside its weights and config, copied into a result by name, never by a link.

A result is published. A folder that somebody else has made may contain a link to a private file. So
a link is followed only where it stays in the folder, or leads from a snapshot of the hub's cache to
the files of the same repository. Weights and configs are not copied but written again: to read them
through a link is as harmless as to read them where they are.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from headwise.base.files import kind_of, one_line, require_file
from headwise.errors import LoadError

# Every name that Transformers gives to a tokenizer's files, and what generate and a chat read.
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def companions(folder: Path, names: Sequence[str] = NAMES) -> list[Path]:
    """The files of these names in a model's folder.

    Raises:
        LoadError: one is not an ordinary file, or a link to a file that is not the model's.
    """
    files = [folder / name for name in names if kind_of(folder / name) != "none"]
    own = [folder.resolve()]
    if own[0].parent.name == "snapshots":  # of the hub's cache
        own.append(own[0].parent.parent / "blobs")
    for file in files:
        require_file(file)
        with one_line(f"{file} cannot be read"):
            target = file.resolve(strict=True)
        if not any(target.is_relative_to(place) for place in own):
            raise LoadError(
                f"{file} is a link to {target}, outside of the model's folder, and would be copied "
                "into the result: put the file itself in its place if it is the model's"
            )
    return files


def copy_companions(folder: Path, part: Path, names: Sequence[str] = NAMES) -> None:
    """Copy the files of these names into the folder `part`.

    Raises:
        LoadError: as `companions`.
        OSError: one cannot be written.
    """
    for file in companions(folder, names):
        shutil.copyfile(file, part / file.name)
