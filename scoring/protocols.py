"""Protocols: the ways to ask a model for the change of a whole image. Each gives other scores.

    patches    256 x 256 side by side, as the literature scores and as `main.py` validates
    whole      the image at once, of whatever size
    sliding    overlapping windows, blended, as `predict.py` does scenes

Padding of a patch at an image's end is cut off again: it is predicted, never counted.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataset import PATCH_SIZE, ChangeDataset, make_loader
from model import SiameseUNet
from networks.mirrors import Pairs, mean_over_views
from networks.sliding_window import OVERLAP, WINDOW, predict_logits
from pairs.sources import Source
from runtime.devices import Precision, explain_out_of_memory
from scoring.counts import Bytes, Prediction

Predicted = tuple[Prediction, Bytes]
PROTOCOLS = ("patches", "whole", "sliding")


@dataclass(frozen=True)
class Predictor:
    """A model and how to ask it.

    Attributes:
        model: in eval mode, on its device.
        amp: precision: off, bf16 or fp16.
        batch_size: patches or windows at once.
        num_workers: processes that cut patches.
        window: side of a sliding window.
        overlap: of neighbouring windows.
        flips: average over mirror images of a patch, an image or a window.
    """

    model: SiameseUNet
    amp: str = "off"
    batch_size: int = 8
    num_workers: int = 0
    window: int = WINDOW
    overlap: int = OVERLAP
    flips: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def rule(self) -> str:
        """How the model decides by itself: "0.5" of the change probability, or "argmax"."""
        is_binary = self.model.task == "semantic" or self.model.num_classes == 1
        return "0.5" if is_binary else "argmax"

    def describe(self, protocol: str) -> str:
        """Return a protocol in words."""
        return {
            "patches": f"{PATCH_SIZE} x {PATCH_SIZE} patches side by side",
            "whole": "whole image at once",
            "sliding": f"windows of {self.window}, overlapping by {self.overlap}, blended",
        }[protocol]

    def predict(self, source: Source, protocol: str) -> Iterator[Predicted]:
        """Predict every pair of a source, in its order.

        Yields:
            The prediction and the truth (D, H, W), of the whole image.

        Raises:
            UserError: an image does not fit in the device's memory.
        """
        by = {"patches": self._patches, "whole": self._whole, "sliding": self._sliding}[protocol]
        self.model.eval()
        with explain_out_of_memory(
            f"protocol {protocol} and --batch-size {self.batch_size}",
            "--batch-size 1, or --protocols patches,sliding",
        ):
            yield from by(source)

    def _patches(self, source: Source) -> Iterator[Predicted]:
        dataset = ChangeDataset(source, crop_size=PATCH_SIZE)
        loader = make_loader(
            dataset,
            self.batch_size,
            shuffle=False,
            num_workers=self.num_workers,
            device=self.device,
            shared=False,  # an image's patches stay together
        )
        places = iter(dataset.patches)
        with closing(loader):
            for before, after, target in loader:
                batch = self._forward(before, after)
                truth = target.numpy().reshape(batch.classes.shape)
                parts: list[NDArray[Any]]
                parts = [batch.change, batch.change_classes, batch.classes, truth]
                for k in range(len(truth)):
                    number, top, left = next(places)
                    height, width = source.sizes[number]
                    if top == left == 0:
                        image: list[Any] = [
                            np.empty((*part.shape[1:-2], height, width), part.dtype)
                            for part in parts
                        ]
                    for whole, part in zip(image, parts, strict=True):
                        place = whole[..., top : top + PATCH_SIZE, left : left + PATCH_SIZE]
                        place[:] = part[k, ..., : place.shape[-2], : place.shape[-1]]
                    if top + PATCH_SIZE >= height and left + PATCH_SIZE >= width:
                        yield Prediction(*image[:3]), image[3]

    def _whole(self, source: Source) -> Iterator[Predicted]:
        for number in range(len(source)):
            channels = source.channels(number)
            batch = self._forward(channels[None, :3], channels[None, 3:6])
            yield _only(batch), channels[6:].numpy()

    def _sliding(self, source: Source) -> Iterator[Predicted]:
        for number in range(len(source)):
            channels = source.channels(number)
            logits = predict_logits(
                self.model,
                channels[:3],
                channels[3:6],
                window=self.window,
                overlap=self.overlap,
                batch_size=self.batch_size,
                flips=self.flips,
                amp=self.amp,
            )
            batch = Prediction.of_logits(logits[None], self.model.task)
            yield _only(batch), channels[6:].numpy()

    @torch.no_grad()
    def _forward(self, before: Tensor, after: Tensor) -> Prediction:
        before, after = (t.to(self.device, non_blocking=True) for t in (before, after))

        def ask(pairs: Pairs) -> list[Tensor]:
            return [self.model(*pair) for pair in pairs]

        dates = [(before, after)]
        with Precision.named(self.amp, self.device).autocast(self.device):
            (logits,) = mean_over_views(ask, dates) if self.flips else ask(dates)
        return Prediction.of_logits(logits, self.model.task)


def _only(batch: Prediction) -> Prediction:
    """Return the one prediction of a batch of one."""
    return Prediction(batch.change[0], batch.change_classes[0], batch.classes[0])
