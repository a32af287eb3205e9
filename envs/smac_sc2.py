"""SMAC in StarCraft II itself: the interface of smac.py on what the game's messages say about its units.

    env = make("sc2:mmm,difficulty=7", num_envs=8, seed=1)  # docs/envs.md says how to install the game

Every game is a client of StarCraft II, led by a worker process (`smac_sc2_worker.py`) in a process group of
its own. A worker answers orders, or ends: then its game is broken, and gets a new worker. It ends by itself
once nobody holds the other end of its pipe. Letters: B games, N agents, M enemies, U units.
"""

import contextlib
import copy
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import torch
import warp as wp

from envs.base import free_memory, require_whole
from envs.smac import _DATA, DEATH_VALUE, FIRST_TARGET, UNIT, WIN_VALUE, Smac, _view, play, restart
from envs.smac_sim import Kind, World

# system -> the game's usual folder and, below Versions/BaseNUMBER, its program
SYSTEMS = {"linux": ("~/StarCraftII", "SC2_x64")}
SYSTEMS |= {"darwin": ("/Applications/StarCraft II", "SC2.app/Contents/MacOS/SC2")}
TYPES = {4: "colossus", 9: "baneling", 48: "marine", 51: "marauder", 54: "medivac"}  # enemies, by the game
TYPES |= {73: "zealot", 74: "stalker", 98: "spinecrawler", 105: "zergling"}
FIELDS = ["x", "y", "hp", "shield", "energy", "cooldown"]  # of a unit, as a worker sends them
DIFFICULTIES = {x: i for i, x in enumerate("123456789A", 1)}  # very easy to very hard (7), then cheats
ATTEMPTS = 3  # clients of a game in a row that may break before the end of an episode
START = 120  # seconds that a new battle may take longer than a step: it may need a new client
GRACE = 10  # seconds that a worker has to save its replay


