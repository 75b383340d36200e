"""The files beside the weights: copied by their names, and never by a link out of the folder."""

import os
from pathlib import Path

import pytest

from headwise.conversion.checkpoint.companions import companions, copy_companions
from headwise.errors import LoadError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    (tmp_path / "id_rsa").write_text("private")
    (model / "tokenizer.json").write_text("{}")
    return model, out


def copied(out: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in out.iterdir()}


def test_only_files_of_known_names_are_copied(folders: tuple[Path, Path]) -> None:
    model, out = folders
    for name in ("tokenizer.key", "vocabulary", "chat_template.pem", "model.safetensors", ".env"):
        (model / name).write_text("else")
    (model / "merges.txt").write_text("a b")
    copy_companions(model, out)
    assert copied(out) == {"tokenizer.json": "{}", "merges.txt": "a b"}


@pytest.mark.parametrize("target", ["../id_rsa", "absolute", "through"])
def test_a_link_out_of_the_folder_is_refused(target: str, folders: tuple[Path, Path]) -> None:
    model, out = folders
    private = model.parent / "id_rsa"
    if target == "through":  # a folder in the folder that is a link itself
        (model / "blobs").symlink_to(model.parent)
        private = Path("blobs/id_rsa")
    (model / "vocab.txt").symlink_to(target if target.startswith("..") else private)
    with pytest.raises(LoadError, match=r"vocab\.txt is a link to .*, outside of the model's"):
        copy_companions(model, out)
    assert not copied(out)


def test_a_link_inside_the_folder_and_a_link_to_the_folder_are_followed(
    folders: tuple[Path, Path],
) -> None:
    model, out = folders
    (model / "vocab.json").symlink_to("tokenizer.json")
    (model.parent / "other").symlink_to(model)
    copy_companions(model.parent / "other", out)
    assert copied(out) == {"tokenizer.json": "{}", "vocab.json": "{}"}


def hub(root: Path) -> tuple[Path, Path]:
    """A snapshot in a hub's cache, and the blobs of its repository."""
    snapshot, blobs = (
        root / "models--a--b" / "snapshots" / "c0ffee",
        root / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    return snapshot, blobs


def test_a_snapshots_links_to_its_repository_are_followed(folders: tuple[Path, Path]) -> None:
    _, out = folders
    snapshot, blobs = hub(out.parent)
    (blobs / "ab12").write_text("blob")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/ab12")
    copy_companions(snapshot, out)
    assert copied(out) == {"tokenizer.json": "blob"}


def test_a_snapshots_links_elsewhere_are_refused(folders: tuple[Path, Path]) -> None:
    _, out = folders
    snapshot, blobs = hub(out.parent)
    (snapshot / "tokenizer.json").symlink_to("../../../id_rsa")
    with pytest.raises(LoadError, match="is a link to"):
        companions(snapshot)
    blobs.rmdir()
    blobs.symlink_to(out.parent)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../blobs/id_rsa")
    with pytest.raises(LoadError, match="is a link to"):
        companions(snapshot)


def test_a_pipe_is_refused_and_a_dangling_link_is_not_there(folders: tuple[Path, Path]) -> None:
    model, _ = folders
    (model / "vocab.txt").symlink_to("gone")
    assert [file.name for file in companions(model)] == ["tokenizer.json"]
    os.mkfifo(model / "merges.txt")
    with pytest.raises(LoadError, match="is not a file"):
        companions(model)
