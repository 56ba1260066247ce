import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import no_file_above

from model import SiameseUNet, build_model, load_model
from runtime.checkpoint import previous_of, read_checkpoint, restore, save_checkpoint
from runtime.errors import UserError
from runtime.options import find_model

KWARGS = {"backbone": "resnet18", "num_classes": 1, "freeze_backbone": True}


@pytest.fixture(scope="module")
def model() -> SiameseUNet:
    torch.manual_seed(0)
    return build_model(**KWARGS).eval()  # type: ignore[arg-type]


@pytest.fixture
def state(model: SiameseUNet) -> dict[str, Any]:
    return {"model": model.state_dict(), "model_kwargs": KWARGS, "config": {"lr": 1.0}, "data": {}}


def tiny_state(value: float = 0.0) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((1000,), value)},
        "model_kwargs": {},
        "config": {},
        "data": {},
    }


def test_a_model_comes_back_as_it_was(model: SiameseUNet, state: dict, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best.pt", state)
    loaded = load_model(tmp_path / "best.pt")
    before, after = torch.randint(0, 256, (2, 1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded(before, after), model(before, after))
    assert not loaded.training
    assert loaded.encoder.frozen
    assert os.listdir(tmp_path) == ["best.pt"]


@pytest.mark.fault("C6")
def test_weights_of_a_compiled_model_keep_plain_names(model: SiameseUNet) -> None:
    compiled = build_model(**KWARGS)  # type: ignore[arg-type]
    compiled.compile()
    assert compiled.state_dict().keys() == model.state_dict().keys()


def test_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for value in (1.0, 2.0, 3.0):
        save_checkpoint(path, tiny_state(value), keep_previous=True)
    assert read_checkpoint(path)["model"]["w"][0] == 3
    assert read_checkpoint(previous_of(path))["model"]["w"][0] == 2


@pytest.mark.fault("R18")
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, tiny_state(1.0))
    with pytest.raises(UserError, match="w is no longer finite"):
        save_checkpoint(path, tiny_state(float("nan")))
    assert read_checkpoint(path)["model"]["w"][0] == 1


@pytest.mark.fault("R4")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, tiny_state(1.0))
    state = {"model": {"w": torch.zeros(100_000)}}
    with no_file_above(20_000), pytest.raises(UserError) as error:
        save_checkpoint(path, state)
    assert "no file may have more than 0 MB here (ulimit -f); raise the limit" in str(error.value)
    assert read_checkpoint(path)["model"]["w"][0] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.fault("C1")
@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", os.urandom(5000), b"PK\x03\x04broken"]
)
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x.pt: not a readable checkpoint"):
        read_checkpoint(path)


@pytest.mark.fault("C1")
def test_truncated_and_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match="no such run or checkpoint"):
        read_checkpoint(path)
    save_checkpoint(path, tiny_state())
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(path)


@pytest.mark.fault("C2")
def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, tiny_state(1.0))
    content = bytearray(path.read_bytes())
    where = content.find(torch.ones(4).numpy().tobytes())
    assert where > 0
    content[where + 1] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["model"]["w"].ne(1).any()  # torch does not notice
    with pytest.raises(UserError, match="fails its check sum"):
        read_checkpoint(path)


WRONG = [
    ("best", 3), ("best", {"epoch": 1}), ("best", {"epoch": -1, "change_iou": 0.5}),
    ("best", {"epoch": 1, "change_iou": "high"}), ("best", {"epoch": 1, "change_iou": 10**400}),
    ("weights", ["imagenet"]), ("mlflow_run_id", 7), ("progress", [1]), ("progress.epoch", 0.5),
    ("progress.batch", -1), ("versions", "1"), ("config", {3: 4}), ("config.lr", {"a": {"b": 1}}),
    ("config.data_dir", 5), ("config.batch_size", "8"), ("config.batch_size", 0),
    ("config.mask_values", 255), ("config.mask_values", [0, -1]), ("data.fingerprint", b"x"),
    ("data.mask_values", "0,255"), ("data.mask_values", [0.0]), ("data.class_names", "road"),
    ("data.class_names", [1, 2]), ("data.class_names", {"road": 1}), ("data.class_colors", [1, 2]),
    ("data.class_colors", [[0, 0]]), ("data.class_colors", [[0, 0, 256]]),
]  # fmt: skip


