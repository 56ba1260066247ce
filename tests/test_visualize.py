from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import save_pair, save_tree
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from dataset import ChangeDataset, open_dataset
from pairs.labels import LabelEncoding
from runtime.figures import save_figure
from visualize import (
    COLUMNS,
    FN,
    FP,
    IGNORED,
    TP,
    WRONG_CLASS,
    color_classes,
    color_errors,
    palette,
    pick_samples,
    plot_confusion,
    plot_predictions,
    prediction_grid,
)


class Brightness(nn.Module):
    """Predicts change where the later date is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout()

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        assert not self.training
        return self.scale * (after.float().mean(1, keepdim=True) - 128)


@pytest.fixture
def val(tmp_path: Path) -> ChangeDataset:
    tree = save_tree(tmp_path / "set", train=1, val=8)
    for i in range(4):
        save_pair(tree / "val", f"still_{i}", 50 + i, mask=np.zeros((32, 32), np.uint8))
    return open_dataset(tree, crop_size=32)


def test_as_the_notebook_calls_it(
    val: ChangeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = Brightness().train()
    figure = plot_predictions(model, val, device="cuda", num_samples=10)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 10 * 5
    assert model.training and model.drop.training
    assert "no CUDA here" in caplog.text
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.format == "PNG"
    assert {p.name for p in tmp_path.iterdir()} == {"results.png", "set"}


@pytest.mark.fault("R12")
def test_needs_no_display(
    val: ChangeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    plot_predictions(Brightness(), val, "cpu", 1, path=tmp_path / "deep" / "er" / "x.png")
    assert (tmp_path / "deep" / "er" / "x.png").is_file()


def test_fewer_patches_than_asked_for(val: ChangeDataset) -> None:
    assert len(plot_predictions(Brightness(), val, "cpu", 100, path=None).axes) == 12 * 5
    with pytest.raises(ValueError, match="num_samples is 0"):
        plot_predictions(Brightness(), val, "cpu", 0)


def test_four_in_five_show_change(val: ChangeDataset) -> None:
    chosen = pick_samples(val, 5)
    changed = [bool((val[i][2] == 1).any()) for i in chosen]
    assert sum(changed) == 4
    assert chosen == sorted(set(chosen)) == pick_samples(val, 5)
    assert len(pick_samples(val, 10)) == 10  # 8 of 10 are all that change


def test_errors_are_coloured_by_hand() -> None:
    truth = np.array([[[1, 0, 1, 0, 255, 2]]])
    predicted = np.array([[[1, 1, 0, 0, 1, 1]]])
    expected = [TP, FP, FN, (0, 0, 0), tuple(IGNORED), WRONG_CLASS]
    assert [tuple(c) for c in color_errors(truth, predicted)[0]] == expected
    truth = np.array([[[1, 1, 1, 0]], [[2, 2, 2, 0]]])
    predicted = np.array([[[1, 1, 0, 1]], [[2, 3, 0, 1]]])
    expected = [TP, WRONG_CLASS, FN, FP]
    assert [tuple(c) for c in color_errors(truth, predicted)[0]] == expected


def test_classes_have_colours_of_their_own() -> None:
    painted = color_classes(np.arange(9)[None])
    assert len({tuple(c) for c in painted[0]}) == 9
    assert tuple(color_classes(np.array([[255]]))[0, 0]) == tuple(IGNORED)


def test_every_class_has_a_colour_of_the_files_or_ours() -> None:
    colors = ((255, 255, 255), (0, 0, 255), (128, 128, 128))
    assert palette(LabelEncoding((0, 1, 2), colors=colors)).tolist() == list(map(list, colors))
    many = palette(LabelEncoding(tuple(range(30))))
    assert many.shape == (30, 3)
    assert (many[1:] != many[0]).any(1).all()


@pytest.mark.parametrize("task", ["change", "semantic"])
def test_classes_are_named_below_the_grid(task: str) -> None:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    mask = torch.zeros((2, 8, 8) if task == "semantic" else (8, 8), dtype=torch.uint8)
    mask[..., :4, :4] = 2
    encoding = LabelEncoding((0, 1, 2), ("none", "road", "building"))
    figure = prediction_grid([(image, image, mask)] * 2, [mask] * 2, encoding)
    assert len(figure.axes) == 2 * len(COLUMNS[task])
    words = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert {"none", "road", "building", "wrong class"} <= set(words)
    assert figure.axes[len(COLUMNS[task]) - 1].get_title() == "errors: IoU 1.00"


def test_sizes_may_differ_from_row_to_row() -> None:
    samples = [
        (torch.zeros(3, n, n + 4, dtype=torch.uint8),) * 2
        + (torch.zeros(n, n + 4, dtype=torch.uint8),)
        for n in (8, 20)
    ]
    figure = prediction_grid(samples, [s[2] for s in samples], LabelEncoding((0, 255)), title="t")
    assert "no change, 0 px predicted" in figure.axes[4].get_title()


def test_a_picture_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    broken = Figure()
    broken.savefig = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        save_figure(broken, path)
    assert path.read_bytes() == b"old"


ODD_NAMES = ("$x^2$", "\ud800", "x" * 50_000, "\u5efa\u7269", "_roof", "a\\$b", "$\\frac{$")


@pytest.mark.fault("D24", "D25")
def test_foreign_text_is_drawn_as_text(tmp_path: Path) -> None:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    mask = torch.arange(64, dtype=torch.uint8).view(8, 8) % len(ODD_NAMES)
    encoding = LabelEncoding(tuple(range(len(ODD_NAMES))), ODD_NAMES)
    names = ["\x1b[31m\udcff$\nsecond $ line"]
    grid = prediction_grid([(image, image, mask)], [mask], encoding, title="$a$", names=names)
    for number, figure in enumerate((grid, plot_confusion(torch.eye(7).long(), ODD_NAMES))):
        save_figure(figure, tmp_path / f"{number}.png")  # a missing glyph would warn
    shown = [text.get_text() for legend in grid.legends for text in legend.get_texts()][-7:]
    assert shown[0] == r"\$x^2\$" and shown[1] == r"\ud800" and shown[4] == " _roof"
    assert len(shown[2]) == 24 and "\x1b" not in grid.axes[0].get_ylabel()
    assert grid.get_suptitle() == r"\$a\$"
