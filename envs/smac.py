"""SMAC's interface, exact: masks, observations, state, reward and ends of the 23 maps, as Warp kernels.

Source: smac/env/starcraft2/starcraft2.py of oxwhirl/smac d6aab33 with default arguments. The functions below
name the method that they follow; the tests compare them with its outputs. docs/envs.md lists its quirks,
kept or not. An engine (`smac_sim.py`) plays the battles on (B, U) records of units; this only reads them.

    env = make("mmm", num_envs=32, device="cuda", seed=1)

Letters: B games, N agents, M enemies, U = N + M units (agents first, both in id order), A = 6 + M actions,
O observation, S state, K type bits, C terrain cells; w and v constants of the map, u the units of one game.
"""

import atexit
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import warp as wp
from gymnasium import spaces

from envs import smac_sim as engine
from envs.base import VecEnv
from envs.smac_map import BattleSim
from envs.smac_picture import draw_battle
from envs.smac_sim import LOOPS_PER_STEP, UNIT, Game, Unit, World

_DATA = Path(__file__).parent
NO_OP, STOP, NORTH, SOUTH, EAST, WEST, FIRST_TARGET = range(7)  # 6 + k attacks enemy k, or heals agent k
SIGHT = wp.constant(9.0)  # tiles between centres, exclusive (unit_sight_range)
REACH = wp.constant(6.0)  # tiles between centres, inclusive, whatever the weapon (unit_shoot_range)
DEATH_VALUE, WIN_VALUE, SCALE_RATE = 10.0, 200.0, 20.0  # reward_death_value, reward_win, reward_scale_rate
NO_ACTION = wp.constant(-1)  # last action of an episode that has just begun: a one-hot of zeros
BLOCK = 32  # threads that share a game on a GPU
GAMES_PER_THREAD = 32  # on a CPU: fewer are not worth another thread

wp.set_module_options({"enable_backward": False, "max_unroll": 1, "fuse_fp": False})
Floats, Ints, Flags = (wp.array(dtype=dtype) for dtype in (float, wp.int64, wp.bool))


@wp.struct
class View:
    """Constants of a map that the interface needs."""

    ally_shields: int  # 1 if rows about agents have a slot for the shield: their race is P
    enemy_shields: int
    n_bits: int  # K
    is_mmm: bool  # map type MMM: medivacs do not hold a battle alone
    reward_scale: float
    episode_limit: int
    external: bool  # another engine plays the battles and fills the units, `health` too
    charge_max: Floats  # (U,) weapon period in loops by SMAC's own table; a medivac's energy
    type_bits: wp.array2d(dtype=float)  # (U, K)
    free_moves: wp.array2d(dtype=wp.bool)  # (C, 4), whether the cell north, south, east, west is walkable


@wp.struct
class Games:
    """All that changes, of B games."""

    units: wp.array2d(dtype=Unit)  # (B, U)
    actions: wp.array2d(dtype=wp.int64)  # (B, N), NO_ACTION at the start of a battle
    delays: wp.array3d(dtype=float)  # (loops, B, U) uniform in [0, 1), of the shots
    shares: Floats  # (B,) uniform in [0, 1), of the attack points
    picture: Game  # (U,) game 0 after the latest step
    # what a step brought, (B,) each; return and length are those of the episode so far
    reward: Floats
    episode_return: Floats
    episode_length: Ints
    dead_allies: Ints
    dead_enemies: Ints
    battle_won: Flags
    terminated: Flags
    truncated: Flags
    done: Flags  # either
    broken: Flags  # the engine lost this step, which ends the episode as truncated; never set by ours
    # what the games show
    obs: wp.array3d(dtype=float)  # (B, N, O)
    state: wp.array2d(dtype=float)  # (B, S)
    avail_actions: wp.array3d(dtype=wp.bool)  # (B, N, A)


# ---- what a battle shows ----
@wp.func
def can_act_on(w: World, u: Game, i: int, k: int):
    """Whether action 6 + k of agent i is available. get_avail_agent_actions."""
    j = w.n_agents + k
    if w.kind[i].medic:  # heals agent k
        if k >= w.n_agents or w.kind[k].medic:
            return False
        j = k
    return u[i].hp > 0.0 and u[j].hp > 0.0 and engine.distance(u, i, j) <= REACH


@wp.func
def show_body(w: World, v: View, u: Game, j: int, shown: float, row: Floats, at: int):
    """Shield, where rows have one, and type bits of unit j from `row[at]` on; `shown` 0 blots them out."""
    shields = wp.where(j < w.n_agents, v.ally_shields, v.enemy_shields)
    if shields > 0:
        row[at] = shown * u[j].shield / w.kind[j].shield_max
    k = wp.int32(0)
    while k < v.n_bits:
        row[at + shields + k] = shown * v.type_bits[j, k]
        k += 1


