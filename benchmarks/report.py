"""Write README.md from results/*.json: `python benchmarks/report.py`."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

HEAD = """# Benchmarks

Written by `python benchmarks/report.py` from [results/](results); do not edit by hand. How to run each: `--help`.

Every ratio, unless another baseline is named, is against [naive.py](naive.py), the same job as a notebook's author writes it: files decoded and resized in
`__getitem__`, Pillow jitter, no workers, a frozen encoder's two passes, float32, a textbook decoder on the concatenated
features, scores that leave the device at every step. smp's U-Net is the stronger baseline: both dates in one pass of six channels. Variants take turns in one process; a ratio is the median over the rounds of
neighbours in time, quartiles behind it. Rates of a CPU are for reading down a column, not for comparing machines.
Peers ([peers.py](peers.py)) get bfloat16, channels_last, a fused optimizer and the same loop.
"""


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of Markdown without the columns in which no row has anything."""
    rows = list(rows)
    filled = [line for line in zip(columns, *rows, strict=True) if any(line[1:]) or not rows]
    head, *body = zip(*filled, strict=True)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def variants(rows: Mapping[str, Mapping[str, float]]) -> str:
    strong = next((row["ratio"] for name, row in rows.items() if name.startswith("smp")), None)
    return table(
        ("", "pairs/s", "ratio", "quartiles", "to smp's", "peak memory, GB", "of naive's"),
        (
            (
                name,
                f"{row['rate']:.2f}" if row["rate"] < 100 else f"{row['rate']:.0f}",
                f"**{row['ratio']:.2f}**",
                f"{row['ratio_q1']:.2f} to {row['ratio_q3']:.2f}",
                f"{row['ratio'] / strong:.2f}" if strong else "",
                f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "",
                f"{row['peak_bytes'] / rows['naive']['peak_bytes']:.2f}"
                if "peak_bytes" in row
                else "",
            )
            for name, row in rows.items()
        ),
    )


def growth(axes: Mapping[str, list[Mapping[str, float]]]) -> str:
    return table(
        ("batch", "size", "pairs/s", "Mpixel/s"),
        (
            (
                f"{row['batch']}",
                f"{row['size']}",
                f"{row['rate']:.2f}",
                f"{row['rate'] * row['size'] ** 2 / 1e6:.2f}",
            )
            for rows in axes.values()
            for row in rows
        ),
    )


