"""One generation, measured: `model.generate` itself, watched, with its timings as data."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from headwise.errors import CapacityError, ShapeError
from headwise.generation.attention import Mechanism, select_attention
from headwise.generation.chunks import chunk_size
from headwise.generation.options import Sampling
from headwise.generation.rotation import forget_length

OnToken = Callable[[int], None]
OnPrefill = Callable[[int, int], None]


@dataclass(frozen=True)
class Margin:
    """How clear the choice of one token was: the best logit, and its lead over the second."""

    best: float
    lead: float


@dataclass
class Run:
    """What one generation gave and took.

    `prefill_seconds` is what the model took to read the prompt, which gives the logits of the first
    token too. `decode_seconds` has one entry per token; the first is the choice alone.
    """

    attention: str
    mechanisms: tuple[Mechanism, ...]
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    margins: list[Margin] = field(default_factory=list)
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: list[float] = field(default_factory=list)
    cache_tokens: int = 0
    cache_bytes: int = 0
    interrupted: bool = False

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens a second; None where nothing was prefilled."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Generated tokens a second after the first; None where there is no second one."""
        steady = self.decode_seconds[1:]
        return len(steady) / sum(steady) if steady else None

    @property
    def decode_median(self) -> float | None:
        """Median seconds a generated token after the first; None where there is no second one."""
        steady = self.decode_seconds[1:]
        return median(steady) if steady else None

    @property
    def cache_bytes_per_token(self) -> float | None:
        """Bytes of cache over the tokens that it has read; None where there is no cache."""
        return self.cache_bytes / self.cache_tokens if self.cache_tokens else None


def generate(
    model: Any,
    prompt: list[int],
    *,
    attention: str = "headwise",
    cache: str = "contiguous",
    sampling: Sampling | None = None,
    on_prefill: OnPrefill | None = None,
    on_token: OnToken | None = None,
) -> Run:
    """Run one prompt with one attention, from a fresh cache.

    The tokens are those of `model.generate` on a model that has just been loaded. The prompt is
    read as `chunk_size` says: with stock attention as `model.generate` reads it.

    `on_prefill(done, total)` is called as the prompt is read, `on_token(token)` with each new token
    as it comes. A KeyboardInterrupt ends the run, which keeps what it has so far. `cache` is for
    headwise, by the names that `headwise.attach` takes.

    Raises:
        ShapeError: an empty prompt.
        UnsupportedError: the model cannot use that attention, or that cache.
        CapacityError: the device ran out of memory.
    """
    if not prompt:
        raise ShapeError("the prompt has no tokens; give some text")
    chosen = sampling if sampling is not None else Sampling()
    run = Run(attention, select_attention(model, attention, cache), len(prompt))
    reading = _Reading(run, on_prefill)
    forget_length(model)
    try:
        # Not inference_mode: its tensors could not be appended to in place by generate.
        with torch.no_grad(), reading.of(model):
            _generate(model, prompt, run, chosen, on_token)
    except KeyboardInterrupt:
        run.interrupted = True
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise CapacityError(
            f"{model.device} ran out of memory after {run.prefill_tokens} of {len(prompt)} prompt "
            f"tokens and {len(run.tokens)} new ones; shorten the context or use --dtype bfloat16"
        ) from error
    if reading.cache is not None:
        from headwise.hf import cache_nbytes

        run.cache_tokens = reading.tokens
        run.cache_bytes = cache_nbytes(reading.cache)
    return run


def _generate(
    model: Any, prompt: list[int], run: Run, sampling: Sampling, on_token: OnToken | None
) -> None:
    """Have Transformers generate, with what watches it."""
    torch.manual_seed(sampling.seed)
    padding = model.generation_config.pad_token_id
    if padding is None:
        ends = model.generation_config.eos_token_id
        padding = ends[0] if isinstance(ends, list) else ends
    ids = torch.tensor([prompt], device=model.device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sampling.max_new_tokens,
        num_beams=1,
        use_cache=True,
        cache_implementation=None,
        prefill_chunk_size=chunk_size(model),
        pad_token_id=padding,
        streamer=_Stopwatch(run, on_token),
        logits_processor=[_Margins(run)],
        **sampling.generate_arguments(),
    )


class _Reading:
    """Looks at each forward pass: how far the prompt is, in what time, and into what cache.

    `tokens` have been read by now, into `cache`, which is None before the first pass and for a
    model that makes none.
    """

    def __init__(self, run: Run, on_prefill: OnPrefill | None) -> None:
        self.run, self.on_prefill = run, on_prefill
        self.cache: Any = None
        self.tokens = 0
        self.began = 0.0

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """While open, the model's passes are looked at."""
        hooks = [
            model.register_forward_pre_hook(self._before, prepend=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        try:
            if self.on_prefill is not None:
                self.on_prefill(0, self.run.prompt_tokens)
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, model: Any, args: Any) -> None:
        self.began = time.perf_counter()

    def _after(self, model: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        run, cache, read = self.run, output.get("cache"), given["input_ids"].shape[1]
        # a pass into another cache has begun anew, as Phi-3's where its short factors end
        self.tokens = read + (self.tokens if cache is self.cache else 0)
        self.cache = cache
        if run.prefill_tokens == run.prompt_tokens:
            return
        _synchronize(model)
        run.prefill_seconds += time.perf_counter() - self.began
        run.prefill_tokens += read
        if self.on_prefill is not None:
            self.on_prefill(run.prefill_tokens, run.prompt_tokens)


class _Stopwatch:
    """A streamer that times each token; Transformers calls `put` with the prompt first."""

    def __init__(self, run: Run, on_token: OnToken | None) -> None:
        self.run, self.on_token = run, on_token
        self.prompt_seen = False
        self.began = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        now = time.perf_counter()
        self.run.decode_seconds.append(now - self.began)
        token = int(value.item())
        self.run.tokens.append(token)
        if self.on_token is not None:
            self.on_token(token)
        # Showing the token is not decoding.
        self.began = time.perf_counter()

    def end(self) -> None:
        """Nothing is held back."""


class _Margins:
    """A logits processor that changes nothing and notes how clear each choice was."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        best, second = logits[0].topk(2).values.tolist()
        self.run.margins.append(Margin(best, best - second))
        return logits


def _out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no type of its own for this.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
