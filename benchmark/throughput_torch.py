"""A peer of throughput.py: our battles as the torch engine of an earlier commit plays them, in its work tree.

Answers "build MAP GAMES" with "ready" and "turn SECONDS" with environment steps per second, under the same
random policy. `--peer torch` is eager, `torch_compiled` compiles its game loop.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=["torch", "torch_compiled"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tree", type=Path, required=True, help="work tree of the earlier commit")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path[0] = str(args.tree)  # its `envs` and its benchmark, not ours
    from benchmark.throughput import Ours

    head = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], cwd=args.tree, capture_output=True, text=True
    )
    print(f"> {args.peer} engine of commit {head.stdout.strip() or 'unknown'}", flush=True)
    ours = None
    for line in sys.stdin:
        word, *values = line.split()
        if word == "build":
            torch.compiler.reset()  # else sizes after the first would be compiled with a variable shape
            ours = Ours(values[0], int(values[1]), args.peer == "torch_compiled", args.device)
            print("> ready", flush=True)
        else:
            print(">", ours.turn(float(values[0])), flush=True)


if __name__ == "__main__":
    main()
