"""One scene in one job, in parts that jobs share, and in a series: the same bits."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_predict import SCRIPT, checkpoint_of, child, made, read_tif

import predict
from mapping import parts
from mapping.job import Mapped
from mapping.pipeline import Band
from networks import sliding_window
from networks.sliding_window import Windows
from runtime.errors import UserError

rasterio = pytest.importorskip("rasterio")
from geo_helpers import write_tif  # noqa: E402

OPTIONS: dict[str, Any] = {"window": 64, "overlap": 16, "device": "cpu", "threshold": 0.5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("run") / "best.pt", freeze_backbone=True)


@pytest.fixture(scope="module")
def dates(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write three dates of 300 x 200 pixels: empty to the left and at the top, with holes."""
    folder = tmp_path_factory.mktemp("dates")
    draw = np.random.default_rng(0)
    pixels = draw.integers(1, 256, (3, 3, 300, 200), dtype=np.uint8)
    pixels[..., :70, :] = 0
    pixels[..., :120] = 0
    pixels[2, :, 150:250, 150:] = 0  # so the second date is another picture in its two pairs
    paths = [folder / f"{2019 + i}.tif" for i in range(3)]
    return [write_tif(path, date, nodata=0) for path, date in zip(paths, pixels, strict=True)]


def run(checkpoint: Path, dates: list[Path], out: Path, **options: Any) -> list[Mapped]:
    words = {"checkpoint": checkpoint, "before": dates[0], "after": dates[1], "output_dir": out}
    given: dict[str, Any] = {name: str(path) for name, path in words.items()}
    given["later"] = tuple(map(str, dates[2:]))
    return predict.predict({**OPTIONS, **given, **options})


def content(folder: Path, name: str) -> dict[str, bytes]:
    """Return the pixels and the files of a map, but for what differs from day to day."""
    found = {}
    for path in sorted(folder.glob(f"{name}_*")):
        if path.suffix == ".tif":
            with rasterio.open(path) as file:
                found[path.name] = file.read().tobytes()
        elif path.suffix not in (".html", ".json", ".gpkg"):
            found[path.name] = path.read_bytes()
    return found


@pytest.mark.parametrize("shape", [(1, 1), (40, 70), (300, 200), (1000, 64)])
@pytest.mark.parametrize("num_parts", [1, 3, 50])
def test_parts_hold_every_band_once(shape: tuple[int, int], num_parts: int) -> None:
    windows = Windows(*shape, 64, 40)
    bands = [parts.bands_of_part(windows, i + 1, num_parts) for i in range(num_parts)]
    assert [band for part in bands for band in part] == list(range(len(windows.tops)))
    for part in filter(None, bands):
        strips = windows.strips_of(part)
        top = windows.band(part[0])[0]
        above = [i for i in range(part[0]) if windows.tops[i] + windows.rows > top]
        assert strips == range(above[0] if above else part[0], part.stop)