@wp.func
def show_unit(w: World, v: View, u: Game, i: int, j: int, obs: Floats, avail: Flags):
    """What agent i sees of unit j, a row of its obs (O,), and its mask (A,) of an enemy. get_obs_agent."""
    n = w.n_agents
    enemy_row = 5 + v.enemy_shields + v.n_bits
    way = engine.place_of(u, j) - engine.place_of(u, i)
    away = wp.length(way)
    shown = float(u[i].hp > 0.0 and u[j].hp > 0.0 and away < SIGHT)
    first = float(shown)
    at = 4 + (j - n) * enemy_row  # behind the moves: enemies, other agents, and itself without a position
    if j >= n:
        can_act = can_act_on(w, u, i, j - n)
        avail[FIRST_TARGET + j - n] = can_act
        first *= float(can_act)
    else:
        rank = wp.where(j == i, n - 1, wp.where(j > i, j - 1, j))
        at = 4 + (w.n_units - n) * enemy_row + rank * (5 + v.ally_shields + v.n_bits)
    if j != i:
        scale = shown / SIGHT
        obs[at] = first
        obs[at + 1] = scale * away
        obs[at + 2] = scale * way[0]
        obs[at + 3] = scale * way[1]
        at += 4
    obs[at] = shown * u[j].hp / w.kind[j].hp_max
    show_body(w, v, u, j, shown, obs, at + 1)


@wp.func
def show_moves(v: View, u: Game, i: int, obs: Floats, avail: Flags):
    """Whether agent i can stop and move, in its mask and in obs. get_avail_agent_actions, can_move.

    A move is tested one cell away, for flyers too, although the order goes two; units do not block it.
    """
    alive = u[i].hp > 0.0
    avail[NO_OP] = not alive
    avail[STOP] = alive
    here = engine.cell_of(engine.place_of(u, i))
    for k in range(4):
        avail[NORTH + k] = alive and v.free_moves[here, k]
        obs[k] = float(avail[NORTH + k])


@wp.func
def show_in_state(w: World, v: View, u: Game, i: int, last_actions: Ints, state: Floats):
    """Unit i in state (S,): its row, and an agent's last action (N,). get_state."""
    n, m = w.n_agents, w.n_units - w.n_agents
    ally_row = 4 + v.ally_shields + v.n_bits
    enemy_row = 3 + v.enemy_shields + v.n_bits
    shown = float(u[i].hp > 0.0)
    at = wp.where(i < n, i * ally_row, n * ally_row + (i - n) * enemy_row)
    state[at] = shown * u[i].hp / w.kind[i].hp_max
    if i < n:
        at += 1
        state[at] = shown * wp.where(w.kind[i].medic, u[i].energy, u[i].cooldown) / v.charge_max[i]
    state[at + 1] = shown * (u[i].x - 16.0) / 32.0  # from the centre in map sizes
    state[at + 2] = shown * (u[i].y - 16.0) / 32.0
    show_body(w, v, u, i, shown, state, at + 3)
    if i < n:
        for k in range(FIRST_TARGET + m):
            at = n * ally_row + m * enemy_row + i * (FIRST_TARGET + m) + k
            state[at] = float(int(last_actions[i]) == k)


@wp.func
def show(w: World, v: View, g: Games, b: int, lane: int):
    """All features of game b; the threads of its block share its units."""
    u = g.units[b]
    for j in range(lane, w.n_units, wp.block_dim()):
        i = wp.int32(0)
        while i < w.n_agents:
            show_unit(w, v, u, i, j, g.obs[b, i], g.avail_actions[b, i])
            i += 1
        if j < w.n_agents:
            show_moves(v, u, j, g.obs[b, j], g.avail_actions[b, j])
        show_in_state(w, v, u, j, g.actions[b], g.state[b])


# ---- what a step brought ----
@wp.func
def health(u: Game, i: int):
    return wp.where(u[i].hp > 0.0, u[i].hp + u[i].shield, 0.0)


