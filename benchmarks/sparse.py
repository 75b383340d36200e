"""What it costs in quality that a query reads only some keys: long contexts, and code.

    python benchmarks/sparse.py MODEL.gguf [--lengths 8192,16384,32768] [--most 1024]
        [--methods dense,ours,exact,quest8,quest16,double] [--work benchmarks/work] [--report]
        [--tasks single,several,chain,common,code]

MODEL.gguf is of fetch_coder.py. Contexts (long_context.py), two of each length, are read once, by
the dense model, and saved. A question is read 16 tokens at a time and answered greedily, so that
the method reads question and answer; all methods go on from the same cache. Dense is headwise
without sparse=, ours is sparse="topk:1024,sinks=4,recent=64,dense=2", and the others
(sparse_rivals.py) choose in its place, with the bytes that ours reads. Distances are of the
distribution of the answer's first token, KL(dense || method) in nats. Code: the last 512 of the
first N tokens of a file, 16 at a time.

Each result is a line of WORK/results.jsonl: a run that was stopped goes on where it was. --report
prints what is there, and draws docs/images/sparse.svg.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import long_context
import torch
from long_context import Question
from report import environment
from sparse_report import draw, print_report
from sparse_rivals import RIVALS, Layers
from sparse_work import Work
from torch import Tensor

import headwise
from headwise.hf import use_own_layers
from headwise.hf.stock_names import CACHE, DynamicCache

METHODS = ("dense", "ours", *RIVALS)
TASKS = ("single", "several", "chain", "common", "code")
SEEDS = (0, 1)
SINKS, RECENT, DENSE = 4, 64, 2
AT_ONCE = 16
CODE_TOKENS = 512
NEWLINE = "\u010a"  # as vocabularies of byte-level BPE write it
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "sparse.svg"
LEARNED_FROM, LEARNED_TO = 2048, 2560  # what Double Sparsity sees of a context beforehand


def read(
    model: Any, tokens: list[int], cache: Any = None, at_once: int = 512, keep: int = 1
) -> tuple[Tensor, Any]:
    """The logits of the last `keep` tokens of every part, [rows, vocabulary], and the cache."""
    rows = []
    for part in torch.tensor([tokens]).split(at_once, dim=1):
        output = model(part, use_cache=True, logits_to_keep=keep, **{CACHE: cache})
        cache = output[CACHE]
        rows.append(output.logits[0])
    return torch.cat(rows), cache


def saved(model: Any, work: Work, name: str, tokens: list[int]) -> Path:
    """The cache of a context, read by the dense model unless it is there."""
    file = work.folder / f"cache-{name}.safetensors"
    if not file.exists():
        began = time.perf_counter()
        headwise.save_cache(read(model, tokens)[1], file)
        print(f"{name}: {len(tokens):,} tokens read in {time.perf_counter() - began:.0f} s")
    return file


def endings(tokenizer: Any) -> Tensor:
    """The tokens that end an answer: special ones, and those with a new line in them."""
    lines = [number for token, number in tokenizer.get_vocab().items() if NEWLINE in token]
    return torch.tensor([*tokenizer.get_added_vocab().values(), *lines])


def answer(
    model: Any, cache: Any, suffix: list[int], question: Question, ends: Tensor
) -> tuple[Tensor, list[int]]:
    """The logits behind a question, and the answer's tokens; the cache is left as it was."""
    first, _ = read(model, suffix, cache, AT_ONCE)
    first = first[-1:]
    logits, given, tokens_read = first, list[int](), len(suffix)
    while True:
        scores = logits[-1].clone()
        if len(given) < question.least:
            scores[ends] = -torch.inf
        token = int(scores.argmax())
        if token in ends:
            break
        given.append(token)
        if len(given) == question.cap:
            break
        logits, _ = read(model, [token], cache)
        tokens_read += 1
    cache.crop(-tokens_read)
    return first, given


@contextmanager
def chosen_by(layers: Layers) -> Iterator[None]:
    """A rival chooses in the place of ours."""
    from headwise.caches import Sketch
    from headwise.hf import sparse

    def chosen_keys(
        kv: Any, query: Tensor, options: Any, mask: Tensor | None
    ) -> tuple[Tensor, None]:
        key, rule = kv.dense(query.dtype)[0], kv.rule
        given = query, key, options.scale, rule.most, rule.sinks, rule.recent
        return layers.choose(*given), None

    # a decoder layer in one operator would choose by the sketch
    alone = patch.object(Sketch, "room", lambda *given: None)
    with alone, patch.object(sparse, "chosen_keys", chosen_keys):
        yield


def in_one_piece(cache: Any, model: Any) -> Any:
    """A loaded cache without its pages, of which a rival would gather all keys at every call."""
    held = model._headwise
    whole = use_own_layers(DynamicCache(config=model.config), held.choice, held.sparse)
    for index, layer in enumerate(cache.layers):
        rows = layer.cache.rows(0, 0, layer.cache.length)
        whole.update(*(each.unsqueeze(0) for each in rows), index)
    return whole


