import mmap

import numpy as np
import pytest

from runtime.memory import own_pages


def test_arrays_of_their_own_pages_are_arrays_like_others() -> None:
    small, large = own_pages((2, 3), np.float32), own_pages((3, 1024, 1024), np.uint8)
    for array in (small, large):
        array[...] = 7
        assert array.sum() == 7 * array.size
    assert (small.dtype, large.dtype) == (np.float32, np.uint8)


def test_no_memory_for_pages_is_no_error_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(MemoryError, match="no memory for 64 MB"):
        own_pages((64, 1024, 1024), np.uint8)
