"""One self-contained HTML page: it opens from disk, without a server and without the network.

    page       {"title": ..., "about": [line, ...], "sections": [SECTION, ...]}
    SECTION    {"title": ..., "lines": [...], "table": TABLE, "views": [VIEW, ...],
                "figures": [{"title": ..., "src": URI}, ...]}      all but the title may be missing
    TABLE      {"head": [cell, ...], "rows": [[cell, ...], ...]}
    VIEW       {"name": ..., "note": ..., "width": W, "height": H, "before": LAYER, "after": LAYER,
                "overlay": LAYER, "legend": [[label, color], ...],
                "items": [{"label": ..., "box": [left, top, right, bottom]}, ...]}
    LAYER      a URI of an image, or a pyramid of tiles in files beside the page:
               {"tiles": "tiles/after/{z}/{x}_{y}.jpg", "size": 512, "levels": 4}; tile x, y of
               level z is a square of 512 << z pixels of the image, drawn at 512; a missing tile is
               empty

A view is a swipe between two dates, with the overlay on top, zoom, and a list of places to go to.
`page.html` is the template; it has the style and the script. Texts are shown as texts: what a file
of a stranger is called cannot become HTML, and what has no shape is escaped.
"""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import visible
from runtime.files import whole_file

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(path: Path, page: Mapping[str, Any]) -> None:
    """Write a page, as the module describes it.

    Raises:
        OSError: the disk is full or read-only.
    """
    content = json.dumps(_visible(page), allow_nan=False).replace("<", "\\u003c")
    title = html.escape(visible(page["title"]))
    top, middle, end = re.split(r"\{\{\w+\}\}", TEMPLATE.read_text("utf-8"))
    with whole_file(path) as beside:
        beside.write_text(f"{top}{title}{middle}{content}{end}", "utf-8")


def image_uri(image: NDArray[np.uint8], quality: int = 85) -> str:
    """Return an image as a URI that holds it: (H, W, 3) as JPEG, (H, W, 4) as PNG."""
    content = io.BytesIO()
    if image.shape[2] == 4:
        Image.fromarray(image).save(content, "PNG", optimize=True)
        return _uri("image/png", content.getvalue())
    Image.fromarray(image).save(content, "JPEG", quality=quality)
    return _uri("image/jpeg", content.getvalue())


def png_uri(path: Path) -> str:
    """Return a PNG file as a URI that holds it."""
    return _uri("image/png", path.read_bytes())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _visible(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isprintable() else visible(value)
    if isinstance(value, Mapping):
        return {key: _visible(part) for key, part in value.items()}
    return [_visible(part) for part in value] if isinstance(value, Sequence) else value