@contextmanager
def method_on(model: Any, method: str, file: Path, tokens: list[int]) -> Iterator[Any]:
    """The cache of a context, while the method chooses."""
    if method not in RIVALS:
        yield headwise.load_cache(file, model)
        return
    layers = Layers(method, model.config.num_hidden_layers - DENSE)
    with chosen_by(layers):
        cache = headwise.load_cache(file, model)
        if layers.learns:
            cache.crop(LEARNED_FROM - len(tokens))
            read(model, tokens[LEARNED_FROM:LEARNED_TO], cache, AT_ONCE)
            layers.learned()
            cache = headwise.load_cache(file, model)
        yield in_one_piece(cache, model)


class Run:
    """One method on all contexts."""

    def __init__(self, asked: argparse.Namespace, work: Work, model: Any, tokenizer: Any) -> None:
        self.asked, self.work, self.model, self.tokenizer = asked, work, model, tokenizer
        self.ends = endings(tokenizer)

    def attach(self, method: str) -> None:
        """The model as the method needs it."""
        most = self.asked.most
        rule = f"topk:{most},sinks={SINKS},recent={RECENT},dense={DENSE}"
        options: dict[str, Any] = {} if method == "dense" else {"sparse": rule}
        headwise.attach(self.model, **options)
        self.method, self.name = method, method if method == "dense" else f"{method}:{most}"

    def questions(self, length: int, seed: int) -> None:
        """All questions to one context that have no answer yet."""
        context = long_context.make(self.tokenizer, length, seed)
        every = enumerate(zip(context.questions, context.suffixes))
        left = [
            (f"{self.name} {context.checksum} {number}", *pair)
            for number, pair in every
            if pair[0].task in self.asked.tasks
        ]
        left = [each for each in left if each[0] not in self.work.done]
        if not left:
            return
        name = f"{length}-{seed}-{context.checksum}"
        file = saved(self.model, self.work, name, context.tokens)
        with method_on(self.model, self.method, file, context.tokens) as cache:
            for key, question, suffix in left:
                self.question(key, length, cache, question, suffix)
        print(f"{self.name}, {length:,}, context {seed}: {len(left)} questions", flush=True)

    def question(
        self, key: str, length: int, cache: Any, question: Question, suffix: list[int]
    ) -> None:
        """One answer, and how far its first token's distribution is from dense."""
        began = time.perf_counter()
        logits, tokens = answer(self.model, cache, suffix, question, self.ends)
        seconds, given = time.perf_counter() - began, self.tokenizer.decode(tokens)
        place = "-".join(key.split()[1:])
        self.work.add(
            id=key,
            method=self.name,
            length=length,
            task=question.task,
            score=question.score(given),
            kl=self.work.distance(place, logits, dense=self.method == "dense"),
            answer=given,
            expected=question.expected,
            seconds=seconds,
        )

    def code(self, tokens: list[int], length: int) -> None:
        """The perplexity of a length's last tokens of code, and how far they are from dense."""
        checksum = long_context.checksum(tokens)
        key = f"{self.name} {checksum} {length}"
        if key in self.work.done:
            return
        longest = tokens[: max(self.asked.lengths) - CODE_TOKENS]
        file = saved(self.model, self.work, f"code-{len(longest)}-{checksum}", longest)
        first = length - CODE_TOKENS
        with method_on(self.model, self.method, file, longest) as cache:
            if first < len(longest):
                cache.crop(first - len(longest))
            began = time.perf_counter()
            logits, _ = read(self.model, tokens[first:length], cache, AT_ONCE, AT_ONCE)
            seconds = time.perf_counter() - began
        expected = torch.tensor(tokens[first + 1 : length + 1])
        self.work.add(
            id=key,
            method=self.name,
            length=length,
            task="code",
            nats=float(torch.nn.functional.cross_entropy(logits.float(), expected)),
            kl=self.work.distance(f"{checksum}-{length}", logits, dense=self.method == "dense"),
            seconds=seconds,
        )
        print(f"{self.name}, {length:,}, code: {seconds:.0f} s", flush=True)


def names(text: str) -> list[str]:
    return text.split(",")


def lengths(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


@torch.no_grad()
def main() -> None:
    """Measure what is not there yet, and print all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--lengths", type=lengths, default=[8192, 16384, 32768])
    parser.add_argument("--methods", type=names, default=list(METHODS))
    parser.add_argument("--tasks", type=names, default=list(TASKS))
    parser.add_argument("--most", type=int, default=1024)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--report", action="store_true")
    asked = parser.parse_args()
    work = Work(asked.work)
    print(environment(), long_context.sources(), sep="\n", flush=True)
    if not asked.report:
        model, tokenizer = headwise.load(asked.model, dtype="bfloat16", weights="packed")
        run = Run(asked, work, model, tokenizer)
        code = long_context.code(tokenizer, max(asked.lengths) + 1)
        for method in asked.methods:
            run.attach(method)
            for length in asked.lengths:
                for seed in SEEDS:
                    run.questions(length, seed)
                if "code" in asked.tasks:
                    run.code(code, length)
    print_report(work.rows)
    draw(work.rows, IMAGE)


if __name__ == "__main__":
    main()
