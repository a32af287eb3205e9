"""What every benchmark writes beside its numbers (commit, hardware, date), and how it writes its files."""

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
ENGINE = "embedded simulator, Warp kernels"  # of every SMAC number that these scripts produce
NO_CHASE = "_no_chase"  # ends the name of a set of battles with chase=false, which was the default once
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


def metadata(script, argv=None, **hardware_facts):
    """What to put beside the numbers of a script of this folder that was called with these arguments."""
    words = ["python", f"benchmark/{Path(script).name}", *(sys.argv[1:] if argv is None else argv)]
    return {"command": shlex.join(words), **commit(), "date": today(), "hardware": hardware(**hardware_facts)}


def today():
    """UTC date and time, to the minute."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def describe(facts):
    """The same metadata as one line of Markdown."""
    hardware = ", ".join(f"{name} {value}" for name, value in facts["hardware"].items())
    dirty = " with uncommitted changes" if facts["dirty"] else ""
    commit = (facts["commit"] or "unknown")[:10]
    return f"`{facts['command']}`, commit {commit}{dirty}, {facts['date']}; {hardware}."


def load(folder):
    """{file's name: content} of the JSON files in a folder of docs/results."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))}


def load_sets(folder):
    """Those of them that are sets of runs, as run_seeds.py wrote them."""
    return {name: report for name, report in load(folder).items() if "runs" in report}


def task_of(name, report):
    """What a set was trained on, for a heading: '3m', '3m, without chase'."""
    task = report["env"].removesuffix(",chase=true").removesuffix(",chase=false")
    return task + ", without chase" * name.endswith(NO_CHASE)


def set_on(method, task):
    """The name of a set of a method on what task_of() says."""
    return f"{method}_{task.replace(', without chase', NO_CHASE)}"


def sources(folder, reports):
    """The command that made each set of runs, its commit, date and hardware, as a Markdown list."""
    about = "Sets of runs (a command works at its commit; flags and defaults have changed since"
    if any("," in ranges(x["seeds"]) for x in reports.values()):
        about += "; where seeds have gaps, those between were not run or cut off: all runs are equally long"
    items = [f"{about}):\n"]
    for name, x in reports.items():
        words = f"python benchmark/run_seeds.py --name {folder}/{name} --seeds {ranges(x['seeds'])}"
        if (x["metric"], x["target"]) != ("eval/win_rate", 0.9):
            words += f" --metric {x['metric']} --target {x['target']:g}"
        threads = x["hardware"]["threads"]
        words += f" --threads {threads}" * (threads != 1) + f" --workers {x['workers']} -- {x['command']}"
        commits = ", ".join(sorted({(run["commit"] or "unknown")[:10] for run in x["runs"]}))
        cpus = sorted({run.get("cpu", x["hardware"]["cpu"]) for run in x["runs"]})  # some sets were extended
        hardware = x["hardware"] | {"cpu": " and ".join(cpus)}
        hardware = ", ".join(f"{key} {value}" for key, value in hardware.items())
        items.append(f"- `{words}`: commit {commits}, {x['date']}; {hardware}")
    return "\n".join(items)


def ranges(numbers):
    """[1, 2, 3, 7] -> '1-3,7', as --seeds takes it."""
    starts = [x for x in numbers if x - 1 not in numbers]
    ends = [x for x in numbers if x + 1 not in numbers]
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


def write_page(folder, title, claim, answer, *parts):
    """docs/results/<folder>/README.md: the claim, our answer in a sentence, and the parts below them."""
    path = RESULTS / folder / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    claim, answer = (" ".join(text.split()) for text in (claim, answer))  # a line each, for report.py
    parts = [f"# {title}", f"**Claim.** {claim}", f"**Answer.** {answer}", *parts]
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    print(f"written: {path}")


def new_parser(docstring):
    """A command line whose --help begins with a script's docstring."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=docstring, formatter_class=formatter, allow_abbrev=False)


def no_arguments(docstring, argv):
    """A command line that has --help only."""
    new_parser(docstring).parse_args(argv)


def last_fifth(steps, values, end=None):
    """The values of a curve after 80% of its steps, or of the step `end`."""
    end = steps[-1] if end is None else end
    return [value for step, value in zip(steps, values, strict=True) if step > 0.8 * end]


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
