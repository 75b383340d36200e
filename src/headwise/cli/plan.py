"""`headwise plan`: what a model's cache costs, what fits, and how fast a token can come."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.cli.documented import documented
from headwise.cli.options import Json, Named, print_json, the_model
from headwise.cli.terminal import screen


@documented
def plan(
    model: str | None = None,
    *,
    named: Named = None,
    context: str | None = None,
    batch: int = 1,
    encoder_context: str | None = None,
    dtype: str | None = None,
    cache_dtype: str | None = None,
    sparse: str | None = None,
    ranks: int | None = None,
    link: str | None = None,
    memory: str | None = None,
    device: str | None = None,
    bandwidth: str | None = None,
    peak: str | None = None,
    plot: Path | None = None,
    verify: bool = False,
    as_json: Json = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Print the named models and devices and stop.")
    ] = False,
) -> int:
    """Say what a model's cache costs, before any weight is loaded.

    Args:
        model: A named model (see --list), a folder, a config.json, a .gguf file, a hub id, smollm2
            or minilm.
        context: Tokens, as 8192 or 128k. Default: the model's limit.
        batch: Sequences.
        encoder_context: The encoder's tokens, for cross-attention. Default: as --context.
        dtype: Of weights and cache: float32, bfloat16, float16 (or fp32, bf16, fp16). Default: the
            config's, else bfloat16.
        cache_dtype: Of the cache alone; int8 and int4 are headwise's own.
        sparse: How many keys a query of a step gets, as topk:1024 or topp:0.95,min=256,max=4096.
        ranks: Estimate a context that is spread over so many processes, each on such a device.
        link: Between them, as 10GB/s. Default: 0.6GB/s, which processes of one machine have.
        memory: What has to hold it, as 24GiB. Default: the device's.
        device: A device by name (see --list). Default: this machine, measured once as by headwise
            bench machine.
        bandwidth: Instead of the device's, as 50GB/s.
        peak: Instead of the device's, as 150GFLOP/s.
        plot: A .png or .svg file: cache against context for each mechanism.
        verify: Run the model's attention here and compare with what is predicted.
    """
    from headwise import planning
    from headwise.base import units
    from headwise.base.console import show
    from headwise.errors import OptionError
    from headwise.loading.progress import quiet_transformers
    from headwise.planning.tables import names_parts, plan_parts, verified_parts

    if listed:
        show(*names_parts())
        return 0
    model = the_model(model, named)
    if model is None:
        raise OptionError("no model is given; name one, as headwise plan llama-3-8b, or see --list")
    if plot is not None:
        from headwise.base.plot import check_plot

        check_plot(plot)
    if verify and sparse is not None:
        raise OptionError("--verify measures attention to all keys: leave --sparse out")
    if verify and device is not None:
        raise OptionError(f"--verify runs on this machine: leave --device {device} out")
    options: dict[str, Any] = {
        name.replace("-", "_"): None if text is None else read(f"--{name}", text)
        for name, text, read in (
            ("context", context, units.tokens),
            ("encoder-context", encoder_context, units.tokens),
            ("memory", memory, units.size),
            ("link", link, units.bandwidth),
            ("bandwidth", bandwidth, units.bandwidth),
            ("peak", peak, units.flops),
        )
    }
    with quiet_transformers(), screen(animated=False) as shown:
        planned = planning.plan(
            model,
            batch=batch,
            dtype=dtype,
            cache_dtype=cache_dtype,
            sparse=sparse,
            ranks=ranks,
            device=device,
            progress=shown,
            **options,
        )
        verified = planning.verify(planned, progress=shown) if verify else None
    if plot is not None:
        planning.write_plot(planned, plot)
    if as_json:
        fields = {} if verified is None else {"verified": verified.to_dict()}
        print_json(planned.to_dict() | fields)
    else:
        show(*plan_parts(planned))
        if verified is not None:
            show(*verified_parts(verified))
    return 0 if verified is None or verified.holds else 1
