"""What must survive: one row a fault, and which tests show that it does.

A row's tests carry its id: `@pytest.mark.fault("D3")`, or several ids. `test_faults.py` fails for a
row without a test, and `python tests/fault_matrix.py` lists rows and tests.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROWS = {
    # data
    "D1": "a pair lacks its partner or its label: all are listed",
    "D2": "sizes differ within a pair: both are named",
    "D3": "truncated, empty, bit-flipped file, or a page named .png: file and cause",
    "D4": "RGBA, grey, palette, 16-bit, EXIF-turned images: converted as documented, or refused",
    "D5": "masks 0/1, 0/255, 1-bit, palette, RGB, JPEG: the same classes, or values and remedy",
    "D6": "mask values that are no class: file and values",
    "D7": "empty split, missing folder, a file for a folder: the expected tree is shown",
    "D8": "same stem twice is refused; odd names, links, hidden files do no harm",
    "D9": "the same image in two splits: a warning names both",
    "D10": "images smaller than the crop, 1 x 1, odd sizes: padded, never resized",
    "D11": "a decompression bomb: refused before decoding",
    "D12": "lists with paths, blank lines, CRLF, unknown names: no way out of the folder",
    "D13": "a file goes or changes during a run: saved, then named; no stale cache",
    "D14": "a split without change, or all of it: said, and no score is NaN",
    "D15": "nothing can be written beside the data: said, and the run goes on",
    "D16": "more than 8 bits, signed, float, planar, CMYK: read by the header, or refused by name",
    "D17": "a mask in the alpha channel, a second band taken for alpha: refused with the channel",
    "D18": "sparse, LERC, planar and other TIFFs: the same pixels in every reader, or refused",
    "D19": "files passed over (other endings, subfolders, a fourth folder): counted, named once",
    "D20": "a pipe, socket, device or link loop with an image's name: refused by name, no hang",
    "D21": "a file replaced with the same size and time: noticed before its pixels count",
    "D22": "a cache or memo zeroed or with flipped bits: noticed, made again",
    "D23": "a drive without locks, two processes building one cache: never a wrong pair",
    "D24": "class names with $, lone surrogates, 50,000 characters, CJK: shown as text",
    "D25": "names that are not UTF-8, or hold ESC and newlines; ASCII locale: printed escaped",
    # runs
    "R1": "kill -9 at any moment: resumed bit for bit",
    "R2": "kill -9 while a checkpoint is written: the old or the new one is whole",
    "R3": "Ctrl-C and SIGTERM: saved, and how to go on; twice: at once",
    "R4": "disk full while saving, logging or drawing: what was there stays, and it is said",
    "R5": "loss not finite: stops before the bad step is applied, keeps the last good checkpoint",
    "R6": "a loader process raises or dies: cause and file once, no hang",
    "R7": "out of memory: batch, crop and what to try",
    "R8": "MLflow's server or database away, or dying midway: one warning",
    "R9": "the run's folder exists: never overwritten",
    "R10": "resumed with other data or options: refused with the difference, unless harmless",
    "R11": "more epochs after the end: goes on",
    "R12": "no display, no home, read-only install, unwritable runs/: works, or one line",
    "R13": "two runs at once in one folder: nothing mixed",
    "R14": "clock jumps, odd names: works",
    "R15": "no weights, or wrong ones: refused with remedies, never random ones silently",
    "R16": "bad flags: refused before any work",
    "R17": "all checkpoints of a run are bad: all named, nothing begins anew",
    "R18": "overflow: best.pt holds finite values only, the schedule waits for a skipped step",
    "R19": "MLflow or TensorBoard missing, locked, deleted; infinite values: one warning each",
    "R20": "several first uses of MLflow at once: all recorded",
    "R21": "an MLflow run left by a kill: continued by its id, or a new one tagged with it",
    "R22": "same seed, any workers: the same samples; none drawn twice",
    "R23": "a run's folder moved, another working directory: goes on",
    "R24": "a sample set half made: noticed, made again",
    "R25": "secrets in addresses and the environment: never written",
    "R26": "servers: on this machine only",
    "R27": "the terminal closes (SIGHUP): saved as for SIGTERM",
    "R28": "stdout or stderr closed, a broken pipe, a log on a full disk: the run goes on",
    "R29": "metrics.csv saved by a spreadsheet: no row is lost, the old file is kept beside",
    "R30": "hostile neighbours of a run: passed over, they do not block --resume",
    "R31": "an MLflow server without end, or an address that is none: bounded, one warning",
    "R32": "the run's folder removed while it trains: made again at the next save",
    "R33": "Ctrl-C while modules are imported: exit 130 without a traceback",
    "R34": "a path with %20, #, ?, spaces, non-ASCII: MLflow and all else work",
    # checkpoints and hostile files
    "C1": "truncated, empty, foreign bytes: refused; resuming takes the newest good one",
    "C2": "a flipped bit: noticed",
    "C3": "a pickle with code: refused, nothing runs",
    "C4": "keys missing, unknown, of wrong type, shape or size: named before anything is built",
    "C5": "a checkpoint of the first version: loads",
    "C6": "saved on a GPU or compiled: loads plainly on a CPU",
    "C7": "archive with ../, absolute path, link, bomb: refused, nothing written outside",
    "C8": "a download breaks off, lies, is a page or moved: resumed or refused, never half a set",
    "C9": "a checkpoint of a newer format: refused with the version",
    "C11": "weights of a deeper sibling: refused; foreign prefixes: understood, or the names shown",
    "C10": "wrong types in any entry of a checkpoint: refused, and the entry is named",
    # several processes
    "P1": "one process or two: the same losses and scores",
    "P2": "a split that ranks do not divide: nothing scored twice or lost",
    "P3": "a rank dies: the others end soon, with a line",
    "P4": "cache, sample set or download wanted by several processes: made once",
    "P5": "uneven batches: no hang",
    "P6": "logs, bars, files: of rank 0 alone",
    "P7": "a signal delivered twice: saved once",
    "P8": "resumed with another number of processes: the same order, or said",
    # using a model
    "U1": "a scene larger than memory: windows",
    "U2": "rasters that do not fit each other: refused with both sides named",
    "U3": "rasterio, onnxruntime or timm missing: the file to install from is named",
    "U4": "killed while a map is written: nothing looks complete",
    "U5": "tiled and whole, ONNX and torch: equal",
    "U6": "a stranger's raster that is a VRT, WMS, or names other files: it alone is opened",
    "U7": "--overwrite with other layers than last time: the whole set of a scene is replaced",
    "U8": "a place in sidecars, in GCPs or RPCs, none at all, or not of the CRS: right or refused",
    "U9": "invented alpha, no data of plain files, EXIF at any size: one meaning, bands are said",
    "U10": "south-up, rotated, across the antimeridian: aligned rightly, polygons cut at 180",
    "U11": "a place that cannot be transformed: found before; a map outlives its polygons",
    "U12": "pixels of 5 mm: enough digits, every polygon valid, rings right",
    "U13": "a bad one in a folder of scenes: the others mapped, it listed; --skip-existing goes on",
}

TESTS = Path(__file__).parent


@cache
def covered_by() -> dict[str, list[str]]:
    """Return the tests of each row as file::function, read from their decorators."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for row in _marked(node):
                    found[row].append(f"{path.name}::{node.name}")
    return found


def _marked(function: ast.FunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
            yield from (ast.literal_eval(argument) for argument in decorator.args)


if __name__ == "__main__":
    tests = covered_by()
    for row, fault in ROWS.items():
        print(f"{row:4} {len(tests[row]):3}  {fault}")
        print("".join(f"            {test}\n" for test in tests[row]), end="")
    print(f"{sum(bool(tests[row]) for row in ROWS)} of {len(ROWS)} rows have a test")
