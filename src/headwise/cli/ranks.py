"""A command as several processes of this machine that share its contexts."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from headwise.errors import OptionError, RankError

# Seconds that a rank waits for the others: loading a model, or reading a chunk of a prompt.
TIMEOUT = 300.0
# Seconds that the first one has to say what happened, once another has ended, and the reverse.
_GRACE = 10.0
_MOST = 64
_PROCESS = "from headwise.cli.ranks import run_rank; run_rank()"


def run_ranks(
    count: int, command: Callable[..., int], arguments: dict[str, Any], timeout: float = TIMEOUT
) -> int:
    """Run `command(**arguments, ranks=group)` in so many processes; the first one's exit code.

    Each has its share of the machine's threads. The first alone writes to stdout and stderr.

    Raises:
        OptionError: no such number of processes.
        RankError: one has ended without the first one saying so.
    """
    if not 2 <= count <= _MOST:
        raise OptionError(f"--context-parallel is {count}, expected 1 to {_MOST} processes")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="headwise-ranks-") as folder:
        place = (count, max(1, cores // count), f"file://{folder}/store", timeout)
        try:
            for rank in range(count):
                said = None if rank == 0 else subprocess.DEVNULL
                started = subprocess.Popen(
                    [sys.executable, "-c", _PROCESS],
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=said,
                )
                ranks.append(started)
                assert started.stdin is not None
                pickle.dump((rank, *place, command, arguments), started.stdin)
                started.stdin.flush()  # and stays open: it ends when this process does
            return _wait_for(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def _wait_for(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first rank."""
    failed, deadline = 0, None
    while ranks[0].poll() is None and (deadline is None or time.monotonic() < deadline):
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:  # the first rank has it too, and says so
            continue
        if deadline is None:
            failed = next((rank for rank, each in enumerate(ranks) if each.poll()), 0)
            deadline = time.monotonic() + _GRACE if failed else None
    code = ranks[0].poll()
    if code is None or code < 0:
        rank = failed if code is None else 0
        raise RankError(f"rank {rank} of {len(ranks)} has ended (exit code {ranks[rank].poll()})")
    deadline = time.monotonic() + _GRACE
    while any(each.poll() is None for each in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    return code


def run_rank() -> None:
    """One of the processes: what it runs comes on stdin, at whose end it ends."""
    from headwise.cli import guarded

    rank, count, threads, store, timeout, command, arguments = pickle.load(sys.stdin.buffer)
    if rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the first one
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)

    def joined() -> int:
        wait = timedelta(seconds=timeout)
        try:
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=count, timeout=wait
            )
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise RankError(f"the {count} processes did not come together: {reason}") from error
        code: int = command(**arguments, ranks=dist.group.WORLD)
        if code == 0:  # else the others may not answer, and it would wait for them
            dist.destroy_process_group()
        return code

    code = guarded(joined)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
