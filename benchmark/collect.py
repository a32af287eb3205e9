"""What the finished runs of a set have logged, in two small files: run_seeds.py's second half."""

import fnmatch
import json
import statistics

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import machine
from benchmark.common import ENGINE, ROOT, last_fifth, today, write_csv, write_json

PER_RUN = ("seed", "run_dir", "resume", "exp_name")  # not settings of the whole set, or its name
MAX_POINTS = 250  # of a curve in the JSON file; longer ones are averaged in groups


def read_curves(folder, patterns):
    """{tag: (steps, values, wall times)} of every event file below `folder`, ordered by step."""
    curves = {}
    for place in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if any(fnmatch.fnmatch(tag, pattern) for pattern in patterns):
                points = {event.step: (event.value, event.wall_time) for event in events.Scalars(tag)}
                curves.setdefault(tag, {}).update(points)
    return {tag: [list(x) for x in zip(*((s, *p) for s, p in sorted(points.items())), strict=True)]
            for tag, points in curves.items()}  # fmt: skip


def thin(steps, values, max_points=MAX_POINTS):
    """Averages of equal groups of points, each at its last step, so that at most `max_points` are left."""
    size = -(-len(steps) // max_points)
    groups = [slice(i, i + size) for i in range(0, len(steps), size)]
    return [steps[g][-1] for g in groups], [statistics.fmean(values[g]) for g in groups]


def summarise(curves, start, metric, target):
    """The figures of one run; None where the run logged nothing of the kind.

    last_fifth: mean over the evaluations in the last fifth of the run's steps. Seconds are those of training
    alone (charts/train_seconds) and those since the launch of the process (wall), evaluations included.
    """
    keys = "best final last_fifth step_to_target train_seconds_to_target wall_seconds_to_target".split()
    summary = dict.fromkeys((*keys, "final_return", "last_fifth_return", "steps"))
    summary["steps"] = max(curve[0][-1] for curve in curves.values()) if curves else None
    if metric in curves:
        steps, values, times = curves[metric]
        summary |= {"best": max(values), "final": values[-1]}
        summary["last_fifth"] = statistics.fmean(last_fifth(steps, values))
        # TensorBoard holds single precision, in which 0.9 is a little less than 0.9
        first = next((i for i, value in enumerate(values) if value >= target - 1e-6), None)
        if first is not None:
            summary |= {"step_to_target": steps[first], "wall_seconds_to_target": times[first] - start}
            if "charts/train_seconds" in curves:
                seconds = np.interp(steps[first], *curves["charts/train_seconds"][:2])
                summary["train_seconds_to_target"] = float(seconds)
    for tag in ("eval/episodic_return", "charts/episodic_return"):
        if tag in curves:
            steps, values, _ = curves[tag]
            summary["final_return"] = values[-1]
            summary["last_fifth_return"] = statistics.fmean(last_fifth(steps, values))
            break
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in summary.items()}


def collect(args):
    """Write the JSON and the CSV file of all finished seeds; returns the former, or None if none is.

    Exits, and leaves the files as they are, where they have a seed that is asked for and has no finished run
    folder, or kept seeds had other settings than the new ones. Seeds that are not asked for drop out.
    """
    about, runs, settings = args.published, [], args.published.get("settings", {})
    path = args.results / f"{args.name}.json"
    for seed in args.seeds:
        folder = args.runs / args.name / f"seed_{seed}"
        if not (folder / "done.json").exists() and seed in args.kept:
            runs.append({"cpu": args.published["hardware"]["cpu"]} | args.kept[seed])
            continue
        if not (folder / "done.json").exists():
            args.failed.setdefault(seed, "not finished")
            continue
        about = json.loads((folder / "done.json").read_text())
        curves = read_curves(folder, args.tags)
        if not curves:
            args.failed[seed] = "it logged nothing"
            continue
        settings = next((json.loads(x.read_text()) for x in folder.rglob("args.json")), settings)
        settings = {key: value for key, value in settings.items() if key not in PER_RUN}
        old = args.published["settings"] if args.kept else settings
        if other := {x for x in settings | old if settings.get(x) != old.get(x)} - {*PER_RUN}:
            has = f"{folder} has another {', '.join(sorted(other))} than the seeds of {path}"
            machine.fail(f"{has}; nothing is written")
        kept = {tag: thin(*curve[:2]) for tag, curve in sorted(curves.items())}
        runs.append({
            "seed": seed, "wall_seconds": about["wall_seconds"], "started": about["started"],
            "commit": about["commit"], "dirty": about["dirty"], "restarts": about["restarts"],
            "peak_memory_mib": about["peak_memory_mib"], "cpu": about["hardware"]["cpu"],
            "summary": summarise(curves, about["start"], args.metric, args.target),
            "curves": {t: {"step": s, "value": [float(f"{x:.5g}") for x in v]} for t, (s, v) in kept.items()},
        })  # fmt: skip
    if not runs:
        print(f"{args.name}: no finished run, nothing to collect")
        return None
    if not any(args.metric in run["curves"] for run in runs):
        known = ", ".join(runs[0]["curves"])
        print(f"{args.name}: no run logged {args.metric}, which the summary is about; it has {known}")
    asked = {*args.seeds} - {run["seed"] for run in runs}
    if lost := [str(seed) for seed in args.published.get("seeds", []) if seed in asked]:
        gone = f"{path} has seeds without a finished run folder: {', '.join(lost)}"
        machine.fail(f"{gone}; nothing is written (--extend keeps them)")
    commits = {(run["commit"], run["dirty"]) for run in runs}
    if len(commits) > 1:
        print(f"{args.name}: the runs come from {len(commits)} states of the code, see `commit` of each run")
    overall = {}
    for key in runs[0]["summary"]:
        values = [run["summary"][key] for run in runs]
        reached = [value for value in values if value is not None]
        # a seed that never reached the target counts as later than all others
        padded = sorted(reached) + [float("inf")] * (len(values) - len(reached))
        middle = statistics.median(padded)
        overall[key] = {"median": middle if middle < float("inf") else None, "n": len(reached)}
        overall[key] |= {"min": min(reached), "max": max(reached)} if reached else {}
    smac = json.loads((ROOT / "envs" / "smac_maps.json").read_text())["maps"]
    env = settings.get("env", "")
    engine = ENGINE if env.lower().split(",")[0] in {x.lower() for x in smac} else None
    failed = args.published.get("failed", {}) if args.kept else {}
    failed |= {str(seed): why for seed, why in args.failed.items()}
    report = {
        "name": args.name, "command": about["command"], "env": env.lower(), "engine": engine,
        "commit": about["commit"], "dirty": any(run["dirty"] for run in runs), "date": today(),
        "hardware": about["hardware"], "workers": about["workers"], "seeds": [run["seed"] for run in runs],
        "failed": {seed: why for seed, why in failed.items() if int(seed) not in {x["seed"] for x in runs}},
        "metric": args.metric, "target": args.target,
        "summary": overall, "settings": settings, "runs": runs,
    }  # fmt: skip
    write_json(path, report)
    rows = [{"seed": run["seed"], **run["summary"], "wall_seconds": run["wall_seconds"]} for run in runs]
    write_csv(args.results / f"{args.name}.csv", rows)
    for key, value in overall.items():
        print(f"{key:26}" + "  ".join(f"{name} {x:g}" for name, x in value.items() if x is not None))
    print(f"written: {args.results / args.name}.json and .csv")
    return report