def setting(result: Mapping[str, Any]) -> str:
    machine, versions = result["hardware"], result["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    changed = f" and {result['changed_files']} changed files" if result["changed_files"] else ""
    return (
        f"`{result['command']}`: {where}; torch {versions['torch']}, torchvision "
        f"{versions['torchvision']}, Python {versions['python']}; commit {result['commit']}{changed}.\n"
    )


def train_step(result: Mapping[str, Any]) -> str:
    parts = []
    if "variants" in result:
        parts += [variants(result["variants"])]
        share, limit = result["share_of_ceiling"], result["ceiling_flops"]
        parts += [
            f"A step of ours takes {result['flops_per_pair'] / 1e9:.1f} GFLOP per pair (counted). The most that "
            f"convolutions or products reach on this machine is {limit['fp32'] / 1e9:.0f} GFLOP/s in float32 and "
            f"{limit['bf16'] / 1e9:.0f} in bfloat16 (measured in the same run): ours uses {share['fp32']:.0%} and "
            f"{share['bf16']:.0%} of it.\n"
        ]
    if "growth" in result:
        parts += ["How it grows:\n", growth(result["growth"])]
    if "profile_ms" in result:
        waits = result["waits_for_device_per_step"]
        device = "cuda" if "gpu" in result["hardware"] else "cpu"
        if "gpu" in result["hardware"]:
            counts = ", ".join(f"{name} {count}" for name, count in waits.items())
            parts += [f"Times per step that the host waits for the GPU: {counts}.\n"]
        parts += [f"![time per operator, naive and ours](results/train_step-{device}.png)\n"]
    return "\n".join(parts)


def loader(result: Mapping[str, Any]) -> str:
    pairs = result["pairs"]
    kind = "generated" if pairs["generated"] else "real"
    text = f"{pairs['count']} {kind} pairs of {pairs['size'][1]} x {pairs['size'][0]}, samples in random order, one core:\n"
    batches = table(
        ("batches of 8", "pairs/s"),
        ((name, f"{row['rate']:.0f}") for name, row in result["batches_of_8"].items()),
    )
    parts = [text, variants(result["one_core"]), batches]
    if "start" in result:
        start, proof = result["start"], result["proof"]
        parts += [
            f"A start with {start['pairs']:,} pairs takes {start['first_s']:.1f} s of a core, again {start['second_s']:.1f} s. To sum up "
            f"every pair at its first use takes {proof['time_of_30_epochs']:.3f} of the loader's time in 30 epochs.\n"
        ]
    return "\n".join((*parts, f"{result['note']}.\n" if result.get("note") else ""))


def predict(result: Mapping[str, Any]) -> str:
    parts = [variants(result["variants"])]
    if "share_of_ceiling" in result:
        share, limit = result["share_of_ceiling"], result["ceiling_flops"]
        parts += [
            f"A pair takes {result['flops_per_pair'] / 1e9:.1f} GFLOP (counted); ours uses {share['fp32']:.0%} of the "
            f"{limit['fp32'] / 1e9:.0f} GFLOP/s that convolutions or products reach here in float32, and {share['bf16']:.0%} of the "
            f"{limit['bf16'] / 1e9:.0f} in bfloat16 (measured in the same run).\n"
        ]
    return "\n".join((*parts, "How it grows:\n", growth(result["growth"])))


def scene(result: Mapping[str, Any]) -> str:
    rows = (
        (
            f"{row['size']:,} x {row['size']:,}",
            f"{row['seconds']:.0f}",
            f"{row['megapixels_per_second']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['polygons']:,}",
        )
        for row in result["growth"]
    )
    text = f"`predict.py` on a pair of GeoTIFFs, from reading to polygons; {result['model']}, {result.get('windows', 'windows of 512, overlap 128')}:\n\n"
    head = ("pixels", "seconds", "megapixels/s", "peak memory, GB", "polygons")
    text += table(head, rows) if result["growth"] else ""
    if turns := result.get("against_network"):
        text += (
            f"\nIn turn with the network alone, {turns['side']:,} x {turns['side']:,}: {turns['share']:.0%} of its "
            f"rate; CPU seconds a megapixel: {turns['network_cpu']:.2f} of the network, {turns['other_cpu']:.2f} of "
            "all else.\n"
        )
    return text


def rates(rows: Mapping[str, Mapping[str, float]], unit: str, **more: str) -> str:
    """Return rates and ratios; `more` names further columns: key="title"."""
    return table(
        ("", unit, "ratio", "quartiles", *more.values()),
        (
            (
                name,
                f"{row['rate']:.2f}",
                f"**{row['ratio']:.2f}**",
                f"{row['ratio_q1']:.2f} to {row['ratio_q3']:.2f}",
                *(f"{row[key]:.2f}" for key in more),
            )
            for name, row in rows.items()
        ),
    )


def ranks(result: Mapping[str, Any]) -> str:
    side, cores = result["side"], result["hardware"]["cores"]
    return "\n".join(
        (
            f"Ratios against one process. All of them share {cores} cores: what is won is what threads lose by waiting for "
            "each other, not the gain of more hardware.\n",
            f"Training step of {result['batch']} pairs of {result['size']} x {result['size']} together:\n",
            rates(result["train"], "pairs/s"),
            f"`predict.py` on one scene of {side:,} x {side:,}:\n",
            rates(result["scene"], "megapixels/s"),
        )
    )


def threads(result: Mapping[str, Any]) -> str:
    parts = [f"A training step of a small network, several times in turn; {result['note']}.\n"]
    for state, text in (("idle", "Alone"), ("busy", "Beside one busy process a core")):
        more = {"cpu_seconds_per_step": "CPU seconds a step"}
        parts += [f"{text}:\n", rates(result[state], "steps/s", **more)]
    return "\n".join(parts)


def extensions(result: Mapping[str, Any]) -> str:
    def told(score: Mapping[str, float]) -> str:
        return f"{score['mean']:.3f} +/- {score['std']:.3f}"

    shifts = list(result["variants"][0].get("shifted_change_iou", {}))
    rows = (
        (
            f"{row['backbone']}, {row['fusion']}",
            told(row["change_iou"]),
            told(row["mean_dice"]),
            *(f"{row['shifted_change_iou'][shift]['mean']:.3f}" for shift in shifts),
        )
        for row in result["variants"]
    )
    columns = (
        "",
        "change IoU",
        "two-class mean Dice",
        *(f"IoU, shifted by {n} px" for n in shifts),
    )
    text = f"Runs on the sample set, {result['seeds']} seeds, scored on {result['split']}: mean and standard deviation.\n\n"
    return text + table(columns, rows)


def gpu_steps(result: Mapping[str, Any]) -> str:
    rows = (
        (
            row["encoder"],
            row["mode"] or "as main.py does it",
            f"{row['batch']}",
            f"{row['rate']:.0f}" if "rate" in row else row.get("fault", ""),
            f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "",
            f"{row['share_of_bf16']:.0%}" if "share_of_bf16" in row else "",
        )
        for row in result["rows"]
    )
    columns = (
        "encoder",
        "how",
        "batch",
        "pairs/s",
        "peak memory, GB",
        "of the bfloat16 ceiling",
    )
    return table(columns, rows)


def gpu_peers(result: Mapping[str, Any]) -> str:
    return "\n".join(
        f"Batch {batch}:\n\n{variants(rows)}" for batch, rows in result["batches"].items()
    )


def as_it_is(result: Mapping[str, Any]) -> str:
    """Return the figures of a part whose form nobody has needed in a table yet."""
    known = ("command", "commit", "changed_files", "versions", "hardware")
    found = {key: value for key, value in result.items() if key not in known}
    return f"```json\n{json.dumps(found, indent=1)}\n```\n"


def real(result: Mapping[str, Any]) -> str:
    def told(score: Mapping[str, float]) -> str:
        spread = f" +/- {score['std']:.3f}" if score["n"] > 1 else ""
        return f"{score['mean']:.3f}{spread}"

    data = result["data"]
    text = (
        f"EfficientNet-Lite0 on {data['train']} training pairs, scored on {data['val']} others "
        f"({result['split']}): best epoch on them, mean and standard deviation over the seeds; of the last "
        "epoch, which nobody chose, the mean. No official split, so no score to compare with a paper's.\n\n"
    )
    if result.get("note"):
        text += f"{result['note']}.\n\n"
    rows = (
        (
            name,
            f"`{' '.join(row['options'])}`" if row["options"] else "",
            str(row["epochs"]),
            str(row["change_iou"]["n"]),
            *(told(row[score]) for score in ("change_iou", "change_dice", "mean_dice")),
            f"{statistics.mean(run['last']['change_iou'] for run in row['runs']):.3f}",
            row["commit"],
        )
        for name, row in result["variants"].items()
    )
    columns = ("", "options", "epochs", "seeds", "change IoU", "change F1", "two-class mean Dice")
    return text + table((*columns, "last epoch: change IoU", "commit"), rows)


# the start of a file's name: title, and what draws it
SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "train_step": ("Training step", train_step),
    "train_step_keep_memory": ("Training step, allocator that keeps freed memory", train_step),
    "loader": ("Loader", loader),
    "predict": ("Prediction", predict),
    "scene": ("Scenes", scene),
    "scene_turns": ("Scenes, in turn with the network alone", scene),
    "scene_without_network": ("Scenes, without a network", scene),
    "threads": ("Threads that wait", threads),
    "ranks": ("Several processes", ranks),
    "extensions": ("Encoders and fusions", extensions),
    "real": ("Real pairs", real),
    "gpu_tests": ("GPU, tests", as_it_is),
    "gpu_step": ("GPU, training step", gpu_steps),
    "gpu_compile": ("GPU, training step compiled", gpu_steps),
    "gpu_peers": ("GPU, other people's models", gpu_peers),
    "gpu_run": ("GPU, a whole run", as_it_is),
    "gpu_scene": ("GPU, a scene", as_it_is),
    "gpu_trace": ("GPU, what a step launches", as_it_is),
}
OTHERS = ("recipes",)  # files that another page shows


def report(results: Path) -> tuple[str, list[Path]]:
    """Return the page, and the files that no section shows."""
    text, shown = HEAD, set()
    for kind, (title, draw) in SECTIONS.items():
        for path in sorted(results.glob(f"{kind}-*.json")):
            result = json.loads(path.read_text())
            device = path.stem.removeprefix(f"{kind}-")
            text += f"\n## {title}, {device}\n\n{setting(result)}\n{draw(result)}"
            shown.add(path)
    others = sorted(set(results.glob("*.json")) - shown)
    return text, [path for path in others if not path.stem.startswith(OTHERS)]


def main() -> None:
    text, others = report(HERE / "results")
    (HERE / "README.md").write_text(text)
    for path in others:
        print(f"{path}: no section shows it")


if __name__ == "__main__":
    main()
