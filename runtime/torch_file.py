"""Read what `torch.save` wrote, whoever did: no code runs, no memory beyond the file's size."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


def read_torch_file(path: Path, *, checked: bool) -> Any:
    """Return the content of a file, its tensors on the CPU.

    Args:
        path: of a file that is there.
        checked: refuse files without check sums, as torch wrote before 1.6.

    Raises:
        ValueError: it cannot be read, with the reason in a line.
    """
    try:
        if checked or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch packs nothing, so whatever unpacks to more is a bomb
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise zipfile.BadZipFile("it holds more than its size")
                if damaged := archive.testzip():  # torch.load does not look at the check sums
                    raise zipfile.BadZipFile(f"{damaged} fails its check sum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's message tells how to load the file nevertheless, in bold: that runs its code
        raise ValueError("it is damaged, or holds more than tensors and plain values") from None
    except Exception as error:
        # zipfile and torch.load raise a dozen types for hostile files; none may reach the user
        raise ValueError(
            (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        ) from None
