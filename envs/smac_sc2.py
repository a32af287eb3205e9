"""SMAC in StarCraft II itself: the interface of smac.py on what the game's messages say about its units.

    env = make("sc2:mmm,difficulty=7", num_envs=8, seed=1)  # docs/envs.md says how to install the game

Every game is a client of StarCraft II, led by a worker process (`smac_sc2_worker.py`) in a process group of
its own. A client that dies, errs, ends or stays silent is killed and started again: its episode ends as
truncated, with a step of reward 0 that is marked in `info["broken"]`. Nothing survives the learner.
Letters as in smac.py: B games, N agents, M enemies, U units.
"""

import contextlib
import copy
import importlib.metadata
import json
import os
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
from envs.machine import free_memory
from envs.smac import _DATA, DEATH_VALUE, FIRST_TARGET, UNIT, WIN_VALUE, Smac, _view, play, restart
from envs.smac_sim import Kind, World

# system -> the game's usual folder and, below Versions/BaseNUMBER, its program
SYSTEMS = {"linux": ("~/StarCraftII", "SC2_x64")}
SYSTEMS |= {"darwin": ("/Applications/StarCraft II", "SC2.app/Contents/MacOS/SC2")}
DIFFICULTIES = "123456789A"  # very easy to very hard (7), then those that cheat
FIELDS = ("x", "y", "hp", "shield", "energy", "cooldown")  # of a unit, as a worker sends them
ATTEMPTS = 3  # clients of a game in a row that may break before the end of an episode
START = 120  # seconds that a client may take longer where it has to start
GRACE = 10  # seconds, so that the worker's own time-out, which tells more, comes first


