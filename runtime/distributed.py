"""One process, or several that torchrun starts: the same calls, which do nothing in the one.

    torchrun --standalone --nproc-per-node 2 main.py        shares each batch
    torchrun --standalone --nproc-per-node 2 evaluate.py    shares the images
    torchrun --standalone --nproc-per-node 2 predict.py     shares the scenes, or windows of one

Every process runs the whole script on its share. Rank 0 alone decides and prints; it alone writes,
but for scenes, which are written where they are mapped. On a GPU, sums go through NCCL, and what
the processes agree on through gloo: no step waits for the device.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.errors import run_script
from runtime.start import usable_cores

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # with rank 0, which may decode a whole dataset before the rest begin


def rank() -> int:
    """Return this process's number among all; 0 decides, writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes there are, on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int | None:
    """Return this process's number on its machine, None where there is one process."""
    return int(os.environ.get("LOCAL_RANK", rank())) if world_size() > 1 else None


def local_world_size() -> int:
    """Return how many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part: each item falls to one process, in order, as even as can be."""
    first, end = (len(items) * (rank() + i) // world_size() for i in (0, 1))
    return items[first:end]


def all_reduce_(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def summand(total: Tensor) -> Tensor:
    """Return this process's part of a sum: all of it at rank 0, 0 elsewhere."""
    return total if rank() == 0 else torch.zeros_like(total)


def agree(*values: int) -> tuple[int, ...]:
    """Return the largest of each value over all processes; they wait for each other."""
    if world_size() == 1:
        return values
    largest = torch.tensor(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def wait_for_all() -> None:
    """Wait until every process is here."""
    agree(0)


def from_rank_0(make: Callable[[], T]) -> T:
    """Call this at rank 0 alone and give the result to all."""
    if world_size() == 1:
        return make()
    box: list = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def gather(item: T) -> list[T]:
    """Return every process's item, by rank."""
    if world_size() == 1:
        return [item]
    items: list = world_size() * [None]
    dist.all_gather_object(items, item)
    return items


@contextmanager
def in_turn() -> Iterator[None]:
    """Let rank 0 go first, then one process of each other machine, then the rest.

    So what is made or fetched here is made once per disk; who comes later finds it.
    """
    turn = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        wait_for_all()
    yield
    for _ in range(turn, 2):
        wait_for_all()


def parallel(model: nn.Module, device: torch.device, *, has_idle_weights: bool) -> nn.Module:
    """Return what to call in training: gradients become means over the processes.

    All weights become those of rank 0. The state dict to save is still that of `model`.

    Args:
        model: where it shall learn, on `device`.
        device: one for each process.
        has_idle_weights: some weights may learn, yet take no part in the logits.
    """
    if world_size() == 1:
        return model
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    # from here on buffers are alike, see sync_batch_norm.py; torch 2.14 calls the option anew
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
    options: dict[str, Any] = {sync_buffers: False}
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        **options,
        gradient_as_bucket_view=True,
        find_unused_parameters=has_idle_weights,
    )


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which gradients add up in each process alone."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def launch_id() -> str | None:
    """Return what all attempts of one torchrun have in common, None without torchrun."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"parent-{os.getppid()}" if launch == "none" else launch


def is_restarted() -> bool:
    """Whether torchrun has started this process again, after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def run(script: Callable[[], object]) -> int:
    """Run a script's body, in as many processes as torchrun has started, and return an exit code.

    Of several processes the first to end says why. The others lose their connection to it, or hear
    SIGTERM from torchrun, and end in silence.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return run_script(script)
    store, number, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    # what an earlier attempt left there, such as addresses, is not for this one
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.set_num_threads(_threads())
    dist.init_process_group(
        backend, store=store, rank=number, world_size=size, timeout=PATIENCE
    )  # not through the environment: the store is needed below

    def is_first() -> bool:
        try:
            return store.add("ended", 1) == 1
        except RuntimeError:  # torchrun has gone, and its store with it
            return True

    if number > 0:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    try:
        code = run_script(script, is_first)
    except Exception as error:
        if not _is_lost_connection(error):
            is_first()
            raise
        if is_first():
            print(
                f"error: rank {number} lost another process, which was killed or whose machine is "
                "gone; start again, main.py with --resume or by torchrun's --max-restarts",
                file=sys.stderr,
            )
        return 1
    if code == 0:
        wait_for_all()
        dist.destroy_process_group()
    return code


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _threads() -> int:
    """Return PyTorch's threads: the usable cores shared, unless OMP_NUM_THREADS was given.

    torchrun sets it to 1 where it was not, so what counts is what torchrun itself was given.
    """
    given = os.environ.get("OMP_NUM_THREADS", "1")
    if given != "1":
        return torch.get_num_threads()
    with suppress(OSError):  # not Linux
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        if b"OMP_NUM_THREADS=1" in environment:
            return 1
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
