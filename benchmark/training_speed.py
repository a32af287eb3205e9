"""Wall-clock of one training run on two commits at the same time, a core each, and what env.step takes of it.

    git worktree add ../torch-engine cd8fb3c
    python benchmark/training_speed.py --tree ../torch-engine -- dop_stochastic.py --env mmm

Runs the program of this work tree and that of `--tree` side by side, one thread each, with the flags behind
" -- ". `env.step` counts the training games only; evaluations are in the total. Writes
docs/results/engine/training_speed.json; report.py writes the page. Linux only, as it pins each run to a core.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import common
from benchmark.common import ROOT, describe, markdown_table, metadata, new_parser, write_json


def child(tree, flags):
    """Run a program of `tree` in this process, print its seconds and those of its training games' steps."""
    start = time.perf_counter()
    sys.path[0] = str(tree)
    import envs

    make, spent, made = envs.make, [], []

    def timed_make(*args, **options):
        env = make(*args, **options)
        if not made:
            step = env.step

            def timed_step(actions):
                started = time.perf_counter()
                result = step(actions)
                spent.append(time.perf_counter() - started)
                return result

            env.step = timed_step
        made.append(env)
        return env

    envs.make = timed_make
    sys.argv = [str(tree / flags[0]), *flags[1:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        if leaving.code:
            raise
    print(
        json.dumps({"seconds": time.perf_counter() - start, "step_seconds": sum(spent), "steps": len(spent)})
    )


def section(report):
    """What a file of this script says, in Markdown."""
    rows = []
    for name, result in report["results"].items():
        share = result["step_seconds"] / result["seconds"]
        ratio = result["seconds"] / report["results"]["earlier commit"]["seconds"]
        title = f"{name} ({report['earlier']})" if name.startswith("earlier") else name
        rows.append([title, f"{result['seconds']:,.1f}", f"{result['step_seconds']:,.1f}", f"{share:.1%}"])
        rows[-1].append(f"{ratio:.2f}")
    table = markdown_table(["", "seconds", "of them env.step", "share", "of the earlier"], rows)
    return (
        f"Two commits at the same time, one core each, evaluations included.\n\n{table}\n{describe(report)}"
    )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = new_parser(__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="work tree of the earlier commit")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="+", help="program and its flags, behind --")
    args = parser.parse_args(argv)
    if not args.tree.is_dir():
        parser.error(f"{args.tree} is no folder")
    if args.child:
        child(args.tree, args.flags)
        return
    if len(cores := sorted(os.sched_getaffinity(0))) < 2:
        parser.error("both trees run at the same time, on a core each: two are needed")
    trees = {"this commit": ROOT, "earlier commit": args.tree.resolve()}
    about = metadata(__file__, argv, threads=1)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for core, (name, tree) in zip(cores[:2], trees.items(), strict=True):
            words = [sys.executable, __file__, "--child", "--tree", str(tree), "--", *args.flags]
            runs[name] = subprocess.Popen(
                ["taskset", "-c", str(core), *words, "--device", "cpu", "--run-dir", f"{folder}/{core}"],
                cwd=tree, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        results = {name: json.loads(run.communicate()[0].splitlines()[-1]) for name, run in runs.items()}
    head = ["git", "rev-parse", "--short=10", "HEAD"]
    earlier = subprocess.run(head, cwd=args.tree, capture_output=True, text=True).stdout.strip()
    about |= {"earlier": earlier, "results": results}
    write_json(common.RESULTS / "engine" / "training_speed.json", about)
    print(section(about))


if __name__ == "__main__":
    main()