class Sc2(Smac):
    """B battles of one SMAC map, each in a client of StarCraft II. `info` adds `broken` (B,) to that of Smac.

    Clients start at the first reset, that of game g with the seed `seed_of_game` (None: `seed`) + g; later
    episodes go on from there, whatever seed a later reset is given. `timeout` seconds are the most for a step
    or a new battle. `save_replay`, an absolute folder, gets a replay of all episodes of a client when that is
    closed. Raises ValueError where something is missing or a name is wrong, RuntimeError where a game breaks
    over and over; both close all clients.
    """

    external = True
    saved = kept = ()  # clients cannot be restored: a resumed run begins new battles
    _waiting = weakref.WeakSet()  # environments whose clients have yet to start: their memory is still free

    def __init__(
        self, map_name, num_envs, device, seed, validate=True, difficulty=7, seed_of_game=None, timeout=300,
        save_replay=None,
    ):  # fmt: skip
        self._id, self._seed = f"sc2:{map_name}", seed if seed_of_game is None else seed_of_game
        require_whole(timeout=timeout)
        require_whole(low=0, seed_of_game=self._seed)
        if str(difficulty).upper() not in list(DIFFICULTIES):
            raise ValueError(f"difficulty must be 1 to 9 or A, got {difficulty!r}")
        if save_replay is not None and not os.path.isabs(str(save_replay)):
            raise ValueError(f"save_replay must be an absolute folder, got {save_replay!r}")
        command, environ, map_file = find_game(map_name)
        if save_replay:
            os.makedirs(save_replay, exist_ok=True)
        games, free = num_envs + sum(env.num_envs for env in self._waiting), free_memory()
        if games * 2**30 > free:
            need = "those of evaluation among them, need about 1 GB of memory each"
            advice = f"{free / 2**30:.1f} GB are free: lower --num-envs or --eval-episodes"
            raise ValueError(f"{self._id}: {games} clients of StarCraft II, {need}, and {advice}")
        super().__init__(map_name, num_envs, device, seed, validate)
        self._waiting.add(self)
        self._battle = json.loads((_DATA / "smac_maps.json").read_text())["maps"][map_name]
        self._medics = self.sim.kinds["medic"][: self.n_agents] & self._view.is_mmm
        self._recipe = dict(
            command=command, environ=environ, start=START, timeout=timeout, learner=os.getpid(),
            game=dict(map_path=f"SMAC_Maps/{map_file.name}", map_data=map_file.read_bytes()),
            races=(self._battle["ally_race"], self._battle["enemy_race"]), limit=self.episode_limit,
            difficulty=DIFFICULTIES.index(str(difficulty).upper()) + 1, medics=self._medics.tolist(),
            n_agents=self.n_agents, n_enemies=self.n_enemies, replays=save_replay,
        )  # fmt: skip
        self._memory = self._games.units.cpu()  # the same memory, or what is copied to the GPU
        self._rows = self._memory.numpy().view(UNIT)[..., 0]  # (B, U)
        self._base = self.sim  # the map's constants; _casts: for which enemies and lives a game has its own
        self._casts, self._workers = ([None] * num_envs for _ in range(2))
        self._starts, self._failures = ([0] * num_envs for _ in range(2))
        self._finalizer = weakref.finalize(self, release, self._workers)  # at exit too

    def _parts(self):
        return [(game, game + 1, self.sim.world, self._view) for game in range(self.num_envs)]

    def close_extras(self):
        self._finalizer()

    # ---- battles ----
    def _fight(self):
        """Play a step in all games; where one breaks, its units stay as they are."""
        rows, actions = self._rows, self._games.actions.cpu().numpy()
        rows["health"] = np.where(rows["hp"] > 0, rows["hp"] + rows["shield"], 0)
        targets = actions - FIRST_TARGET + np.where(self._medics, 0, self.n_agents)
        rows["target"][:, : self.n_agents] = np.where(actions < FIRST_TARGET, -1, targets)  # for the picture
        answers = self._ask({game: ("step", played) for game, played in enumerate(actions.tolist())})
        self._fill(answers)
        self._games.broken.copy_(torch.tensor([answer is None for answer in answers.values()]))

    def _step(self, actions):
        *shown, info = super()._step(actions)
        return *shown, info | {"broken": self._games.broken.clone()}

    def _restart(self, done):
        """Begin battles in the games of done (B,), in new clients where they broke."""
        self._games.done.copy_(done)
        games = done.nonzero().flatten().tolist()
        for game in games:
            if self._workers[game]:  # its client lived to the end of an episode
                self._failures[game] = 0
        while games:
            answers = self._ask({game: ("reset",) for game in games})
            games = [game for game, answer in answers.items() if answer is None]
            for game, answer in answers.items():
                if answer is not None:
                    *cast, answers[game] = answer
                    self._rows["target"][game] = -1
                    if self._casts[game] != cast:
                        self._cast(game, *cast)
                        self._casts[game] = cast
            self._fill(answers)
        self._waiting.discard(self)

    def _fill(self, answers):
        """Put {game: units, None where it broke} where the kernels read them."""
        for game, units in answers.items():
            if units is not None:
                values = np.frombuffer(units, np.float32).reshape(-1, len(FIELDS))  # (U, 6)
                for name, value in zip(FIELDS, values.T, strict=True):
                    self._rows[name][game] = value
        self._games.units.copy_(self._memory)

    def _cast(self, game, types, lives):
        """Constants for a game's enemies in its own order, `types` (M,), and for at most `lives` (U,)."""
        n, base, sim, battle = self.n_agents, self._base, copy.copy(self._base), dict(self._battle)
        stats = json.loads((_DATA / "smac_units.json").read_text())["units"]
        ids = {name: re.findall(r"\d+", stats[name]["game_ids"]["enemy"]) for name in set(base.types[n:])}
        of_type = {int(number[0]): base.types.index(name, n) for name, number in ids.items()}
        if strange := set(types) - set(of_type):
            raise RuntimeError(f"{self._id}: an enemy is of type {strange.pop()}, which SMAC's map has not")
        order = [*range(n), *(of_type[kind] for kind in types)]
        sim.types, sim.kinds = tuple(base.types[i] for i in order), base.kinds[order]
        sim.kinds["hp_max"] = lives
        battle["max_reward"] = WIN_VALUE + DEATH_VALUE * len(types)
        battle["max_reward"] += float(sum(lives[n:]) + sim.kinds["shield_max"][n:].sum())
        sim.world, view = World(), _view(battle, sim, self._wp_device)
        for name in World.vars:
            setattr(sim.world, name, getattr(base.world, name))
        sim.world.kind, view.external = wp.array(sim.kinds, dtype=Kind, device=self._wp_device), True
        part = game, game + 1, sim.world, view
        self._play[game], self._begin[game] = self._record(play, *part), self._record(restart, *part)
        self.sim = self.sim if game else sim  # of the picture

    # ---- workers ----
    def _ask(self, orders):
        """{game: answer} to orders to the workers; None where a game broke: its next order gets a new one."""
        if not self._finalizer.alive:
            raise RuntimeError(f"{self._id} is closed")
        for game, order in orders.items():
            if self._workers[game] is None:
                seed = (self._seed + game + 500_009 * self._starts[game]) % 2**31
                replays = self._recipe["replays"] and f"{self._recipe['replays']}/{self.map_name}_{game}"
                self._workers[game] = Worker(self._recipe | {"seed": seed, "replays": replays})
                self._starts[game] += 1
            self._workers[game].send(order)
        end, answers = time.monotonic() + self._recipe["timeout"] + START + GRACE, {}
        for game in orders:
            answers[game] = self._workers[game].receive(end)
            if isinstance(answers[game], Exception):
                problem, log = f"{self._id}, game {game}: {answers[game]}", self._workers[game].kill()
                self._workers[game] = answers[game] = None
                self._failures[game] += 1
                if self._failures[game] == ATTEMPTS:
                    self.close()
                    raise RuntimeError(f"{problem}, {ATTEMPTS} times in a row; its log ends: {log or '-'}")
                print(f"{problem}; it starts anew", file=sys.stderr, flush=True)
        return answers


