"""What several processes bring on one machine, against one process with as many threads.

    python benchmarks/ranks.py                    two processes on the CPU, about a minute
    python benchmarks/ranks.py --processes 4

train    steps of the default model, bfloat16; the pairs of a batch are shared
scene    predict.py on a pair of GeoTIFFs, from reading to polygons; the windows are shared

Both kinds of processes live all the time, and wait while the others work. On a CPU they share the
same cores, so all there is to win is what threads lose by waiting for each other; on several GPUs
it would be another chip a process, which this does not measure.
"""

import os
import shutil
import socket
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measure
import torch
from measure import Work
from scene import write_scene
from train_step import batch_of, ours, train

from mapping.maps import Kinds
from mapping.scenes import ScenePair
from predict import Config, job_of
from runtime import distributed
from runtime.distributed import share, world_size
from runtime.sync_batch_norm import synchronize

SCENE_SIDE = 1536  # four windows of 512 in each of four strips
KINDS = Kinds.of("change", 1, {})


class Processes:
    """Some processes that wait for the name of a work, and do it together.

    Args:
        number: of them.
        threads: of each.
        batch: pairs of a training step, of all together.
        size: side of a patch.
        side: of the scene in `folder`.
        folder: holds before.tif and after.tif.
    """

    def __init__(
        self, number: int, threads: int, batch: int, size: int, side: int, folder: Path
    ) -> None:
        context = torch.multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.connections, self.processes = [], []
        for rank in range(number):
            here, there = context.Pipe()
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads,
            }  # fmt: skip
            arguments = (there, environment, threads, batch, size, side, folder)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.connections.append(here)
            self.processes.append(process)

    def work(self, name: str) -> Work:
        """Return what does a work once, and says how much it was."""

        def work() -> float:
            for connection in self.connections:
                connection.send(name)
            return sum(connection.recv() for connection in self.connections)

        return work

    def end(self) -> None:
        """Let the processes go."""
        for connection in self.connections:
            connection.send("")
        for process in self.processes:
            process.join()


def _serve(
    connection: Connection,
    environment: dict[str, Any],
    threads: int,
    batch: int,
    size: int,
    side: int,
    folder: Path,
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})

    def script() -> None:
        torch.set_num_threads(threads)
        works = {"train": _training(batch, size), "scene": _prediction(side, folder)}
        while name := connection.recv():
            connection.send(works[name]())

    distributed.run(script)


def _training(batch: int, size: int) -> Work:
    """Return one step; it says how many pairs this process had."""
    device = torch.device("cpu")
    torch.manual_seed(0)
    model = ours()
    synchronize(model)
    return train(model, device, batch_of(len(share(range(batch))), size, device), 1)


def _prediction(side: int, folder: Path) -> Work:
    """Return the prediction of the scene; it says how many megapixels this process wrote."""
    model = ours()
    pair = ScenePair("scene", folder / "before.tif", folder / "after.tif")
    config = Config("", "", "", amp="bf16", output_dir=str(folder / f"of-{world_size()}"))
    job = job_of(config, model, KINDS)

    def work() -> float:
        with redirect_stdout(StringIO()):
            mapped = job.run([pair], shared=world_size() > 1)
        return side**2 / 1e6 if mapped else 0.0

    return work


def main() -> None:
    parser = measure.parser(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--processes", type=int, default=2, help="with one thread each")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step (default: 8)")
    parser.add_argument("--size", type=int, default=256, help="side of a patch (default: 256)")
    parser.add_argument("--side", type=int, default=SCENE_SIDE, help="of the scene")
    arguments = parser.parse_args()
    device, number = torch.device("cpu"), arguments.processes
    folder = Path(tempfile.mkdtemp())
    try:
        write_scene(folder, arguments.side)
        about = (arguments.batch, arguments.size, arguments.side, folder)
        kinds = {
            f"1 process, {number} threads": Processes(1, number, *about),
            f"{number} processes, 1 thread each": Processes(number, 1, *about),
        }
        results: dict[str, Any] = dict(zip(("batch", "size", "side"), about, strict=False))
        for work, unit in (("train", "pairs/s"), ("scene", "megapixels/s")):
            works = {name: processes.work(work) for name, processes in kinds.items()}
            results[work] = measure.alternate(works, device, arguments.rounds)
            measure.show(results[work], unit)
        for processes in kinds.values():
            processes.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    measure.save("ranks", results, arguments)


if __name__ == "__main__":
    main()
