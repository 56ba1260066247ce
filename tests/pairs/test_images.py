"""Files to arrays: one of each kind, compared with the plain file, and all that is broken."""

import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_helpers import mask_of, picture, png_bomb, save
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pairs.images import IGNORE, read_image, read_label, read_size
from pairs.labels import Classes, LabelEncoding, choose_encoding, label_values
from runtime.errors import UserError

RGB = picture(0, 17, 33)
GREY = RGB[..., 0]


def palette_image(indices: np.ndarray, colors: list[int]) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette(colors)
    return image


@pytest.mark.fault("D4")
@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), np.stack([GREY] * 3, axis=-1)),
        (Image.fromarray(np.dstack([GREY, GREY])), np.stack([GREY] * 3, axis=-1)),
        (Image.fromarray(np.dstack([RGB, GREY])), RGB),
        (Image.fromarray(mask_of(17, 33)).convert("1"), np.stack([mask_of(17, 33)] * 3, axis=-1)),
        (
            palette_image(mask_of(17, 33, 1), [10, 20, 30, 40, 50, 60]),
            np.array([[10, 20, 30], [40, 50, 60]], np.uint8)[mask_of(17, 33, 1)],
        ),
    ],
    ids=["RGB", "L", "LA", "RGBA", "1", "P"],
)  # fmt: skip
def test_images(tmp_path: Path, image: Image.Image, expected: np.ndarray) -> None:
    path = save(tmp_path / "x.png", image)
    assert np.array_equal(read_image(path), expected)
    assert read_size(path) == (17, 33)


@pytest.mark.fault("D4")
def test_a_transparent_palette(tmp_path: Path) -> None:  # Pillow would warn
    path = tmp_path / "x.png"
    palette_image(mask_of(8, 8, 1), [0, 0, 0, 9, 9, 9]).save(path, transparency=bytes([0, 128]))
    assert read_image(path).max() == 9
    assert set(np.unique(read_label(path))) == {0, 9}


@pytest.mark.fault("D4")
@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_images_that_are_converted(tmp_path: Path, mode: str) -> None:
    smooth = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (64, 64, 3))
    path = tmp_path / "x.jpg"
    Image.fromarray(np.ascontiguousarray(smooth)).convert(mode).save(path, quality=95)
    assert np.abs(read_image(path).astype(int) - smooth).max() < 12


@pytest.mark.fault("D4")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, ending: str) -> None:
    turned = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1), 7: RGB[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(RGB),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    Image.fromarray(RGB).save(path, exif=exif)
    assert np.array_equal(read_image(path), turned[orientation])
    assert read_size(path) == turned[orientation].shape[:2]


@pytest.mark.fault("D4")
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    path = save(tmp_path / "x.tif", Image.fromarray(GREY.astype(dtype) * 200))
    with pytest.raises(UserError, match=r"x\.tif.*8 bits"):
        read_image(path)


def broken(path: Path, kind: str) -> Path:
    whole = io.BytesIO()
    Image.fromarray(picture(1, 64, 64)).save(whole, "PNG")
    data = bytearray(whole.getvalue())
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "without an end":
        data = data[:60]
    elif kind == "empty":
        data.clear()
    elif kind == "HTML":
        data = bytearray(b"<!DOCTYPE html><html><body>Sign in to download</body></html>")
    elif kind == "bit-flipped":
        data[len(data) // 2] ^= 0x10
    elif kind == "a bomb":
        data = bytearray(png_bomb())
    path.write_bytes(data)
    return path


KINDS = ["truncated", "without an end", "empty", "HTML", "bit-flipped", "a bomb"]


@pytest.mark.fault("D3")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [read_image, read_label])
def test_broken_files_are_named(
    tmp_path: Path, kind: str, read: Callable[[Path], np.ndarray]
) -> None:
    path = broken(tmp_path / "some file.png", kind)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.fault("D3")
def test_every_truncation_of_a_file_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    whole = io.BytesIO()
    pixels = picture(2, 6, 6)
    Image.fromarray(pixels).save(whole, "PNG")
    refused = 0
    for length in range(len(whole.getvalue())):
        path.write_bytes(whole.getvalue()[:length])
        try:
            assert np.array_equal(read_image(path), pixels)  # only checksums were lost
        except UserError:
            refused += 1
    assert refused > len(whole.getvalue()) - 40


@pytest.mark.fault("D11")
def test_a_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    path = broken(tmp_path / "bomb.png", "a bomb")
    assert path.stat().st_size < 60_000
    with pytest.raises(UserError, match=r"20000|400000000"):
        read_size(path)


@pytest.mark.fault("D3")
@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",  # runs Ghostscript
        b"P6 1 1 255 abc",
        b"SIMPLE  =                    T" + b" " * 2850,
    ],
)
def test_formats_that_are_not_ours_are_not_even_tried(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    for read in (read_size, read_image, read_label):
        with pytest.raises(UserError, match="cannot be read as an image.*replace or remove"):
            read(path)


@pytest.mark.fault("D13")
def test_a_file_that_is_gone(tmp_path: Path) -> None:
    for read in (read_image, read_label, read_size):
        with pytest.raises(UserError, match="is gone"):
            read(tmp_path / "x.png")


def test_a_folder_named_like_an_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.png"):
        (tmp_path / "x.png").mkdir()
        read_image(tmp_path / "x.png")


def test_reading_in_threads_leaves_the_warning_filters(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{n}.png", picture(n, 48, 48)) for n in range(32)]
    before = list(warnings.filters)
    for _ in range(10):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read_image, paths))
    assert warnings.filters == before


