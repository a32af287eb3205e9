"""SMAC in StarCraft II itself: the interface of smac.py on what the game's own messages say about its units.

    env = make("sc2:mmm,difficulty=7", num_envs=8, seed=1)  # needs the game: docs/envs.md says how to install it

Every game is a client of StarCraft II of its own, led by a worker process (`smac_sc2_worker.py`) in a process
group of its own. A client that dies, errs, ends or stays silent is killed and started again: its episode ends
as truncated, with a step of reward 0 that is marked in `info["broken"]`. Nothing survives the learner.

Letters as in smac.py: B games, N agents, M enemies, U units.
"""

import contextlib
import copy
import importlib.metadata
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import warp as wp

from envs.base import require_whole
from envs.smac import _DATA, DEATH_VALUE, FIRST_TARGET, UNIT, WIN_VALUE, Smac, _view, play, restart
from envs.smac_sim import Kind, World

HELP = "docs/envs.md says how to install the game"
PACKAGES = ("pys2clientprotocol", "websocket-client")
PROGRAMS = {"Linux": "SC2_x64", "Darwin": "SC2.app/Contents/MacOS/SC2"}
FOLDERS = {"Linux": "~/StarCraftII", "Darwin": "/Applications/StarCraft II"}
DIFFICULTIES = "123456789A"  # very easy to very hard (7), then those that cheat
FIELDS = ("x", "y", "hp", "shield", "energy", "cooldown")  # of a unit, as a worker sends them
CLIENT_MEMORY = 2**30  # bytes, about
ATTEMPTS = 3  # clients of a game in a row that may break before the end of an episode
GRACE = 10  # seconds after the worker's own time-out, which can tell more than ours


