"""Processes of torch.distributed for tests: started once, asked many times, always taken away."""

import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

# Seconds after which a test has hung.
_HUNG = 120.0


class Group:
    """Processes that run functions together; `run` gives what each of them returned.

    Functions are of a module, with arguments that pickle. An error comes back as it was raised.
    """

    def __init__(self, count: int, *, timeout: float = 60.0, block: int | None = None) -> None:
        # what is imported here once is forked from there on: seconds for each process
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["headwise.hf", "torch.distributed"])
        self.folder = tempfile.TemporaryDirectory(prefix="headwise-test-ranks-")
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            arguments = (rank, count, f"{self.folder.name}/store", timeout, block, there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def begin(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Have all processes run a function."""
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))

    def result(self, rank: int) -> Any:
        """What the function returned in one of them, or the error that it raised there."""
        if not self.pipes[rank].poll(_HUNG):
            raise TimeoutError(f"rank {rank} has not answered")
        result: Any = self.pipes[rank].recv()
        return result

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What the function returned in each; raises the first error."""
        self.begin(function, *args, **kwargs)
        results = [self.result(rank) for rank in range(len(self.pipes))]
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def kill(self, rank: int) -> None:
        """End one of them at once."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self.processes[rank].join()

    def __enter__(self) -> "Group":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, count: int, store: str, timeout: float, block: int | None, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if block is not None:
        from headwise.caches import split

        split.BLOCK = block
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        function, args, kwargs = pipe.recv()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - the test raises it
            error.add_note(traceback.format_exc())
            result = error
        pipe.send(result)
