import mmap

import numpy as np
import pytest

from runtime.memory import keep_freed_memory, own_pages, return_freed_memory


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


@pytest.mark.parametrize("has_glibc", [True, False])
def test_freed_memory_is_kept_and_returned_where_there_is_glibc(
    has_glibc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, int]] = []

    class Library:
        def __init__(self, name: str) -> None:
            if not has_glibc:
                raise OSError(f"{name}: cannot open shared object file")

        def mallopt(self, parameter: int, value: int) -> None:
            asked.append((parameter, value))

        def malloc_trim(self, pad: int) -> None:
            asked.append(("trim", pad))

    monkeypatch.setattr("ctypes.CDLL", Library)
    keep_freed_memory(one_arena=True)
    return_freed_memory()
    expected = [(-3, 2**30), (-1, 2**31 - 1), (-8, 1), ("trim", 0)]
    assert asked == (expected if has_glibc else [])