class Sc2(Smac):
    """B battles of one SMAC map, each in a client of StarCraft II. `info` adds `broken` (B,) to that of Smac.

    Clients start at the first reset, that of game g with the seed `seed_of_game` (None: `seed`) + g; the game's
    random stream goes on from there, whatever seed a later reset is given. `timeout` seconds are the most that
    a client may take to start, for a step or for a restart. `save_replay`, an absolute folder, gets a replay of
    all episodes of each client when it is closed. Raises ValueError where something is missing or a name is
    wrong, RuntimeError where a game breaks over and over; both leave nothing behind.
    """

    external = True
    _waiting = weakref.WeakSet()  # environments whose clients have yet to start, so that their memory is free

    def __init__(
        self, map_name, num_envs, device, seed, validate=True, difficulty=7, seed_of_game=None, timeout=300,
        save_replay=None,
    ):  # fmt: skip
        self._id, self._timeout = f"sc2:{map_name}", timeout
        require_whole(timeout=timeout)
        if seed_of_game is not None:
            require_whole(low=0, seed_of_game=seed_of_game)
        level = str(difficulty).upper()
        if len(level) != 1 or level not in DIFFICULTIES:
            raise ValueError(f"difficulty must be 1 to 9 or A, got {difficulty!r}")
        if save_replay is not None and not Path(str(save_replay)).is_absolute():
            raise ValueError(f"save_replay must be an absolute folder, got {save_replay!r}")
        command, environ, map_file = self._find(map_name)
        n_games = num_envs + sum(env.num_envs for env in self._waiting)
        if (free := _free_memory()) < n_games * CLIENT_MEMORY:
            need = f"{n_games} games of StarCraft II, evaluation's among them, need about 1 GB of memory each"
            advice = "lower --num-envs or --eval-episodes"
            raise ValueError(f"{self._id}: {need}, and {free / 2**30:.1f} GB are free: {advice}")
        super().__init__(map_name, num_envs, device, seed, validate)
        self._waiting.add(self)

        self._battle = json.loads((_DATA / "smac_maps.json").read_text())["maps"][map_name]
        stats = json.loads((_DATA / "smac_units.json").read_text())["units"]
        ids = {name: re.search(r"(\d+)\)", unit["game_ids"]["enemy"] or "") for name, unit in stats.items()}
        self._names = {
            int(match[1]): name for name, match in ids.items() if match
        }  # type of the game -> ours
        self._cast = [None] * num_envs  # the types and most life that a game's constants were made for
        n = self.n_agents
        self._medics = self.sim.kinds["medic"] & (self._battle["map_type"] == "MMM")
        on_gpu = self.device.type == "cuda"
        memory = (
            torch.zeros_like(self._games.units, device="cpu", pin_memory=True)
            if on_gpu
            else self._games.units
        )
        self._memory, self._rows = memory, memory.numpy().view(UNIT)[..., 0]  # (B, U) structured
        self._seed = seed if seed_of_game is None else seed_of_game
        game = dict(races=(self._battle["ally_race"], self._battle["enemy_race"]))
        game |= dict(difficulty=DIFFICULTIES.index(level) + 1)
        game |= dict(local_map=dict(map_path=f"SMAC_Maps/{map_file.name}", map_data=map_file.read_bytes()))
        self._recipe = dict(command=command, environ=environ, timeout=timeout, learner=os.getpid())
        self._recipe |= dict(game=game, n_agents=n, n_enemies=self.n_enemies, limit=self.episode_limit)
        self._recipe |= dict(replays=save_replay, medics=self._medics[:n].tolist())
        self._workers, self._launches, self._failures = [None] * num_envs, [0] * num_envs, [0] * num_envs
        self._finalizer = weakref.finalize(self, _release, self._workers)  # at exit too

    def _find(self, map_name):
        """The command that starts the game, its additional environment and the map's file."""
        for package in PACKAGES:
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                install = "pip install -r requirements-sc2.txt"
                raise ValueError(f"{self._id} needs the package {package}: {install}") from None
        system = platform.system()
        if system not in PROGRAMS:
            raise ValueError(f"{self._id} needs Linux or macOS; on Windows, Linux in WSL will do")
        folder = Path(os.environ.get("SC2PATH") or FOLDERS[system]).expanduser().absolute()
        if not folder.is_dir():
            wrong = (
                "SC2PATH says so"
                if os.environ.get("SC2PATH")
                else "SC2PATH is not set, so it should be there"
            )
            raise ValueError(f"no StarCraft II in {folder} ({wrong}): {HELP}")
        builds = [path for path in folder.glob("Versions/Base*") if path.name[4:].isdigit()]
        program = max(builds, key=lambda path: int(path.name[4:]), default=folder / "Versions/Base*")
        program = program / PROGRAMS[system]
        if not os.access(program, os.X_OK):
            raise ValueError(
                f"no program {program} that can be run: {HELP}, and SC2PATH must name its folder"
            )
        map_file = folder / "Maps" / "SMAC_Maps" / f"{map_name}.SC2Map"
        if not map_file.is_file():
            unpack = f"unpack SMAC_Maps.zip of SMAC's release v0.1-beta1 in {folder / 'Maps'}"
            raise ValueError(f"no map file {map_file}: {unpack}; docs/envs.md says where to get it")
        libraries = os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), str(folder / "Libs")]))
        return [str(program), "-dataDir", f"{folder}{os.sep}"], {"LD_LIBRARY_PATH": libraries}, map_file

    def _parts(self):
        """A launch for each game, as each may show its enemies in an order of its own."""
        return [(game, game + 1, self.sim.world, self._view) for game in range(self.num_envs)]

    def close_extras(self):
        self._finalizer()

    # ---- battles ----
    def _fight(self):
        """Play a step in all games; where one breaks, its units stay as they are."""
        rows, actions = self._rows, self._games.actions.cpu().numpy()
        rows["health"] = np.where(rows["hp"] > 0, rows["hp"] + rows["shield"], 0)
        aims = actions - FIRST_TARGET + np.where(self._medics[: self.n_agents], 0, self.n_agents)
        rows["target"][:, : self.n_agents] = np.where(actions >= FIRST_TARGET, aims, -1)  # for the picture
        answers = self._ask({game: ("step", played) for game, played in enumerate(actions.tolist())})
        self._fill(answers)
        self._games.broken.copy_(torch.tensor([answer is None for answer in answers.values()]))

    def _step(self, actions):
        *shown, info = super()._step(actions)
        info["broken"] = self._games.broken.clone()
        return *shown, info

    def _restart(self, done):
        """Begin battles in the games of done (B,), where need be in new clients."""
        self._games.done.copy_(done)
        games = done.nonzero().flatten().tolist()
        for game in games:
            if self._workers[game]:  # it has lived to the end of an episode
                self._failures[game] = 0
        while games:
            answers = self._ask({game: ("reset",) for game in games})
            games = [game for game, answer in answers.items() if answer is None]
            begun = {game: answer for game, answer in answers.items() if answer is not None}
            for game, (types, life, _) in begun.items():
                self._rows["target"][game] = -1
                if self._cast[game] != (types, life):
                    self._recast(game, types, life)
            self._fill({game: units for game, (_, _, units) in begun.items()})
        self._waiting.discard(self)

    def _fill(self, answers):
        """Put {game: units, None where it broke} where the kernels read them."""
        for game, units in answers.items():
            if units is not None:
                values = np.frombuffer(units, np.float32).reshape(-1, len(FIELDS))  # (U, 6)
                for name, value in zip(FIELDS, values.T, strict=True):
                    self._rows[name][game] = value
        if self._memory is not self._games.units:
            self._games.units.copy_(self._memory)

    def _recast(self, game, types, life):
        """Constants for the order in which a game shows its enemies, `types` (M,), and for its `life` (U,)."""
        n, sim, battle = self.n_agents, copy.copy(self.sim), dict(self._battle)
        names = [*self.sim.types[:n], *(self._names.get(kind, f"type {kind}") for kind in types)]
        if strange := [name for name in names if name not in self.sim.types]:
            raise RuntimeError(
                f"{self._id}: the game has a {strange[0]}, which SMAC's {self.map_name} has not"
            )
        sources = [i if i < n else n + self.sim.types[n:].index(name) for i, name in enumerate(names)]
        sim.types, sim.kinds = tuple(names), self.sim.kinds[sources]
        sim.kinds["hp_max"] = life
        most = sim.kinds["hp_max"][n:].sum() + sim.kinds["shield_max"][n:].sum()
        battle["max_reward"] = DEATH_VALUE * self.n_enemies + WIN_VALUE + float(most)
        sim.world = World()
        for name in World.vars:
            setattr(sim.world, name, getattr(self.sim.world, name))
        sim.world.kind = wp.array(sim.kinds, dtype=Kind, device=self._wp_device)
        view = _view(battle, sim, self._wp_device)
        view.external = True
        part = game, game + 1, sim.world, view
        self._play[game], self._begin[game] = self._record(play, *part), self._record(restart, *part)
        self._cast[game] = types, life
        if game == 0:
            self.sim = sim  # of the picture

    # ---- workers ----
    def _ask(self, orders):
        """{game: answer} to orders to the workers; None where a game broke, whose next order finds a new one."""
        if not self._finalizer.alive:
            raise RuntimeError(f"{self._id} is closed")
        for game, order in orders.items():
            if self._workers[game] is None:
                seed = (self._seed + game + 500_009 * self._launches[game]) % 2**31
                self._workers[game] = _Worker(self._recipe, seed, f"{self.map_name}_{game}")
                self._launches[game] += 1
            self._workers[game].send(order)
        end, answers = time.monotonic() + 2 * self._timeout + GRACE, {}
        for game in orders:
            try:
                answers[game] = self._workers[game].receive(end)
                continue
            except RuntimeError as error:
                answers[game], problem = None, f"{self._id}, game {game}: {error}"
            log = self._workers[game].kill()
            self._workers[game] = None
            self._failures[game] += 1
            if self._failures[game] >= ATTEMPTS:
                self.close()
                raise RuntimeError(
                    f"{problem}, the {ATTEMPTS}rd time in a row; its log ends: {log or 'empty'}"
                )
            print(f"{problem}; it starts anew", file=sys.stderr, flush=True)
        return answers


