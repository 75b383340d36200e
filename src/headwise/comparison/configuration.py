"""Everything that determines what a comparison finds, as data that is checked and kept with it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headwise.base.files import kind_of, read_json, reason
from headwise.base.written import write_whole
from headwise.comparison.mechanisms import DEFAULT, parse
from headwise.errors import LoadError, OptionError

Task = Literal["recall", "text"]
TASKS: tuple[Task, ...] = ("recall", "text")

_FILE = "configuration.json"


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is trained, on what, and how.

    >>> Configuration(width=64, heads=8).head_dim
    8

    Args:
        mechanisms: names as `mechanisms.parse` takes them.
        task: "recall" or "text".
        steps: of training, a run.
        seeds: runs of each mechanism, with the seeds 0, 1, ...
        width: E of the decoder.
        heads: query heads of E / heads dims each.
        layers: blocks of the decoder.
        pairs: of a key and its value in a sequence of recall.
        vocabulary: tokens of recall, half of them keys and half values.
        length: tokens of a training sequence of text.
        text: SHA-256 of the file's bytes, for the task text.
        batch: tokens of a training step.
        learning_rate: its highest.
        threads: that PyTorch computes with; another number rounds otherwise.

    Raises:
        OptionError: a value out of its range, or one that does not fit the others.
    """

    mechanisms: tuple[str, ...] = DEFAULT
    task: Task = "recall"
    steps: int = 1600
    seeds: int = 1
    width: int = 64
    heads: int = 8
    layers: int = 2
    pairs: int = 32
    vocabulary: int = 128
    length: int = 128
    text: str | None = None
    batch: int = 2048
    learning_rate: float = 2e-3
    threads: int = 1

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise OptionError(f"task is {self.task!r}, expected {' or '.join(TASKS)}")
        if (self.task == "text") != (self.text is not None):
            raise OptionError(
                f"task is {self.task} {'without' if self.text is None else 'with'} a text file; "
                "a text file goes with the task text, and with it only"
            )
        least = {"steps": 1, "seeds": 1, "width": 1, "heads": 1, "layers": 1, "pairs": 1}
        least |= {"vocabulary": 4, "length": 2, "batch": 1, "threads": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise OptionError(f"{name} is {value!r}, expected an integer of at least {low}")
        if not isinstance(self.learning_rate, int | float) or not 0 < self.learning_rate < 1:
            raise OptionError(f"learning_rate is {self.learning_rate!r}, expected between 0 and 1")
        if self.width % (4 * self.heads):
            raise OptionError(
                f"width is {self.width}, and {self.heads} heads need a multiple of "
                f"{4 * self.heads}: the dims of a head, and half of them, are rotated in pairs"
            )
        if not self.mechanisms:
            raise OptionError("mechanisms is empty; expected some, as mha,gqa-2,mqa,mla")
        specs = [parse(name, self.heads, self.head_dim) for name in self.mechanisms]
        for at, spec in enumerate(specs):
            if spec in specs[:at]:
                same = self.mechanisms[specs.index(spec)]
                raise OptionError(f"mechanisms: {self.mechanisms[at]} is the same as {same}")
        self._check_sequences()

    def _check_sequences(self) -> None:
        if self.task == "recall" and self.vocabulary < 2 * self.pairs + 2:
            raise OptionError(
                f"vocabulary is {self.vocabulary}, and {self.pairs} pairs need at least "
                f"{2 * self.pairs + 2}: half of it are keys, which differ within a sequence"
            )
        if self.batch < self.tokens:
            raise OptionError(
                f"batch is {self.batch} tokens, expected at least the {self.tokens} of a sequence"
            )

    @property
    def head_dim(self) -> int:
        """D, dims of a head."""
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""
        return 4 * self.pairs if self.task == "recall" else self.length

    def settings(self) -> dict[str, Any]:
        """What this task reads, as JSON has it."""
        unread = ("length", "text") if self.task == "recall" else ("pairs", "vocabulary")
        found = {name: value for name, value in asdict(self).items() if name not in unread}
        return found | {"mechanisms": list(self.mechanisms)}


def claim(folder: Path, configuration: Configuration) -> None:
    """Make `folder` the place of this comparison, or see that it is already.

    Raises:
        OptionError: it holds another comparison (the first setting that differs is named), or
            something else, or cannot be written.
    """
    settings, path = configuration.settings(), folder / _FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        other = kind_of(path) == "none" and any(folder.iterdir())
    except (LoadError, OSError) as error:
        raise OptionError(f"{folder}: {reason(error)}; give another folder") from error
    if other:
        raise OptionError(f"{folder} is not empty and holds no comparison; give a new folder")
    if kind_of(path) == "none":
        write_whole(path, (json.dumps(settings, indent=1) + "\n").encode())
        return
    try:
        held = read_json(path)
    except LoadError as error:
        raise OptionError(f"{error}; give a new folder") from error
    for name in dict.fromkeys([*settings, *held]):
        if held.get(name) != settings.get(name):
            raise OptionError(
                f"{folder} holds a comparison with {name} {_shown(held.get(name))}, not "
                f"{_shown(settings.get(name))}; give another folder, or the same settings"
            )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
