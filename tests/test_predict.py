import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import no_file_above, picture, save
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import predict
from mapping import job
from mapping.job import Job
from mapping.maps import Kinds
from mapping.scenes import ScenePair, Series, find_scenes
from model import build_model, load_model
from pairs.images import read_image, read_label
from predict import Config, Mapped, job_of, predict_scene
from runtime.checkpoint import digest_of, save_checkpoint
from runtime.errors import Interrupted, UserError, run_script
from scoring.record import stored_threshold

SCRIPT = Path(predict.__file__)
BINARY = Kinds.of("change", 1, {})


class Difference(nn.Module):
    """Change where the later date is brighter in red; each pixel for itself."""

    task = "change"

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return (after[:, :1].float() - before[:, :1].float()) / 32


class SemanticDifference(nn.Module):
    """Red says change; the classes are the brightest channel before and after."""

    task = "semantic"

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return torch.cat([after[:, :1].float() - before[:, :1].float(), before, after], dim=1)


def checkpoint_of(path: Path, data: dict[str, Any] | None = None, **kwargs: Any) -> Path:
    torch.manual_seed(0)
    kwargs = {"backbone": "resnet18", "freeze_backbone": False, **kwargs}
    model = build_model(**kwargs)
    assert model.head.bias is not None
    nn.init.constant_(model.head.bias, 0)
    state = {"model": model.state_dict(), "model_kwargs": kwargs, "config": {}, "data": data or {}}
    save_checkpoint(path, state)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_network: str) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("run") / "best.pt", backbone=tiny_network)


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def run(*words: object, **options: Any) -> list[Mapped]:
    names = ("checkpoint", "before", "after", "output_dir")
    options = {"window": 64, "overlap": 16, "amp": "off", "device": "cpu", **options}
    given = dict(zip(names, map(str, words), strict=True))
    return predict.predict({**given, **options})


def pair(
    folder: Path,
    model: nn.Module,
    before: Path,
    after: Path,
    *,
    kinds: Kinds = BINARY,
    **options: Any,
) -> Mapped:
    options = {"window": 64, "overlap": 16, **options}
    config = Config("", "", "", output_dir=str(folder), **options)
    mapped = job_of(config, model.eval(), kinds).run([ScenePair("x", before, after)])
    assert mapped is not None
    return mapped[0]


def test_plain_pair_gives_what_python_gives(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before, after = (
        save(tmp_path / "a.png", picture(1, 90, 110)),
        save(tmp_path / "b.jpg", picture(2, 90, 110)),
    )
    (result,) = run(checkpoint, before, after, tmp_path / "out")
    images = read_image(before), read_image(after)
    expected = predict_scene(
        load_model(checkpoint), *images, window=64, overlap=16, amp="off"
    ).numpy()
    stored = np.asarray(opened(tmp_path / "out" / "a_probability.png"))
    assert np.abs(stored / 254 - expected).max() <= 0.5 / 254 + 1e-5
    mask = opened(tmp_path / "out" / "a_mask.png")
    assert mask.mode == "P"
    is_clear = np.abs(expected - 0.5) > 1e-5
    assert np.array_equal(np.asarray(mask)[is_clear], (expected > 0.5)[is_clear])
    assert set(np.unique(read_label(tmp_path / "out" / "a_mask.png"))) <= {0, 255}
    assert opened(tmp_path / "out" / "a_overlay.png").size == (110, 90)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "a_about.json", "a_mask.png", "a_mask.qml", "a_overlay.png", "a_probability.png",
        "a_probability.qml", "a_report.html",
    ]  # fmt: skip
    assert result.changed == pytest.approx(np.asarray(mask).mean())
    assert "110 x 90" in capsys.readouterr().out


def test_threshold_and_float32(checkpoint: Path, tmp_path: Path) -> None:
    files = [save(tmp_path / f"{i}.png", picture(i, 40, 40)) for i in (1, 2)]
    run(checkpoint, *files, tmp_path / "out", threshold=0.3, probability="float32")
    stored = np.asarray(opened(tmp_path / "out" / "1_probability.tif"))
    assert stored.dtype == np.float32
    mask = np.asarray(opened(tmp_path / "out" / "1_mask.png"))
    assert np.array_equal(mask, stored > 0.3)


