import hashlib
import io
import os
import stat
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from data_helpers import save_tree

from pairs import fetch as fetching
from pairs.download import LEVIR_CD, Archive, fetch_dataset, unpack
from pairs.fetch import fetch
from pairs.layouts import find_pairs
from runtime.errors import UserError

CONTENT = bytes(range(256)) * 2000  # 512 kB


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`, with the vices that a test gives it."""

    daemon_threads = True
    files: dict[str, bytes]
    asked: list[tuple[str, str | None]]  # path and Range of every request
    knows_ranges = True
    break_after: int | None = None  # bytes of a response
    num_breaks = 10**9
    claimed: int | None = None  # Content-Length, whatever is sent
    is_chunked = False  # no Content-Length at all
    status: list[int]  # of the next responses, instead of a file
    kind = "application/octet-stream"
    moved: dict[str, str]
    wrong_range = False

    def url(self, path: str = "/x.zip") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, path = self.server, self.path
        server.asked.append((path, self.headers["Range"]))
        if path in server.moved:
            self.send_response(302)
            self.send_header("Location", server.moved[path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.status:
            self.send_error(server.status.pop(0))
            return
        content = server.files[path]
        begins = 0
        if server.knows_ranges and self.headers["Range"]:
            begins = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if begins >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            told = 7 if server.wrong_range else begins
            self.send_header("Content-Range", f"bytes {told}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        part = content[begins:]
        self.send_header("Content-Type", "text/html" if content[:5] == b"<html" else server.kind)
        if not server.is_chunked:
            self.send_header("Content-Length", str(server.claimed or len(part)))
        self.end_headers()
        if server.break_after is not None and server.num_breaks > 0:
            server.num_breaks -= 1
            part = part[: server.break_after]
        self.wfile.write(part)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetching, "PAUSE", 0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked, server.status, server.moved = {"/x.zip": CONTENT}, [], [], {}
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def got(server: Server, folder: Path) -> bytes:
    path = fetch(server.url(), folder / "x.zip", md5_of(CONTENT))
    assert os.listdir(folder) == ["x.zip"]
    return path.read_bytes()


def refused(server: Server, folder: Path, match: str, kept: int = 0) -> None:
    """The file is not there, and of what has come `kept` bytes are."""
    with pytest.raises(UserError, match=match) as error:
        fetch(server.url(), folder / "x.zip", md5_of(CONTENT))
    assert len(str(error.value).splitlines()) == 1
    assert not (folder / "x.zip").exists()
    part = folder / "x.zip.part"
    assert (part.stat().st_size if part.exists() else 0) == kept


# ---- one file


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    assert got(server, tmp_path) == CONTENT
    assert got(server, tmp_path) == CONTENT
    assert len(server.asked) == 1


@pytest.mark.fault("C8")
def test_what_breaks_off_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.break_after, server.num_breaks = 200_000, 2
    assert got(server, tmp_path) == CONTENT
    assert [ranges for _, ranges in server.asked] == [None, "bytes=200000-", "bytes=400000-"]


@pytest.mark.fault("C8")
def test_a_later_start_goes_on_where_the_first_gave_up(server: Server, tmp_path: Path) -> None:
    server.break_after = 10_000
    refused(server, tmp_path, "broke off .*the same command goes on", kept=50_000)
    server.break_after = None
    assert got(server, tmp_path) == CONTENT
    assert server.asked[-1][1] == "bytes=50000-"


@pytest.mark.fault("C8")
def test_a_server_without_ranges_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    server.knows_ranges, server.break_after, server.num_breaks = False, 200_000, 2
    assert got(server, tmp_path) == CONTENT


@pytest.mark.fault("C8")
@pytest.mark.parametrize("old", [b"rest of an older file", CONTENT[:-9] + b"x", CONTENT + b"more"])
def test_the_rest_of_another_file_is_not_mixed_in(
    old: bytes, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "x.zip.part").write_bytes(old)
    assert got(server, tmp_path) == CONTENT


@pytest.mark.fault("C8")
def test_a_wrong_length_is_no_truth(server: Server, tmp_path: Path) -> None:
    server.claimed = 1000  # the rest is never read
    refused(server, tmp_path, "another file than was published")
    server.claimed = len(CONTENT) + 1000  # as if it broke off: then there is no more
    assert got(server, tmp_path) == CONTENT


@pytest.mark.fault("C8")
def test_no_length_at_all(server: Server, tmp_path: Path) -> None:
    server.is_chunked = True
    assert got(server, tmp_path) == CONTENT


@pytest.mark.fault("C8")
def test_another_range_than_was_asked_for(server: Server, tmp_path: Path) -> None:
    (tmp_path / "x.zip.part").write_bytes(CONTENT[:1000])
    server.wrong_range = True
    refused(server, tmp_path, "another part", kept=1000)


@pytest.mark.fault("C8")
def test_another_file_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.files["/x.zip"] = b"PK" + CONTENT
    refused(server, tmp_path, f"md5 {md5_of(b'PK' + CONTENT)}, not {md5_of(CONTENT)}")


@pytest.mark.fault("C8")
def test_a_page_instead_is_named_by_its_title(server: Server, tmp_path: Path) -> None:
    server.files["/x.zip"] = b"<html><title>Quota\n exceeded &amp; more</title></html>"
    refused(server, tmp_path, r"a page came instead: Quota exceeded & more.*put it at .*x\.zip")


@pytest.mark.fault("C8")
def test_the_page_that_asks_to_confirm_is_confirmed(server: Server, tmp_path: Path) -> None:
    server.files["/x.zip"] = (
        b'<html><form id="download-form" action="/get?old=1" method="get">'
        b'<input type="hidden" name="id" value="a&amp;b">'
        b'<input type="hidden" name="confirm" value="t"></form>'
    )
    server.files["/get?id=a%26b&confirm=t"] = CONTENT
    assert got(server, tmp_path) == CONTENT
    server.files["/get?id=a%26b&confirm=t"] = server.files["/x.zip"]  # and again, and again
    (tmp_path / "x.zip").unlink()
    refused(server, tmp_path, "a page came instead: without a title")


@pytest.mark.fault("C8")
def test_a_redirect_is_followed_but_not_to_a_file(server: Server, tmp_path: Path) -> None:
    server.files["/y.zip"] = CONTENT
    server.moved["/x.zip"] = "/y.zip"
    assert got(server, tmp_path) == CONTENT
    (tmp_path / "x.zip").unlink()
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
        server.moved["/x.zip"] = target
        refused(server, tmp_path, "cannot be downloaded")
    server.moved["/x.zip"] = "/x.zip"  # round and round
    refused(server, tmp_path, "redirect")


def test_https_never_becomes_http() -> None:
    import urllib.request

    request = urllib.request.Request("https://host/x")
    with pytest.raises(ValueError, match="from https to http://host/x"):
        fetching._SafeRedirects().redirect_request(
            request, io.BytesIO(), 302, "", {}, "http://host/x"
        )


@pytest.mark.fault("C8")
def test_http_errors_pass_or_do_not(server: Server, tmp_path: Path) -> None:
    server.status = [503, 429]
    assert got(server, tmp_path) == CONTENT
    (tmp_path / "x.zip").unlink()
    server.status = [404]
    refused(server, tmp_path, "HTTP 404")
    server.status = [500] * 99
    refused(server, tmp_path, "HTTP 500")
    assert len(server.status) == 99 - fetching.ATTEMPTS


@pytest.mark.fault("C8")
@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.zip", "file:///etc/passwd", "no address"])
def test_no_server_is_one_line(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PAUSE", 0)
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(url, tmp_path / "x.zip", "0" * 32)
    assert os.listdir(tmp_path) == []


@pytest.mark.fault("C8", "R4")
def test_room_is_looked_for_before_a_byte_is_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = fetching.SPARE_BYTES + 2 * len(CONTENT) - 1
    usage = fetching.shutil._ntuple_diskusage(10**12, 0, free)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    refused(server, tmp_path, r"x\.zip takes 0\.0 GB with what it holds.*make room")
    assert os.listdir(tmp_path) == []
    server.is_chunked = True  # its size is not known before
    usage = fetching.shutil._ntuple_diskusage(10**12, 0, fetching.SPARE_BYTES + 1000)
    refused(server, tmp_path, "more than the disk has room for")


# ---- archives


def zip_of(folder: Path) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder).as_posix())
    return memory.getvalue()


def entry(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name
    info.external_attr = mode << 16
    return info


@pytest.mark.fault("C7")
@pytest.mark.parametrize(
    ("info", "content"),
    [
        (entry("../out.png"), b"x"),
        (entry("A/../../out.png"), b"x"),
        (entry("/tmp/out.png"), b"x"),
        (entry("C:/out.png"), b"x"),
        (entry("..\\out.png"), b"x"),
        (entry("A/link.png", stat.S_IFLNK | 0o777), b"/etc/passwd"),
        (entry("A/pipe.png", stat.S_IFIFO | 0o644), b""),
        (entry("A/zeros.png"), bytes(10**8)),
    ],
)
def test_an_archive_writes_nowhere_else(
    info: zipfile.ZipInfo, content: bytes, tmp_path: Path
) -> None:
    archive = tmp_path / "in" / "x.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("A/good.png", b"good")
        info.compress_type = zipfile.ZIP_DEFLATED
        file.writestr(info, content)
    with pytest.raises(UserError, match=r"x\.zip: (its entry|claims to hold)"):
        unpack(archive, tmp_path / "in" / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.zip"]


@pytest.mark.fault("C7")
def test_a_lying_or_broken_archive_is_refused(tmp_path: Path) -> None:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("A/zeros.png", bytes(10**7))
    whole = memory.getvalue()
    size = (10**7).to_bytes(4, "little")
    lies = whole.replace(size, (1000).to_bytes(4, "little"))  # claims 1 kB
    long = whole.replace(b"PK\x03\x04", b"PK\x03\x04" + bytes(9999), 1)
    for number, content in enumerate(
        (b"", b"PK", long, whole[:-30], lies, whole.replace(b"x", b"y"))
    ):
        archive = tmp_path / f"{number}.zip"
        archive.write_bytes(content)
        with pytest.raises(UserError, match=f"{number}.zip: ") as error:
            unpack(archive, tmp_path / "out")
        assert len(str(error.value)) < 600
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.png")) <= 1000


# ---- the dataset


@pytest.fixture
def archives(server: Server, tmp_path: Path) -> list[Archive]:
    """Three zips on the server: bare, in a folder of their own, with foreign files."""
    tree = save_tree(tmp_path / "made", train=3, val=2, test=1)
    found = []
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        content = zip_of(tree / split if split != "val" else tree)
        if split == "val":
            memory = io.BytesIO()
            with zipfile.ZipFile(memory, "w") as archive:
                for path in sorted((tree / "val").rglob("*.png")):
                    archive.write(path, f"LEVIR/{path.relative_to(tree).as_posix()}")
                archive.writestr("__MACOSX/._x", "x")
            content = memory.getvalue()
        server.files[f"/{split}.zip"] = content
        found.append(Archive(split, server.url(f"/{split}.zip"), md5_of(content), count))
    return found


@pytest.mark.fault("C8")
def test_the_dataset_is_whole_and_fetched_once(
    archives: list[Archive], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data" / "LEVIR-CD"
    assert fetch_dataset(data, archives) == data
    assert "academic use only" in capsys.readouterr().out
    splits = find_pairs(tmp_path / "data").splits
    assert {split: len(pairs) for split, pairs in splits.items()} == {
        "train": 3, "val": 2, "test": 1,
    }  # fmt: skip
    made = tmp_path / "made" / "val" / "B" / "val_1.png"
    assert (data / "val" / "B" / "val_1.png").read_bytes() == made.read_bytes()
    assert [p.name for p in data.parent.iterdir() if p.suffix != ".lock"] == ["LEVIR-CD"]
    asked = len(server.asked)
    fetch_dataset(data, archives)
    assert len(server.asked) == asked == 3
    assert "is there already" in capsys.readouterr().out


@pytest.mark.fault("C8")
def test_half_a_dataset_is_none(archives: list[Archive], server: Server, tmp_path: Path) -> None:
    data = tmp_path / "data" / "LEVIR-CD"
    good = server.files["/test.zip"]
    server.files["/test.zip"] = good[:-1] + b"?"
    with pytest.raises(UserError, match=r"test\.zip: sent another file"):
        fetch_dataset(data, archives)
    assert not data.exists()
    server.files["/test.zip"] = good
    fetch_dataset(data, archives)  # the two that had come are not fetched again
    assert [path for path, _ in server.asked].count("/train.zip") == 1


@pytest.mark.fault("C8")
def test_the_users_own_data_stays(archives: list[Archive], server: Server, tmp_path: Path) -> None:
    mine = save_tree(tmp_path / "data", train=1, val=1)
    before = sorted(mine.rglob("*"))
    with pytest.raises(UserError, match="stays untouched; move it"):
        fetch_dataset(mine, archives)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("mine")
    with pytest.raises(UserError, match="stays untouched"):
        fetch_dataset(tmp_path / "notes", archives)
    assert sorted(mine.rglob("*")) == before
    assert server.asked == []


@pytest.mark.fault("C8")
def test_archives_of_something_else_are_no_dataset(
    archives: list[Archive], server: Server, tmp_path: Path
) -> None:
    wrong = [Archive(a.split, a.url, a.md5, a.num_pairs + 1) for a in archives]
    with pytest.raises(UserError, match="not the dataset to download"):
        fetch_dataset(tmp_path / "a" / "LEVIR", wrong)
    assert not (tmp_path / "a" / "LEVIR").exists()


@pytest.mark.fault("P4", "R13")
def test_two_at_once_fetch_once(archives: list[Archive], server: Server, tmp_path: Path) -> None:
    data = tmp_path / "data" / "LEVIR-CD"
    done: list[Any] = []
    threads = [
        threading.Thread(target=lambda: done.append(fetch_dataset(data, archives)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done == [data, data]
    assert len(server.asked) == 3


def test_the_addresses_are_whole() -> None:
    assert [(a.split, a.num_pairs) for a in LEVIR_CD] == [
        ("train", 445),
        ("val", 64),
        ("test", 128),
    ]
    assert all(len(a.md5) == 32 and a.url.startswith("https://") for a in LEVIR_CD)