PLAIN = mask_of(17, 33)


@pytest.mark.fault("D5")
@pytest.mark.parametrize(
    ("ending", "image"),
    [
        ("png", Image.fromarray(PLAIN)),
        ("png", Image.fromarray(PLAIN // 255)),
        ("png", Image.fromarray(PLAIN).convert("1")),
        ("bmp", Image.fromarray(PLAIN).convert("1")),
        ("png", palette_image(PLAIN // 255, [0, 0, 0, 255, 255, 255])),
        ("png", palette_image(PLAIN // 255, [0, 0, 0, 200, 0, 0])),
        ("png", Image.fromarray(np.dstack([PLAIN] * 3))),
        ("png", Image.fromarray(np.dstack([PLAIN] * 4))),
        ("tif", Image.fromarray((PLAIN // 255).astype(np.uint16))),
        ("png", Image.fromarray(PLAIN.astype(np.uint16) * 257)),
        ("jpg", Image.fromarray(PLAIN)),
        ("JPG", Image.fromarray(np.dstack([PLAIN] * 3))),
    ],
    ids=["0/255", "0/1", "1-bit", "1-bit bmp", "grey palette", "colour palette", "RGB", "RGBA",
         "16-bit 0/1", "16-bit 0/65535", "JPEG", "RGB JPEG"],
)  # fmt: skip
def test_masks_give_the_same_classes(tmp_path: Path, ending: str, image: Image.Image) -> None:
    path = save(tmp_path / f"x.{ending}", image)
    raw = read_label(path)
    assert raw.dtype == np.uint8
    coding = choose_encoding(label_values(raw, path), Classes(1))
    assert np.array_equal(coding.decode(raw, path), PLAIN // 255)


@pytest.mark.fault("D5")
@pytest.mark.parametrize("quality", [95, 75, 50, 30])
def test_jpeg_noise_is_snapped(tmp_path: Path, quality: int) -> None:
    mask = np.kron(np.random.default_rng(0).integers(0, 2, (8, 8)), np.ones((21, 21)))
    path = tmp_path / "x.jpg"
    Image.fromarray((mask * 255).astype(np.uint8)).save(path, quality=quality)
    raw = read_label(path)
    assert len(np.unique(raw)) > 2
    assert np.array_equal(LabelEncoding((0, 255)).decode(raw, path), mask)


@pytest.mark.fault("D5")
def test_a_jpeg_of_other_values_is_not_snapped(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(mask_of(64, 64, 140)).save(path)
    with pytest.raises(UserError, match=r"x\.jpg.*PNG"):
        LabelEncoding((0, 255)).decode(read_label(path), path)
    Image.fromarray(mask_of(64, 64, 1)).save(path)
    with pytest.raises(UserError, match=r"x\.jpg.*PNG"):
        label_values(read_label(path), path)


@pytest.mark.fault("D5")
@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.fromarray(np.dstack([PLAIN, PLAIN // 2, PLAIN])), "coloured.*255, 127, 255"),
        (Image.fromarray(PLAIN.astype(np.uint16) * 4), "uint16 pixels from 0 to 1020"),
        (Image.fromarray(PLAIN.astype(np.float32)), "float32 pixels"),
        (Image.fromarray(PLAIN).convert("CMYK"), "CMYK pixels"),
    ],
)
def test_other_labels_are_refused(tmp_path: Path, image: Image.Image, said: str) -> None:
    path = save(tmp_path / "x.tif", image)
    with pytest.raises(UserError, match=said):
        read_label(path)


@pytest.mark.parametrize(
    ("found", "num_classes", "asked", "expected"),
    [
        ({0}, 1, None, (0, 255)),
        ({0, 255}, 1, None, (0, 255)),
        ({0, 1}, 1, None, (0, 1)),
        ({1}, 1, None, (0, 1)),
        ({0, 255}, 2, None, (0, 255)),
        ({0, 1, 255}, 2, None, (0, 1)),
        ({0, 128, 255}, 3, None, (0, 128, 255)),
        ({0, 128}, 3, None, (0, 128, 255)),
        ({0, 1, 2, 255}, 3, None, (0, 1, 2)),
        ({0, 3}, 5, None, (0, 1, 2, 3, 4)),
        ({7, 9}, 1, (7, 9), (7, 9)),
        ({0, 1, 255}, 1, (0, 1), (0, 1)),
        ({0, 255}, 1, (255, 0), (255, 0)),
    ],
)
def test_coding_of_a_whole_dataset(
    found: set[int], num_classes: int, asked: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    assert choose_encoding(found, Classes(num_classes, values=asked)).values == expected


@pytest.mark.fault("D6")
@pytest.mark.parametrize(
    ("found", "num_classes", "asked", "said"),
    [
        ({0, 254, 255}, 1, None, r"0, 254, 255.*254\.png.*--mask-values"),
        ({0, 128, 255}, 1, None, "--num-classes 3"),
        ({0, 1, 255}, 1, None, "0, 1, 255"),
        ({0, 1, 2, 3}, 3, None, r"3\.png"),
        ({0, 255}, 4, None, "0, 255"),
        ({0, 255}, 1, (0, 1), "0, 255"),
        ({0, 255}, 1, (0, 1, 2), "give 2 different values"),
        ({0, 255}, 3, (0, 1, 1), "give 3 different values"),
        ({0, 255}, 1, (0, 256), "from 0 to 255"),
    ],
)
def test_values_that_are_no_class(
    found: set[int], num_classes: int, asked: tuple[int, ...] | None, said: str
) -> None:
    examples = {value: Path(f"{value}.png") for value in found}
    with pytest.raises(UserError, match=said) as error:
        choose_encoding(found, Classes(num_classes, values=asked), examples)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.fault("D6")
def test_decode_names_the_file_and_the_values() -> None:
    raw = np.array([[0, 254, 255]], np.uint8)
    with pytest.raises(UserError, match=r"y\.png.*254"):
        LabelEncoding((0, 255)).decode(raw, Path("y.png"))


@given(st.lists(st.integers(0, 255), min_size=2, max_size=9, unique=True), st.integers(0, 2**32))
def test_decode_undoes_the_coding(values: list[int], seed: int) -> None:
    classes = np.random.default_rng(seed).integers(0, len(values), (5, 7)).astype(np.uint8)
    raw = np.array(values, np.uint8)[classes]
    assert np.array_equal(LabelEncoding(tuple(values)).decode(raw, Path("x.png")), classes)


def test_255_is_ignored_where_it_is_no_class() -> None:
    raw = np.array([[0, 1, 255]], np.uint8)
    assert LabelEncoding((0, 1)).decode(raw, Path("x.png")).tolist() == [[0, 1, IGNORE]]
    assert LabelEncoding((0, 1, 255)).decode(raw, Path("x.png")).tolist() == [[0, 1, 2]]


COLORS = ((255, 255, 255), (0, 0, 255), (128, 128, 128))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_coloured_labels_are_looked_up(mode: str, tmp_path: Path) -> None:
    classes = np.random.default_rng(0).integers(0, 3, (9, 7))
    image = Image.fromarray(np.array(COLORS, dtype=np.uint8)[classes])
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    path = save(tmp_path / "x.png", image)
    assert np.array_equal(read_label(path, COLORS), classes)
    coding = LabelEncoding((0, 1, 2), colors=COLORS)
    assert np.array_equal(coding.read(path), classes)
    index = save(tmp_path / "index.png", classes.astype(np.uint8))  # the same without colours
    assert np.array_equal(coding.read(index), classes)


def test_unknown_colours_are_named(tmp_path: Path) -> None:
    pixels = np.full((4, 4, 3), 255, np.uint8)
    pixels[1, 2] = 1, 2, 3
    path = save(tmp_path / "x.png", pixels)
    with pytest.raises(UserError, match=r"x\.png: the colours \[1, 2, 3\] are no class"):
        read_label(path, COLORS)
    with pytest.raises(UserError, match=r"classes\.json"):
        read_label(path)