def test_threshold_of_an_evaluation_is_taken_and_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    best = shutil.copy(checkpoint, tmp_path / "best.pt")
    files = [save(tmp_path / f"{i}.png", picture(i, 40, 40)) for i in (1, 2)]
    scores = tmp_path / "evaluation" / "test" / "scores.json"
    scores.parent.mkdir(parents=True)
    point = {"points": {"default": {"threshold": None}, "val": {"threshold": 0.3125}}}
    run_of: dict[str, Any] = {
        "checkpoint": "runs/x/best.pt",
        "sha256": digest_of(Path(best)),
        "protocols": {"patches": {}, "sliding": point},
    }
    run_of["trained_on_this_data"] = True
    scores.write_text(json.dumps({"runs": [run_of], "val_pairs": 64}))
    run(best, *files, tmp_path / "a", probability="float32")
    assert "threshold 0.3125, chosen on val" in capsys.readouterr().out
    stored = np.asarray(opened(tmp_path / "a" / "1_probability.tif"))
    assert np.array_equal(np.asarray(opened(tmp_path / "a" / "1_mask.png")), stored > 0.3125)
    scores.write_text(json.dumps({"runs": [run_of], "val_pairs": 3}))
    assert stored_threshold(Path(best)) is None
    foreign = {**run_of, "trained_on_this_data": False}
    scores.write_text(json.dumps({"runs": [foreign], "val_pairs": 64}))
    assert stored_threshold(Path(best)) is None
    other = {**run_of, "sha256": "0" * 16}
    scores.write_text(json.dumps({"runs": [other], "val_pairs": 64}))
    assert stored_threshold(Path(best)) is None
    together = tmp_path.parent / "evaluation" / "test" / "scores.json"
    together.parent.mkdir(parents=True)
    together.write_text(json.dumps({"runs": [other, run_of], "val_pairs": 64}))
    assert stored_threshold(Path(best)) == (0.3125, together)
    shutil.rmtree(tmp_path.parent / "evaluation")
    scores.write_text("{")
    assert stored_threshold(Path(best)) is None


def test_a_threshold_is_of_the_same_flips_or_says_that_it_is_not(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    best = Path(shutil.copy(checkpoint, tmp_path / "best.pt"))
    files = [save(tmp_path / f"{i}.png", picture(i, 40, 40)) for i in (1, 2)]

    def chosen(**options: bool) -> str:
        run(best, *files, tmp_path / "out", overwrite=True, **options)
        said = capsys.readouterr().out
        return next(line for line in said.splitlines() if line.startswith("threshold"))

    assert "--split val --flips`" in chosen(flips=True) and "--flips" not in chosen()
    for name, flips, threshold in (("test", {}, 0.25), ("test-flips", {"flips": True}, 0.75)):
        scores = tmp_path / "evaluation" / name / "scores.json"
        scores.parent.mkdir(parents=True)
        of_run = {
            "sha256": digest_of(best),
            "trained_on_this_data": True,
            "protocols": {"sliding": {"points": {"val": {"threshold": threshold}}}},
        }
        scores.write_text(json.dumps({"runs": [of_run], "val_pairs": 64, **flips}))
        if name == "test":
            assert "threshold 0.25, chosen on val without --flips (" in chosen(flips=True)
    assert "threshold 0.25, chosen on val (" in chosen()
    assert "threshold 0.75, chosen on val (" in chosen(flips=True)
    (tmp_path / "evaluation" / "test" / "scores.json").unlink()
    assert "threshold 0.75, chosen on val with --flips (" in chosen()


def test_classes_have_values_a_palette_and_a_threshold_if_asked(tmp_path: Path) -> None:
    colors = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]
    data = {"class_names": ["none", "road", "house"], "class_colors": colors}
    checkpoint = checkpoint_of(tmp_path / "k.pt", data, num_classes=3)
    files = [save(tmp_path / f"{i}.png", picture(i, 40, 40)) for i in (1, 2)]
    run(checkpoint, *files, tmp_path / "out")
    mask = opened(tmp_path / "out" / "1_mask.png")
    values = np.unique(np.asarray(mask)).tolist()
    assert set(values) <= {0, 1, 2} and len(values) > 1
    painted = np.asarray(mask.convert("RGB")).reshape(-1, 3)
    assert {tuple(c) for c in painted.tolist()} == {tuple(colors[v]) for v in values}
    (all_change,) = run(checkpoint, *files, tmp_path / "out2", threshold=0.0)
    assert all_change.changed == 1


