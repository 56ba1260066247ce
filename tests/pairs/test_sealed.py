import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from mapping.rasters import open_scene
from pairs.bands import Reading
from pairs.images import read_pixels
from pairs.sealed import open_sealed
from runtime.errors import UserError

rasterio = pytest.importorskip("rasterio")
from geo_helpers import write_tif  # noqa: E402


def tif(path: Path, **profile: object) -> Path:
    return write_tif(path, np.full((3, 64, 64), 7, np.uint8), **profile)


def vrt_of(other: Path | str, size: int = 8) -> str:
    """Show an address, or a file beside the VRT: GDAL 3.12 opens no other from there."""
    name, is_beside = (other.name, 1) if isinstance(other, Path) else (other, 0)
    return (
        f'<VRTDataset rasterXSize="{size}" rasterYSize="{size}"><VRTRasterBand dataType="Byte" '
        f'band="1" subClass="VRTRawRasterBand"><SourceFilename relativeToVRT="{is_beside}">'
        f"{name}</SourceFilename></VRTRasterBand></VRTDataset>"
    )


@contextmanager
def server() -> Iterator[tuple[str, list[str]]]:
    """Give an address on this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}", asked
        finally:
            listening.shutdown()
            thread.join()


def opened(path: Path, **options: object) -> str:
    with open_sealed(path, **options) as source:  # type: ignore[arg-type]
        source.read(1, out_shape=(4, 4))
        source.read_masks(1)
        return str(source.driver)


@pytest.mark.fault("U6")
@pytest.mark.parametrize("name", ["innocent.tif", "x.vrt", "x.png", "x.img"])
def test_a_text_that_shows_another_file_is_no_raster(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    (tmp_path / name).write_text(vrt_of(secret))
    with pytest.raises(UserError, match=r"a VRT, .*--allow-vrt"):
        opened(tmp_path / name)
    assert opened(tmp_path / name, allow_vrt=True) == "VRT"


@pytest.mark.fault("U6")
def test_no_address_is_asked(tmp_path: Path) -> None:
    with server() as (address, asked):
        kinds = {
            "wms": f'<GDAL_WMS><Service name="TMS"><ServerUrl>{address}/${{z}}/${{x}}/${{y}}.png'
            "</ServerUrl></Service><DataWindow><TileCountX>1</TileCountX></DataWindow></GDAL_WMS>",
            "wcs": f"<WCS_GDAL><ServiceURL>{address}/?</ServiceURL><CoverageName>x</CoverageName>"
            "</WCS_GDAL>",
            "vrt": vrt_of(f"/vsicurl/{address}/x"),
            "stac": f'{{"stac_version": "1.0.0", "type": "Feature", "assets": {{"a": {{"href": '
            f'"{address}/a.tif"}}}}}}',
        }
        for name, text in kinds.items():
            path = tmp_path / f"{name}.tif"
            path.write_text(text)
            with pytest.raises(UserError, match=f"{name}.tif"):
                opened(path)
        for name in ("tag.tif", "sidecar.tif"):
            path = tif(tmp_path / name)
            far = f"/vsicurl/{address}/o.tif"
            if name == "tag.tif":
                with rasterio.open(path, "r+") as file:
                    file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=far)
            else:
                Path(f"{path}.aux.xml").write_text(
                    '<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">'
                    f"{far}</MDI></Metadata></PAMDataset>"
                )
            with pytest.raises(UserError, match="names another file, /vsicurl/"):
                opened(path)
        for name in ("/vsicurl/", f"/vsicurl/{address}/x.tif", address, "GTIFF_DIR:1:x.tif"):
            with pytest.raises(UserError, match="no such file"):
                opened(Path(name))
        assert asked == []


@pytest.mark.fault("U6")
@pytest.mark.parametrize("end", [".ovr", ".OVR", ".msk"])
def test_sidecars_are_of_the_file_itself(tmp_path: Path, end: str) -> None:
    path = tif(tmp_path / "a.tif")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64 * 64))
    beside = Path(f"{path}{end}")
    beside.write_text(vrt_of(secret, 64))
    with pytest.raises(UserError, match="no TIFF, but GDAL would open it"):
        opened(path)
    tif(beside)
    with rasterio.open(beside, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(secret))
    with pytest.raises(UserError, match="names another file"):
        opened(path)
    beside.unlink()
    os.mkfifo(beside)
    with pytest.raises(UserError, match="no regular file"):
        opened(path)
    beside.unlink()
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4])
    assert opened(path) == "GTiff"


@pytest.mark.fault("U6")
@pytest.mark.parametrize("end", ["tfw", "tif.aux.xml", "wld", "prj"])
def test_a_neighbour_that_never_ends_is_refused(tmp_path: Path, end: str) -> None:
    path = tif(tmp_path / "a.tif")
    os.mkfifo(tmp_path / f"a.{end}")
    with pytest.raises(UserError, match=f"a.{end}: no regular file"):
        opened(path)


def test_formats_that_are_read(tmp_path: Path) -> None:
    for driver, end in [("GTiff", "tif"), ("PNG", "png"), ("JPEG", "jpg"), ("BMP", "bmp"),
                        ("HFA", "img"), ("JP2OpenJPEG", "jp2"), ("WEBP", "webp")]:  # fmt: skip
        assert opened(tif(tmp_path / f"a.{end}", driver=driver)) == driver
    assert opened(tif(tmp_path / "big.tif", bigtiff="yes", endianness="big")) == "GTiff"
    (tmp_path / "x.tif").write_text("x")
    with pytest.raises(UserError, match="none of GTiff, PNG"):
        opened(tmp_path / "x.tif")


@pytest.mark.fault("U6")
@pytest.mark.parametrize("reading", [Reading(bands=(1, 2, 3)), Reading(alpha=1, bands=(2, 3, 3))])
def test_another_alpha_opens_no_other_file(reading: Reading, tmp_path: Path) -> None:
    """GDAL takes a name that holds <VRTDataset for a VRT, and the name may be a stranger's."""
    plain = tif(tmp_path / "x.tif", photometric="rgb")
    assert read_pixels(plain, reading).rgb.shape == (64, 64, 3)
    # the fourth band counts as alpha, so GDAL is shown another view
    four = write_tif(tmp_path / "y.tif", np.full((4, 64, 64), 7, np.uint8))
    stranger = four.rename(tmp_path / 'x<VRTDataset rasterXSize="8" rasterYSize="8">.tif')
    with pytest.raises(UserError, match="rename it without '<'"):  # noqa: SIM117
        with open_scene(stranger, stranger, reading=reading):
            pass
