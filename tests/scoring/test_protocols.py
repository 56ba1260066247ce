from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import save_pair, save_tree
from tiny import TINY

from dataset import open_dataset
from model import SiameseUNet, build_model
from pairs.sources import Source
from runtime.errors import UserError
from scoring import protocols
from scoring.counts import Prediction
from scoring.protocols import PROTOCOLS, Predictor


@pytest.fixture(scope="module")
def model(tiny_network: str) -> SiameseUNet:
    torch.manual_seed(0)
    return build_model(backbone=tiny_network).eval()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(protocols, "PATCH_SIZE", 32)
    tree = save_tree(tmp_path / "set", size=(70, 45), train=1, val=2)
    save_pair(tree / "val", "a_small", 7, size=(17, 33))
    save_pair(tree / "val", "exact", 8, size=(32, 64))
    return open_dataset(tree).source


class TwoDates(Source):
    """The same label at both dates, as semantic change has two."""

    def __init__(self, source: Source) -> None:
        self.pairs, self.encoding, self.sizes = source.pairs, source.encoding, source.sizes
        self.source = source

    def channels(self, number: int) -> torch.Tensor:
        channels = self.source.channels(number)
        return torch.cat([channels, channels[6:]])


def logits_of(model: SiameseUNet, channels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(channels[None, :3], channels[None, 3:6])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_each_image_comes_once_whole_and_in_order(
    protocol: str, batch_size: int, model: SiameseUNet, source: Source
) -> None:
    predictor = Predictor(model, batch_size=batch_size, window=32, overlap=8)
    found = list(predictor.predict(source, protocol))
    assert len(found) == len(source)
    for number, (prediction, truth) in enumerate(found):
        assert prediction.change.shape == source.sizes[number]
        assert prediction.classes.shape == truth.shape == (1, *source.sizes[number])
        assert (truth == source.channels(number)[6:].numpy()).all()


def test_patches_are_predicted_apart_and_put_together(model: SiameseUNet, source: Source) -> None:
    found = [p for p, _ in Predictor(model, batch_size=3).predict(source, "patches")]
    number = next(i for i, pair in enumerate(source.pairs) if pair.name == "exact")
    channels = source.channels(number)
    for left in (0, 32):
        alone = Prediction.of_logits(logits_of(model, channels[..., left : left + 32]), "change")
        gap = found[number].change[:, left : left + 32].astype(int) - alone.change[0]
        assert np.abs(gap).max() <= 1  # a step is 1 / 65536


def test_whole_and_one_window_are_the_model_itself(model: SiameseUNet, source: Source) -> None:
    for protocol in ("whole", "sliding"):
        predictor = Predictor(model, window=512)
        for number, (prediction, _) in enumerate(predictor.predict(source, protocol)):
            alone = Prediction.of_logits(logits_of(model, source.channels(number)), "change")
            assert np.abs(prediction.change.astype(int) - alone.change[0]).max() <= 1


def test_workers_change_nothing(model: SiameseUNet, source: Source) -> None:
    alone, helped = (
        [p.change for p, _ in Predictor(model, num_workers=n).predict(source, "patches")]
        for n in (0, 1)
    )
    assert all((a == b).all() for a, b in zip(alone, helped, strict=True))


def test_two_dates_of_classes(source: Source) -> None:
    torch.manual_seed(0)
    semantic = build_model(task="semantic", backbone=TINY, num_classes=3).eval()

    for protocol in PROTOCOLS:
        for prediction, truth in Predictor(semantic).predict(TwoDates(source), protocol):
            height, width = prediction.change.shape
            assert prediction.change_classes.shape == truth.shape == (2, height, width)
            assert prediction.change_classes.min() >= 1 and prediction.change_classes.max() <= 3


def of_four_by_hand(model: SiameseUNet, channels: torch.Tensor) -> torch.Tensor:
    def seen(*axes: int) -> torch.Tensor:
        return logits_of(model, channels.flip(axes)).flip(axes)

    return (seen() + seen(-1) + seen(-2) + seen(-2, -1)) / 4


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("task", ["change", "semantic"])
def test_flips_are_a_mean_of_four_made_by_hand(protocol: str, task: str, source: Source) -> None:
    torch.manual_seed(0)
    num_classes, source = (3, TwoDates(source)) if task == "semantic" else (1, source)
    model = build_model(task=task, backbone=TINY, num_classes=num_classes).eval()
    number = next(i for i, pair in enumerate(source.pairs) if pair.name == "exact")
    found, plain = (
        list(Predictor(model, flips=flips).predict(source, protocol))[number][0]
        for flips in (True, False)
    )
    image = source.channels(number)[:6]
    parts = image.split(32, dim=-1) if protocol == "patches" else [image]  # 32 x 64 pixels
    logits = torch.cat([of_four_by_hand(model, part) for part in parts], dim=-1)
    expected = Prediction.of_logits(logits, task)
    assert np.abs(found.change.astype(int) - expected.change[0]).max() <= 1
    assert (found.change_classes == expected.change_classes[0]).mean() > 0.999
    assert (found.classes == expected.classes[0]).mean() > 0.999
    assert np.abs(found.change.astype(int) - plain.change).max() > 10


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_flips_change_nothing_of_a_model_that_sees_each_pixel_alone(
    protocol: str, source: Source
) -> None:
    class Darker(SiameseUNet):
        def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            return (before.float() - after.float()).mean(1, keepdim=True) / 64

    model = build_model(backbone=TINY).eval()
    model.__class__ = Darker
    plain, mean = (
        [p for p, _ in Predictor(model, flips=flips).predict(source, protocol)]
        for flips in (False, True)
    )
    for one, other in zip(plain, mean, strict=True):
        assert np.array_equal(one.change, other.change)
        assert np.array_equal(one.classes, other.classes)


def test_no_room_says_what_to_try(source: Source, model: SiameseUNet) -> None:
    class Greedy(SiameseUNet):
        def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = build_model(backbone=TINY)
    model.__class__ = Greedy
    with pytest.raises(UserError, match="protocol whole.*--protocols patches,sliding"):
        list(Predictor(model).predict(source, "whole"))
