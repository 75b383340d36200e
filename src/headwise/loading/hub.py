"""A model from the Hugging Face hub into its local cache: safetensors and configs, nothing else."""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.base.progress import Progress, silent
from headwise.errors import LoadError
from headwise.loading.progress import bar_class
from headwise.loading.source import PICKLES, refuse_pickle

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
# Other formats of the same weights lie in subfolders, and in Mistral's consolidated files.
_UNWANTED = ["*/*", "consolidated*"]

# More weight files than any model has, fewer bytes than any.
_MOST_FILES = 10_000


def download(repo: str, progress: Progress = silent) -> Path:
    """The local folder of a hub model, fetched if it is not in the hub's cache yet.

    Without a network, what is in that cache is used.

    Raises:
        LoadError: no such model, no network, no access, or no safetensors weights.
    """
    import huggingface_hub

    with _one_line(repo):
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                tqdm_class=bar_class(_bytes_only(progress), f"downloading {repo}"),
            )
        )
        if not any(folder.glob("*.safetensors")):
            names = huggingface_hub.list_repo_files(repo)
            refuse_pickle(repo, [name for kind in PICKLES for name in fnmatch.filter(names, kind)])
    return folder


def download_config(repo: str, progress: Progress = silent) -> Path:
    """The config.json of a hub model, fetched if it is not in the hub's cache yet.

    Raises:
        LoadError: no such model, no network, no access, or no config.
    """
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    progress(f"downloading the config of {repo}", 0, 0)
    with _one_line(repo):
        try:
            return Path(huggingface_hub.hf_hub_download(repo, "config.json"))
        except RemoteEntryNotFoundError as error:
            raise LoadError(f"{repo} has no config.json, so it is no model to plan for") from error


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """What the hub raises, as one line that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    told: dict[type[Exception], str] = {
        HFValidationError: f"{repo!r} is neither an existing path nor a hub id (owner/name)",
        GatedRepoError: f"{repo} is gated: ask for access on its page on the hub, then run: "
        "hf auth login",
        RepositoryNotFoundError: f"{repo!r} is neither an existing path nor a model on the hub (or "
        "it is private: run hf auth login)",
        LocalEntryNotFoundError: f"{repo!r} is not an existing path nor in the hub's local cache, "
        "and the hub cannot be reached; check the network, or give a local folder or .gguf file",
    }
    try:
        yield
    except LoadError:
        raise
    except (HFValidationError, OSError) as error:
        for kind, text in told.items():
            if isinstance(error, kind):
                raise LoadError(text) from error
        text = " ".join(str(error).split())[:200]
        raise LoadError(f"{repo} could not be downloaded: {text}; try again") from error


def _bytes_only(progress: Progress) -> Progress:
    """Leave out the hub's bar of files, which counts to the number of `_WANTED` files at most."""

    def report(stage: str, done: int, total: int) -> None:
        if total > _MOST_FILES:
            progress(stage, done, total)

    return report
