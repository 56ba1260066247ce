"""Signs of life: a bar on a terminal, elsewhere a line every half a minute."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SILENCE = 30  # seconds between two lines


class Bar(tqdm):
    """Progress through `items`, or of what `update` counts; the arguments are tqdm's.

    A log gets lines instead of a bar: "epoch 2/30: 40 % of 100 batches, 00:31 passed, 00:46 left".
    """

    def __init__(self, items: Iterable[Any] | None = None, desc: str = "", **more: Any) -> None:
        if not sys.stderr.isatty():
            more |= {"mininterval": SILENCE, "maxinterval": 2 * SILENCE, "delay": SILENCE}
            more |= {"smoothing": 0}  # an average over the whole, not the last seconds
            more["bar_format"] = (
                "{desc}: {percentage:.0f} % of {total_fmt} {unit}, {elapsed} passed, "
                "{remaining} left{postfix}"
            )
        super().__init__(items, desc, leave=False, **more)

    def close(self) -> None:
        """End; a log keeps its lines."""
        if not sys.stderr.isatty():
            self.last_print_t = 0.0  # for tqdm as if nothing had been shown: nothing to wipe out
        super().close()

    @staticmethod
    def status_printer(file: TextIO) -> Any:
        """Return what shows the bar's text; see tqdm."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: text.strip() and print(text, file=file, flush=True)


def duration(seconds: float) -> str:
    """Return a time as people say it: "45 s", "12 min", "3 h 05 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
