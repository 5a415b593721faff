"""Rows in ``results/`` as a Markdown table or as a plot.

    python benchmarks/show.py table kd_loss --threads 1 --column ms
    python benchmarks/show.py plot                        # every op: results/<op>.svg

A number counts for the processor it was measured on: with rows of several, the newest is shown unless ``--cpu`` names a part of another.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = {"ms": "ms", "speedup": "speedup", "error": "error", "mac": "mac_per_cycle", "peak": "peak_mb"}


def rows(op: str, threads: int | None = None, cpu: str | None = None) -> list[dict[str, str]]:
    """Rows of one op on one processor; without ``cpu`` the one with the newest row."""
    with (RESULTS / f"{op}.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if threads is None or row["threads"] == str(threads)]
    if cpu is None and found:
        cpu = max(found, key=lambda row: row["date"])["cpu"]
    return [row for row in found if (cpu or "") in row["cpu"]]


def unique(values) -> list[str]:
    return list(dict.fromkeys(values))


def table(found: list[dict[str, str]], column: str) -> str:
    """One line per case, one column per rival, as Markdown."""
    rivals = unique(row["rival"] for row in found)
    lines = ["| case | " + " | ".join(rivals) + " |", "|---" * (len(rivals) + 1) + "|"]
    by_key = {(row["case"], row["rival"]): row for row in found}
    for case in unique(row["case"] for row in found):
        cells = [shown(by_key[case, rival][COLUMNS[column]], column) if (case, rival) in by_key else "-" for rival in rivals]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value: str, column: str) -> str:
    if not value:
        return "-"
    return f"{float(value):.2f}x" if column == "speedup" else f"{float(value):.3g}"


def plot(op: str, found: list[dict[str, str]], path: Path) -> None:
    """Bars of the speedup over the baseline with their quartiles, one group per case."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = op  # the same rows give the same file
    from matplotlib import pyplot as plt

    baseline = next((row["rival"] for row in found if row["speedup"] == row["speedup_q1"] == row["speedup_q3"] == "1.000"), None)
    cases, rivals = unique(row["case"] for row in found), [name for name in unique(row["rival"] for row in found) if name != baseline]
    width = 0.8 / len(rivals)
    figure, axes = plt.subplots(figsize=(max(6.0, 1.5 * len(cases)), 4.0), layout="constrained")
    for i, rival in enumerate(rivals):
        mine = [row for row in found if row["rival"] == rival]
        at = [cases.index(row["case"]) + (i - (len(rivals) - 1) / 2) * width for row in mine]
        middle, low, high = ([float(row[name]) for row in mine] for name in ("speedup", "speedup_q1", "speedup_q3"))
        spread = [[max(m - q, 0) for m, q in zip(middle, low, strict=True)], [max(q - m, 0) for m, q in zip(middle, high, strict=True)]]
        axes.bar(at, middle, width, yerr=spread, label=rival, error_kw={"elinewidth": 0.8, "ecolor": "0.3"})
    axes.axhline(1.0, color="0.5", linewidth=0.8, label=baseline)
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize=8)
    axes.set_ylabel(f"times as fast as {baseline or 'the baseline'}")
    first = found[0]
    axes.set_title(
        f"{op}: {first['cpu']}, {first['threads']} thread{'s' if first['threads'] != '1' else ''}, {first['versions']}", fontsize=9
    )
    figure.legend(fontsize=7, ncols=min(4, len(rivals) + 1), loc="outside lower center")
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["table", "plot"])
    parser.add_argument("op", nargs="*", help="as in results/<op>.csv; all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--column", choices=COLUMNS, default="speedup")
    parser.add_argument("--cpu", help="a part of the processor's name")
    args = parser.parse_args(arguments)
    for op in args.op or sorted(path.stem for path in RESULTS.glob("*.csv")):
        found = rows(op, args.threads, args.cpu)
        if not found:
            print(f"{op}: no rows with {args.threads} threads")
        elif args.what == "table":
            print(f"{op}, {args.threads} thread{'s' if args.threads > 1 else ''}, {found[0]['cpu']}\n\n{table(found, args.column)}\n")
        else:
            plot(op, found, RESULTS / f"{op}.svg")
            print(f"results/{op}.svg")


if __name__ == "__main__":
    main()