@pytest.mark.fault("C10")
@pytest.mark.parametrize(("entry", "value"), WRONG)
def test_a_wrong_entry_is_named(entry: str, value: object, tmp_path: Path) -> None:
    state: dict[str, Any] = {
        **tiny_state(),
        "best": {"epoch": 1, "change_iou": 0.5, "iou/road": float("nan")},
        "weights": "none",
        "progress": {"epoch": 1, "batch": 0},
        "config": {"lr": 1e-3, "data_dir": None, "batch_size": 8, "mask_values": [0, 255]},
        "data": {"fingerprint": "x", "mask_values": [0, 255], "class_names": ["no", "yes"],
                 "class_colors": [[0, 0, 0], [255, 255, 255]]},
    }  # fmt: skip
    save_checkpoint(tmp_path / "x.pt", state)
    read_checkpoint(tmp_path / "x.pt")
    *parents, name = entry.split(".")
    (state[parents[0]] if parents else state)[name] = value
    torch.save({"format": 1, **state}, tmp_path / "x.pt")
    with pytest.raises(
        UserError, match=rf"x\.pt: its entry {entry.split('.', maxsplit=1)[0]}.* is .*, not "
    ):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.fault("R7")
def test_no_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "x.pt", tiny_state())

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError, match=r"x\.pt: no memory to read it"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_model_is_named_in_many_ways(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (tmp_path / "runs" / ".a.tmp").mkdir()
    (run / "last.pt").touch()
    for word in (run, str(run), "a", run / "last.pt"):
        assert find_model(word, tmp_path / "runs") == run / "last.pt"
    (run / "best.pt").touch()
    for word in (run, "a", run / "best.pt"):
        assert find_model(word, tmp_path / "runs") == run / "best.pt"


def test_a_model_that_is_not_there_brings_those_that_are(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").touch()
        os.utime(tmp_path / name / "best.pt", (number, number + 1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="b: no such run or checkpoint; the newest are .*new, .*ol"):
        find_model("b", tmp_path)
    with pytest.raises(UserError, match=r"empty: holds no best\.pt or last\.pt; the newest are"):
        find_model("empty", tmp_path)
    with pytest.raises(UserError, match="no such run or checkpoint$"):
        find_model("b", tmp_path / "none")


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


@pytest.mark.fault("C3")
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(zipped: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "x.pt", tmp_path / "touched"
    torch.save({"model": Evil(target)}, path, _use_new_zipfile_serialization=zipped)
    if not zipped:
        path.write_bytes(pickle.dumps(Evil(target)))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(path)
    assert not target.exists()


@pytest.mark.fault("C4")
@pytest.mark.parametrize("key", ["format", "model", "model_kwargs", "config", "data"])
def test_missing_keys_are_named(key: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    content = {"format": 1, **tiny_state()}
    del content[key]
    torch.save(content, path)
    with pytest.raises(UserError, match=f"'{key}' is NoneType"):
        read_checkpoint(path)


@pytest.mark.fault("C4")
def test_weights_that_do_not_fit_are_named(state: dict, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    weights = dict(state["model"])
    weights["head.bias"] = torch.zeros(7)
    save_checkpoint(path, {**state, "model": weights})
    with pytest.raises(UserError, match="model does not fit.*head.bias"):
        load_model(path)
    save_checkpoint(path, {**state, "model_kwargs": {"backbone": "resnet18", "colour": 1}})
    with pytest.raises(UserError, match="colour"):
        load_model(path)
    save_checkpoint(path, {**state, "model_kwargs": {"backbone": "resnet99"}})
    with pytest.raises(UserError, match="resnet99"):
        load_model(path)


@pytest.mark.fault("C4")
@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"num_classes": 10**9}, "num_classes is 1000000000"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": True}, "num_classes is True"),
        ({"num_classes": 2.0}, r"num_classes is 2\.0"),
        ({"num_classes": [1]}, "num_classes"),
        ({"freeze_backbone": "yes"}, "freeze_backbone is 'yes'"),
        ({"backbone": "../../etc/passwd"}, "choose one of"),
        ({"backbone": ["resnet18"]}, "backbone is"),
        ({"backbone": "timm:hf-hub:someone/something"}, "choose one of"),
        ({"backbone": "timm:local-dir:/tmp"}, "choose one of"),
        ({"backbone": "timm:../x"}, "choose one of"),
        ({"fusion": "concat\n"}, "choose one of"),
        ({"task": "__class__"}, "choose one of"),
        ({"encoder": "x"}, "'encoder' is unknown"),
        ({7: 7}, "7 is unknown"),
    ],
)
def test_a_hostile_description_is_refused_before_anything_is_built(
    kwargs: dict, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr("model.build_encoder", build)
    path = tmp_path / "x.pt"
    torch.save({"format": 1, **tiny_state(), "model_kwargs": {**KWARGS, **kwargs}}, path)
    with pytest.raises(UserError, match=says) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.fault("C7")
def test_a_packed_checkpoint_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, tiny_state())
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data if "/data/" not in name else bytes(10**8))
    assert path.stat().st_size < 10**6
    with pytest.raises(UserError, match="holds more than its size"):
        read_checkpoint(path)


@pytest.mark.fault("C6")
def test_saved_on_a_gpu_loads_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    with monkeypatch.context() as patch:  # what torch writes for a tensor there
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:3")
        save_checkpoint(path, tiny_state(1.0))
    assert b"cuda:3" in path.read_bytes()
    weight = read_checkpoint(path)["model"]["w"]
    assert weight.device.type == "cpu" and weight[0] == 1


@pytest.mark.fault("C9")
def test_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({**tiny_state(), "format": 2, "versions": {"repository": "9.9"}}, path)
    with pytest.raises(UserError, match=r"format 2 is newer than this code's 1.*9\.9"):
        read_checkpoint(path)


@pytest.mark.fault("C7")
def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../outside", "x")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.fault("C4")
@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3),  # shorter than its weight: the fused AdamW read and wrote beyond it
        torch.zeros(()).expand(400, 300).T,  # 120,000 numbers in four bytes
        torch.zeros(300, 400).to_sparse(),
        torch.zeros(300, 400, device="meta"),
        [0.0],
        None,
    ],
)
def test_an_optimizers_state_cannot_reach_beyond_its_weights(entry: str, value: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(300, 400))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0][entry] = value
    try:
        restore({"optimizer": optimizer}, {"optimizer": saved}, "run.pt")
    except UserError as error:
        assert "its optimizer does not fit" in str(error)
        return
    moments = optimizer.state_dict()["state"][0]
    assert entry != "step" and moments[entry].untyped_storage().nbytes() == weight.nbytes
    optimizer.step()


