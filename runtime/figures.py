"""Figures without a display: text of strangers is drawn as it is written, files appear whole.

They are built without pyplot, so nothing here leaves global state behind.
"""

import functools
import io
from pathlib import Path

from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from runtime.errors import visible
from runtime.files import whole_file

LONGEST_TEXT = 60  # characters of a foreign text in a figure
# DejaVu comes with matplotlib; of the others, which have Chinese, Japanese and Korean, what is here
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC",
         "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Malgun Gothic",
         "Arial Unicode MS")  # fmt: skip


class Picture(Figure):
    """A figure that notebooks show by themselves, without pyplot."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()

    def draw(self, renderer: RendererBase) -> None:
        """Draw with the fonts that `plain_text` counts on."""
        for text in self.findobj(Text):
            text.set_fontfamily(list(_fonts()))
        super().draw(renderer)


@functools.cache
def _fonts() -> dict[str, FT2Font]:
    installed = {font.name for font in fontManager.ttflist}
    return {name: get_font(findfont(name)) for name in FONTS if name in installed}


def plain_text(text: str, length: int = LONGEST_TEXT) -> str:
    """Return a foreign text in a form that a figure shows as it is written.

    A long text loses its middle, a character that no font has is escaped, a dollar begins no
    formula, and a leading underscore does not keep a name out of a legend.
    """
    if len(text) > length:
        text = f"{text[: length // 2]}...{text[3 + length // 2 - length :]}"
    shown = "".join(
        c if any(font.get_char_index(ord(c)) for font in _fonts().values()) else ascii(c)[1:-1]
        for c in visible(text.replace("\n", " "))
    )
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def plain_title(title: str) -> str:
    """Return a title of several lines, each as `plain_text`; lines may be longer."""
    return "\n".join(plain_text(line, 2 * LONGEST_TEXT) for line in title.splitlines())


def save_figure(figure: Figure, path: Path) -> None:
    """Save as PNG so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as beside:
        figure.savefig(beside, format="png")
