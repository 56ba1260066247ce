"""Write README.md from results/*.json: `python benchmarks/report.py`."""

import json
from collections.abc import Iterable, Mapping
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
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def variants(rows: Mapping[str, Mapping[str, float]]) -> str:
    return table(
        ("", "pairs/s", "ratio", "quartiles", "peak memory, GB", "of naive's"),
        (
            (
                name,
                f"{row['rate']:.2f}" if row["rate"] < 100 else f"{row['rate']:.0f}",
                f"**{row['ratio']:.2f}**",
                f"{row['ratio_q1']:.2f} to {row['ratio_q3']:.2f}",
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


def train_step(result: Mapping[str, Any], name: str) -> str:
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
        if "gpu" in result["hardware"]:
            counts = ", ".join(f"{name} {count}" for name, count in waits.items())
            parts += [f"Times per step that the host waits for the GPU: {counts}.\n"]
        parts += [f"![time per operator, naive and ours](results/{name}.png)\n"]
    return "\n".join(parts)


def loader(result: Mapping[str, Any]) -> str:
    pairs = result["pairs"]
    kind = "generated" if pairs["generated"] else "real"
    text = f"{pairs['count']} {kind} pairs of {pairs['size'][1]} x {pairs['size'][0]}, samples in random order, one core:\n"
    batches = table(
        ("batches of 8", "pairs/s"),
        ((name, f"{row['rate']:.0f}") for name, row in result["batches_of_8"].items()),
    )
    return "\n".join((text, variants(result["one_core"]), batches))


def predict(result: Mapping[str, Any]) -> str:
    return "\n".join((variants(result["variants"]), "How it grows:\n", growth(result["growth"])))


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
    text = f"`predict.py` on a pair of GeoTIFFs, from reading to polygons; {result['model']}, windows of 512, overlap 128:\n\n"
    head = ("pixels", "seconds", "megapixels/s", "peak memory, GB", "polygons")
    return text + table(head, rows)


def ranks(result: Mapping[str, Any]) -> str:
    def rates(rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
        return table(
            ("", unit, "ratio", "quartiles"),
            (
                (
                    name,
                    f"{row['rate']:.2f}",
                    f"**{row['ratio']:.2f}**",
                    f"{row['ratio_q1']:.2f} to {row['ratio_q3']:.2f}",
                )
                for name, row in rows.items()
            ),
        )

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


def real(result: Mapping[str, Any]) -> str:
    data = result["data"]
    text = (
        f"EfficientNet-Lite0 on {data['train']} training pairs, scored on {data['val']} others "
        f"({result['split']}): best of {result['epochs']} epochs, mean and standard deviation of the "
        "seeds. No official split, so no score to compare with a paper's.\n\n"
    )
    rows = (
        (
            name,
            str(row["change_iou"]["n"]),
            *(
                f"{row[score]['mean']:.3f} +/- {row[score]['std']:.3f}"
                for score in ("change_iou", "change_dice", "mean_dice")
            ),
        )
        for name, row in result["variants"].items()
    )
    return text + table(("", "seeds", "change IoU", "change F1", "two-class mean Dice"), rows)


SECTIONS = {
    "train_step": "Training step",
    "train_step_keep_memory": "Training step, allocator that keeps freed memory",
    "loader": "Loader",
    "predict": "Prediction",
    "scene": "Scenes",
    "scene_without_network": "Scenes, without a network",
    "ranks": "Several processes",
    "real": "Real pairs",
}


DRAWN_BY = {
    "loader": loader,
    "predict": predict,
    "scene": scene,
    "scene_without_network": scene,
    "ranks": ranks,
    "real": real,
}


def main() -> None:
    text = HEAD
    for kind, title in SECTIONS.items():
        for path in sorted((HERE / "results").glob(f"{kind}-*.json")):
            result = json.loads(path.read_text())
            device = path.stem.removeprefix(f"{kind}-")
            text += f"\n## {title}, {device}\n\n{setting(result)}\n"
            if kind.startswith("train_step"):
                text += train_step(result, path.stem)
            else:
                text += DRAWN_BY[kind](result)
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
