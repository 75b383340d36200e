"""`headwise compare`: small decoders that differ in the attention alone, trained and timed."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from headwise.cli.documented import documented
from headwise.cli.options import Json, print_json, the_document, words
from headwise.cli.terminal import interrupted, screen


@documented
def compare(
    *,
    mechanisms: str = "mha,gqa:2,mqa,mla",
    task: Literal["recall", "beyond", "text"] = "recall",
    document: Path | None = None,
    text: Annotated[Path | None, typer.Option(hidden=True)] = None,  # the old name of --document
    steps: int = 1600,
    seeds: int = 1,
    width: int = 64,
    heads: int = 8,
    layers: int = 2,
    pairs: int | None = None,
    vocabulary: int = 128,
    length: int = 128,
    batch: int = 2048,
    learning_rate: float = 2e-3,
    threads: int = 1,
    equal: Literal["parameters", "bytes"] = "parameters",
    contexts: str = "1024,8192,32768",
    rounds: int = 21,
    out: Path = Path("headwise-compare"),
    as_json: Json = False,
) -> int:
    """Train small decoders that differ in the attention alone; show quality, cache and speed.

    Args:
        mechanisms: mha, gqa:2 (2 kv heads), mqa, mla, mla:24 (a latent of 24), gated-delta, kda,
            ssd, retention, topk:16 (mha whose queries get 16 keys), window:16 (mha in a window;
            window: of an eighth of the tokens), memory:16 (the same and a memory), hybrid:3-1
            (three of gated-delta, one of mha), joined by commas.
        task: Associative recall, the same over a distance, or the bytes of a text file.
        document: The text file for --task text.
        steps: Training steps of each run.
        seeds: Runs of each mechanism.
        width: Hidden size of the decoders.
        heads: Query heads.
        layers: Blocks of a decoder.
        pairs: For recall and beyond: pairs in a sequence, 32 and 8 if not given.
        vocabulary: For recall and beyond: half are keys, half values.
        length: Tokens of a sequence: for beyond the longest, for text in training.
        batch: Tokens of a training step.
        learning_rate: The highest of its schedule.
        threads: Of PyTorch, in training and timing.
        equal: In all decoders: parameters, or also the bytes held of the longest sequence.
        contexts: Tokens in the cache when decoding is timed, joined by commas.
        rounds: How often each mechanism is timed, in turn.
        out: A folder for the results; a run that it holds is not done again.
    """
    from headwise.base import units
    from headwise.cli.compare_table import show
    from headwise.comparison import Configuration, Experiment
    from headwise.comparison.text import read
    from headwise.errors import OptionError

    file = the_document(document, text, old_name="--text")
    if (task == "text") != (file is not None):
        asked, needed = "--task text", "--document FILE"
        if file is not None:
            asked, needed = needed, asked
        raise OptionError(f"{asked} needs {needed}")
    content, digest = (None, None) if file is None else read(file)
    configuration = Configuration(
        mechanisms=tuple(words(mechanisms)),
        task=task,
        text=digest,
        steps=steps,
        seeds=seeds,
        width=width,
        heads=heads,
        layers=layers,
        pairs=pairs,  # type: ignore[arg-type]
        vocabulary=vocabulary,
        length=length,
        batch=batch,
        learning_rate=learning_rate,
        threads=threads,
        equal=equal,
    )
    counts = units.token_counts("--contexts", contexts)
    experiment = Experiment(configuration, content, out, counts, rounds)
    stopped = False
    with screen(animated=False) as shown:
        try:
            experiment.carry_out(shown)
        except KeyboardInterrupt:
            stopped = True
    if as_json:
        print_json(experiment.comparison.to_dict())
    else:
        show(experiment.comparison, out)
    return interrupted("the same command resumes from here") if stopped else 0