@pytest.mark.fault("C4")
def test_a_schedule_keeps_its_methods() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    saved = {**scheduler.state_dict(), "step": "no function", "get_lr": None, "last_epoch": 7}
    restore({"scheduler": scheduler}, {"scheduler": saved}, "run.pt")
    optimizer.step()
    scheduler.step()
    assert scheduler.last_epoch == 8


@pytest.mark.fault("C4")
@pytest.mark.parametrize("state", [torch.zeros(2), [1], {"scale": torch.zeros(2)}, {"scale": 1.0}])
def test_a_scaler_of_another_kind_is_refused(state: Any) -> None:
    with pytest.raises(UserError, match="its scaler does not fit"):
        restore({"scaler": torch.amp.GradScaler("cpu")}, {"scaler": state}, "run.pt")
    nothing: list[dict[str, dict]] = [{}, {"scaler": {}}]
    for none in nothing:
        restore({"scaler": torch.amp.GradScaler("cpu")}, none, "run.pt")


def test_restore_names_the_part() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(UserError, match="run.pt: its optimizer does not fit"):
        restore({"optimizer": optimizer}, {"optimizer": {"param_groups": []}}, "run.pt")
    with pytest.raises(UserError, match="its optimizer does not fit"):
        restore({"optimizer": optimizer}, {}, "run.pt")
