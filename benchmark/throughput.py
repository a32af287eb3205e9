"""Environment steps per second with random legal actions: observation, state, masks and auto-reset included.

    python benchmark/throughput.py
    python benchmark/throughput.py --peer smax --peer-python .venv-smax/bin/python
    git worktree add ../torch-engine cd8fb3c
    python benchmark/throughput.py --peer torch torch_compiled --tree ../torch-engine

The peers are SMAX of the registry package jaxmarl for battles, mpe2 and vmas for particle tasks, in an
interpreter of their own (see docs/benchmark.md), and an earlier version of ours in a work tree of its own:
the battle engine in torch, eager and compiled. For each task and batch size ours and the peers take turns;
a number is the median of the turns. Compilation and the first steps are not counted. Writes
docs/results/engine/throughput.json; report.py writes the page.
"""

import contextlib
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from gymnasium import spaces

from benchmark.common import ENGINE, RESULTS, describe, markdown_table, metadata, new_parser, write_json
from envs import make

PARTICLES = ("aggregation", "spread,n_agents=5")  # 5 agents in the plane, 25 steps
BATTLES = ("mmm", "2s3z", "10m_vs_11m", "3m")
# name -> script that plays it, package and version, our tasks that it is measured beside
PEERS = {
    "torch": ("throughput_torch.py", "torch", None, BATTLES),
    "torch_compiled": ("throughput_torch.py", "torch", None, BATTLES),
    "smax": ("throughput_smax.py", "jaxmarl", "0.2.0", ("2s3z", "10m_vs_11m")),  # the same units
    "mpe2": ("throughput_particles.py", "mpe2", "1.1.1", PARTICLES),
    "vmas": ("throughput_particles.py", "vmas", "1.5.2", PARTICLES),
}
WARM_UP = 100  # steps: longer than a random game, so that the games are no longer in step


