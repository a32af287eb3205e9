"""Repeat one command over seeds in parallel processes on this machine, and collect its curves in small files.

    python benchmark/run_seeds.py --name dop_mmm --seeds 1-8 --workers 2 -- python dop_stochastic.py --env mmm

Each seed gets the folder runs/<name>/seed_<n> with log.txt, the run folder of the command and, once it has
ended well, done.json. A seed with done.json is not run again; anything else in its place is set aside as
seed_<n>.old_<k>, never deleted. Then the curves go to docs/results/<name>.json, and a line per seed to
<name>.csv. Nothing is run where these hold another command, or seeds that --seeds leaves out.
"""

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.common import ENGINE, RESULTS, ROOT, commit, hardware, last_fifth, today, write_csv, write_json

TAGS = [
    "eval/*",
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/win_rate",
    "charts/train_seconds",
    "losses/entropy",
    "losses/grad_norm_actor",
]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PYTHON = ("python", "python3")  # in a command, the interpreter that runs this script
PER_RUN = ("seed", "run_dir", "resume", "evaluate")  # not settings of the whole set
MAX_POINTS = 250  # of a curve in the JSON file; longer ones are averaged in groups


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--name", required=True, help="name of this set of runs, of its folder and its result files"
    )
    parser.add_argument("--seeds", type=parse_seeds, required=True, help="for example 1-8 or 1,2,5")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--metric", default="eval/win_rate", help="the tag that the summary is about")
    parser.add_argument(
        "--target", type=float, default=0.90, help="value of --metric whose first time is reported"
    )
    parser.add_argument("--tags", nargs="+", default=TAGS, help="tags to collect, with wildcards")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs' folder is")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the two result files go")
    parser.add_argument("--collect-only", action="store_true", help="run nothing, collect what is finished")
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.command = argv[cut + 1 :]
    args.runs = args.runs.resolve()  # the command runs in ROOT, wherever this script was called from
    if not re.fullmatch(r"[\w.-]+", args.name):
        parser.error(f"--name may have letters, digits, '_', '-' and '.', got {args.name!r}")
    if not args.command and not args.collect_only:
        parser.error("the command to repeat is missing: put it behind ' -- '")
    if not args.collect_only and args.command[0] not in PYTHON:
        program = args.command[0]  # a path is looked up from ROOT, where the command runs
        if not shutil.which(ROOT / program if os.path.dirname(program) else program):
            parser.error(f"{program!r} is no program that can be run; Python files need 'python' before them")
    if args.workers < 1 or args.threads < 1:
        parser.error("--workers and --threads must be at least 1")
    return args


def parse_seeds(text):
    """'1-3,7' -> [1, 2, 3, 7]."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds such as 1-8 or 1,2,5")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} holds no seed")
    return sorted(set(seeds))


# ---- running ----
def launch(args, seed):
    """Start one run and return (process, its folder, what done.json will say)."""
    folder = args.runs / args.name / f"seed_{seed}"
    if folder.exists():
        old = next(
            f for k in range(1, 10**6) if not (f := folder.with_name(f"{folder.name}.old_{k}")).exists()
        )
        folder.rename(old)
    folder.mkdir(parents=True)
    words = [sys.executable if args.command[0] in PYTHON else args.command[0], *args.command[1:]]
    words += ["--seed", str(seed), "--exp-name", args.name, "--run-dir", str(folder)]
    variables = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(args.threads)), "PYTHONUNBUFFERED": "1"}
    about = {
        "seed": seed,
        "command": shlex.join(args.command),
        **commit(),
        "started": today(),
        "start": time.time(),
    }
    about |= {"hardware": hardware(args.threads), "workers": args.workers}
    with open(folder / "log.txt", "w") as log:
        log.write(shlex.join(words) + "\n")
        log.flush()
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return process, folder, about


def peak_memory(pid):
    """Largest resident memory of a running process so far in MiB, None where /proc does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return match and round(int(match[1]) / 1024)


