"""What it costs that waiting threads spin or sleep, on an idle machine and on a busy one.

    python benchmarks/threads.py
    python benchmarks/threads.py --rounds 3 -o threads.json

Each variant is a process of its own that makes training steps when its turn comes: of one thread,
of one for each core that spin while they wait (OpenMP's default), and of as many that sleep, as
`runtime/start.py` sets it. Busy: beside them, one process for each core computes without pause.
"""

import os
import subprocess
import sys
import time

import measure
from measure import Work

CORES = os.cpu_count() or 1
VARIANTS = {
    "sleeping threads (ours)": {"OMP_WAIT_POLICY": "passive"},
    "spinning threads": {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def learn(steps: int) -> None:
    """Make steps whenever a line comes in, and say how much CPU time they took."""
    import torch
    from train_step import batch_of

    from model import build_model

    model = build_model(backbone="resnet18", freeze_backbone=False)
    batch = batch_of(4, 128, torch.device("cpu"))
    for _ in sys.stdin:
        start = time.process_time()
        for _ in range(steps):
            model(*batch[:2]).square().mean().backward()
        print(time.process_time() - start, flush=True)


class Learner:
    """A process with threads as a variant says."""

    def __init__(self, environment: dict[str, str], steps: int) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        set_ones = {name: value for name, value in environment.items() if value}
        self.steps, self.cpu_seconds = steps, 0.0
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--learn", str(steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**inherited, **set_ones},
        )

    def work(self) -> float:
        """Let it make its steps."""
        assert self.process.stdin and self.process.stdout
        print(file=self.process.stdin, flush=True)
        self.cpu_seconds += float(self.process.stdout.readline())
        return float(self.steps)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--steps", type=int, default=1, help="in a turn (default: 1)")
    parser.add_argument("--learn", type=int, help="be one of the processes")
    arguments = parser.parse_args()
    if arguments.learn:
        learn(arguments.learn)
        return
    learners = {name: Learner(setting, arguments.steps) for name, setting in VARIANTS.items()}
    turns: dict[str, Work] = {name: learner.work for name, learner in learners.items()}
    results = {}
    for state in ("idle", "busy"):
        others = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for _ in range(CORES if state == "busy" else 0)
        ]
        for learner in learners.values():
            learner.cpu_seconds = 0.0
        table = measure.alternate(turns, measure.torch.device("cpu"), arguments.rounds)
        for other in others:
            other.kill()
        for name, row in table.items():
            row["cpu_seconds_per_step"] = learners[name].cpu_seconds / (
                arguments.steps * (arguments.rounds + 1)
            )
        print(state)
        measure.show(table, "steps/s")
        results[state] = table
    for learner in learners.values():
        learner.process.kill()
    load = os.getloadavg()[0]
    note = f"'idle' means that this benchmark added no load; load average at the end {load:.1f}"
    measure.save("threads", {**results, "note": note}, arguments)


if __name__ == "__main__":
    main()