class Ours:
    """Our environment under a random policy; `turn(seconds)` returns env steps per second."""

    def __init__(self, env_id, num_envs, device, **options):
        torch.manual_seed(0)
        self.device = device
        self.env = make(env_id, num_envs=num_envs, device=device, seed=0, validate=False, **options)
        self.env.reset()
        if isinstance(self.env.single_action_space, spaces.Box):
            bounds = self.env.single_action_space.low, self.env.single_action_space.high
            self.low, self.high = (torch.as_tensor(bound, device=device) for bound in bounds)  # (N, D)
            self.shape = (num_envs, *self.low.shape)
        self.play(WARM_UP)

    @torch.no_grad()
    def play(self, steps):
        """A random legal action per agent, or a random one within the bounds. Returns seconds."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.env.step(self.actions())
            self.env.state()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def actions(self):
        avail_actions = self.env.avail_actions()  # (B, N, A) or None
        if avail_actions is None:
            return torch.lerp(self.low, self.high, torch.rand(self.shape, device=self.device))  # (B, N, D)
        # legal ones score 1 to 2, the others 0 to 1
        return (torch.rand(avail_actions.shape, device=self.device) + avail_actions).argmax(-1)

    def turn(self, seconds):
        steps, spent = 0, 0.0
        while spent < seconds:
            spent += self.play(20)
            steps += 20
        return steps * self.env.num_envs / spent


class Peer:
    """A script of PEERS in another interpreter, asked line by line; it sleeps while others play."""

    def __init__(self, name, python, threads, device="cpu", tree=None):
        script, package, version, _ = PEERS[name]
        find = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({package!r}))"
        if subprocess.run([python, "-c", find]).returncode:
            install = f"{python} -m pip install {package}=={version}"
            raise SystemExit(f"throughput.py: {python} has no {package}, install it with: {install}")
        words = [python, str(Path(__file__).with_name(script)), "--peer", name, "--threads", str(threads)]
        if name.startswith("torch"):
            words += ["--tree", str(tree), "--device", device]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._read()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("> "):  # anything else is what its libraries print
                return line[2:].strip()
        raise SystemExit("throughput.py: the peer ended, see its message above")

    def ask(self, *words):
        print(*words, file=self.process.stdin, flush=True)
        return self._read()

    def turn(self, seconds):
        return float(self.ask("turn", seconds))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def cores(threads):
    """Keep this process and its children on `threads` cores: XLA has no setting for its number of threads."""
    before, pinnable = torch.get_num_threads(), hasattr(os, "sched_setaffinity")  # Linux only
    torch.set_num_threads(threads)
    if pinnable:
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if pinnable:
            os.sched_setaffinity(0, allowed)


def measure(env_id, num_envs, args, peers):
    """{way: {"steps_per_second": median, "turns": [...]}} of one map and batch size."""
    gc.collect()
    ways = {"ours": Ours(env_id, num_envs, args.device)}
    for name, peer in peers.items():
        if env_id.lower() in PEERS[name][-1]:
            peer.ask("build", env_id, num_envs)
            ways[name] = peer
    turns = {name: [] for name in ways}
    for repeat in range(args.repeats):
        for name in list(ways)[:: 1 if repeat % 2 == 0 else -1]:
            turns[name].append(round(ways[name].turn(args.seconds), 1))
    return {
        name: {"steps_per_second": statistics.median(values), "turns": values}
        for name, values in turns.items()
    }


def table_of(results, env_id, threads):
    """Markdown: one line per batch size, the ways and the ratios of ours to the peers."""
    chosen = [r for r in results if r["env"] == env_id and r["threads"] == threads]
    ways = list(chosen[0]["ways"])
    peers = [way for way in ways if way in PEERS]
    rows = []
    for result in chosen:
        speed = {way: result["ways"][way]["steps_per_second"] for way in ways}
        rows.append([result["num_envs"], *(f"{speed[way]:,.0f}" for way in ways)])
        rows[-1] += [f"{speed['ours'] / speed[peer]:.2f}" for peer in peers]
    return markdown_table(["games", *ways, *(f"ours / {peer}" for peer in peers)], rows)


def section(report):
    """What a file of this script says, in Markdown."""
    text = f"Beside {report['peer']}. " if "peer" in report else ""
    if "mpe2" in report.get("peer", ""):
        text += "mpe2 plays one game in every row, as it has no batch. "
    text += "Environment steps per second (a step of one game counts as 1), random legal actions.\n"
    for env_id, threads in dict.fromkeys((x["env"], x["threads"]) for x in report["results"]):
        text += f"\n{env_id}, {threads} thread{'s' if threads > 1 else ''}:\n\n"
        text += table_of(report["results"], env_id, threads)
    return f"{text}\n{describe(report)}"


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument(
        "--envs", nargs="+", default=["MMM", "2s3z", "10m_vs_11m", "3m"], help="environment ids"
    )
    parser.add_argument("--num-envs", nargs="+", type=int, default=[4, 16, 64, 256, 512, 1024])
    parser.add_argument("--threads", nargs="+", type=int, default=[os.cpu_count()], help="one table for each")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    parser.add_argument("--tree", type=Path, help="work tree of the torch engine, for the peers torch*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--peer", nargs="+", default=[], choices=PEERS, help="measure these simulators in the same run"
    )
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has the peers installed"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "engine" / "throughput", help="result file, without suffix"
    )
    args = parser.parse_args(argv)
    if args.repeats < 1 or min(args.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device is available here")
    if args.tree and not args.tree.is_dir():
        parser.error(f"{args.tree} is no folder")
    if not args.tree and any(name.startswith("torch") for name in args.peer):
        parser.error(
            "the torch engine is commit cd8fb3c: git worktree add ../torch-engine cd8fb3c, then --tree"
        )
    waiting = os.environ.get("OMP_WAIT_POLICY")  # of torch's idle threads, in all ways alike
    about = metadata(__file__, argv, device=args.device)
    about["command"] = f"OMP_WAIT_POLICY={waiting} " * bool(waiting) + about["command"]
    battles = [env_id for env_id in args.envs if env_id.lower() not in PARTICLES]
    about |= ({"engine": ENGINE} if battles else {}) | {"results": []}
    for threads in args.threads:
        with cores(threads):
            peers = {
                name: Peer(name, args.peer_python, threads, args.device, args.tree) for name in args.peer
            }
            about |= {"peer": " and ".join(peer.versions for peer in peers.values())} if peers else {}
            for env_id in args.envs:
                for num_envs in args.num_envs:
                    try:
                        ways = measure(env_id, num_envs, args, peers)
                    except ValueError as error:  # of an id or a number of games
                        sys.exit(f"throughput.py: {error}")
                    about["results"].append(
                        {"env": env_id, "num_envs": num_envs, "threads": threads, "ways": ways}
                    )
                    write_json(Path(f"{args.out}.json"), about)
                    speeds = "  ".join(f"{name} {x['steps_per_second']:>10,.0f}" for name, x in ways.items())
                    print(f"{env_id:18} threads {threads}  games {num_envs:5}  {speeds}", flush=True)
            for peer in peers.values():
                peer.close()
    print(f"{section(about)}\nwritten: {args.out}.json")


if __name__ == "__main__":
    main()
