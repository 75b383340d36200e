"""Text as it streams: the pieces make the whole, and no half character is shown."""

from pathlib import Path

import pytest

from cli.checkpoints import save_tiny
from headwise.errors import OptionError
from headwise.generation.text import TextStream, prompt_tokens
from headwise.loading.model_folder import ModelFolder


@pytest.mark.parametrize(
    "text", ["plain", "héllo Ω", "日本語 text", "👍🏽 ok", " leading\n\nlines "]
)
def test_pieces_join_to_the_text(tmp_path: Path, text: str) -> None:
    tokenizer = ModelFolder(save_tiny(tmp_path)).tokenizer
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_ends_comes_out_at_the_end(tmp_path: Path) -> None:
    tokenizer = ModelFolder(save_tiny(tmp_path)).tokenizer
    stream = TextStream(tokenizer)
    half = tokenizer("Ω")["input_ids"][:1]
    assert [stream.push(token) for token in half] == [""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_a_prompt_that_is_not_text_is_refused(tmp_path: Path) -> None:
    tokenizer = ModelFolder(save_tiny(tmp_path)).tokenizer
    # what Python makes of a byte on the command line that is not UTF-8
    with pytest.raises(OptionError, match="not valid UTF-8"):
        prompt_tokens(tokenizer, "hi \udcff")