@wp.func
def judge(w: World, v: View, g: Games, b: int):
    """Reward, end and counts of game b after a step. reward_battle, get_game_code."""
    u = g.units[b]
    damage = wp.float32(0.0)
    allies, enemies = wp.int32(0), wp.int32(0)
    fighting_allies, fighting_enemies = wp.int32(0), wp.int32(0)
    for i in range(w.n_units):
        alive = int(u[i].hp > 0.0)
        fights = wp.where(w.kind[i].medic, 0, alive)
        if i < w.n_agents:
            allies += alive
            fighting_allies += fights
        else:
            enemies += alive
            fighting_enemies += fights
            if u[i].health > 0.0:
                damage += u[i].health - health(u, i) + wp.where(alive == 0, DEATH_VALUE, 0.0)
    lost = fighting_allies == 0 and (enemies > 0 or v.is_mmm)
    won = not lost and allies > 0 and fighting_enemies == 0
    tied = allies == 0 and enemies == 0  # on MMM this is lost already
    # the original takes |.| of the sum over all enemies: what heals more than it loses is paid for it
    g.reward[b] = (wp.abs(damage) + wp.where(won, WIN_VALUE, 0.0)) / v.reward_scale
    g.episode_return[b] += g.reward[b]
    g.episode_length[b] += wp.int64(1)
    g.dead_allies[b] = wp.int64(w.n_agents - allies)
    g.dead_enemies[b] = wp.int64(w.n_units - w.n_agents - enemies)
    g.battle_won[b] = won
    g.terminated[b] = lost or won or tied
    late = g.broken[b] or g.episode_length[b] >= wp.int64(v.episode_limit)
    g.truncated[b] = not g.terminated[b] and late
    g.done[b] = g.terminated[b] or g.truncated[b]


# ---- a step of all games: a block of threads plays a game, and on a CPU a block is one thread ----
@wp.func_native("WP_TILE_SYNC();")
def meet():
    """All threads of the block wait for each other here."""


@wp.kernel
def play(first: int, w: World, v: View, g: Games):
    """The battles of an env step from game `first` on, their outcome, and what they show."""
    block, lane = wp.tid()
    b = first + block
    u = g.units[b]
    if not v.external:
        for i in range(lane, w.n_units, wp.block_dim()):
            u[i].health = health(u, i)
            if i < w.n_agents:
                engine.obey(w, u, i, int(g.actions[b, i]))
        meet()
        for loop in range(g.delays.shape[0]):
            for i in range(lane, w.n_units, wp.block_dim()):
                engine.decide(w, u, i, g.delays[loop, b, i] * 3.0 - 1.0)
            meet()
            for i in range(lane, w.n_units, wp.block_dim()):
                engine.resolve(w, u, i)
            meet()
    if lane == 0:
        judge(w, v, g, b)
    show(w, v, g, b, lane)
    if b == 0:
        for i in range(lane, w.n_units, wp.block_dim()):
            g.picture[i] = u[i]


@wp.kernel
def restart(first: int, w: World, v: View, g: Games):
    """Fresh battles where the last one is done, and what they show."""
    block, lane = wp.tid()
    b = first + block
    if g.done[b]:
        for i in range(lane, w.n_units, wp.block_dim()):
            if not v.external:
                engine.begin(w, g.units[b], i, g.shares[b])
            if i < w.n_agents:
                g.actions[b, i] = wp.int64(NO_ACTION)
        if lane == 0:
            g.episode_return[b] = 0.0
            g.episode_length[b] = wp.int64(0)
        meet()
        show(w, v, g, b, lane)


