"""One file of a server, going on where an earlier attempt broke off; whole or not there.

    PATH.part    what has come so far
    PATH         all of it, its check sum verified

What a server sends is never trusted: its size is bounded by the disk, its content decided by the
check sum.
"""

import hashlib
import html
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, Any

from runtime.errors import UserError
from runtime.files import whole_file
from runtime.progress import Bar

TIMEOUT = 30  # seconds without a byte before a connection is given up
ATTEMPTS = 5  # in a row that bring less than MIN_PROGRESS
MIN_PROGRESS = 2**20  # bytes
PAUSE = 1.0  # seconds before the second attempt, doubled each time
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP's "try again"
SPARE_BYTES = 2 * 10**9  # left free on the disk
MAX_PAGE = 2**20  # bytes of a page that came instead of a file


def fetch(url: str, path: Path, md5: str) -> Path:
    """Download a file, going on where an earlier attempt broke off; it is whole or not there.

    Args:
        url: http or https.
        path: where to; what has come so far lies beside it as PATH.part.
        md5: of the whole file, 32 hexadecimal digits.

    Raises:
        UserError: unreachable, broken off too often, no room, or not the file with this check sum.
        OSError: the disk.
    """
    if path.is_file() and _md5(path) == md5:
        return path
    part = path.with_name(path.name + ".part")
    was_resumed = _size(part) > 0
    _fetch_part(url, part, path.name)
    if was_resumed and _md5(part) != md5:  # the file there is another one now: all of it anew
        part.unlink()
        _fetch_part(url, part, path.name)
    if (found := _md5(part)) != md5:
        part.unlink()
        raise UserError(
            f"{url}: sent another file than was published (md5 {found}, not {md5}); nothing was "
            f"kept. Try later, or fetch it with a browser and put it at {path}"
        )
    with whole_file(path) as beside:
        part.replace(beside)
    return path


def _fetch_part(url: str, part: Path, name: str) -> None:
    """Fill `part` to its end, as the server tells it."""
    failures, reason = 0, ""
    while failures < ATTEMPTS:
        before = _size(part)
        if failures:
            time.sleep(PAUSE * 2 ** (failures - 1))
        try:
            _receive(url, part, name)
        except _BrokenOff as fault:
            reason = str(fault)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and before:
                return  # there is no more: the check sum tells whether it is the file
            reason = f"HTTP {error.code} {error.reason}"
            if error.code not in PASSING:
                raise _unavailable(url, part, reason) from None
        except ValueError as error:  # an address that is none, or a redirect to one
            raise _unavailable(url, part, str(error)) from None
        else:
            return
        failures = 0 if _size(part) - before >= MIN_PROGRESS else failures + 1
    raise _unavailable(url, part, reason)


def _receive(url: str, part: Path, name: str) -> None:
    """Append what the server has beyond `part`."""
    have = _size(part)
    headers = {"User-Agent": "Mozilla/5.0 (python-urllib)", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with _open(url, headers) as response:
        if "html" in response.headers.get("Content-Type", ""):
            following = _beyond_page(_read_page(response), response.url, part)
            with _open(following, headers) as behind:
                if "html" in behind.headers.get("Content-Type", ""):
                    title = _title(_read_page(behind))
                    raise _unavailable(url, part, f"a page came instead: {title}")
                _append(behind, part, have, name)
        else:
            _append(response, part, have, name)


def _append(response: Any, part: Path, have: int, name: str) -> None:
    url, length = response.url, _number(response.headers.get("Content-Length"))
    begins = 0
    if response.status == http.client.PARTIAL_CONTENT:
        told = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        begins = int(told[1]) if told else -1
    if begins not in (0, have):
        raise _unavailable(url, part, "the server sent another part than was asked for")
    free = shutil.disk_usage(part.parent).free - SPARE_BYTES
    # the zip and what it holds lie on the disk together; pictures do not shrink in a zip
    needed = 2 * (begins + length) - have if length is not None else 0
    if needed > free:
        raise UserError(
            f"{part.parent}: {name} takes {needed / 1e9:.1f} GB with what it holds, and "
            f"{max(0, free) / 1e9:.1f} GB are free beyond a reserve; make room, or --data-dir"
        )
    total = None if length is None else begins + length
    with (
        part.open("ab" if begins else "wb") as file,
        Bar(desc=f"download {name}", total=total, initial=begins, unit="B", unit_scale=True) as bar,
    ):
        received = 0
        while chunk := _read(response, 2**20):
            file.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
            if received > free:
                part.unlink()
                raise UserError(f"{url}: sends more than the disk has room for; nothing was kept")
        file.flush()
        os.fsync(file.fileno())
    if length is not None and received < length:
        raise _BrokenOff(f"broke off after {received} of {length} bytes")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirect, but never from https to something weaker."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str,
        headers: Any, newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        if req.type == "https" and not newurl.startswith("https:"):
            raise ValueError(f"was redirected from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str]) -> Any:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("is no http address")
    opener = urllib.request.build_opener(_SafeRedirects)
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _broken_off(error) from None


def _read(response: Any, size: int) -> bytes:
    try:
        return response.read1(size)
    except (OSError, http.client.HTTPException) as error:
        raise _broken_off(error) from None


def _read_page(response: Any) -> bytes:
    page = b""
    while len(page) < MAX_PAGE and (chunk := _read(response, MAX_PAGE)):
        page += chunk
    return page


class _BrokenOff(Exception):
    """The network's fault, not the disk's: worth another attempt."""


def _broken_off(error: Exception) -> _BrokenOff:
    return _BrokenOff(str(getattr(error, "reason", error)) or type(error).__name__)


def _beyond_page(page: bytes, url: str, part: Path) -> str:
    """Return where the form of Google Drive leads that asks to confirm a large download.

    Raises:
        UserError: it is another page: the file is gone, or was downloaded too often today.
    """
    text = page.decode("utf-8", "replace")
    form = re.search(r'<form[^>]*id="download-form"[^>]*action="([^"]+)"', text)
    if not form:
        raise _unavailable(url, part, f"a page came instead: {_title(page)}")
    fields = re.findall(r'<input[^>]*type="hidden"[^>]*name="([^"]*)"[^>]*value="([^"]*)"', text)
    query = urllib.parse.urlencode([(html.unescape(k), html.unescape(v)) for k, v in fields])
    target = urllib.parse.urljoin(url, html.unescape(form[1]))
    if urllib.parse.urlsplit(url).scheme == "https" and not target.startswith("https:"):
        raise _unavailable(url, part, f"a form leads from https to {target}")
    return f"{target.partition('?')[0]}?{query}"


def _title(page: bytes) -> str:
    title = re.search(r"<title>(.{1,200}?)</title>", page.decode("utf-8", "replace"), re.DOTALL)
    return " ".join(html.unescape(title[1]).split()) if title else "without a title"


def _unavailable(url: str, part: Path, reason: str) -> UserError:
    have = _size(part)
    # in words of the server's: on one line, and nothing that a terminal would obey
    reason = " ".join("".join(c if c.isprintable() else " " for c in reason).split())[:200]
    kept = f"{have / 1e6:.0f} MB are kept, the same command goes on" if have else "try again later"
    by_hand = part.with_suffix("")
    return UserError(
        f"{url}: cannot be downloaded ({reason}); {kept}, or fetch it with a browser and put it at "
        f"{by_hand}"
    )


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,18}", text) else None


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
