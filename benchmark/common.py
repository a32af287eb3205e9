"""What every benchmark writes beside its numbers (commit, hardware, date), and how it writes its files."""

import csv
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
ENGINE = "embedded simulator, Warp kernels"  # of every SMAC number that these scripts produce
CODE = [":(glob)*.py", "envs", "benchmark", "requirements.txt"]  # what can change a number


def commit():
    """Commit of the working tree, and whether the code differs from it; None outside a git checkout."""

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", *CODE))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def hardware(threads=None, device="cpu"):
    """Processor, cores, versions; the GPU's name if `device` is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"cpu": cpu, "cores": cores, "python": platform.python_version(), "torch": version("torch")}
    if threads is not None:
        facts["threads"] = threads
    if str(device).startswith("cuda"):
        import torch  # here, so that Ray's workers need not have it in memory

        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def metadata(command, **hardware_facts):
    """What to put beside the numbers of a benchmark that runs in this process."""
    return {"command": command, **commit(), "date": today(), "hardware": hardware(**hardware_facts)}


def today():
    """UTC date and time, to the minute."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def describe(facts):
    """The same metadata as one line of Markdown."""
    hardware = ", ".join(f"{name} {value}" for name, value in facts["hardware"].items())
    dirty = " with uncommitted changes" if facts["dirty"] else ""
    commit = (facts["commit"] or "unknown")[:10]
    return f"`{facts['command']}`, commit {commit}{dirty}, {facts['date']}; {hardware}."


def source(report):
    """Where the numbers of a file of run_seeds.py come from, as an item of a Markdown list."""
    commits = ", ".join(sorted({(run["commit"] or "unknown")[:10] for run in report["runs"]}))
    hardware = ", ".join(f"{name} {value}" for name, value in report["hardware"].items())
    made = f"commit {commits}, {report['date']}, {report['workers']} at a time; {hardware}"
    seeds = f"seeds {report['seeds'][0]} to {report['seeds'][-1]}"
    return f"- {report['name']}: `{report['command']}`, {seeds}, {made}"


def wilson(successes, n, z=1.96):
    """Wilson's 95% interval of a rate, (low, high)."""
    rate, spread = successes / n, z * math.sqrt(successes * (n - successes) / n + z * z / 4) / n
    centre, scale = rate + z * z / (2 * n), 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def success_rate(outcomes):
    """How many of a list of bools are True, with Wilson's 95% interval: "7 of 20 (18 to 57%)"."""
    low, high = wilson(sum(outcomes), len(outcomes))
    return f"{sum(outcomes)} of {len(outcomes)} ({100 * low:.0f} to {100 * high:.0f}%)"


def last_fifth(steps, values, end=None):
    """The values of a curve after 80% of its steps, or of the step `end`."""
    end = steps[-1] if end is None else end
    return [value for step, value in zip(steps, values, strict=True) if step > 0.8 * end]


def median_worst(values):
    """Median and, in brackets, minimum over seeds: "0.98 (0.93)"; "-" of nothing."""
    return f"{statistics.median(values):.2f} ({min(values):.2f})" if values else "-"


def markdown_table(header, rows):
    """A Markdown table; cells are put down with str()."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write_json(path, content):
    """Write JSON that a person can read: one line per list of numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_json(content) + "\n")


def _json(value, indent=""):
    if isinstance(value, dict) and value:
        inner = indent + "  "
        items = [f"{inner}{json.dumps(str(key))}: {_json(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        inner = indent + "  "
        return "[\n" + ",\n".join(inner + _json(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value)


def write_csv(path, rows):
    """Write a list of dicts with equal keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
