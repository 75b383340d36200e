"""One generation, measured: prefill in chunks, then decode token by token, timings as data.

The cache is made by the attention that is measured, in the first chunk, and both phases run the
same way for every attention, so that two runs can be compared.
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from headwise.errors import CapacityError, ShapeError
from headwise.generation.attention import Mechanism, select_attention
from headwise.generation.options import Sampling

CHUNK = 512

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

    `decode_seconds` has one entry a token, the first one with the set-up of the loop in it.
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
    ids = torch.tensor([prompt], device=model.device)
    held = None
    try:
        # Not inference_mode: its tensors could not be appended to in place by generate.
        with torch.no_grad():
            held = _prefill(model, ids, run, on_prefill)
            held = _decode(model, ids, held, run, chosen, on_token)
    except KeyboardInterrupt:
        run.interrupted = True
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise CapacityError(
            f"{model.device} ran out of memory after {run.prefill_tokens} of {len(prompt)} prompt "
            f"tokens and {len(run.tokens)} new ones; shorten the context or use --dtype bfloat16"
        ) from error
    if held is not None:
        from headwise.hf import cache_nbytes

        run.cache_tokens = int(held.get_seq_length())
        run.cache_bytes = cache_nbytes(held)
    return run


def _prefill(model: Any, ids: torch.Tensor, run: Run, on_prefill: OnPrefill | None) -> Any:
    """Read all prompt tokens but the last, which generate needs for its first step.

    ids: [1, S]. Returns the cache of S - 1 tokens, None for S = 1.
    """
    parameters = inspect.signature(model.forward).parameters
    # "cache" since Transformers 5.2x; custom models keep the old name.
    name = "cache" if "cache" in parameters else "past_key_values"
    keep = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    cache, total = None, ids.shape[1] - 1
    if on_prefill is not None and total:
        on_prefill(0, total)
    for start in range(0, total, CHUNK):
        chunk = ids[:, start : min(start + CHUNK, total)]
        began = time.perf_counter()
        output = model(input_ids=chunk, use_cache=True, **{name: cache}, **keep)
        cache = output[name]
        _synchronize(model)
        run.prefill_seconds += time.perf_counter() - began
        run.prefill_tokens += chunk.shape[1]
        if on_prefill is not None:
            on_prefill(run.prefill_tokens, total)
    return cache


def _decode(
    model: Any,
    ids: torch.Tensor,
    cache: Any,
    run: Run,
    sampling: Sampling,
    on_token: OnToken | None,
) -> Any:
    """Generate from the last prompt token on; returns the cache."""
    torch.manual_seed(sampling.seed)
    extra = {} if cache is None else {"cache": cache}
    padding = model.generation_config.pad_token_id
    if padding is None:
        ends = model.generation_config.eos_token_id
        padding = ends[0] if isinstance(ends, list) else ends
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sampling.max_new_tokens,
        num_beams=1,
        cache_implementation=None,
        pad_token_id=padding,
        streamer=_Stopwatch(run, on_token),
        logits_processor=[_Margins(run)],
        return_dict_in_generate=True,
        **sampling.generate_arguments(),
        **extra,
    )
    return output.cache


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