# ---- environment ----
@functools.cache
def start_warp(device):
    """Warp's name of a torch device. Compiles the kernels for it, once per machine; then a cache has them."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"SMAC's battles run on cpu and cuda, not on {device.type}")
    wp.config.log_level = wp.LOG_ERROR
    stderr, trouble = os.dup(2), ""
    try:
        with open(os.devnull, "w") as nowhere:  # for a native complaint of a missing driver at every start
            os.dup2(nowhere.fileno(), 2)
        wp.init()
        tempfile.TemporaryFile(dir=wp.config.kernel_cache_dir).close()
    except OSError as error:
        wp.config.kernel_cache_dir = tempfile.mkdtemp(prefix="warp_")
        atexit.register(shutil.rmtree, wp.config.kernel_cache_dir, ignore_errors=True)
        wp.init()
        trouble = f", and in every run until WARP_CACHE_PATH is a folder that can be written ({error})"
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    name, block = ("cpu", 1) if device.type == "cpu" else (f"cuda:{device.index or 0}", BLOCK)
    if device.type == "cuda" and not wp.is_cuda_available():
        raise RuntimeError("Warp cannot use this machine's CUDA driver: update it, or use --device cpu")
    module, started = wp.get_module(__name__), time.perf_counter()
    cached = Path(wp.config.kernel_cache_dir, module.get_module_identifier(block)).exists()
    if not cached:
        text = f"compiling the battle engine for {name}, once on this machine{trouble} ..."
        print(text, end="", file=sys.stderr, flush=True)
    try:
        module.load(name, block)
    except Exception as error:  # Warp has no class for it
        where = wp.config.kernel_cache_dir
        raise RuntimeError(
            f"the battle engine compiled into {where} does not load, delete it: {error}"
        ) from error
    if not cached:
        print(f" {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return name


def _view(battle, sim, device):
    """The constants of the interface; `battle` is the map's entry in smac_maps.json."""
    view, n = View(), battle["n_agents"]
    view.ally_shields, view.enemy_shields = (int(battle[f"{side}_race"] == "P") for side in ("ally", "enemy"))
    view.is_mmm, view.n_bits = battle["map_type"] == "MMM", battle["unit_type_bits"]
    view.reward_scale, view.episode_limit = battle["max_reward"] / SCALE_RATE, battle["episode_limit"]
    # get_unit_type_id: the agents' types in id order; those of enemy stalkers and zealots the other way round
    order = [group["unit"].lower() for group in battle["agent_id_order"]][: view.n_bits]
    enemy_order = order[::-1] if battle["map_type"] == "stalkers_and_zealots" else order
    bits = [[name == bit for bit in order] for name in sim.types[:n]]
    bits += [[name == bit for bit in enemy_order] for name in sim.types[n:]]
    periods = json.loads((_DATA / "smac_units.json").read_text())["smac_cooldown_normaliser"]
    periods["medivac"] = 200  # of energy
    charge = [periods.get(name, periods["other"]) for name in sim.types]
    wide = np.pad(sim.walkable, 1)  # (34, 34), the edge is a wall
    moves = [wide[1:-1, 2:], wide[1:-1, :-2], wide[2:, 1:-1], wide[:-2, 1:-1]]  # north, south, east, west
    view.charge_max = wp.array(charge, dtype=float, device=device)
    view.type_bits = wp.array(np.array(bits, np.float32), dtype=float, device=device)
    view.free_moves = wp.array(np.stack(moves, 2).reshape(-1, 4), dtype=wp.bool, device=device)
    return view


def fields(memory):
    """Views (..., U) of the numbers of Unit in its bytes (..., U, size), by name."""
    dtypes, views = {"f": torch.float32, "i": torch.int32, "b": torch.bool}, SimpleNamespace()
    for name, (dtype, offset) in UNIT.fields.items():
        if dtype.kind in dtypes:
            part = memory[..., offset : offset + dtype.itemsize]
            setattr(views, name, part.view(dtypes[dtype.kind])[..., 0])
    return views


_POOL = ThreadPoolExecutor(os.cpu_count())  # its threads begin when they are first needed