class Sc2(Smac):
    """B battles of one SMAC map, each in a client of StarCraft II. `info` adds `broken` (B,) to that of Smac.

    Clients start at the first reset, that of game g with the seed `seed_of_game` (None: `seed`) + g; later
    episodes go on from there, whatever seed a later reset is given. One that dies, errs, ends, or is silent
    for `timeout` seconds ends its episode as truncated, with a step of reward 0 that is marked as broken.
    `save_replay`, an absolute folder, gets all episodes of a client when that is closed. Raises ValueError
    where something is missing or a name is wrong, RuntimeError where a game breaks over and over.
    """

    external = True
    saved = kept = ()  # clients cannot be restored: a resumed run begins new battles
    _waiting = weakref.WeakSet()  # environments whose clients have yet to start: their memory is still free

    def __init__(
        self, map_name, num_envs, device, seed, validate=True, difficulty=7, seed_of_game=None, timeout=300,
        save_replay=None,
    ):  # fmt: skip
        seed_of_game = seed if seed_of_game is None else seed_of_game
        require_whole(timeout=timeout)
        require_whole(low=0, seed_of_game=seed_of_game)
        if not (level := DIFFICULTIES.get(str(difficulty).upper())):
            raise ValueError(f"difficulty must be 1 to 9 or A, got {difficulty!r}")
        if save_replay is not None and not os.path.isabs(str(save_replay)):
            raise ValueError(f"save_replay must be an absolute folder, got {save_replay!r}")
        command, map_file = find_game(map_name)
        games, free = num_envs + sum(env.num_envs for env in self._waiting), free_memory()
        if games * 2**30 > free:
            need = f"{games} clients of StarCraft II, those of evaluation among them, need about 1 GB each"
            free = f"{free / 2**30:.1f} GB of memory are free"
            raise ValueError(f"sc2:{map_name}: {need}, and {free}: lower --num-envs or --eval-episodes")
        if save_replay:
            try:
                os.makedirs(save_replay, exist_ok=True)
            except OSError as error:
                raise ValueError(f"save_replay can be no folder: {error}") from error
        super().__init__(map_name, num_envs, device, seed, validate)
        self._waiting.add(self)
        self._battle = json.loads((_DATA / "smac_maps.json").read_text())["maps"][map_name]
        self._recipe = dict(command=command, map_file=map_file, battle=self._battle, difficulty=level)
        self._recipe |= dict(learner=os.getpid(), replays=save_replay)
        self._timeout, self._seeds, self._failures = timeout, itertools.count(seed_of_game), [0] * num_envs
        medics = self.sim.kinds["medic"][: self.n_agents]
        self._first_target = np.where(medics, 0, self.n_agents)  # (N,)
        self._memory = self._games.units.cpu()  # the same memory, or what is copied to the GPU
        self._rows = self._memory.numpy().view(UNIT)[..., 0]  # (B, U)
        self._base = self.sim  # the map's constants; each game has some of its own, by `_casts`
        self._casts, self._play, self._begin, self._workers = ([None] * num_envs for _ in range(4))

    # ---- battles ----
    def _fight(self):
        """Play a step in all games; where one breaks, its units stay as they are."""
        rows, actions = self._rows, self._games.actions.cpu().numpy()
        rows["health"] = np.where(rows["hp"] > 0, rows["hp"] + rows["shield"], 0)
        targets = np.where(actions < FIRST_TARGET, -1, actions - FIRST_TARGET + self._first_target)  # (B, N)
        rows["target"][:, : self.n_agents] = targets  # for the picture
        broken = self._ask(dict(enumerate(zip(actions.tolist(), targets.tolist(), strict=True))))
        self._games.broken.copy_(torch.tensor([game in broken for game in range(self.num_envs)]))

    def _step(self, actions):
        *shown, info = super()._step(actions)
        return *shown, info | {"broken": self._games.broken.clone()}

    def _restart(self, done):
        """Begin battles in the games of done (B,), in new clients where they broke."""
        self._games.done.copy_(done)
        games = done.nonzero().flatten().tolist()
        for game in games:
            self._rows["target"][game] = -1
            if self._workers[game]:  # its client lived to the end of an episode
                self._failures[game] = 0
        while games:
            games = self._ask(dict.fromkeys(games))
        self._waiting.discard(self)

    def _cast(self, game, types, lives):
        """Constants for a game's enemies in its own order, `types` (M,), and for at most `lives` (U,)."""
        sim, battle, n = copy.copy(self._base), dict(self._battle), self.n_agents
        try:
            order = [*range(n), *(sim.types.index(TYPES[number], n) for number in types)]
        except (KeyError, ValueError) as error:
            self.close()
            raise RuntimeError(f"sc2:{self.map_name}: enemies of types {types} are not this map's") from error
        sim.types, sim.kinds = [sim.types[i] for i in order], sim.kinds[order]
        sim.kinds["hp_max"] = lives
        enemies = sim.kinds[n:]
        battle["max_reward"] = WIN_VALUE + sum(DEATH_VALUE + enemies["hp_max"] + enemies["shield_max"]).item()
        sim.world, view = World(), _view(battle, sim, self._wp_device)
        sim.world.assign(self._base.world)
        sim.world.kind, view.external = wp.array(sim.kinds, dtype=Kind, device=self._wp_device), True
        part = game, game + 1, sim.world, view
        self._play[game], self._begin[game] = self._record(play, *part), self._record(restart, *part)
        self.sim = self.sim if game else sim  # of the picture

    # ---- workers ----
    def _ask(self, orders):
        """Order what {game: actions and targets, or None for a new battle} says -> the games that broke."""
        if self.closed:
            raise RuntimeError(f"sc2:{self.map_name} is closed")
        for game, order in orders.items():
            if not self._workers[game]:  # it broke, or never was
                seed = next(self._seeds) % 2**31
                try:
                    self._workers[game] = Worker(self._recipe | {"game": game, "seed": seed})
                except OSError as error:
                    self.close()
                    raise RuntimeError(f"sc2:{self.map_name}, game {game}: no worker: {error}") from error
            self._workers[game].send(order)
        end, broken = time.monotonic() + self._timeout + (None in orders.values()) * START, []
        for game in orders:
            if answer := self._workers[game].receive(end):
                *cast, units = answer
                if self._casts[game] != cast:
                    self._cast(game, *cast)
                    self._casts[game] = cast
                self._rows[FIELDS][game] = np.frombuffer(units, [(name, np.float32) for name in FIELDS])
                continue
            said = f"sc2:{self.map_name}, game {game} broke; its log ends: {self._workers[game].kill()}"
            self._workers[game] = None
            self._failures[game] += 1
            if self._failures[game] == ATTEMPTS:
                self.close()
                raise RuntimeError(f"{ATTEMPTS} times in a row {said}")
            print(f"{said}; it starts anew", file=sys.stderr, flush=True)
            broken.append(game)
        self._games.units.copy_(self._memory)
        return broken

    def close_extras(self):
        self._waiting.discard(self)
        for worker in filter(None, self._workers):
            worker.kill(GRACE)


