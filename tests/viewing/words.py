"""A tokenizer whose tokens are given words, so that a test can say what they hold."""

from typing import Any


class Words:
    """Token 1 + i is the i-th word, with a space before it; token 0 is special."""

    def __init__(self, *words: str, special: tuple[int, ...] = ()) -> None:
        self.words = words
        self.all_special_ids = list(special)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + self.words.index(word) for word in text.split(" ")]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(f" {self.words[(token - 1) % len(self.words)]}" for token in ids)