class Worker:
    """The learner's end of a worker process."""

    def __init__(self, recipe):
        near, far = socket.socketpair()
        self.folder = tempfile.TemporaryDirectory(prefix="sc2_", ignore_cleanup_errors=True)
        self.log = Path(self.folder.name, "log").open("w+b")  # what worker and game print
        # -P: envs/ has files with names of packages. A session of its own: Ctrl-C is for the learner
        words = [sys.executable, "-P", str(_DATA / "smac_sc2_worker.py"), str(far.fileno())]
        streams = dict(stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.process = subprocess.Popen(words, pass_fds=[far.fileno()], start_new_session=True, **streams)
        far.close()
        self.pipe = Connection(near.detach())
        self.send(recipe | {"folder": self.folder.name})

    def send(self, message):
        with contextlib.suppress(OSError):  # a worker that has died is noticed where it should answer
            self.pipe.send(message)

    def receive(self, end):
        """The worker's answer, or an exception with the reason why there is none."""
        try:
            if self.pipe.poll(max(0, end - time.monotonic())):
                return self.pipe.recv()
            return RuntimeError("its worker does not answer")
        except (EOFError, OSError):
            return RuntimeError("its worker died")

    def kill(self):
        """End worker and game at once -> the end of their log in one line."""
        self.pipe.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.seek(0)
        said = " ".join(self.log.read().decode(errors="replace").split())[-300:]
        self.log.close()
        self.folder.cleanup()
        return said


def release(workers):
    """End the workers, those that do not listen by force."""
    living, workers[:] = [worker for worker in workers if worker], [None] * len(workers)
    for worker in living:
        worker.send(None)
    for worker in living:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(GRACE)
        worker.kill()


# ---- what must be there ----
def find_game(map_name):
    """The command that starts the game, what it needs in its environment, and the map's file."""
    for package in ("pys2clientprotocol", "websocket-client"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            install = "pip install -r requirements-sc2.txt"
            raise ValueError(f"sc2:{map_name} needs the package {package}: {install}") from None
    if sys.platform not in SYSTEMS:
        raise ValueError(f"sc2:{map_name} needs Linux or macOS; on Windows, Linux in WSL will do")
    usual, program = SYSTEMS[sys.platform]
    told = os.environ.get("SC2PATH")
    folder = Path(told or usual).expanduser().absolute()
    if not folder.is_dir():
        why = "where SC2PATH says that it is" if told else "and SC2PATH does not say where it is"
        raise ValueError(f"no StarCraft II in {folder}, {why}: docs/envs.md says how to install it")
    builds = [path for path in folder.glob("Versions/Base*") if path.name[4:].isdigit()]
    program = max(builds, key=lambda path: int(path.name[4:]), default=folder / "Versions/Base*") / program
    if not os.access(program, os.X_OK):
        raise ValueError(f"no program {program}: docs/envs.md says how to install the game")
    map_file = folder / "Maps" / "SMAC_Maps" / f"{map_name}.SC2Map"
    if not map_file.is_file():
        archive = "SMAC_Maps.zip (release v0.1-beta1 of oxwhirl/smac)"
        raise ValueError(f"no map file {map_file}: unpack {archive} in {folder / 'Maps'}")
    libraries = ":".join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), f"{folder}/Libs"]))
    return [str(program), "-dataDir", f"{folder}/"], {"LD_LIBRARY_PATH": libraries}, map_file
