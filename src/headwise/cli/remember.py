"""`headwise remember` and `headwise forget`: texts that were read once, stored, listed, removed."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.cli import options
from headwise.cli.documented import documented
from headwise.cli.terminal import screen

if TYPE_CHECKING:
    from headwise.stored.store import StoredModel


@documented
def remember(
    file: Path | None = None,
    *,
    model: str | None = None,
    chat: bool = False,
    folder: Path | None = None,
    limit: str = "10GB",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    cache: str = "contiguous",
    weights: options.Weights = "auto",
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> int:
    """Read a text once and store its cache, or list what is stored.

    Afterwards headwise generate --remember --document FILE, with the same model, --dtype, --cache
    and --chat, goes on from there.

    Args:
        file: The text. Without it, what is stored is listed.
        model: A model folder, a .gguf file or a hub id. Default: smollm2, SmolLM2-135M-Instruct.
        chat: Inside the model's chat template.
        folder: Where to store. Default: the user's cache folder, which generate --remember takes.
        limit: What the folder may hold; what was not used for longest goes.
        cache: Of headwise, as in headwise generate.
        weights: Of a .gguf file: packed, float or auto, as in headwise generate.
    """
    if file is None:
        _list(folder, as_json=as_json)
        return 0
    from headwise.generation.options import Sampling
    from headwise.generation.session import Session
    from headwise.generation.text import read_document
    from headwise.hf.stored.remembered import Remembered
    from headwise.loading.options import LoadOptions
    from headwise.loading.progress import quiet_transformers

    place = Remembered.parse(True if folder is None else folder, limit)
    text = read_document(file)
    weights = options.weights_of(weights, model, device, alone=True)
    with quiet_transformers(), screen(animated=True) as shown:
        shown("starting", 0, 0)
        session = Session.open(
            model,
            "",
            LoadOptions(
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                weights=weights,
                progress=shown,
            ),
            Sampling(max_new_tokens=1),
            document=text,
            chat=chat,
        )
        remembered = session.remember(
            place,
            cache=cache,
            on_prefill=lambda done, total: shown("reading the text", done, total),
        )
    fields = {
        "file": str(file),
        "model": session.name,
        "folder": str(remembered.folder),
        "tokens": len(session.prompt),
        "known": remembered.known,
        "stored": remembered.stored,
        "notes": remembered.notes,
    }
    if as_json:
        options.print_json(fields)
    else:
        from headwise.base.console import facts_table, show

        show(facts_table((name, _words(value)) for name, value in fields.items() if value != []))
    return 0


@documented
def forget(
    model: str | None = None,
    *,
    folder: Path | None = None,
    everything: bool = False,
) -> int:
    """Remove what is stored of a model, or everything.

    Args:
        model: The beginning of an id that headwise remember lists.
        folder: Where it is stored. Default: the user's cache folder.
        everything: Of all models.
    """
    from headwise.base.console import show
    from headwise.base.memory import gib
    from headwise.errors import OptionError
    from headwise.stored.store import forget as remove

    if (model is None) != everything:
        raise OptionError("give an id that headwise remember lists, or --everything")
    found = [each for each in _stored(folder) if everything or each.id.startswith(model or "")]
    if model is not None and len(found) != 1:
        raise OptionError(
            f"{model!r} is the beginning of {len(found)} ids, expected one that headwise remember "
            "lists"
        )
    for each in found:
        remove(used.entry for used in each.blocks)
    total = sum(each.nbytes for each in found)
    show(f"removed {sum(len(each.blocks) for each in found):,} blocks, {gib(total)}")
    return 0


def _stored(folder: Path | None) -> "list[StoredModel]":
    from headwise.base.files import local_path
    from headwise.errors import OptionError
    from headwise.stored.store import own_folder, stored_models

    return stored_models(own_folder() if folder is None else local_path(folder, kind=OptionError))


def _list(folder: Path | None, *, as_json: bool) -> None:
    from headwise.base.console import show
    from headwise.base.memory import gib
    from headwise.cli.tables import columns, show_table

    found = _stored(folder)
    if as_json:
        options.print_json([each.to_dict() for each in found])
        return
    rows = [
        (
            each.id[:8],
            f"{each.origin.model}, {each.origin.dtype}" if each.origin else "damaged",
            each.origin.cache if each.origin else "",
            f"{each.tokens:,}",
            f"{len(each.blocks):,}",
            gib(each.nbytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(each.last)),
        )
        for each in found
    ]
    names = ("id", "model", "cache", "tokens", "blocks", "size", "last used")
    if not rows:
        show("nothing is remembered")
        return
    show_table("remembered", columns(names, rows, left=("id", "model", "cache", "last used")))


def _words(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
