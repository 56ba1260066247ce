"""What lies beside the maps of a scene: their place, their colours in QGIS, where they come from.

NAME_overlay.pgw, .png.aux.xml    place of the picture: affine transform, CRS
NAME_mask.qml, ...                a style that QGIS takes when it opens the map of that name
NAME_about.json                   provenance: checkpoint, threshold, command, version, files
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from mapping.grids import Grid, place
from runtime.errors import UserError, visible

Color = Sequence[int]
MAKERS = ("checkpoint_sha256", "threshold", "options")  # of the provenance: what changes a map

_STYLE = """<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>
<qgis version="3.22" styleCategories="AllStyleCategories" hasScaleBasedVisibilityFlag="0">
  <pipe>
{renderer}
    <brightnesscontrast brightness="0" contrast="0" gamma="1"/>
    <huesaturation saturation="0" grayscaleMode="0" colorizeOn="0"/>
    <rasterresampler maxOversampling="2"/>
  </pipe>
  <blendMode>0</blendMode>
</qgis>
"""
_HEAT = ((0.0, "#ffffb2"), (0.5, "#fd8d3c"), (1.0, "#bd0026"))  # ColorBrewer's YlOrRd


def write_place(picture: Path, grid: Grid, step: int) -> None:
    """Write where a picture of every `step`-th pixel of a scene lies, if it lies anywhere."""
    if grid.transform is None:
        return
    t = grid.transform
    x, y = place(t, step / 2, step / 2)
    numbers = (t.a * step, t.d * step, t.b * step, t.e * step, x, y)
    lines = "".join(f"{number:.12g}\n" for number in numbers)
    picture.with_suffix(".pgw").write_text(lines, "utf-8")
    if grid.crs is not None:
        text = f"<PAMDataset>\n  <SRS>{escape(grid.crs.to_wkt())}</SRS>\n</PAMDataset>\n"
        picture.with_name(f"{picture.name}.aux.xml").write_text(text, "utf-8")


def write_class_style(map_path: Path, names: Sequence[str], palette: Sequence[Color]) -> None:
    """Write the style of a map of classes: class 0 is clear, the others have their colours."""
    entries = "\n".join(
        f'        <paletteEntry value="{value}" color="#{red:02x}{green:02x}{blue:02x}" '
        f'alpha="{255 if value else 0}" label={quoteattr(visible(name))}/>'
        for value, (name, (red, green, blue)) in enumerate(zip(names, palette, strict=True))
    )
    renderer = (
        '    <rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" '
        'nodataColor="">\n      <colorPalette>\n'
        f"{entries}\n      </colorPalette>\n    </rasterrenderer>"
    )
    _write_style(map_path, renderer)


def write_probability_style(map_path: Path, top: float) -> None:
    """Write the style of a probability map: clear below a tenth, then yellow to red.

    Args:
        map_path: of the map.
        top: the value that means 1, as QGIS reads it: 1 where the file tells its scale, else 254.
    """
    items = [(0.0, "#ffffb2", 0, "0"), (0.1, "#ffffb2", 0, "0.1")]
    items += [(max(share, 0.11), color, 255, f"{share:g}") for share, color in _HEAT[1:]]
    shades = "\n".join(
        f'          <item value="{share * top:g}" color="{color}" alpha="{alpha}" label="{label}"/>'
        for share, color, alpha, label in items
    )
    renderer = (
        '    <rasterrenderer type="singlebandpseudocolor" band="1" opacity="1" alphaBand="-1" '
        f'classificationMin="0" classificationMax="{top:g}" nodataColor="">\n'
        "      <rasterTransparency>\n        <singleValuePixelList>\n"
        f'          <pixelListEntry min="{top * 1.0001:g}" max="255" percentTransparent="100"/>\n'
        "        </singleValuePixelList>\n      </rasterTransparency>\n      <rastershader>\n"
        f'        <colorrampshader colorRampType="INTERPOLATED" classificationMode="1" clip="0" '
        f'minimumValue="0" maximumValue="{top:g}">\n'
        f"{shades}\n        </colorrampshader>\n      </rastershader>\n    </rasterrenderer>"
    )
    _write_style(map_path, renderer)


def _write_style(map_path: Path, renderer: str) -> None:
    map_path.with_suffix(".qml").write_text(_STYLE.format(renderer=renderer), "utf-8")


def about_path(folder: Path, name: str) -> Path:
    """Return where a scene's provenance is."""
    return folder / f"{name}_about.json"


def write_about(folder: Path, name: str, about: Mapping[str, Any]) -> None:
    """Write the provenance of a scene whose other files are in the folder."""
    files = sorted(path.name for path in folder.iterdir() if path.name.startswith(f"{name}_"))
    text = json.dumps({**about, "files": files}, indent=2)
    about_path(folder, name).write_text(text + "\n", "utf-8")


def is_complete(folder: Path, name: str, about: Mapping[str, Any]) -> bool:
    """Whether a scene's whole set is in the folder.

    Raises:
        UserError: it is, but of another checkpoint or other options.
    """
    path = about_path(folder, name)
    try:
        found = json.loads(path.read_text("utf-8"))
        if not all((folder / file).exists() for file in found["files"]):
            return False
        other = [key for key in MAKERS if found[key] != json.loads(json.dumps(about[key]))]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    if other:
        raise UserError(
            f"{path}: another {other[0].replace('_', ' ')} made this scene, so it is not gone on "
            "with; --overwrite, or another --output-dir"
        )
    return True


def tags_of(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the provenance as a GeoTIFF's tags."""
    return {
        f"PREDICT_{key.upper()}": value if isinstance(value, str) else json.dumps(value)
        for key, value in about.items()
    }
