"""Repeat one command over seeds on Ray, and collect its curves in small files.

    python benchmark/run_seeds.py --name mine/dop_mmm --seeds 1-8 --workers 2 -- python dop_stochastic.py

Ray starts on this machine and ends with this script, unless --address names a cluster. Each seed gets the
folder runs/<name>/seed_<n> with log.txt, the run folder of the command and, once it has ended well,
done.json. A seed with done.json is not run again; one that was interrupted, or lost its machine, goes on from
its latest checkpoint; anything else in its place is set aside as seed_<n>.old_<k>, never deleted. Then the
curves go to docs/results/<name>.json, and a line per seed to <name>.csv. Nothing is run where these hold
another command, or seeds that --seeds leaves out; --extend keeps their seeds, whose run folders may be gone.
"""

import argparse
import copy
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

try:
    import ray
except ImportError:  # needed to run, not to collect
    ray = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import machine
from benchmark.collect import collect
from benchmark.common import RESULTS, ROOT, commit, describe, hardware, markdown_table, new_parser, today

TAGS = "eval/* charts/episodic_return charts/episodic_length charts/win_rate charts/train_seconds".split()
TAGS += "losses/entropy losses/grad_norm_actor".split()
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PYTHON = ("python", "python3")  # in a command, the interpreter that runs this script
PRIVATE = "of_one_run_seeds"  # resource that marks a Ray which ends with its script
LOSSES = 5  # workers or their machines that a seed may lose before it counts as failed