def test_folders_are_paired_by_stem(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        save(tmp_path / "A" / f"{name}.png", picture(1))
        save(tmp_path / "B" / f"{name}.jpg", picture(2))
    save(tmp_path / "B" / ".hidden.png", picture(3))
    (tmp_path / "B" / "notes.txt").write_text("x")
    results = run(checkpoint, tmp_path / "A", tmp_path / "B", tmp_path / "out")
    assert len(results) == 2
    assert (tmp_path / "out" / "a_mask.png").is_file() and (
        tmp_path / "out" / "b_mask.png"
    ).is_file()
    save(tmp_path / "A" / "c.png", picture(1))
    with pytest.raises(UserError, match=r"1 file without a partner.*c\.png"):
        find_scenes(tmp_path / "A", tmp_path / "B")
    with pytest.raises(UserError, match="two files or two folders"):
        find_scenes(tmp_path / "A", tmp_path / "B" / "a.jpg")


def test_what_is_there_stays_unless_asked(checkpoint: Path, tmp_path: Path) -> None:
    files = [save(tmp_path / f"{i}.png", picture(i)) for i in (1, 2)]
    save(tmp_path / "out" / "1_b_mask.png", picture(3))  # of another scene
    mine = save(tmp_path / "out" / "1_mask.png", picture(3))
    before = mine.read_bytes()
    with pytest.raises(UserError, match=r"1_mask\.png: is there already; --overwrite"):
        run(checkpoint, *files, tmp_path / "out")
    assert mine.read_bytes() == before and len(list(mine.parent.iterdir())) == 2
    run(checkpoint, *files, tmp_path / "out", overwrite=True)
    assert mine.read_bytes() != before


def test_a_fault_of_the_input_is_named_before_the_output(checkpoint: Path, tmp_path: Path) -> None:
    before = save(tmp_path / "1.png", picture(1))
    save(tmp_path / "out" / "1_mask.png", picture(3))
    with pytest.raises(UserError, match=r"2\.png: no such file"):
        run(checkpoint, before, tmp_path / "2.png", tmp_path / "out")
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2\.png: "):
        run(checkpoint, before, tmp_path / "2.png", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"overlap": 64}, "--overlap 64: give less than --window 64"),
        ({"scale": (5.0, 1.0)}, "--scale 5,1: give two numbers, the lower first"),
        ({"scale": (5.0,)}, "--scale 5: give two numbers"),
    ],
)
def test_options_that_do_not_go_together(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        run(checkpoint, "a", "b", tmp_path, **options)


def made(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.fault("U7")
def test_overwrite_replaces_all_that_is_there_of_a_scene(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    before, after = geo_pair(tmp_path)
    out = tmp_path / "out"
    run(checkpoint, before, after, out, polygons="both")
    assert {"before_polygons.gpkg", "before_mask.tif"} <= made(out)
    other = save(out / "before_2_mask.png", picture(3))
    (out / "before_mask.tif.aux.xml").write_text("<PAMDataset/>")  # QGIS leaves its statistics
    plain = [save(tmp_path / f"{n}.png", picture(i)) for i, n in enumerate(("before", "after"))]
    run(checkpoint, *plain, out, overwrite=True, report=False)
    assert made(out) == {
        "before_about.json", "before_mask.png", "before_mask.qml", "before_overlay.png",
        "before_probability.png", "before_probability.qml", other.name,
    }  # fmt: skip


@pytest.mark.fault("U13")
def test_a_bad_scene_costs_none_of_the_others(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        save(tmp_path / "A" / f"{name}.png", picture(1))
        save(tmp_path / "B" / f"{name}.png", picture(2))
    save(tmp_path / "B" / "a.png", picture(2, 40, 40))  # another size
    cut = tmp_path / "A" / "c.png"
    cut.write_bytes(cut.read_bytes()[:-100])  # shows when it is decoded
    folders = tmp_path / "A", tmp_path / "B"
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        run(checkpoint, *folders, out)
    first, *faults = str(caught.value).splitlines()
    assert first == "mapped: 2 scenes; with faults: 2"
    assert "a.png" in faults[0] and "have different" in faults[0] and "c.png" in faults[1]
    assert {name[0] for name in made(out)} == {"b", "d"}

    mapped: list[str] = []
    real = Job.run

    def noted(job: Job, series: Series, *args: Any, **options: Any) -> Any:
        mapped.append(series[0].name)
        return real(job, series, *args, **options)

    monkeypatch.setattr(Job, "run", noted)
    save(tmp_path / "B" / "a.png", picture(2))
    save(cut, picture(1))
    (out / "d_mask.png").unlink()  # killed while it was moved into place
    run(checkpoint, *folders, out, skip_existing=True)
    assert mapped == ["a", "c", "d"] and {name[0] for name in made(out)} == set("abcd")
    assert "1 of 4 scenes mapped already" in capsys.readouterr().out
    run(checkpoint, *folders, out, skip_existing=True)
    assert len(mapped) == 3
    with pytest.raises(UserError, match="another threshold made this scene"):
        run(checkpoint, *folders, out, skip_existing=True, threshold=0.25)
    with pytest.raises(UserError, match="give one of them"):
        run(checkpoint, *folders, out, skip_existing=True, overwrite=True)


@pytest.mark.fault("U13")
def test_scenes_are_judged_before_the_first_window(checkpoint: Path, tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / "A" / f"{name}.png", picture(1))
        save(tmp_path / "B" / f"{name}.png", picture(2, 40, 40))
    with pytest.raises(UserError, match="mapped: 0 scenes; with faults: 2"):
        run(checkpoint, tmp_path / "A", tmp_path / "B", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- GeoTIFFs


def geo_pair(folder: Path, height: int = 100, width: int = 120, **profile: Any) -> list[Path]:
    """Write two flat dates, the later one with a bright block of 20 x 30 pixels."""
    pytest.importorskip("rasterio")
    from geo_helpers import write_tif

    flat = np.full((3, height, width), 100, np.uint8)
    built = flat.copy()
    built[0, 30:50, 40:70] = 200
    return [
        write_tif(folder / "before.tif", flat, **profile),
        write_tif(folder / "after.tif", built, **profile),
    ]


def read_tif(path: Path) -> tuple[NDArray[Any], Any]:
    import rasterio

    with rasterio.open(path) as file:
        return file.read(1), (
            file.crs,
            file.transform,
            file.nodata,
            file.tags(ns="IMAGE_STRUCTURE"),
        )


@pytest.mark.fault("U2")
def test_georeferenced_maps_lie_where_the_first_date_does(tmp_path: Path) -> None:
    files = geo_pair(tmp_path)
    result = pair(tmp_path / "out", Difference(), *files, min_area=1)
    _, (crs, transform, _, _) = read_tif(files[0])
    truth = np.zeros((100, 120), dtype=bool)
    truth[30:50, 40:70] = True
    mask, about = read_tif(tmp_path / "out" / "x_mask.tif")
    assert about[:3] == (crs, transform, 255) and about[3]["LAYOUT"] == "COG"
    assert np.array_equal(mask, truth)
    chance, about = read_tif(tmp_path / "out" / "x_probability.tif")
    assert about[:3] == (crs, transform, 255) and about[3]["LAYOUT"] == "COG"
    expected = 1 / (1 + np.exp(-100 / 32))
    assert np.abs(chance / 254 - np.where(truth, expected, 0.5)).max() < 0.5 / 254 + 1e-6
    collection = json.loads((tmp_path / "out" / "x_polygons.geojson").read_text())
    (feature,) = collection["features"]
    assert feature["properties"] == {
        "class": 1, "name": "change", "mean_probability": pytest.approx(expected, abs=0.002),
        "area_m2": pytest.approx(150 / 0.9996**2, rel=1e-4),
    }  # fmt: skip
    assert result.polygons == 1 and result.changed == pytest.approx(truth.mean())
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "x_about.json", "x_mask.qml", "x_mask.tif", "x_overlay.pgw", "x_overlay.png",
        "x_overlay.png.aux.xml", "x_polygons.geojson", "x_probability.qml", "x_probability.tif",
        "x_report.html",
    ]  # fmt: skip


def test_each_map_tells_where_it_comes_from(checkpoint: Path, tmp_path: Path) -> None:
    before, after = geo_pair(tmp_path)
    run(checkpoint, before, after, tmp_path / "out", threshold=0.25)
    about = json.loads((tmp_path / "out" / "before_about.json").read_text())
    assert about["checkpoint_sha256"] == digest_of(checkpoint) and about["threshold"] == 0.25
    assert about["command"].startswith(f"python predict.py {checkpoint} {before} {after} ")
    assert "--threshold 0.25" in about["command"] and about["version"]
    assert {*about["files"], "before_about.json"} == made(tmp_path / "out")
    import rasterio

    for layer in ("mask", "probability"):
        with rasterio.open(tmp_path / "out" / f"before_{layer}.tif") as file:
            tags = file.tags()
        assert tags["PREDICT_CHECKPOINT_SHA256"] == digest_of(checkpoint)
        assert tags["PREDICT_THRESHOLD"] == "0.25" and tags["PREDICT_COMMAND"] == about["command"]


@pytest.mark.fault("U11")
@pytest.mark.parametrize("fails", ["find_polygons", "write_geojson", "write_geopackage"])
def test_a_map_outlives_its_polygons(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    from mapping import maps

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such ring")

    monkeypatch.setattr(maps, fails, fail)
    before, after = geo_pair(tmp_path)
    with pytest.raises(UserError, match=r"before_polygons: no polygons could be made \(no such ri"):
        run(checkpoint, before, after, tmp_path / "out", polygons="both")
    names = made(tmp_path / "out")
    assert {"before_mask.tif", "before_probability.tif", "before_overlay.png"} <= names
    assert not any("polygons" in name for name in names)


def test_the_picture_lies_where_the_scene_does(tmp_path: Path) -> None:
    files = geo_pair(tmp_path)
    pair(tmp_path / "out", Difference(), *files)
    import rasterio

    with rasterio.open(tmp_path / "out" / "x_overlay.png") as file, rasterio.open(files[0]) as date:
        assert file.crs == date.crs and file.transform.almost_equals(date.transform, 1e-6)
        assert file.bounds == pytest.approx(date.bounds)


@pytest.mark.fault("U2")
def test_no_data_stays_no_data(tmp_path: Path) -> None:
    files = geo_pair(tmp_path, nodata=200)
    pair(tmp_path / "out", Difference(), *files, probability="float32")
    # only one of three bands says 200, so the block counts
    assert not (read_tif(tmp_path / "out" / "x_mask.tif")[0] == 255).any()
    files = geo_pair(tmp_path, nodata=100)
    result = pair(tmp_path / "out", Difference(), *files, probability="float32")
    mask, chance = (read_tif(tmp_path / "out" / f"x_{n}.tif")[0] for n in ("mask", "probability"))
    assert (mask == 255).all() and np.isnan(chance).all()
    assert result.polygons == 0 and result.changed == 0


@pytest.mark.fault("U2")
def test_dates_on_different_grids(tmp_path: Path, checkpoint: Path) -> None:
    from rasterio.transform import from_origin

    before, _ = geo_pair(tmp_path)
    _, after = geo_pair(tmp_path / "moved", transform=from_origin(5e5 + 5, 5.2e6, 0.5, 0.5))
    with pytest.raises(UserError, match="--align"):
        run(checkpoint, before, after, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pair(tmp_path / "out", Difference(), before, after, align=True)
    mask, _ = read_tif(tmp_path / "out" / "x_mask.tif")
    assert (mask[:, :10] == 255).all() and (mask[:, 10:] != 255).all()
    assert np.argwhere(mask == 1).min(0).tolist() == [30, 50]  # ten columns further


def test_semantic_change_has_a_map_of_each_date(tmp_path: Path) -> None:
    files = geo_pair(tmp_path)
    kinds = Kinds.of("semantic", 3, {"class_names": ["unchanged", "red", "green", "blue"]})
    pair(tmp_path / "out", SemanticDifference(), *files, kinds=kinds)
    before, _ = read_tif(tmp_path / "out" / "x_classes_before.tif")
    after, _ = read_tif(tmp_path / "out" / "x_classes_after.tif")
    assert np.unique(after).tolist() == [0, 1] and (after > 0).sum() == 600
    assert np.array_equal(before > 0, after > 0)
    collection = json.loads((tmp_path / "out" / "x_polygons.geojson").read_text())
    (feature,) = collection["features"]
    assert feature["properties"]["from"] in kinds.names[1:]
    assert feature["properties"]["to"] == "red"


# ---- a scene larger than memory, and ends before the end

CHILD = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from test_predict import BINARY, Difference, pair
{body}
"""


def child(body: str) -> list[str]:
    tests = Path(__file__).parent
    return [sys.executable, "-c", CHILD.format(tests=str(tests), root=str(tests.parent), body=body)]


def large_pair(folder: Path, height: int, width: int) -> list[Path]:
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    folder.mkdir()
    paths = [folder / "a.tif", folder / "b.tif"]
    for seed, path in enumerate(paths):
        rows = np.random.default_rng(seed).integers(1, 256, (3, 250, width), dtype=np.uint8)
        with rasterio.open(
            path, "w", driver="GTiff", count=3, height=height, width=width, dtype="uint8",
            crs="EPSG:32632", transform=from_origin(5e5, 5.2e6, 0.5, 0.5), tiled=True,
        ) as file:  # fmt: skip
            for top in range(0, height, 250):
                file.write(rows, window=((top, top + 250), (0, width)))
    return paths


@pytest.mark.fault("U1")
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_height_of_a_scene(tmp_path: Path) -> None:
    peaks = []
    for height in (4000, 16000):  # both fill the 64 MB of GDAL's cache
        files = large_pair(tmp_path / str(height), height, 2000)
        body = (
            f"pair(Path({str(tmp_path / f'out{height}')!r}), Difference(), "
            f"*map(Path, {list(map(str, files))!r}), window=512, overlap=64, threshold=1.0)\n"
            "lines = Path('/proc/self/status').read_text().splitlines()\n"
            "print([l.split()[1] for l in lines if l.startswith('VmHWM')][0])"
        )
        done = subprocess.run(
            child(body), capture_output=True, text=True, env={**os.environ, "GDAL_CACHEMAX": "64"}
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    pair_size = 2 * 3 * 16000 * 2000 / 2**20  # 183 MiB
    assert peaks[1] - peaks[0] < pair_size / 2


@pytest.mark.slow
@pytest.mark.fault("U4")
def test_killed_while_writing_leaves_no_file_that_looks_complete(tmp_path: Path) -> None:
    files = geo_pair(tmp_path, 300, 64)
    body = (
        "import os, signal; from mapping import files\n"
        "write = files.GeoTiffMap.write\n"
        "def write_and_die(self, top, rows):\n"
        "    write(self, top, rows)\n"
        "    if top > 100: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.GeoTiffMap.write = write_and_die\n"
        f"pair(Path({str(tmp_path / 'out')!r}), Difference(), "
        f"*map(Path, {list(map(str, files))!r}))"
    )
    done = subprocess.run(child(body), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [p.name for p in (tmp_path / "out").iterdir()]
    assert len(left) == 1 and left[0].startswith(".unfinished-")


@pytest.mark.fault("U4")
def test_an_error_or_a_signal_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [save(tmp_path / f"{i}.png", picture(i, 64, 200)) for i in (1, 2)]
    calls = []

    def interrupted(share: float) -> None:
        calls.append(share)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)  # the main thread hears it

    real = job.predict_scene_bands

    def bands(*args: Any, after_batch: Any, **kwargs: Any) -> Any:
        def both(share: float) -> None:
            interrupted(share)
            after_batch(share)

        return real(*args, after_batch=both, **kwargs)

    monkeypatch.setattr(job, "predict_scene_bands", bands)
    with pytest.raises(Interrupted, match="stopped after 0 of 1 scenes") as stop:
        run(checkpoint, *files, tmp_path / "out", batch_size=1)
    assert stop.value.exit_code == 143 and len(calls) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_folder_that_cannot_be_written_is_named(checkpoint: Path, tmp_path: Path) -> None:
    files = [save(tmp_path / f"{i}.png", picture(i)) for i in (1, 2)]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/out: cannot be written to"):
        run(checkpoint, *files, tmp_path / "file" / "out")


def test_help_answers_without_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['predict.py', '--help']\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'rasterio' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "checkpoint before after" in done.stdout and "--min-area" in done.stdout


def test_script_ends_with_one_line_and_2(tmp_path: Path) -> None:
    words = [str(tmp_path / "no.pt"), "a.png", "b.png"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {tmp_path / 'no.pt'}: no such run or checkpoint")


@pytest.mark.fault("U4")
@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size there")
@pytest.mark.parametrize("kilobytes", [1, 100])
def test_a_disk_that_fills_is_one_line(
    checkpoint: Path, tmp_path: Path, kilobytes: int, capsys: pytest.CaptureFixture
) -> None:
    from geo_helpers import write_tif

    noise = np.random.default_rng(0).integers(0, 256, (2, 3, 300, 300), dtype=np.uint8)
    files = [write_tif(tmp_path / f"{i}.tif", date) for i, date in enumerate(noise)]
    options: dict[str, Any] = {"probability": "float32", "threshold": 0.5}
    with no_file_above(kilobytes * 1024):
        out = tmp_path / "out"
        assert run_script(lambda: run(checkpoint, *files, out, **options)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert list(out.iterdir()) == []
