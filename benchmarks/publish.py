"""Make docs/benchmarks.md, its plot and its JSON from a run of all benchmarks.

python benchmarks/run.py && python benchmarks/publish.py
"""

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PLOTTED = [
    "25 leaves of 4 MB: the loop loses, per save",
    "25 leaves of 4 MB: blocked, per save",
    "25 leaves of 4 MB: a save, until on disk",
    "Restoring 400 MB",
]
HEAD = """# Benchmarks

One run of `python benchmarks/run.py` at commit {commit}: {versions}, Python {python},
{machine}, {devices}. The tables have medians, and beside them the least and the
greatest value. The candidates of a table took turns, in as many rounds as it says. A
table of another run says at which commit that was.
[benchmarks/README.md](../benchmarks/README.md) says what a number means.

The numbers of all rounds are in [benchmarks.json](benchmarks.json).

![flaxckpt beside others](benchmarks.svg)
"""


def main() -> None:
    entries = json.loads((HERE / "results.json").read_text())
    versions = entries[0]["versions"]
    text = HEAD.format(
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        python=entries[0]["python"],
        machine=entries[0]["machine"],
        devices=entries[0]["devices"],
        commit=entries[0]["commit"],
    )
    for entry in entries:
        numbers = sorted({len(values) for values in entry["results"].values()})
        rounds = " or ".join(map(str, numbers))
        about = f"{entry['unit']}; rounds: {rounds}"
        if entry["commit"] != entries[0]["commit"]:
            about += f"; at commit {entry['commit']}"
        text += f"\n## {entry['title']}\n\n{about}\n\n"
        text += "| | median | |\n|---|--:|---|\n"
        for name, values in entry["results"].items():
            low, middle, high = min(values), statistics.median(values), max(values)
            text += f"| {name} | {middle:.3g} | {low:.3g} to {high:.3g} |\n"
        if entry["notes"]:
            text += "\n" + "\n".join(f"- {note}" for note in entry["notes"]) + "\n"
    (DOCS / "benchmarks.md").write_text(text)
    (DOCS / "benchmarks.json").write_text(json.dumps(entries))
    plot({entry["title"]: entry for entry in entries})


def plot(entries) -> None:
    """Draw the medians of some tables as bars, flaxckpt's in another colour."""
    plt.rcParams |= {"svg.hashsalt": "flaxckpt", "font.size": 9}
    figure, axes = plt.subplots(2, 2, figsize=(11, 6), layout="constrained")
    for axis, title in zip(axes.flat, PLOTTED, strict=True):
        results = entries[title]["results"]
        names = list(results)[::-1]
        medians = [max(statistics.median(results[name]), 0) * 1e3 for name in names]
        colors = ["#c2410c" if name == "flaxckpt" else "#94a3b8" for name in names]
        bars = axis.barh(names, medians, color=colors)
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set_title(f"{title} (ms)", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.savefig(DOCS / "benchmarks.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