def parse_args(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--name", required=True, help="SET or FOLDER/SET, of its folder and its result files")
    add("--seeds", type=parse_seeds, required=True, help="for example 1-8 or 1,2,5")
    add("--workers", type=int, default=1, help="runs at the same time; a cluster takes what it has room for")
    add("--threads", type=int, default=1, help="threads of each run, and the cores it takes of a cluster")
    add("--gpus", type=float, default=0, help="GPUs that Ray keeps for a run; with 0.25 four share one")
    add("--address", help="HOST:PORT of the cluster of Ray to which this machine belongs, or auto")
    add("--sweep", type=parse_sweep, action="append", default=[], metavar="FLAG=A,B",
        help="a set of its own per value of a flag of the command; repeated: per combination")  # fmt: skip
    add("--metric", default="eval/win_rate", help="the tag that the summary is about")
    add("--target", type=float, default=0.90, help="value of --metric whose first time is reported")
    add("--tags", nargs="+", default=TAGS, help="tags to collect, with wildcards")
    add("--runs", type=Path, default=ROOT / "runs", help="where the runs' folder is")
    add("--results", type=Path, default=RESULTS, help="where the result files go")
    add("--extend", action="store_true", help="keep the seeds that the result files have, run further ones")
    add("--collect-only", action="store_true", help="run nothing, collect what is finished")
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.command = argv[cut + 1 :]
    args.runs = args.runs.resolve()  # the command runs in ROOT, wherever this script was called from
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", args.name):
        parser.error(f"--name may have letters, digits, '_', '-', '.' and one '/', got {args.name!r}")
    if not args.command and not args.collect_only:
        parser.error("the command to repeat is missing: put it behind ' -- '")
    if not args.collect_only and args.command[0] not in PYTHON:
        program = args.command[0]  # a path is looked up from ROOT, where the command runs
        if not shutil.which(ROOT / program if os.path.dirname(program) else program):
            parser.error(f"{program!r} is no program that can be run; Python files need 'python' before them")
    if args.workers < 1 or args.threads < 1 or args.gpus < 0:
        parser.error("--workers and --threads must be at least 1, and --gpus at least 0")
    if not args.collect_only and not ray:
        parser.error(f"Ray is missing: {sys.executable} -m pip install -r requirements-benchmark.txt")
    return args


def parse_seeds(text):
    """'1-3,7' -> [1, 2, 3, 7]."""
    ends = [re.findall(r"\d+", part) for part in text.split(",")]
    seeds = {seed for x in ends if x for seed in range(int(x[0]), int(x[-1]) + 1)}
    empty = any(x and int(x[0]) > int(x[-1]) for x in ends)
    if empty or not seeds or not re.fullmatch(r"\s*\d+(-\d+)?\s*(,\s*\d+(-\d+)?\s*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds such as 1-8 or 1,2,5")
    return sorted(seeds)


def parse_sweep(text):
    """'actor_lr=1e-4,5e-4' -> [('actor_lr', '1e-4'), ('actor_lr', '5e-4')]."""
    if not re.fullmatch(r"[a-z]\w*=[\w.-]+(,[\w.-]+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no flag with values such as actor_lr=1e-4,5e-4")
    flag, values = text.split("=")
    return [(flag, value) for value in values.split(",")]


def sets_of(args):
    """`args` once for each combination of the sweeps, with a name and a command of its own."""
    for cell in itertools.product(*args.sweep):
        one = copy.copy(args)
        one.cell, one.failed = cell, {}
        one.name += "".join(f"_{flag}_{value}" for flag, value in cell)
        one.command = args.command + [x for f, v in cell for x in (f"--{f.replace('_', '-')}", v)]
        path = args.results / f"{one.name}.json"
        one.published = json.loads(path.read_text()) if path.exists() else {}
        one.kept = {run["seed"]: run for run in one.published.get("runs", [])} if args.extend else {}
        one.seeds = sorted({*args.seeds, *one.kept})
        about = {name: one.published.get(name) for name in ("metric", "target")}
        if one.kept and about != {"metric": args.metric, "target": args.target}:
            machine.fail(f"{path} is about --metric {about['metric']} --target {about['target']:g}")
        yield one


# ---- on a worker ----
class Run:
    """One run, as an actor of Ray, in `place`, a folder of the caller, or with None in one of the worker."""

    def follow(self, words, place, files, threads, gpus):
        """Start it among `files` {name: bytes}. Yields (facts, files): at the start, of changes, at the end.

        In a folder of the caller there are no files to yield.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder, seen = Path(place or scratch), {}
            folder.mkdir(parents=True, exist_ok=True)
            if not place:
                put(folder, files)
                news(folder, seen)
            words = [sys.executable if words[0] in PYTHON else words[0], *words[1:], "--run-dir", str(folder)]
            for checkpoint in folder.glob("*/model.pt"):
                words += ["--resume", str(checkpoint.parent)]
            env = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"PYTHONUNBUFFERED": "1"}
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # Ray's processes block SIGINT
            start = time.time()
            with open(folder / "log.txt", "a") as log:
                print(shlex.join(words), file=log, flush=True)
                streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                self.process = subprocess.Popen(words, cwd=ROOT if place else None, env=env, **streams)
            facts = {"started": today(), "hardware": hardware(threads, "cuda" if gpus else "cpu")}
            yield facts | {"start": start}, {}
            while self.process.poll() is None:
                time.sleep(0.5)
                if not place and (changed := news(folder, seen)):
                    yield {}, changed
            files = {} if place else news(folder, seen)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of KiB
        facts = {"exit_code": self.process.returncode, "peak_memory_mib": round(memory)}
        yield facts | {"end": time.time()}, files

    def interrupt(self):
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)


def news(folder, seen):
    """{name: bytes} of the files that are not as in `seen`, which is brought up to date.

    Checkpoints are read first: events that are read later hold all that a resumed run will not log again.
    """
    files = {}
    for path in sorted(folder.rglob("*"), key=lambda path: path.name != "model.pt"):
        if path.is_file() and path.suffix != ".tmp":
            state = path.stat().st_mtime_ns, path.stat().st_size
            if seen.get(path) != state:
                seen[path], files[str(path.relative_to(folder))] = state, path.read_bytes()
    return files


def put(folder, files):
    """Write what `news` has read, each file whole or not at all, checkpoints last."""
    for name, content in reversed(files.items()):
        path, new = folder / name, folder / f"{name}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        new.replace(path)


# ---- on the caller ----
def start_ray(args):
    """Start Ray, or connect to the cluster. Returns how many runs it has room for."""
    if args.address:
        shipped = {"working_dir": str(ROOT), "excludes": [".git", ".ci", "docs", "runs"]}
        options = {"address": args.address, "runtime_env": shipped}
    else:
        options = {"address": "local", "num_cpus": args.workers * args.threads, "resources": {PRIVATE: 1}}
        options |= {"include_dashboard": False, "object_store_memory": 2**27}
    try:
        if ":" in options["address"]:  # Ray itself would ask for minutes
            socket.create_connection(options["address"].rsplit(":", 1), timeout=10).close()
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray has no class for it
        machine.fail(f"cannot use Ray at {options['address']}: {error}")
    room = {"CPU": 0, "GPU": 0} | ray.cluster_resources()
    if args.address and PRIVATE in room:
        machine.fail("this Ray ends with another run_seeds.py; start a cluster with ray start --head")
    fit = min(room["CPU"] // args.threads, room["GPU"] // args.gpus if args.gpus else room["CPU"])
    if not fit:
        has = f"Ray has {room['CPU']:g} cores and {room['GPU']:g} GPUs"
        machine.fail(f"{has}, a run takes {args.threads} and {args.gpus:g}")
    return int(fit)


def unfinished(args):
    """The seeds that are left to run; exits where the name has another command or more seeds."""
    folder, published = args.runs / args.name, args.results / f"{args.name}.json"
    files = [(seed, folder / f"seed_{seed}" / "done.json") for seed in args.seeds]
    done = {seed: (path, json.loads(path.read_text())) for seed, path in files if path.exists()}
    old = args.published
    for path, about in [*done.values(), *([(published, old)] if old else [])]:
        if about.get("command") != shlex.join(args.command):
            machine.fail(f"{path} is of {about.get('command')!r}; take another --name or delete the file")
    if left_out := [str(seed) for seed in old.get("seeds", []) if seed not in args.seeds]:
        more = f"{published} has more seeds than --seeds asks for ({', '.join(left_out)})"
        machine.fail(f"{more}; ask for them too, take another --name or delete the file")
    done = {seed: (published, run) for seed, run in args.kept.items()} | done
    print(f"{args.name}: {len(done)} of {len(args.seeds)} seeds are already finished", flush=True)
    now, hashes = commit()["commit"], {seed: about["commit"] for seed, (_, about) in done.items()}
    elsewhere = [f"seed {seed} ({(x or 'unknown')[:10]})" for seed, x in hashes.items() if x != now]
    if elsewhere:
        anew = f"{', '.join(elsewhere)}; to run one anew, remove its folder {folder}/seed_<n>"
        print(f"finished at another commit than the present {(now or 'unknown')[:10]}: {anew}", flush=True)
    return [seed for seed in args.seeds if seed not in done]


def submit(args, seed, workers):
    """Queue a run, on from its checkpoint or anew, with what was there set aside. Returns {stream: run}."""
    folder = args.runs / args.name / f"seed_{seed}"
    about = {"seed": seed, "command": shlex.join(args.command), **commit()}
    try:
        started = json.loads((folder / "started.json").read_text())
    except (OSError, ValueError):
        started = {}
    if about.items() <= started.items() and any(folder.glob("*/model.pt")):
        about = started | {"restarts": started["restarts"] + 1}
    else:
        about |= {"restarts": 0, "workers": workers}
        if folder.exists():
            old = (folder.with_name(f"{folder.name}.old_{k}") for k in itertools.count(1))
            folder.rename(next(f for f in old if not f.exists()))
    words = [*args.command, "--seed", str(seed), "--exp-name", Path(args.name).name]
    place = (None, news(folder, {})) if args.address else (folder, {})
    run = ray.remote(num_cpus=args.threads, num_gpus=args.gpus, max_concurrency=2)(Run).remote()
    stream = run.follow.remote(words, *place, args.threads, args.gpus)
    return {stream: (run, args, seed, folder, about)}


def settle(args, folder, about):
    """Print how a run is and put it down: started.json, at its end done.json or failed.json instead."""
    code, state = about.get("exit_code"), "goes on" if about["restarts"] else "started"
    state += f", log in {folder}/log.txt"
    if code is not None:
        about["wall_seconds"] = round(about.pop("end") - about["start"], 1)
        state = f"{f'FAILED with exit code {code}' if code else 'finished'} after {about['wall_seconds']} s"
    put(folder, {"started.json": (json.dumps(about, indent=2) + "\n").encode()})
    if code is not None:
        (folder / "started.json").rename(folder / ("failed.json" if code else "done.json"))
    if code:
        args.failed[about["seed"]] = code
    print(f"{args.name}, seed {about['seed']}: {state}", flush=True)


def receive(stream, folder, about):
    """Put what a run has sent into its folder and its facts. Returns what is new of the latter."""
    try:
        facts, files = ray.get(next(stream))
    except (StopIteration, ray.exceptions.RayError) as error:
        of_run = isinstance(error, ray.exceptions.RayTaskError)  # not of its machine
        return {"lost": f"{error.cause!r}" if of_run else type(error).__name__}
    put(folder, files)
    about |= facts | about  # where it goes on, its first start counts
    return facts


def run_all(args, sets):
    """Run every seed that is not finished; `failed` of its set tells why one has no result."""
    waiting = [(one, seed) for one in sets for seed in unfinished(one)]
    if not waiting:
        return
    workers, running, begun, lost = start_ray(args), {}, set(), Counter()
    for one, seed in waiting:
        running |= submit(one, seed, workers)
    stop = machine.catch_signals()
    while running:
        if stop and stop[-1] == 130:
            stop.append("the runs know")
            print(f"stopping {len(begun)} runs, which save; the same command goes on with them", flush=True)
            for stream, (run, *_) in running.items():
                run.interrupt.remote() if stream in begun else ray.kill(run)
        for stream in ray.wait([*running], timeout=1)[0]:
            run, one, seed, folder, about = running[stream]
            facts = receive(stream, folder, about)
            if "start" in facts:
                begun.add(stream)
                settle(one, folder, about)
            elif facts:
                ray.kill(run)
                begun.discard(stream)
                del running[stream]
                if stop and facts.get("exit_code") != 0:
                    continue  # it goes on another time
                if "exit_code" in facts:
                    settle(one, folder, about)
                    continue
                lost[folder] += 1
                print(f"{one.name}, seed {seed}: lost its worker: {facts['lost']}", flush=True)
                if lost[folder] < LOSSES:
                    running |= submit(one, seed, workers)
                else:
                    one.failed[seed] = f"it lost {LOSSES} workers"
    ray.shutdown()
    if stop:
        sys.exit(130)


def tabulate(args, sets, reports):
    """Print and write the table of a sweep, a row per set: median (minimum to maximum) over seeds."""
    figures = ("best", "final", "last_fifth", "step_to_target", "final_return")
    rows = []
    for one, report in zip(sets, reports, strict=True):
        rows.append([*(value for _, value in one.cell), len(report["runs"])])
        for figure in (report["summary"][name] for name in figures):
            known = figure["median"] is not None
            rows[-1].append("{median:g} ({min:g} to {max:g})".format(**figure) if known else "-")
    table = markdown_table([*(flag for flag, _ in one.cell), "seeds", *figures], rows)
    command = shlex.join(["python", "benchmark/run_seeds.py", *sys.argv[1:]])
    made = describe(reports[0] | {"command": command})
    about = f"Median (minimum to maximum) over seeds; the metric is {args.metric}, its target {args.target:g}"
    (args.results / f"{args.name}_sweep.md").write_text(f"# {args.name}\n\n{made}\n\n{about}.\n\n{table}")
    print(table)


def main(argv=None):
    args = parse_args(argv)
    sets = [*sets_of(args)]
    if not args.collect_only:
        try:
            run_all(args, sets)
        except KeyboardInterrupt:  # while Ray starts; later it is a signal that run_all waits for
            machine.fail(130)
    reports = [collect(one) for one in sets]
    if args.sweep and all(reports):
        tabulate(args, sets, reports)
    for one in sets:
        if one.failed:
            reasons = {x: f"exit code {why}" if type(why) is int else why for x, why in one.failed.items()}
            failed = ", ".join(f"seed {seed} ({why})" for seed, why in reasons.items())
            print(f"{one.name}, without a result: {failed}")
    return 1 if any(one.failed for one in sets) or not all(reports) else 0


if __name__ == "__main__":
    sys.exit(main())
