"""One generation, recorded: `model.generate` itself, watched, with its timings as data."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headwise.errors import CapacityError, ShapeError
from headwise.generation.answer import Answer, Margin
from headwise.generation.attention import Remember, select_attention
from headwise.generation.chunks import chunk_size
from headwise.generation.options import Sampling
from headwise.hf import cache_nbytes, read_nbytes
from headwise.hf.rotation import forget_length
from headwise.hf.stock_names import CACHE

# Bytes of logits that an answer keeps.
_MOST_LOGITS = 2**28

OnToken = Callable[[int], None]
OnPrefill = Callable[[int, int], None]


def generate(
    model: Any,
    prompt: list[int],
    *,
    attention: str = "headwise",
    cache: str = "contiguous",
    cache_limit: str | int | None = None,
    sparse: str | None = None,
    remember: Remember = None,
    context_parallel: Any = None,
    sampling: Sampling | None = None,
    keep_logits: bool = False,
    on_prefill: OnPrefill | None = None,
    on_token: OnToken | None = None,
) -> Answer:
    """Answer one prompt with one attention, from a fresh cache or what is remembered.

    The tokens are those of `model.generate` on a model that has just been loaded. The prompt is
    read as `chunk_size` says: with stock attention as `model.generate` reads it.

    `on_prefill(done, total)` is called as the prompt is read, `on_token(token)` with each new token
    as it comes. A KeyboardInterrupt ends the answer, which keeps what it has so far. `cache`,
    `cache_limit`, `sparse`, `remember` and `context_parallel` are for headwise, as
    `headwise.attach` takes them.
    `keep_logits`: the answer keeps the logits of its tokens, as far as they fit.

    Raises:
        ShapeError: an empty prompt.
        UnsupportedError: the model cannot use that attention, or that cache.
        CapacityError: the device ran out of memory.
    """
    if not prompt:
        raise ShapeError("the prompt has no tokens; give some text")
    layers = select_attention(
        model,
        attention,
        cache,
        cache_limit=cache_limit,
        sparse=sparse,
        remember=remember,
        context_parallel=context_parallel,
    )
    attachment = model.__dict__.get("_headwise")
    layout = None if attachment is None else attachment.sparse
    said = "" if layout is None else str(layout.choice)
    ranks = getattr(attachment and attachment.choice, "ranks", None)
    answer = Answer(attention, layers, len(prompt), said, 1 if ranks is None else ranks.count)
    recorder = _Recorder(answer, on_prefill, on_token, keep_logits)
    forget_length(model)
    try:
        # Not inference_mode: its tensors could not be appended to in place by generate.
        with torch.no_grad(), recorder.watching(model):
            _generate(model, prompt, recorder, sampling or Sampling())
    except KeyboardInterrupt:
        answer.interrupted = True
    except RuntimeError as error:
        # The CPU's allocator has no type of its own for this.
        if not isinstance(error, torch.OutOfMemoryError) and (
            "can't allocate memory" not in str(error)
        ):
            raise
        raise CapacityError(
            f"{model.device} ran out of memory after {answer.prefill_tokens} of {len(prompt)} "
            f"prompt tokens and {len(answer.tokens)} new ones; shorten the context or use --dtype "
            "bfloat16"
        ) from error
    if recorder.cache is not None:
        answer.cache_bytes = cache_nbytes(recorder.cache)
        answer.read_bytes = read_nbytes(recorder.cache)
    else:
        answer.cache_tokens = 0
    return answer


def _generate(model: Any, prompt: list[int], recorder: "_Recorder", sampling: Sampling) -> None:
    """Have Transformers generate, with what records it."""
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
        streamer=recorder,
        logits_processor=[recorder],
        **sampling.generate_arguments(),
    )


class _Recorder:
    """Notes in an answer what each forward pass, each choice and each token of `generate` is.

    `cache` is what the last pass wrote to; None before the first and for a model that makes none.
    """

    def __init__(
        self,
        answer: Answer,
        on_prefill: OnPrefill | None,
        on_token: OnToken | None,
        keep_logits: bool,
    ) -> None:
        self.answer, self.on_prefill, self.on_token = answer, on_prefill, on_token
        self.keep_logits = keep_logits
        self.cache: Any = None
        self.prompt_seen = False

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """While open, the model's passes are looked at."""
        hooks = [
            model.register_forward_pre_hook(self._before, prepend=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        try:
            if self.on_prefill is not None:
                self.on_prefill(0, self.answer.prompt_tokens)
            self.token_began = time.perf_counter()
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, model: Any, args: Any) -> None:
        attachment = model.__dict__.get("_headwise")
        if (
            attachment is not None
            and attachment.remembered is not None
            and not self.answer.prefill_tokens
        ):
            self.answer.known_tokens = attachment.remembered.known
        self.pass_began = time.perf_counter()

    def _after(self, model: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        answer, cache, read = self.answer, output.get(CACHE), inputs["input_ids"].shape[1]
        # a pass into another cache has restarted, as Phi-3's where its short factors end
        before = answer.known_tokens if self.cache is None else 0
        answer.cache_tokens = read + (answer.cache_tokens if cache is self.cache else before)
        self.cache = cache
        if answer.known_tokens + answer.prefill_tokens == answer.prompt_tokens:
            return
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        answer.prefill_seconds += time.perf_counter() - self.pass_began
        answer.prefill_tokens += read
        if self.on_prefill is not None:
            done = answer.known_tokens + answer.prefill_tokens
            self.on_prefill(done, answer.prompt_tokens)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """As a logits processor: change nothing, and note how clear the choice is."""
        best, second = logits[0].topk(2).values.tolist()
        self.answer.margins.append(Margin(best, best - second))
        kept = self.answer.logits
        if self.keep_logits and (len(kept) + 1) * logits.shape[1] * 4 <= _MOST_LOGITS:
            kept.append(logits[0].float().cpu())
        return logits

    def put(self, value: Tensor) -> None:
        """As a streamer: time each token; Transformers begins with the prompt."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.answer.decode_seconds.append(time.perf_counter() - self.token_began)
        token = int(value.item())
        self.answer.tokens.append(token)
        if self.on_token is not None:
            self.on_token(token)
        # Showing the token is not decoding.
        self.token_began = time.perf_counter()

    def end(self) -> None:
        """As a streamer: nothing is held back."""