def finish(process, folder, about):
    """Write done.json, or failed.json for an exit code other than 0. Returns the exit code."""
    about |= {"wall_seconds": round(time.time() - about["start"], 1), "exit_code": process.returncode}
    marker = folder / ("failed.json" if process.returncode else "done.json")
    marker.with_suffix(".tmp").write_text(json.dumps(about, indent=2) + "\n")
    marker.with_suffix(".tmp").rename(marker)
    return process.returncode


def stop(running, patience=30):
    """Interrupt the children as Ctrl-C would, and kill whatever is left after `patience` seconds."""
    for number in (signal.SIGINT, signal.SIGKILL):
        for process, _, _ in running:
            if process.poll() is None:
                os.killpg(process.pid, number)
        deadline = time.time() + patience
        while time.time() < deadline and any(process.poll() is None for process, _, _ in running):
            time.sleep(0.05)


def check_results(args):
    """Exit where a result file holds another command, or seeds that are not asked for now."""
    path = args.results / f"{args.name}.json"
    if not path.exists():
        return
    old = json.loads(path.read_text())
    left_out = [str(seed) for seed in old.get("seeds", []) if seed not in args.seeds]
    if old.get("command") != shlex.join(args.command):
        sys.exit(f"run_seeds.py: {path} is of {old.get('command')!r}; take another --name or delete the file")
    if left_out:
        sys.exit(
            f"run_seeds.py: {path} has more seeds than --seeds asks for ({', '.join(left_out)}); "
            "ask for them too, take another --name or delete the file"
        )


def run_all(args):
    """Run every seed that is not finished. Returns {seed: exit code} of the failed ones."""
    waiting, running, failed, elsewhere, now = [], [], {}, [], commit()["commit"]
    for seed in args.seeds:
        done = args.runs / args.name / f"seed_{seed}" / "done.json"
        if not done.exists():
            waiting.append(seed)
            continue
        about = json.loads(done.read_text())
        if about["command"] != shlex.join(args.command):
            sys.exit(
                f"run_seeds.py: seed {seed} of {args.name!r} ran {about['command']!r}; take another --name"
            )
        if about["commit"] != now:
            elsewhere.append(f"seed {seed} ({(about['commit'] or 'unknown')[:10]})")
    check_results(args)
    print(
        f"{args.name}: {len(args.seeds) - len(waiting)} of {len(args.seeds)} seeds are already finished",
        flush=True,
    )
    if elsewhere:
        print(
            f"finished at another commit than the present {(now or 'unknown')[:10]}: {', '.join(elsewhere)}; "
            f"to run one anew, remove its folder {args.runs / args.name}/seed_<n>",
            flush=True,
        )
    # both end in KeyboardInterrupt, also where a shell has started this in the background with SIGINT ignored
    handled = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, signal.default_int_handler) for number in handled]
    try:
        while waiting or running:
            while waiting and len(running) < args.workers:
                running.append(launch(args, waiting.pop(0)))
                print(f"seed {running[-1][2]['seed']}: started, log in {running[-1][1]}/log.txt", flush=True)
            time.sleep(0.05)
            for process, _, about in running:
                about["peak_memory_mib"] = peak_memory(process.pid) or about.get("peak_memory_mib")
            for run in [run for run in running if run[0].poll() is not None]:
                running.remove(run)
                code, about = finish(*run), run[2]
                if code:
                    failed[about["seed"]] = code
                state = f"FAILED with exit code {code}" if code else "finished"
                print(f"seed {about['seed']}: {state} after {about['wall_seconds']} s", flush=True)
    except KeyboardInterrupt:
        print(f"stopping {len(running)} runs; the same command goes on with the seeds that are not finished")
        stop(running)
        sys.exit(130)
    finally:
        for number, handler in zip(handled, previous, strict=True):
            signal.signal(number, handler)
    return failed


