"""Small GeoTIFFs."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")
from rasterio.transform import from_origin  # noqa: E402

UTM = "EPSG:32632"


def write_tif(path: Path, pixels: np.ndarray, **profile: Any) -> Path:
    """Write (bands, H, W) as a GeoTIFF of half-metre pixels, unless the profile says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colors = profile.pop("colorinterp", None)
    settings = {
        "driver": "GTiff",
        "crs": UTM,
        "transform": from_origin(5e5, 5.2e6, 0.5, 0.5),
        **profile,
    }
    bands, height, width = pixels.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        file = rasterio.open(
            path, "w", count=bands, height=height, width=width, dtype=pixels.dtype, **settings
        )
    with file:
        file.write(pixels)
        if colors:
            file.colorinterp = colors
    return path
