import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mapping.sidecars import write_class_style, write_probability_style


def test_styles_have_the_classes_and_their_colours(tmp_path: Path) -> None:
    write_class_style(
        tmp_path / "x_mask.tif", ["none", 'a "road" & <b>\x1b'], [(0, 0, 0), (255, 0, 16)]
    )
    root = ET.parse(tmp_path / "x_mask.qml").getroot()
    none, road = root.iter("paletteEntry")
    assert none.attrib["alpha"] == "0" and road.attrib["color"] == "#ff0010"
    assert road.attrib["value"] == "1" and road.attrib["label"] == 'a "road" & <b>\\x1b'


@pytest.mark.parametrize("top", [1, 254])
def test_a_probability_is_clear_below_a_tenth(tmp_path: Path, top: float) -> None:
    write_probability_style(tmp_path / "x_probability.tif", top)
    root = ET.parse(tmp_path / "x_probability.qml").getroot()
    values = [float(item.attrib["value"]) for item in root.iter("item")]
    alphas = [int(item.attrib["alpha"]) for item in root.iter("item")]
    assert values == sorted(values) and values[-1] == top and alphas[:2] == [0, 0]
    assert alphas[-1] == 255