class Worker:
    """The learner's end of a worker process."""

    def __init__(self, recipe):
        self.folder = tempfile.TemporaryDirectory(prefix="sc2_", ignore_cleanup_errors=True)
        self.log = tempfile.TemporaryFile(buffering=0)  # what worker and game print
        self.pipe, far = Pipe()
        # -P: envs/ has files with names of packages. A session of its own: Ctrl-C is for the learner
        words = [sys.executable, "-P", str(_DATA / "smac_sc2_worker.py")]
        options = dict(stdin=far, stdout=self.log, stderr=self.log, start_new_session=True)
        self.process = subprocess.Popen(words, **options)
        far.close()
        self.send(recipe | {"folder": self.folder.name})

    def send(self, message):
        with contextlib.suppress(OSError):  # a worker that has died is noticed where it should answer
            self.pipe.send(message)

    def receive(self, end):
        """The worker's answer; None if it died, or is silent until the clock is at `end`."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll(max(0, end - time.monotonic())):
                return self.pipe.recv()
            self.log.write(b"StarCraft II has not answered within its timeout")

    def kill(self, grace=1):
        """End worker and game, if need be by force, `grace` seconds later -> the end of their log."""
        self.pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()
        self.log.seek(0)
        return " ".join(self.log.read().decode(errors="replace").split())[-300:] or "-"


def find_game(map_name):
    """The command that starts the game, and the map's file; ValueError for what is missing."""
    if not all(map(importlib.util.find_spec, ("s2clientprotocol", "websocket"))):
        packages = "pys2clientprotocol and websocket-client: pip install -r requirements-sc2.txt"
        raise ValueError(f"sc2:{map_name} needs the packages {packages}")
    if sys.platform not in SYSTEMS:
        raise ValueError(f"sc2:{map_name} needs Linux or macOS; on Windows, Linux in WSL will do")
    (usual, program), told = SYSTEMS[sys.platform], os.environ.get("SC2PATH")
    folder = Path(told or usual).expanduser().absolute()
    builds = {int(path.name[4:]): path for path in folder.glob("Versions/Base*") if path.name[4:].isdigit()}
    program = builds.get(max(builds, default=0), folder / "Versions/Base*") / program
    if not program.exists():
        advice = "set it to the folder of StarCraft II, or install that as docs/envs.md says"
        raise ValueError(f"sc2:{map_name} finds no {program}, and SC2PATH is {told or 'not set'}: {advice}")
    map_file = folder / "Maps" / "SMAC_Maps" / f"{map_name}.SC2Map"
    if not map_file.exists():
        archive = "SMAC_Maps.zip (release v0.1-beta1 of oxwhirl/smac)"
        raise ValueError(f"sc2:{map_name} finds no {map_file}: unpack {archive} in {folder / 'Maps'}")
    libraries = ":".join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), f"{folder}/Libs"]))
    return ["env", f"LD_LIBRARY_PATH={libraries}", str(program), "-dataDir", f"{folder}/"], map_file
