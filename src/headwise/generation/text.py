"""Text to tokens and back: the prompt as a model expects it, and the answer as it comes."""

from pathlib import Path
from typing import Any

from headwise.base.files import local_path, read_text
from headwise.errors import OptionError


def read_document(path: Path) -> str:
    """A text file, to stand in front of a prompt.

    Raises:
        LoadError: missing, a folder, not allowed, or not UTF-8 text.
    """
    return read_text(local_path(path), "document")


def least_tokens(tokenizer: Any, text: str) -> int:
    """A number of tokens that `text` has at least, without tokenizing it.

    No token is longer than the longest of the vocabulary. A text of hundreds of megabytes would
    take all memory before its tokens could be counted.
    """
    return len(text) // max(1, max(map(len, tokenizer.get_vocab()), default=1))


def prompt_tokens(tokenizer: Any, prompt: str, *, document: str = "", chat: bool = False) -> list:
    """The token ids of a prompt, behind a document and inside the model's chat template if asked.

    Raises:
        OptionError: the prompt and the document are empty, or the model has no chat template.
    """
    text = f"{document.rstrip()}\n\n{prompt}" if document.strip() else prompt
    if not text.strip():
        raise OptionError("the prompt is empty; give some text with --prompt")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise OptionError("the prompt is not valid UTF-8 text; check the terminal's encoding")
    if not chat:
        return list(tokenizer(text)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError("this model has no chat template; leave --chat out")
    turns = [{"role": "user", "content": text}]
    try:
        templated = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # A template is a program that comes with the model; jinja2's errors are what it raises.
        if type(error).__module__.split(".")[0] != "jinja2":
            raise
        raise OptionError(f"the model's chat template failed: {error}; leave --chat out") from error
    # The template writes the special tokens itself.
    return list(tokenizer(templated, add_special_tokens=False)["input_ids"])


class TextStream:
    """Turns tokens into text as they come; half a character waits for its other half."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        # Text of tokens[:shown] is out. Decoding starts one step earlier, at `context`, because
        # what a token's text is (its leading space) depends on the token before it.
        self.context = self.shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes, often "" inside a character of several bytes."""
        self.tokens.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self.context, self.shown = self.shown, len(self.tokens)
        return text

    def finish(self) -> str:
        """What still waited, now that no more tokens come."""
        text = self._new_text()
        self.context = self.shown = len(self.tokens)
        return text

    def _new_text(self) -> str:
        before = self._decode(self.tokens[self.context : self.shown])
        return self._decode(self.tokens[self.context :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self.tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
