"""One prompt on one loaded model, to be run with one attention or several and compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headwise.base.progress import Progress, silent
from headwise.errors import LoadError, SpecError
from headwise.generation.options import Sampling, check_length, context_limit
from headwise.generation.run import OnPrefill, Run, generate
from headwise.generation.text import TextStream, least_tokens, prompt_tokens
from headwise.loading.model_folder import ModelFolder
from headwise.loading.options import LoadOptions
from headwise.loading.source import demo_model, find_source
from headwise.spec import ModelSpec

OnText = Callable[[str], None]

# How far the logits of two right attentions may be apart, relative to the largest logit: what the
# rounding of a whole model's layers adds up to (docs/concepts/equality.md).
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass
class Session:
    """A loaded model with a prompt's tokens."""

    name: str
    model: Any
    tokenizer: Any
    prompt: list[int]
    sampling: Sampling

    @classmethod
    def open(
        cls,
        model: str | None,
        prompt: str,
        *,
        document: str = "",
        chat: bool = False,
        sampling: Sampling,
        dtype: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
        progress: Progress = silent,
    ) -> "Session":
        """Load a model (None: the demo model), after checking that prompt and answer fit it.

        Raises:
            LoadError: no such model, or not one that is safe to read.
            ShapeError: prompt and answer are longer than the model's context.
            CapacityError: weights and cache would not fit in memory.
        """
        options = LoadOptions(
            dtype=dtype,
            device=device,
            attention="eager",  # the one that every model has; a run selects its own
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        place = model if model is not None else demo_model()
        opened = ModelFolder.find(place, options)
        config, tokenizer = opened.config, opened.tokenizer
        check_decoder(place, config)
        limit = context_limit(config)
        if least := least_tokens(tokenizer, document):
            check_length(least, sampling.max_new_tokens, limit, at_least=True)
        tokens = prompt_tokens(tokenizer, prompt, document=document, chat=chat)
        check_length(len(tokens), sampling.max_new_tokens, limit)
        vocabulary = config.get_text_config(decoder=True).vocab_size
        if max(tokens, default=0) >= vocabulary:
            raise LoadError(
                f"{place}: its tokenizer made token {max(tokens)} and the model has {vocabulary}: "
                "they are not of one model"
            )
        loaded = opened.load(context=len(tokens) + sampling.max_new_tokens)
        progress("warming up", 0, 0)
        _warm_up(loaded, tokens[:32])
        return cls(find_source(place).name, loaded, tokenizer, tokens, sampling)

    def run(
        self,
        attention: str,
        *,
        cache: str = "contiguous",
        on_prefill: OnPrefill | None = None,
        on_text: OnText | None = None,
    ) -> Run:
        """Run the prompt with one attention; `on_text` gets the answer's text, a piece a token.

        `cache` is for headwise, by the names that `headwise.attach` takes.
        """
        stream = TextStream(self.tokenizer)

        def on_token(token: int) -> None:
            if on_text is not None:
                on_text(stream.push(token))

        run = generate(
            self.model,
            self.prompt,
            attention=attention,
            cache=cache,
            sampling=self.sampling,
            on_prefill=on_prefill,
            on_token=on_token,
        )
        if on_text is not None and (rest := stream.finish()):
            on_text(rest)
        return run

    def text(self, run: Run) -> str:
        """A run's answer as text."""
        return str(self.tokenizer.decode(run.tokens, skip_special_tokens=True))

    def report(self, runs: list[Run]) -> dict[str, Any]:
        """The runs as plain data, for JSON; times in seconds, sizes in bytes."""
        return {
            "model": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "prompt_tokens": len(self.prompt),
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed,
            "runs": [self._run_report(run) for run in runs],
            "identical": identical(runs),
            "first_difference": self._difference_report(runs),
        }

    def near_tie(self, runs: list[Run], at: int) -> bool:
        """Whether every run found its choice of token `at` too close to call in its dtype."""
        tolerance = LOGIT_TOLERANCE.get(self.model.dtype, 0.0)
        at_token = [run.margins[at] for run in runs if at < len(run.margins)]
        return all(margin.lead <= tolerance * abs(margin.best) for margin in at_token)

    def _difference_report(self, runs: list[Run]) -> dict[str, Any] | None:
        at = (
            None
            if identical(runs) is not False
            else first_difference(runs[0].tokens, runs[1].tokens)
        )
        if at is None:
            return None
        return {"token": at, "near_tie": self.near_tie(runs, at)}

    def _run_report(self, run: Run) -> dict[str, Any]:
        return {
            "attention": run.attention,
            "layers": [
                {
                    "count": each.layers,
                    "mechanism": each.mechanism,
                    "backend": each.backend,
                    "cache": each.cache,
                    "others": [{"backend": name, "reason": why} for name, why in each.others],
                }
                for each in run.mechanisms
            ],
            "text": self.text(run),
            "tokens": run.tokens,
            "prefill": {
                "tokens": run.prefill_tokens,
                "seconds": run.prefill_seconds,
                "tokens_per_second": run.prefill_rate,
            },
            "decode": {
                "tokens": len(run.tokens),
                "seconds": sum(run.decode_seconds),
                "tokens_per_second": run.decode_rate,
                "median_seconds_per_token": run.decode_median,
            },
            "cache": {
                "tokens": run.cache_tokens,
                "bytes": run.cache_bytes,
                "bytes_per_token": run.cache_bytes_per_token,
            },
            "interrupted": run.interrupted,
        }


def check_decoder(place: str, config: Any) -> None:
    """Refuse what does not write text token after token."""
    if config.is_encoder_decoder:
        raise LoadError(
            f"{place} is an encoder-decoder ({config.model_type}); the command needs a decoder. In "
            "Python headwise.attach works on it"
        )
    try:
        writes = bool(ModelSpec.from_config(config).layers)
    except SpecError:
        return  # a family without a reader
    if not writes:
        raise LoadError(
            f"{place} is an encoder ({config.model_type}) and writes no text; give a decoder"
        )


def _warm_up(model: Any, tokens: list[int]) -> None:
    """One forward pass, so that no measured run pays for what is done once.

    Weights are read from disk by their first use, and kernels are chosen by theirs.
    """
    with torch.no_grad():
        output = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    if not bool(output.logits.isfinite().all()):
        raise LoadError(
            f"the model's logits are not numbers in {str(model.dtype)[6:]}: its weights are "
            "damaged, or need another --dtype"
        )


def identical(runs: list[Run]) -> bool | None:
    """Whether two runs gave the same tokens; None without two whole runs."""
    if len(runs) < 2 or any(run.interrupted for run in runs):
        return None
    return all(run.tokens == runs[0].tokens for run in runs[1:])


def first_difference(first: list[int], second: list[int]) -> int | None:
    """The position of the first token that differs, None where there is none.

    >>> first_difference([5, 7, 11], [5, 7, 13]), first_difference([5], [5])
    (2, None)
    """
    for position, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return position
    return None if len(first) == len(second) else min(len(first), len(second))