# ---- collecting ----
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


def at_step(curve, step):
    """Value of a curve at a step, linear between its points."""
    steps, values = curve[0], curve[1]
    after = next((i for i, x in enumerate(steps) if x >= step), len(steps) - 1)
    if after == 0 or steps[after] <= step:
        return values[after]
    share = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])


def summarise(curves, start, metric, target):
    """The figures of one run; None where the run logged nothing of the kind.

    last_fifth: mean over the evaluations in the last fifth of the run's steps. Seconds are those of training
    alone (charts/train_seconds) and those since the launch of the process (wall), evaluations included.
    """
    keys = (
        "best",
        "final",
        "last_fifth",
        "step_to_target",
        "train_seconds_to_target",
        "wall_seconds_to_target",
    )
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
                summary["train_seconds_to_target"] = at_step(curves["charts/train_seconds"], steps[first])
    for tag in ("eval/episodic_return", "charts/episodic_return"):
        if tag in curves:
            steps, values, _ = curves[tag]
            summary["final_return"] = values[-1]
            summary["last_fifth_return"] = statistics.fmean(last_fifth(steps, values))
            break
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in summary.items()}


def collect(args, failed):
    """Write the JSON and the CSV file of all finished seeds; returns the former, or None if none is."""
    runs, settings = [], {}
    for seed in args.seeds:
        folder = args.runs / args.name / f"seed_{seed}"
        if not (folder / "done.json").exists():
            if args.collect_only:
                failed[seed] = "not finished"
            continue
        about = json.loads((folder / "done.json").read_text())
        curves = read_curves(folder, args.tags)
        if not curves:
            failed[seed] = "it logged nothing"
            continue
        settings = next((json.loads(path.read_text()) for path in folder.rglob("args.json")), settings)
        settings = {key: value for key, value in settings.items() if key not in PER_RUN}
        kept = {tag: thin(*curve[:2]) for tag, curve in sorted(curves.items())}
        runs.append({
            "seed": seed, "wall_seconds": about["wall_seconds"], "started": about["started"],
            "commit": about["commit"], "dirty": about["dirty"],
            "peak_memory_mib": about.get("peak_memory_mib"),
            "summary": summarise(curves, about["start"], args.metric, args.target),
            "curves": {t: {"step": s, "value": [float(f"{x:.5g}") for x in v]} for t, (s, v) in kept.items()},
        })  # fmt: skip
    if not runs:
        print(f"{args.name}: no finished run, nothing to collect")
        return None
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
    engine = ENGINE if env.lower() in {x.lower() for x in smac} else None
    report = {
        "name": args.name, "command": about["command"], "env": env.lower(), "engine": engine,
        "commit": about["commit"], "dirty": any(run["dirty"] for run in runs), "date": today(),
        "hardware": about["hardware"], "workers": about["workers"], "seeds": [run["seed"] for run in runs],
        "failed": {str(seed): code for seed, code in failed.items()},
        "metric": args.metric, "target": args.target,
        "summary": overall, "settings": settings, "runs": runs,
    }  # fmt: skip
    write_json(args.results / f"{args.name}.json", report)
    rows = [{"seed": run["seed"], **run["summary"], "wall_seconds": run["wall_seconds"]} for run in runs]
    write_csv(args.results / f"{args.name}.csv", rows)
    return report


def main(argv=None):
    args = parse_args(argv)
    failed = {} if args.collect_only else run_all(args)
    report = collect(args, failed)
    if report:
        for key, value in report["summary"].items():
            print(f"{key:26}" + "  ".join(f"{name} {x:g}" for name, x in value.items() if x is not None))
        print(f"written: {args.results / args.name}.json and .csv")
    if failed:
        print("without a result: " + ", ".join(f"seed {seed} ({why})" for seed, why in failed.items()))
    return 1 if failed or not report else 0


if __name__ == "__main__":
    sys.exit(main())