class _Worker:
    """The learner's end of a worker process."""

    def __init__(self, recipe, seed, prefix):
        near, far = socket.socketpair()
        self.folder = tempfile.TemporaryDirectory(prefix="sc2_", ignore_cleanup_errors=True)
        self.log = Path(self.folder.name, "log").open("w+b")  # what worker and game print
        # -P: envs/ has files with names of packages. A session of its own: Ctrl-C is for the learner
        words = [sys.executable, "-P", str(_DATA / "smac_sc2_worker.py"), str(far.fileno())]
        streams = dict(stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.process = subprocess.Popen(words, pass_fds=[far.fileno()], start_new_session=True, **streams)
        far.close()
        self.pipe = Connection(near.detach())
        replays = recipe["replays"] and (str(recipe["replays"]), prefix)
        game = recipe["game"] | {"random_seed": seed}
        self.send(recipe | {"folder": self.folder.name, "game": game, "replays": replays})

    def send(self, message):
        with contextlib.suppress(OSError):  # a worker that has died is noticed where it should answer
            self.pipe.send(message)

    def receive(self, end):
        """The worker's answer; RuntimeError with the reason why there is none."""
        try:
            if not self.pipe.poll(max(0, end - time.monotonic())):
                raise RuntimeError("its worker does not answer")
            answer = self.pipe.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            raise RuntimeError(f"its worker died (exit code {self.process.poll()})") from None
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    def kill(self):
        """End worker and game at once; returns the end of the log in one line."""
        self.pipe.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.seek(0)
        said = " ".join(self.log.read().decode(errors="replace").split())[-300:]
        self.log.close()
        self.folder.cleanup()
        return said


def _release(workers):
    """End the workers, those that do not listen by force."""
    living = [worker for worker in workers if worker]
    for worker in living:
        worker.send(None)
    end = time.monotonic() + GRACE
    for worker in living:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0, end - time.monotonic()))
        worker.kill()
    workers[:] = [None] * len(workers)


def _free_memory():
    """Bytes that programs may still take, as far as the system tells."""
    with contextlib.suppress(OSError):
        return 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