class Smac(VecEnv):
    """B battles of one SMAC map. `info` adds `battle_won`, `dead_allies` and `dead_enemies`, each (B,).

    `chase`: enemies go after whoever hurt them, and after their target, before they look for the nearest.
    `ladder`: weapons are those of the multiplayer ladder, not of the data that the maps name.
    Raises RuntimeError where Warp cannot use the GPU that torch uses.
    """

    bounded_features = True
    saved = ("_obs", "_state", "_avail_actions", "_pictured")
    kept = ("units", "actions", "episode_return", "episode_length", "picture")  # likewise, of `_games`
    external = False  # in a subclass whose battles are played elsewhere: it fills `units` before the kernels

    def __init__(self, map_name, num_envs, device, seed, validate=True, chase=True, ladder=False):
        device = torch.device(device)
        self._wp_device = start_warp(device)
        self.sim = BattleSim(map_name, self._wp_device, chase, ladder)
        battle, size = self.sim.battle, self.sim.battle["sizes"]
        self.map_name, self.n_enemies = map_name, battle["n_enemies"]
        self._view = _view(battle, self.sim, self._wp_device)
        self._view.external = self.external
        n, u, n_actions = battle["n_agents"], self.sim.n_units, size["n_actions"]
        limit, space = battle["episode_limit"], spaces.MultiDiscrete([n_actions] * n)
        super().__init__(num_envs, n, size["obs"], size["state"], limit, space, device, seed, validate)

        # the kernels work on memory that stays, since their launches are recorded with its addresses
        shapes = dict(units=(num_envs, u), picture=(u,), delays=(LOOPS_PER_STEP, num_envs, u))
        shapes |= dict(actions=(num_envs, n), avail_actions=(num_envs, n, n_actions))
        shapes |= dict(obs=(num_envs, n, self.obs_dim), state=(num_envs, self.state_dim))
        self._arrays, self._games = Games(), SimpleNamespace()
        for name, array in Games.vars.items():
            kind, shape = array.type.dtype, shapes.get(name, (num_envs,))
            if kind is Unit:
                memory = torch.zeros(*shape, UNIT.itemsize, dtype=torch.uint8, device=device)
            else:
                memory = torch.zeros(shape, dtype=wp.dtype_to_torch(kind), device=device)
            array = wp.array(ptr=memory.data_ptr(), dtype=kind, shape=shape, device=self._wp_device)
            setattr(self._arrays, name, array)
            setattr(self._games, name, memory)
        self._episode_return, self._episode_length = self._games.episode_return, self._games.episode_length
        self._play = [self._record(play, *part) for part in self._parts()]
        self._begin = [self._record(restart, *part) for part in self._parts()]
        self._pictured = None  # what the title of the picture says

    def _parts(self):
        """First game, end, World and View of each launch: one, or on a CPU one for each thread with work."""
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        parts = max(1, min(threads, self.num_envs // GAMES_PER_THREAD))
        edges = [self.num_envs * part // parts for part in range(parts + 1)]
        return [(first, end, self.sim.world, self._view) for first, end in pairwise(edges)]

    def _record(self, kernel, first, end, world, view):
        """A launch of a kernel for the games from `first` to `end`."""
        options = dict(block_dim=BLOCK, device=self._wp_device, record_cmd=True)
        inputs = [first, world, view, self._arrays]
        return wp.launch_tiled(kernel, dim=[end - first], inputs=inputs, **options)

    def _launch(self, commands):
        if self.device.type == "cuda":
            stream = wp.stream_from_torch(self.device)
            for command in commands:
                command.launch(stream)
        else:
            others = [_POOL.submit(command.launch) for command in commands[1:]]
            commands[0].launch()
            for other in others:
                other.result()

    def _shown(self):
        """obs (B, N, O), state (B, S) and avail_actions (B, N, A) as they are now."""
        return tuple(getattr(self._games, name).clone() for name in ("obs", "state", "avail_actions"))

    def _restart(self, done):
        """Mark the games of done (B,), where the next `_observe()` begins a battle."""
        self._games.done.copy_(done)
        if self.sim.world.draws_goal:
            torch.rand(self._games.shares.shape, generator=self.generator, out=self._games.shares)

    def _observe(self):
        self._launch(self._begin)
        self._games.picture.copy_(self._games.units[0])
        self._pictured = (torch.zeros(1, dtype=torch.int64, device=self.device),) * 4
        return self._shown()

    def _fight(self):
        """What the battles of a step need before they are played or, by another engine, judged."""
        torch.rand(self._games.delays.shape, generator=self.generator, out=self._games.delays)

    def _step(self, actions):
        g = self._games
        g.actions.copy_(actions)
        self._fight()
        self._launch(self._play)
        names = ("battle_won", "dead_allies", "dead_enemies", "episode_return", "episode_length")
        info = {name: getattr(g, name).clone() for name in names}
        info["final_obs"], info["final_state"], info["final_avail_actions"] = self._shown()
        reward, terminated, truncated = g.reward.clone(), g.terminated.clone(), g.truncated.clone()
        self._pictured = info["episode_length"], info["episode_return"], info["battle_won"], terminated
        self._restart(g.done)
        self._launch(self._begin)
        self._obs, self._state, self._avail_actions = self._shown()
        return self._obs, reward, terminated, truncated, info

    def state_dict(self):
        return super().state_dict() | {name: getattr(self._games, name).clone() for name in self.kept}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        for name in self.kept:
            getattr(self._games, name).copy_(state[name])  # in place: recorded launches know the address

    @property
    def units(self):
        """The units of all games by field, (B, U) each, as views: who writes into them changes the battle."""
        return fields(self._games.units)

    def render(self):
        """(H, 640, 3) uint8: game 0 from above as the latest step left it, even if that ended the battle."""
        if self._obs is None:
            raise RuntimeError("call env.reset() before env.render()")
        units = fields(self._games.picture.cpu())
        length, episode_return, won, terminated = (entry[0].item() for entry in self._pictured)
        outcome = "time out" if length >= self.episode_limit else ""
        if terminated:
            tied = not (units.hp > 0).any() and not self._view.is_mmm
            outcome = "won" if won else "tied" if tied else "lost"
        title = f"{self.map_name}   step {length}   return {episode_return:.1f}"
        return draw_battle(self.sim, units, title, outcome)
