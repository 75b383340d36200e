"""A text as the tokens of a model, each with its own text."""

from dataclasses import dataclass
from typing import Any

from headwise.errors import LoadError, OptionError, ShapeError
from headwise.generation.options import context_limit


@dataclass(frozen=True)
class Token:
    """A token's id, its text (a leading space is part of it), and whether it is a special one."""

    id: int
    text: str
    special: bool


def tokenize(
    model: Any, tokenizer: Any, text: str | tuple[str, str], new_tokens: int
) -> tuple[list[int], list[int] | None]:
    """The ids of a text or of a pair, special tokens included, and of which text each is.

    The latter is what the tokenizer says to the model (BERT's token types); None for one text, and
    where the tokenizer says nothing.

    Raises:
        OptionError: no text, text that is not valid Unicode, a pair that is none, or no tokenizer.
        ShapeError: more tokens than the model has positions.
        LoadError: the tokenizer is another model's.
    """
    if not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise OptionError(
            f"tokenizer is a {type(tokenizer).__name__}, expected the model's tokenizer"
        )
    texts = text if isinstance(text, tuple | list) else (text,)
    if len(texts) > 2:
        raise OptionError(f"text is {len(texts)} texts, expected one, or a pair")
    for each in texts:
        if each is not None and not isinstance(each, str):
            raise OptionError(f"text is a {type(each).__name__}, expected a str, or a pair of them")
        if not each:
            raise OptionError("the text is empty; give some")
        if any("\ud800" <= character <= "\udfff" for character in each):
            raise OptionError("the text is not valid UTF-8 text; check the terminal's encoding")
    # a text that is too long is refused below, in one line
    encoded = tokenizer(*texts, verbose=False)
    ids = [int(token) for token in encoded["input_ids"]]
    kinds = encoded.get("token_type_ids") if len(texts) == 2 else None
    if not ids:
        raise OptionError("the text has no tokens; give some text")
    limit = context_limit(model.config)
    if limit is not None and len(ids) + new_tokens > limit:
        new = f" and {new_tokens} new ones" if new_tokens else ""
        raise ShapeError(
            f"the text has {len(ids)} tokens{new}, and the model has positions for {limit}: "
            "shorten it"
        )
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if max(ids) >= vocabulary:
        raise LoadError(
            f"the tokenizer made token {max(ids)} and the model has {vocabulary}: they are not of "
            "one model"
        )
    return ids, None if kinds is None else [int(kind) for kind in kinds]


def describe(tokenizer: Any, ids: list[int]) -> list[Token]:
    """Each token with its text; half a character becomes the replacement character."""
    special = set(tokenizer.all_special_ids)
    return [
        Token(each, tokenizer.decode([each], clean_up_tokenization_spaces=False), each in special)
        for each in ids
    ]
