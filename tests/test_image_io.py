import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from image_io import (
    MaskCoding,
    choose_mask_coding,
    label_values,
    read_image,
    read_label,
    read_size,
)
from scenes import box_mask, picture

RGB = picture("x", 20, 30)
GREY = RGB[..., 0]
MASK = box_mask(20, 30)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


# ---- images, D4


def test_d4_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    alpha = np.dstack([RGB, np.full((20, 30), 7, np.uint8)])
    for name, array in {"rgb.png": RGB, "rgb.tif": RGB, "rgb.bmp": RGB, "rgba.png": alpha}.items():
        assert np.array_equal(read_image(save(tmp_path / name, array)), RGB), name
    grey = read_image(save(tmp_path / "grey.png", GREY))
    assert np.array_equal(grey, np.dstack([GREY] * 3))
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_image(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))
    bits = read_image(save(tmp_path / "bits.png", GREY > 128))
    assert np.array_equal(bits[..., 0], (GREY > 128) * np.uint8(255))


def test_d4_exif_turns_the_picture_and_its_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    path = save(tmp_path / "turned.png", RGB, exif=exif)
    assert np.array_equal(read_image(path), np.rot90(RGB, -1))
    assert read_size(path) == (30, 20)


def test_d4_sixteen_bits_and_floats_are_refused(tmp_path: Path) -> None:
    for name, array in (
        ("i16.png", GREY.astype(np.uint16) * 256),
        ("f.tif", GREY.astype(np.float32)),
        ("i32.tif", GREY.astype(np.int32)),
    ):
        path = save(tmp_path / name, array)
        with pytest.raises(UserError, match=f"{name}: has .* scale it to 8 bits"):
            read_image(path)


# ---- broken files, D3 and D11


def flip_a_bit(content: bytes) -> bytes:
    middle = content.index(b"IDAT") + 60
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize("read", [read_image, read_label])
@pytest.mark.parametrize(
    "damage",
    [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"<html></html>", flip_a_bit],
    ids=["truncated", "empty", "html", "bit"],
)
def test_d3_a_broken_file_is_named(read, damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = save(tmp_path / "broken.png", GREY)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"broken\.png: cannot be read as an image"):
        read(path)


def test_d13_a_vanished_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png: is gone"):
        read_image(tmp_path / "gone.png")


def test_d11_a_bomb_is_refused_before_decoding(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    side = 20_000

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(side + 1)) for _ in range(1000)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    assert path.stat().st_size < 100_000

    def decode(*args: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for read in (read_image, read_label, read_size):
        with pytest.raises(UserError, match="20000 x 20000 pixels are too many|decompression bomb"):
            read(path)


# ---- labels, D5 and D6


def test_d5_all_encodings_of_a_mask_are_the_same_classes(tmp_path: Path) -> None:
    web = Image.fromarray(np.dstack([MASK] * 3)).convert("P")  # 0 and 255 at odd indices
    web.save(tmp_path / "web.png")
    indexed = Image.fromarray((MASK > 0).astype(np.uint8))
    indexed.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    indexed.save(tmp_path / "indexed.png")
    paths = {
        save(tmp_path / "255.png", MASK): (0, 255),
        save(tmp_path / "1.png", (MASK > 0).astype(np.uint8)): (0, 1),
        save(tmp_path / "bits.png", MASK > 0): (0, 255),
        save(tmp_path / "rgb.png", np.dstack([MASK] * 3)): (0, 255),
        save(tmp_path / "u16.png", (MASK > 0).astype(np.uint16) * 65535): (0, 255),
        save(tmp_path / "noisy.jpg", MASK, quality=60): (0, 255),
        tmp_path / "web.png": (0, 255),
        tmp_path / "indexed.png": (0, 1),
    }
    for path, values in paths.items():
        raw = read_label(path)
        coding = choose_mask_coding(label_values(raw, path), 1)
        assert coding.values == values, path.name
        assert np.array_equal(coding.decode(raw, path), MASK > 0), path.name
    assert len(np.unique(read_label(tmp_path / "noisy.jpg"))) > 2  # it was noisy


def test_d5_labels_that_tell_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a coloured label, with \[0, 0, 0\], \[255, 0, 0\]"):
        read_label(save(tmp_path / "c.png", np.dstack([MASK, MASK * 0, MASK * 0])))
    with pytest.raises(UserError, match="up to 300"):
        read_label(save(tmp_path / "i.png", np.where(MASK > 0, 300, 0).astype(np.uint16)))
    faint = save(tmp_path / "f.jpg", (MASK > 0).astype(np.uint8))
    raw = read_label(faint).copy()
    raw[0, 0] = 1
    with pytest.raises(UserError, match="its noise hides the classes"):
        label_values(raw, faint)


@pytest.mark.parametrize(
    ("values", "num_classes", "expected"),
    [
        ({0}, 1, (0, 255)),
        ({0, 255}, 1, (0, 255)),
        ({0, 1}, 1, (0, 1)),
        ({0, 255}, 2, (0, 1)),  # 255 is ignored there
        ({0, 128, 255}, 3, (0, 128, 255)),
        ({0, 255}, 3, (0, 128, 255)),
        ({0, 1, 2}, 3, (0, 1, 2)),
        ({0, 1, 2, 255}, 3, (0, 1, 2)),
        ({0, 4, 255}, 5, (0, 1, 2, 3, 4)),
    ],
)
def test_coding_is_told_from_the_values(
    values: set[int], num_classes: int, expected: tuple[int, ...]
) -> None:
    assert choose_mask_coding(values, num_classes).values == expected


@pytest.mark.parametrize(
    ("values", "num_classes", "says"),
    [
        ({0, 128, 255}, 1, "hold the values 0, 128, 255.*--num-classes 3 reads them as none, road"),
        ({0, 254}, 1, "hold the values 0, 254.*254.png.*--mask-values"),
        ({0, 1, 255}, 1, "hold the values 0, 1, 255"),
        ({0, 3}, 3, r"hold the values 0, 3; expected 0,128,255 or 0,1,2 .*3\.png"),
    ],
)
def test_d6_strange_values_are_listed_with_a_file_and_the_remedy(
    values: set[int], num_classes: int, says: str
) -> None:
    examples = {v: Path(f"{v}.png") for v in values}
    with pytest.raises(UserError, match=says):
        choose_mask_coding(values, num_classes, None, examples)


def test_the_users_own_values() -> None:
    coding = choose_mask_coding({10, 20, 255}, 1, (20, 10))
    raw = np.array([[20, 10, 255]], dtype=np.uint8)
    assert coding.decode(raw, Path("x.png")).tolist() == [[0, 1, 255]]
    for asked in ((0,), (0, 0), (0, 256), (0, 1, 2)):
        with pytest.raises(UserError, match="give 2 different values from 0 to 255"):
            choose_mask_coding({0}, 1, asked)


def test_d6_a_value_that_is_no_class_is_never_decoded() -> None:
    with pytest.raises(UserError, match=r"x\.png: values \[3, 254\] are no class; expected 0, 1"):
        MaskCoding((0, 1)).decode(np.array([[0, 1, 254, 3]], dtype=np.uint8), Path("x.png"))
