"""`headwise generate`: text from a model, and what it took."""

import itertools
import secrets
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headwise.base.console import harmless
from headwise.cli import options
from headwise.cli.documented import documented
from headwise.cli.options import Weights, weights_of
from headwise.cli.terminal import screen

if TYPE_CHECKING:
    from headwise.generation import Answer
    from headwise.generation.options import Sampling
    from headwise.generation.session import Session

Attention = Literal["headwise", "sdpa", "eager"]
Other = Literal["headwise", "dense", "sdpa", "eager"]


@documented
def generate(
    model: options.Model = None,
    *,
    named: options.Named = None,
    prompt: str,
    document: Path | None = None,
    context: options.OldDocument = None,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: Attention = "headwise",
    cache: str = "contiguous",
    cache_limit: str | None = None,
    sparse: str | None = None,
    remember: bool = False,
    weights: Weights = "auto",
    context_parallel: int = 1,
    against: Other | None = None,
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> int:
    """Generate text and show the mechanism, speed and cache of the attention that ran.

    Args:
        prompt: The text to continue.
        document: A text file to put in front of the prompt.
        chat: Use the model's chat template.
        max_new_tokens: Tokens to generate at most.
        temperature: 0 takes the most likely token; above, sample.
        top_p: Sample among the most likely tokens of this total probability.
        seed: Seed of the sampling. Default: a new one.
        attention: What computes the attention.
        cache: headwise's cache: contiguous, paged, paged:64, int8, int8:64, int4, int4:64,
            window:2048, window:2048,sinks=4, or disk:FOLDER, in files there, for contexts that are
            larger than memory.
        cache_limit: What a cache on disk may have in memory, as 4GB. Default: what the system has.
        sparse: Have a query of a step see those keys alone that weigh most: topk:1024, or
            topp:0.95,min=256,max=4096; behind either sinks=4, recent=64, dense=2. Of a cache on
            disk topk:1024 is the default, and all has a query see all keys.
        remember: Go on from what was read before, and store what is read now, in the user's cache
            folder: see headwise remember. Stored text can be read by whoever reads that folder.
        weights: Of a .gguf file: packed, which are multiplied in the file's own blocks, or float,
            dequantised. auto packs them where headwise runs alone on a CPU.
        context_parallel: Processes of this machine that share the context, each with a part of the
            cache and of the cores.
        against: Run the prompt again with this one and compare; dense is headwise without --sparse.
    """
    from headwise.base.units import limit
    from headwise.caches import CacheChoice
    from headwise.errors import OptionError
    from headwise.generation.options import Sampling
    from headwise.generation.text import read_document
    from headwise.loading.options import find_device
    from headwise.spec import SparseChoice

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=secrets.randbits(31) if seed is None else seed,
    )
    if against == attention:
        raise OptionError(f"--against {against} is what --attention is; choose another")
    most = None if cache_limit is None else limit("cache_limit", cache_limit)
    if CacheChoice.parse(cache, most) != CacheChoice() and "headwise" not in (
        attention,
        against,
    ):
        raise OptionError(f"--cache {cache} is for headwise, and only {attention} was to run")
    if sparse is not None and attention != "headwise":
        raise OptionError(f"--sparse is for headwise, and --attention is {attention}")
    if against == "dense" and sparse is None:
        raise OptionError("--against dense is headwise without --sparse, which is not given")
    if sparse not in (None, "all"):
        SparseChoice.parse(sparse)
    if remember and attention != "headwise":
        raise OptionError(f"--remember is for headwise, and --attention is {attention}")
    if context_parallel > 1 and attention != "headwise":
        raise OptionError(f"--context-parallel is for headwise, and --attention is {attention}")
    if context_parallel > 1 and (sparse is not None or remember):
        raise OptionError("--sparse and --remember need whole contexts: no --context-parallel")
    if context_parallel != 1 and find_device(device).type != "cpu":
        raise OptionError(
            "--context-parallel shares the cores of this machine: give --device cpu; for GPUs "
            "start a script of yours with torchrun, and attach with context_parallel"
        )
    file = options.the_document(document, context)
    model = options.the_model(model, named)
    weights = weights_of(
        weights, model, device, alone=attention == "headwise" and against in (None, "dense")
    )
    work: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "document": read_document(file) if file is not None else "",
        "chat": chat,
        "loading": {
            "dtype": dtype,
            "device": device,
            "trust_remote_code": trust_remote_code,
            "weights": weights,
        },
        "sampling": sampling,
        "attention": attention,
        "against": against,
        "as_json": as_json,
        "remember": remember,
        "how": {"cache": cache, "cache_limit": cache_limit, "sparse": sparse},
    }
    if context_parallel == 1:
        return _generate(**work)
    from headwise.cli.ranks import run_ranks

    return run_ranks(context_parallel, _generate, work)


def _generate(
    *,
    model: str | None,
    prompt: str,
    document: str,
    chat: bool,
    loading: dict[str, Any],
    sampling: "Sampling",
    attention: Attention,
    against: Other | None,
    as_json: bool,
    remember: bool,
    how: dict[str, Any],
    ranks: Any = None,
) -> int:
    """Load, run and show; in each of several processes, where `ranks` is their group."""
    from headwise.generation.session import Session
    from headwise.loading.options import LoadOptions
    from headwise.loading.progress import quiet_transformers

    with quiet_transformers(), screen(animated=True) as shown:
        shown("starting", 0, 0)
        session = Session.open(
            model,
            prompt,
            LoadOptions(**loading, progress=shown),
            sampling,
            document=document,
            chat=chat,
        )
    with quiet_transformers():
        run = partial(_run, session, how, compared=bool(how["sparse"] and against))
        runs = [run(attention, stream=not as_json, remember=remember, context_parallel=ranks)]
        if against is not None and not runs[0].interrupted:
            runs.append(run(against, stream=False))
    if as_json:
        options.print_json(session.report(runs))
    else:
        from headwise.cli.generate_table import show

        show(session, runs)
    return 130 if any(run.interrupted for run in runs) else 0


def _run(
    session: "Session",
    how: "dict[str, Any]",
    attention: str,
    *,
    compared: bool,
    stream: bool,
    remember: bool = False,
    context_parallel: Any = None,
) -> "Answer":
    """One measured run; its text goes to stdout as it comes, or its progress to stderr."""
    most, pieces = session.sampling.max_new_tokens, itertools.count(1)
    with screen(animated=False) as shown:

        def on_prefill(done: int, total: int) -> None:
            shown(f"{attention}: reading the prompt", done, total)

        def on_text(text: str) -> None:
            if stream:
                shown.close()  # the bar of a long prompt must not stand in the text
                sys.stdout.write(harmless(text))
                sys.stdout.flush()
            else:
                shown(f"{attention}: generating", min(next(pieces), most), most)

        run = session.run(
            attention,
            **how,
            remember=remember,
            context_parallel=context_parallel,
            keep_logits=compared and session.sampling.greedy,
            on_prefill=on_prefill,
            on_text=on_text,
        )
    if stream:
        sys.stdout.write("\n")
    return run