@pytest.mark.parametrize("overlap", [16, pytest.param(40, marks=pytest.mark.slow)])
def test_joined_parts_are_the_whole_bit_for_bit(
    checkpoint: Path, dates: list[Path], tmp_path: Path, overlap: int
) -> None:
    run(checkpoint, dates[:2], tmp_path / "whole", overlap=overlap, polygons="both")
    for number in (3, 1, 4, 2):
        run(checkpoint, dates[:2], tmp_path, part=f"{number}/4", overlap=overlap, polygons="both")
    assert made(tmp_path) == {"whole", "2019_parts"}
    (mapped,) = run(checkpoint, dates[:2], tmp_path, join=True, overlap=overlap, polygons="both")
    whole, joined = content(tmp_path / "whole", "2019"), content(tmp_path, "2019")
    assert whole == joined and "2019_polygons.geojson" in whole and mapped.polygons > 0
    assert not (tmp_path / "2019_parts").exists()


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on(
    checkpoint: Path, dates: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    body = (
        "import os, signal, test_job\n"
        "from mapping.parts import Parts\n"
        "write = Parts.write\n"
        "def write_and_die(self, band):\n"
        "    write(self, band)\n"
        "    if band.top > 100: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Parts.write = write_and_die\n"
        f"test_job.run(Path({str(checkpoint)!r}), [*map(Path, {list(map(str, dates[:2]))!r})], "
        f"Path({str(out)!r}), part='1/1')"
    )
    command = child(f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n{body}")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(made(out / "2019_parts")) == 5  # bands of rows 0, 48, 96 and 144, about.json
    with pytest.raises(UserError, match=r"2 of 6 bands are missing, the first of rows 192 to 235"):
        run(checkpoint, dates[:2], out, join=True)
    assert made(out) == {"2019_parts"}
    tops = []
    real = parts.Parts.write

    def noted(self: parts.Parts, band: Band) -> None:
        tops.append(band.top)
        real(self, band)

    monkeypatch.setattr(parts.Parts, "write", noted)
    run(checkpoint, dates[:2], out, part="1/1")
    assert tops == [192, 236]
    run(checkpoint, dates[:2], out, join=True)
    run(checkpoint, dates[:2], tmp_path / "whole")
    assert content(out, "2019") == content(tmp_path / "whole", "2019")


@pytest.mark.slow
def test_parts_of_other_options_or_dates_are_not_joined(
    checkpoint: Path, dates: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds no parts to join"):
        run(checkpoint, dates[:2], tmp_path, join=True)
    run(checkpoint, dates[:2], tmp_path, part="1/1")
    with pytest.raises(UserError, match="were made with another threshold"):
        run(checkpoint, dates[:2], tmp_path, join=True, threshold=0.25)
    with pytest.raises(UserError, match="were made with another options"):
        run(checkpoint, dates[:2], tmp_path, part="1/2", overlap=32)
    other = write_tif(tmp_path / "2020.tif", np.ones((3, 300, 200), np.uint8), nodata=0)
    with pytest.raises(UserError, match="were made with another after date"):
        run(checkpoint, [dates[0], other], tmp_path, join=True)
    damaged = sorted((tmp_path / "2019_parts").glob("*.npz"))[2]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"00000096\.npz: is damaged; remove it"):
        run(checkpoint, dates[:2], tmp_path, join=True)
    assert "2019_mask.tif" not in made(tmp_path)
    for options, says in (
        ({"part": "3/2"}, "--part 3/2: give 1/2 to 2/2"),
        ({"part": "1/2", "join": True}, "give one of them"),
    ):
        with pytest.raises(UserError, match=says):
            run(checkpoint, dates[:2], tmp_path, **options)


@pytest.mark.slow
def test_four_jobs_at_the_same_time_map_one_scene(
    checkpoint: Path, dates: list[Path], tmp_path: Path
) -> None:
    words = [sys.executable, str(SCRIPT), str(checkpoint), *map(str, dates[:2]), "-o"]
    flags = ["--window", "64", "--overlap", "16", "--device", "cpu", "--threshold", "0.5"]
    running = [
        subprocess.Popen([*words, str(tmp_path), *flags, "--part", f"{i}/4"]) for i in (1, 2, 3, 4)
    ]
    assert [job.wait() for job in running] == [0, 0, 0, 0]
    subprocess.run([*words, str(tmp_path), *flags, "--join"], check=True)
    run(checkpoint, dates[:2], tmp_path / "whole")
    assert content(tmp_path, "2019") == content(tmp_path / "whole", "2019")


def test_windows_without_data_are_left_out_and_nothing_changes(
    checkpoint: Path, dates: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = sliding_window._predict_windows

    def counted(*args: Any) -> Any:
        seen.append(len(args[2]))
        return real(*args)

    monkeypatch.setattr(sliding_window, "_predict_windows", counted)
    run(checkpoint, dates[:2], tmp_path / "some")
    num_some = sum(seen)
    seen.clear()
    monkeypatch.setattr(sliding_window, "_with_data", lambda _, places: list(range(len(places))))
    run(checkpoint, dates[:2], tmp_path / "all")
    assert num_some < 0.6 * sum(seen)
    assert content(tmp_path / "some", "2019") == content(tmp_path / "all", "2019")


def test_a_scene_without_any_data(checkpoint: Path, tmp_path: Path) -> None:
    empty = [write_tif(tmp_path / f"{i}.tif", np.zeros((3, 100, 90), np.uint8), nodata=0)
             for i in range(2)]  # fmt: skip
    (mapped,) = run(checkpoint, empty, tmp_path / "out")
    assert mapped.changed == 0
    assert (read_tif(tmp_path / "out" / "0_mask.tif")[0] == 255).all()


# ---- series


@pytest.mark.parametrize("flips", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_series_is_its_pairs_and_encodes_a_date_once(
    checkpoint: Path,
    dates: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flips: bool,
) -> None:
    from model import SiameseUNet

    num_encoded = []
    real = SiameseUNet.encode

    def counted(self: SiameseUNet, image: torch.Tensor) -> list[torch.Tensor]:
        num_encoded.append(len(image))
        return real(self, image)

    monkeypatch.setattr(SiameseUNet, "encode", counted)
    found = run(checkpoint, dates, tmp_path / "series", flips=flips, amp="off")
    num_series = sum(num_encoded)
    num_encoded.clear()
    for first, name in ((0, "2019_to_2020"), (1, "2020_to_2021")):
        run(checkpoint, dates[first : first + 2], tmp_path / "pairs", flips=flips, amp="off")
        alone = content(tmp_path / "pairs", dates[first].stem)
        together = content(tmp_path / "series", name)
        assert [*alone.values()] == [*together.values()] and len(alone) > 5
    assert len(found) == 2 and num_series < 0.9 * sum(num_encoded)


@pytest.mark.slow
def test_a_series_in_parts_is_joined_and_goes_on(
    checkpoint: Path, dates: list[Path], tmp_path: Path
) -> None:
    run(checkpoint, dates, tmp_path / "whole")
    for number in (1, 2):
        run(checkpoint, dates, tmp_path, part=f"{number}/2")
    run(checkpoint, dates, tmp_path, join=True)
    for name in ("2019_to_2020", "2020_to_2021"):
        assert content(tmp_path, name) == content(tmp_path / "whole", name)
    before = (tmp_path / "2019_to_2020_mask.tif").stat().st_mtime_ns
    (tmp_path / "2020_to_2021_mask.tif").unlink()
    (mapped,) = run(checkpoint, dates, tmp_path, skip_existing=True)
    assert "2020_to_2021" in mapped.lines[-1]
    assert (tmp_path / "2019_to_2020_mask.tif").stat().st_mtime_ns == before


def test_the_disk_is_full_in_the_middle_of_a_scene(
    checkpoint: Path, dates: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mapping.files import GeoTiffMap

    real = GeoTiffMap.write

    def full(self: GeoTiffMap, top: int, rows: Any) -> None:
        if top > 100:
            raise UserError(f"{self.path}: cannot be written whole (no space); make room")
        real(self, top, rows)

    monkeypatch.setattr(GeoTiffMap, "write", full)
    with pytest.raises(UserError, match="cannot be written whole"):
        run(checkpoint, dates[:2], tmp_path / "out")
    assert not made(tmp_path / "out")
    assert not [t for t in threading.enumerate() if "(work)" in t.name]
