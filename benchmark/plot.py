"""Learning curves from docs/results/*.json: mean over seeds, its 95% interval, and every seed as a thin line.

    python benchmark/plot.py docs/results/dop_mmm.json
    python benchmark/plot.py docs/results/dop_mmm.json docs/results/dop_mmm_paper.json --labels default paper

One colour per file, one panel per environment. The interval is Student's t over seeds,
mean +- t(n - 1) s / sqrt(n), at each step where every seed is still running; with one seed there is none.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import RESULTS

# two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom; beyond, 1.96 is within 4%
T_95 = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
]  # fmt: skip
AXES = {"step": "environment steps", "hours": "hours of training", "minutes": "minutes of training"}
NAMES = {
    "eval/win_rate": "greedy win rate",
    "eval/episodic_return": "greedy return",
    "charts/win_rate": "win rate while training",
    "charts/episodic_return": "return while training",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="result files of run_seeds.py")
    parser.add_argument("--labels", nargs="+", help="one per file instead of its name")
    parser.add_argument("--tag", default="eval/win_rate", help="which curve")
    parser.add_argument("--x", choices=AXES, default="step", help="horizontal axis")
    parser.add_argument("--until", type=float, help="where the horizontal axis ends")
    parser.add_argument("--hline", type=float, help="a dashed line at this height, such as a paper's number")
    parser.add_argument(
        "--out", type=Path, help="PNG file; default docs/results/<name of the first file>.png"
    )
    args = parser.parse_args(argv)
    if args.labels and len(args.labels) != len(args.files):
        parser.error(f"{len(args.files)} files need as many --labels, got {len(args.labels)}")
    return args


def load(path):
    """The content of a file of run_seeds.py; SystemExit where it is none."""
    try:
        report = json.loads(path.read_text())
        if "runs" not in report:
            raise ValueError("no runs in it")
    except (OSError, ValueError) as error:
        raise SystemExit(f"plot.py: {path} is no result file of run_seeds.py: {error}") from error
    return report


def interval(values):
    """Mean and half width of the 95% interval over seeds, each (P,), of values (seeds, P)."""
    n = len(values)
    if n < 2:
        return values.mean(0), np.zeros(values.shape[1])
    quantile = T_95[n - 2] if n - 2 < len(T_95) else 1.96
    return values.mean(0), quantile * values.std(0, ddof=1) / np.sqrt(n)


def curves_of(report, tag, x):
    """[(x, value)] per seed as arrays; x in steps, or in hours or minutes of training at these steps."""
    curves = []
    for run in report["runs"]:
        if tag not in run["curves"]:
            raise SystemExit(
                f"plot.py: {report['name']} has no curve {tag!r}, only {', '.join(run['curves'])}"
            )
        steps, values = (np.array(run["curves"][tag][key], dtype=float) for key in ("step", "value"))
        if x != "step":
            clock = run["curves"].get("charts/train_seconds")
            if clock is None:
                raise SystemExit(f"plot.py: {report['name']} has no charts/train_seconds for --x {x}")
            steps = np.interp(steps, clock["step"], clock["value"]) / {"hours": 3600, "minutes": 60}[x]
        curves.append((steps, values))
    return curves


def draw(axes, curves, colour, label):
    """One setting: all seeds thin, mean and interval on top."""
    start, end = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    longest = max((steps for steps, _ in curves), key=len)
    grid = longest[(longest >= start) & (longest <= end)]
    mean, half = interval(np.stack([np.interp(grid, *curve) for curve in curves]))
    for curve in curves:
        axes.plot(*curve, color=colour, linewidth=0.6, alpha=0.45)
    axes.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
    plural = "s" if len(curves) > 1 else ""
    axes.plot(grid, mean, color=colour, linewidth=2.0, label=f"{label} ({len(curves)} seed{plural})")


def main(argv=None):
    args = parse_args(argv)
    reports = [load(path) for path in args.files]
    labels = args.labels or [report["name"] for report in reports]
    envs = list(dict.fromkeys(report["env"] for report in reports))
    colours = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(labels))}
    columns = min(len(envs), 3)
    rows = -(-len(envs) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(1.2 + 4.8 * columns, 3.6 * rows), squeeze=False)
    for axes in grid.flat[len(envs) :]:
        axes.axis("off")
    for env, axes in zip(envs, grid.flat, strict=False):
        engines = set()
        for report, label in zip(reports, labels, strict=True):
            if report["env"] == env:
                draw(axes, curves_of(report, args.tag, args.x), colours[label], label)
                engines.add(report["engine"])
        if args.hline is not None:
            axes.axhline(args.hline, color="grey", linestyle="--", linewidth=1)
        if args.tag.endswith("win_rate"):
            axes.set_ylim(-0.03, 1.03)
        if args.until:
            axes.set_xlim(0, args.until)
        axes.set_title(", ".join([env or "?", *sorted(engine for engine in engines if engine)]), fontsize=10)
        axes.set_xlabel(AXES[args.x])
        if args.x == "step":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel(NAMES.get(args.tag, args.tag))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    figure.text(
        0.995, 0.005, "bold: mean; band: 95% t interval over seeds", ha="right", fontsize=6, color="grey"
    )
    figure.tight_layout()
    out = args.out or RESULTS / f"{args.files[0].stem}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)
    print(f"written: {out}")
    return out


if __name__ == "__main__":
    main()
