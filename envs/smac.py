"""SMAC's interface, exact: masks, observations, state, reward and ends of the 23 maps, as Warp kernels.

Source: smac/env/starcraft2/starcraft2.py of oxwhirl/smac d6aab33 with default arguments. The functions below
name the method that they follow; the tests compare them with its outputs. The battle itself comes from an
engine (`smac_sim.py`) that plays on (B, U) records of units; the interface only reads them.

    env = make("mmm", num_envs=32, device="cuda", seed=1)

Letters: B games, N agents, M enemies, U = N + M units (agents first, both in id order), A = 6 + M actions,
O observation, S state, K type bits, C terrain cells; w and v constants of the map, u the units of one game.

Kept, though odd: the team is paid |net change| of the enemies' hp and shields, so their healing pays too;
type bits of enemy stalkers and zealots are reversed; a medivac's first feature about enemy k is whether
agent k can be healed; the cooldown feature may exceed 1; MMM is lost once only the medivac is left, or both
sides are dead.
Differs from the original, where it has plain bugs:
1. max_reward is counted once (there, once for every pass of the loop that waits for units).
2. A tie ends the episode and a fresh battle follows (there, the battle respawned within the step goes on).
3. `truncated` tells a timeout from an end (there, one flag for both).
"""

import functools
import json
import os
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

from envs.base import VecEnv
from envs.smac_sim import (
    LOOPS_PER_STEP,
    UNIT,
    BattleSim,
    Game,
    Unit,
    World,
    cell_of,
    decide,
    distance,
    obey,
    place_of,
    resolve,
)

_DATA = Path(__file__).parent
NO_OP, STOP, NORTH, SOUTH, EAST, WEST, FIRST_TARGET = range(7)  # 6 + k attacks enemy k, or heals agent k
SIGHT = wp.constant(9.0)  # tiles between centres, exclusive (unit_sight_range)
REACH = wp.constant(6.0)  # tiles between centres, inclusive, whatever the weapon (unit_shoot_range)
DEATH_VALUE = wp.constant(10.0)  # reward_death_value
WIN_VALUE = wp.constant(200.0)  # reward_win
SCALE_RATE = 20.0  # reward_scale_rate
NO_ACTION = wp.constant(-1)  # last action of an episode that has just begun: a one-hot of zeros
BLOCK = 32  # threads that share a game on a GPU
GAMES_PER_THREAD = 32  # on a CPU: fewer are not worth another thread
GLYPHS = {"marine": "M", "marauder": "D", "stalker": "S", "zealot": "Z", "colossus": "C"}
GLYPHS |= {"zergling": "z", "hydralisk": "H", "baneling": "b", "spinecrawler": "X", "medivac": "+"}

wp.set_module_options({"enable_backward": False, "max_unroll": 1, "fuse_fp": False})
Floats, Ints, Flags = (wp.array(dtype=dtype) for dtype in (float, wp.int64, wp.bool))
FloatRows, IntRows, FlagRows = (wp.array2d(dtype=dtype) for dtype in (float, wp.int64, wp.bool))


@wp.struct
class View:
    """Constants of a map that the interface needs."""

    ally_shields: int  # 1 if rows about agents have a slot for the shield: their race is P
    enemy_shields: int
    is_mmm: bool  # map type MMM: medivacs heal, and do not hold a battle alone
    reward_scale: float
    episode_limit: int
    n_bits: int  # K
    n_actions: int  # A
    obs_dim: int  # O
    state_dim: int  # S
    external: bool  # another engine plays the battles and fills the units, `health` too
    draws_goal: bool  # the enemies' attack point lies anew between two points in every battle
    goal_from: wp.vec2
    goal_to: wp.vec2
    fresh: Game  # (U,), the start of a battle
    shield_max: Floats  # (U,), at least 1
    charge_max: Floats  # (U,) weapon period in loops by SMAC's own table; a medivac's energy
    type_bits: FloatRows  # (U, K)
    free_moves: FlagRows  # (C, 4), whether the cell north, south, east, west of each is walkable


@wp.struct
class Games:
    """All that changes, of B games."""

    units: wp.array2d(dtype=Unit)  # (B, U)
    actions: IntRows  # (B, N), NO_ACTION at the start of a battle
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
    obs: FloatRows  # (B, N * O)
    state: FloatRows  # (B, S)
    avail_actions: FlagRows  # (B, N * A)


# ---- what a battle shows ----
@wp.func
def can_act_on(w: World, v: View, u: Game, i: int, k: int):
    """Whether action 6 + k of agent i is available. get_avail_agent_actions."""
    j = w.n_agents + k
    if v.is_mmm and w.kind[i].medic:  # heals agent k
        if k >= w.n_agents:
            return False
        if w.kind[k].medic:
            return False
        j = k
    return u[i].hp > 0.0 and u[j].hp > 0.0 and distance(u, i, j) <= REACH


@wp.func
def show_body(w: World, v: View, u: Game, j: int, shields: int, shown: float, row: Floats, at: int):
    """Shield, where rows have one, and type bits of unit j from `row[at]` on; `shown` 0 blots them out."""
    if shields > 0:
        row[at] = shown * u[j].shield / v.shield_max[j]
    k = wp.int32(0)
    while k < v.n_bits:
        row[at + shields + k] = shown * v.type_bits[j, k]
        k += 1


@wp.func
def show_unit(w: World, v: View, u: Game, i: int, j: int, obs: Floats, avail: Flags):
    """What agent i sees of unit j, a row of obs (N * O,), and the mask of an enemy. get_obs_agent."""
    n = w.n_agents
    ally_row = 5 + v.ally_shields + v.n_bits
    enemy_row = 5 + v.enemy_shields + v.n_bits
    away = distance(u, i, j)
    shown = float(u[i].hp > 0.0 and u[j].hp > 0.0 and away < SIGHT)
    first = float(shown)
    shields = v.ally_shields
    at = (i + 1) * v.obs_dim - (ally_row - 4)  # the own row is the last and has no position
    if j >= n:
        can_act = can_act_on(w, v, u, i, j - n)
        avail[i * v.n_actions + FIRST_TARGET + j - n] = can_act
        first *= float(can_act)
        shields = v.enemy_shields
        at = i * v.obs_dim + 4 + (j - n) * enemy_row
    elif j != i:
        at = i * v.obs_dim + 4 + (w.n_units - n) * enemy_row + wp.where(j > i, j - 1, j) * ally_row
    if j != i:
        scale = shown / SIGHT
        obs[at] = first
        obs[at + 1] = scale * away
        obs[at + 2] = scale * (u[j].x - u[i].x)
        obs[at + 3] = scale * (u[j].y - u[i].y)
        at += 4
    obs[at] = shown * u[j].hp / w.kind[j].hp_max
    show_body(w, v, u, j, shields, shown, obs, at + 1)


@wp.func
def show_moves(w: World, v: View, u: Game, i: int, obs: Floats, avail: Flags):
    """Whether agent i can stop and move, in its mask and in obs. get_avail_agent_actions, can_move.

    A move is tested one cell away, for flyers too, although the order goes two; units do not block it.
    """
    at = i * v.n_actions
    alive = u[i].hp > 0.0
    avail[at + NO_OP] = not alive
    avail[at + STOP] = alive
    here = cell_of(place_of(u, i))
    for k in range(4):
        free = alive and v.free_moves[here, k]
        avail[at + NORTH + k] = free
        obs[i * v.obs_dim + k] = float(free)


@wp.func
def show_in_state(w: World, v: View, u: Game, i: int, last_actions: Ints, state: Floats):
    """Unit i in state (S,): its row, and an agent's last action (N,). get_state."""
    n = w.n_agents
    ally_row = 4 + v.ally_shields + v.n_bits
    enemy_row = 3 + v.enemy_shields + v.n_bits
    shown = float(u[i].hp > 0.0)
    shields = wp.where(i < n, v.ally_shields, v.enemy_shields)
    at = wp.where(i < n, i * ally_row, n * ally_row + (i - n) * enemy_row)
    state[at] = shown * u[i].hp / w.kind[i].hp_max
    if i < n:
        at += 1
        state[at] = shown * wp.where(w.kind[i].medic, u[i].energy, u[i].cooldown) / v.charge_max[i]
    state[at + 1] = shown * (u[i].x - 16.0) / 32.0  # from the centre in map sizes
    state[at + 2] = shown * (u[i].y - 16.0) / 32.0
    show_body(w, v, u, i, shields, shown, state, at + 3)
    if i < n:
        at = n * ally_row + (w.n_units - n) * enemy_row + i * v.n_actions
        for k in range(v.n_actions):
            state[at + k] = float(int(last_actions[i]) == k)


@wp.func
def show(w: World, v: View, g: Games, b: int, lane: int):
    """All features of game b; the threads of its block share its units."""
    u = g.units[b]
    for j in range(lane, w.n_units, wp.block_dim()):
        i = wp.int32(0)
        while i < w.n_agents:
            show_unit(w, v, u, i, j, g.obs[b], g.avail_actions[b])
            i += 1
        if j < w.n_agents:
            show_moves(w, v, u, j, g.obs[b], g.avail_actions[b])
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
        fights = wp.where(v.is_mmm and w.kind[i].medic, 0, alive)
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
    ...


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
                obey(w, u, i, int(g.actions[b, i]))
        meet()
        for loop in range(g.delays.shape[0]):
            for i in range(lane, w.n_units, wp.block_dim()):
                decide(w, u, i, g.delays[loop, b, i] * 3.0 - 1.0)
            meet()
            for i in range(lane, w.n_units, wp.block_dim()):
                resolve(w, u, i)
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
        u = g.units[b]
        for i in range(lane, w.n_units, wp.block_dim()):
            if not v.external:
                u[i] = v.fresh[i]
                if v.draws_goal:
                    u[i].goal_x = g.shares[b] * v.goal_from[0] + (1.0 - g.shares[b]) * v.goal_to[0]
                    u[i].goal_y = g.shares[b] * v.goal_from[1] + (1.0 - g.shares[b]) * v.goal_to[1]
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
    wp.config.log_level = wp.LOG_ERROR
    stderr, quiet = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    if not torch.cuda.is_available():  # its native part complains of a missing driver at every start
        os.dup2(quiet, 2)
    try:
        wp.init()
        tempfile.TemporaryFile(dir=wp.config.kernel_cache_dir).close()
        trouble = ""
    except OSError as error:
        wp.config.kernel_cache_dir = tempfile.mkdtemp(prefix="warp_")
        wp.init()
        trouble = f", and in every run until WARP_CACHE_PATH is a folder that can be written ({error})"
    os.dup2(stderr, 2)
    os.close(stderr)
    os.close(quiet)
    name, block = "cpu", 1
    if device.type == "cuda":
        name, block = f"cuda:{device.index or 0}", BLOCK
        if not wp.is_cuda_available():
            raise RuntimeError("Warp cannot use this machine's CUDA driver: update it, or use --device cpu")
    module, started = wp.get_module(__name__), time.perf_counter()
    cached = Path(wp.config.kernel_cache_dir, module.get_module_identifier(block)).exists()
    if not cached:
        text = f"compiling the battle engine for {name}, once on this machine{trouble} ..."
        print(text, end="", file=sys.stderr, flush=True)
    module.load(name, block)
    if not cached:
        print(f" {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return name


def _view(battle, sim, device):
    """The constants of the interface; `battle` is the map's entry in smac_maps.json."""
    n, m, types = battle["n_agents"], battle["n_enemies"], sim.types
    view = View()
    view.ally_shields, view.enemy_shields = (int(battle[f"{side}_race"] == "P") for side in ("ally", "enemy"))
    view.is_mmm, view.n_bits = battle["map_type"] == "MMM", battle["unit_type_bits"]
    view.reward_scale, view.episode_limit = battle["max_reward"] / SCALE_RATE, battle["episode_limit"]
    view.n_actions = FIRST_TARGET + m
    ally, enemy = view.ally_shields + view.n_bits, view.enemy_shields + view.n_bits
    view.obs_dim = 4 + m * (5 + enemy) + (n - 1) * (5 + ally) + 1 + ally
    view.state_dim = n * (4 + ally) + m * (3 + enemy) + n * view.n_actions
    if sim.goal_between:
        view.draws_goal, (view.goal_from, view.goal_to) = True, sim.goal_between
    # get_unit_type_id: the agents' types in id order; those of enemy stalkers and zealots the other way round
    order = [group["unit"].lower() for group in battle["agent_id_order"]]
    enemy_order = order[::-1] if battle["map_type"] == "stalkers_and_zealots" else order
    bits = [[name == bit for bit in order] for name in types[:n]]
    bits += [[name == bit for bit in enemy_order] for name in types[n:]]
    periods = json.loads((_DATA / "smac_units.json").read_text())["smac_cooldown_normaliser"]
    periods["medivac"] = 200  # of energy
    wide = np.pad(sim.walkable, 1)  # (34, 34), the edge is a wall
    moves = [wide[1:-1, 2:], wide[1:-1, :-2], wide[2:, 1:-1], wide[:-2, 1:-1]]  # north, south, east, west
    for name, values, dtype in (
        ("fresh", sim.fresh, Unit),
        ("shield_max", np.maximum(sim.kinds["shield_max"], 1), float),
        ("charge_max", [periods.get(name, periods["other"]) for name in types], float),
        ("type_bits", np.array(bits, np.float32)[:, : view.n_bits], float),
        ("free_moves", np.stack(moves, 2).reshape(-1, 4), wp.bool),
    ):
        setattr(view, name, wp.array(values, dtype=dtype, device=device))
    return view


def fields(memory):
    """Views (..., U) of the fields of Unit in its bytes (..., U, size)."""
    dtypes = {"f": torch.float32, "i": torch.int32, "b": torch.bool}
    views = {}
    for name, (dtype, offset) in UNIT.fields.items():
        part = memory[..., offset : offset + dtype.itemsize]
        views[name] = part.view(dtypes.get(dtype.kind, torch.bool))[..., 0]
    return SimpleNamespace(**views)


_POOL = ThreadPoolExecutor(os.cpu_count())  # its threads begin when they are first needed


class Smac(VecEnv):
    """B battles of one SMAC map. `info` adds `battle_won`, `dead_allies` and `dead_enemies`, each (B,).

    Raises RuntimeError where Warp cannot use the GPU that torch uses.
    """

    bounded_features = True
    saved = ("_obs", "_state", "_avail_actions", "_pictured")
    kept = ("units", "actions", "episode_return", "episode_length", "picture")  # likewise, of `_games`
    external = False  # in a subclass whose battles are played elsewhere: it fills `units` before the kernels

    def __init__(self, map_name, num_envs, device, seed, validate=True):
        battle = json.loads((_DATA / "smac_maps.json").read_text())["maps"][map_name]
        device = torch.device(device)
        self._wp_device = start_warp(device)
        self.map_name, self.n_enemies = map_name, battle["n_enemies"]
        self.sim = BattleSim(map_name, self._wp_device)
        n, u, n_actions = battle["n_agents"], self.sim.n_units, FIRST_TARGET + battle["n_enemies"]
        view = self._view = _view(battle, self.sim, self._wp_device)
        view.external = self.external
        limit, space = battle["episode_limit"], spaces.MultiDiscrete([n_actions] * n)
        super().__init__(num_envs, n, view.obs_dim, view.state_dim, limit, space, device, seed, validate)

        # the kernels work on memory that stays, since their launches are recorded with its addresses
        shapes = {"units": (num_envs, u), "picture": (u,), "actions": (num_envs, n)}
        shapes |= {"delays": (LOOPS_PER_STEP, num_envs, u), "state": (num_envs, self.state_dim)}
        shapes |= {"obs": (num_envs, n * self.obs_dim), "avail_actions": (num_envs, n * n_actions)}
        games, memories = Games(), {}
        for name, array in Games.vars.items():
            shape, kind = shapes.get(name, (num_envs,)), array.type.dtype
            if kind is Unit:
                memory = torch.zeros(*shape, UNIT.itemsize, dtype=torch.uint8, device=device)
                view_of = wp.array(ptr=memory.data_ptr(), dtype=Unit, shape=shape, device=self._wp_device)
            else:
                memory = torch.zeros(shape, dtype=wp.dtype_to_torch(kind), device=device)
                view_of = wp.from_torch(memory)
            memories[name] = memory
            setattr(games, name, view_of)
        self._arrays, self._games = games, SimpleNamespace(**memories)
        self._episode_return, self._episode_length = memories["episode_return"], memories["episode_length"]
        self._play, self._begin = (
            [self._record(kernel, *part) for part in self._parts()] for kernel in (play, restart)
        )
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
        return wp.launch_tiled(
            kernel, dim=[end - first], inputs=[first, world, view, self._arrays], **options
        )

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
        g, shape = self._games, (self.num_envs, self.n_agents, -1)
        return g.obs.clone().view(shape), g.state.clone(), g.avail_actions.clone().view(shape)

    def _restart(self, done):
        """Mark the games of done (B,), where the next `_observe()` begins a battle."""
        self._games.done.copy_(done)
        if self.sim.goal_between:
            torch.rand(self._games.shares.shape, generator=self.generator, out=self._games.shares)

    def _observe(self):
        self._launch(self._begin)
        self._games.picture.copy_(self._games.units[0])
        self._pictured = None
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
        units, outcome, length, episode_return = fields(self._games.picture.cpu()), "", 0, 0.0
        if self._pictured:
            length, episode_return, won, terminated = (entry[0].item() for entry in self._pictured)
            outcome = "time out" if length >= self.episode_limit else ""
            if terminated:
                tied = not (units.hp > 0).any() and not self._view.is_mmm
                outcome = "won" if won else "tied" if tied else "lost"
        title = f"{self.map_name}   step {length}   return {episode_return:.1f}"
        return _draw(self.sim, units, title, outcome)


# ---- picture ----
def _draw(sim, units, title, outcome):
    """Picture of one battle, `units` (U,): blue agents, red enemies, shots and heals of this step."""
    from PIL import Image, ImageDraw, ImageFont  # only pictures need Pillow

    fine, header = 2, 32  # drawn at twice the size, then shrunk; pixels
    cells = np.argwhere(sim.walkable).tolist()
    west, south = min(x for x, _ in cells) - 0.5, min(y for _, y in cells) - 0.5
    width, height = max(x for x, _ in cells) + 1.5 - west, max(y for _, y in cells) + 1.5 - south  # tiles
    tile = fine * 640 / width
    size = (fine * 640, fine * 2 * round((header + 640 * height / width) / 2))  # even, for video codecs
    image = Image.new("RGB", size, (38, 40, 44))
    draw = ImageDraw.Draw(image, "RGBA")

    def at(x, y):
        return (x - west) * tile, size[1] - (y - south) * tile

    def box(x, y, half):
        return [*at(x - half, y + half), *at(x + half, y - half)]

    for x, y in cells:
        draw.rectangle(box(x + 0.5, y + 0.5, 0.5), fill=(92, 96, 88) if (x + y) % 2 else (88, 92, 84))
    kinds = {name: torch.tensor(sim.kinds[name]) for name in ("hp_max", "shield_max", "period", "radius")}
    life, shield = (units.hp / kinds["hp_max"]).tolist(), (units.shield / kinds["shield_max"]).tolist()
    shot = (units.cooldown > kinds["period"] - LOOPS_PER_STEP).tolist()  # within this step
    radius = kinds["radius"].tolist()
    spots = list(zip(units.x.tolist(), units.y.tolist(), radius, sim.types, strict=True))
    tall = ("medivac", "colossus")
    for i in sorted(range(len(spots)), key=lambda i: (life[i] > 0, sim.types[i] in tall, -spots[i][1])):
        (x, y, radius, name), side = spots[i], (64, 128, 245) if i < sim.n_agents else (228, 66, 56)
        if life[i] <= 0:
            left, top, right, bottom = box(x, y, 0.6 * radius)
            draw.line([left, top, right, bottom], (*side, 80), 2 * fine)
            draw.line([left, bottom, right, top], (*side, 80), 2 * fine)
            continue
        lift, opacity = (0.3, 150) if name == "medivac" else (0.07, 255)
        draw.ellipse(box(x + lift, y - lift, radius), fill=(0, 0, 0, 70))
        draw.ellipse(box(x, y, radius), fill=(*side, opacity), outline=(20, 20, 24), width=fine)
        font = ImageFont.load_default(1.25 * radius * tile)
        draw.text(at(x, y), GLYPHS[name], fill=(255, 255, 255), font=font, anchor="mm")
        health = (96, 224, 92) if life[i] > 0.5 else (245, 200, 60) if life[i] > 0.25 else (255, 110, 70)
        left, base = at(x - radius, y + radius + 0.06)
        for share, colour in ((life[i], health), (shield[i], (130, 210, 255))):
            if share == share:  # not 0 / 0, a unit without shields
                for part, paint in ((1, (15, 15, 18, 200)), (share, colour)):
                    draw.rectangle([left, base - 2 * fine, left + 2 * radius * tile * part, base], fill=paint)
                base -= 3.5 * fine
    for i, j in enumerate(units.target.tolist()):
        heals = sim.types[i] == "medivac"
        if life[i] > 0 and j >= 0 and (shot[i] or heals):
            colour = (80, 255, 120) if heals else (255, 236, 120) if i < sim.n_agents else (255, 160, 90)
            draw.line([*at(*spots[i][:2]), *at(*spots[j][:2])], (*colour, 210), 3 * fine // 2)
            draw.ellipse(box(*spots[j][:2], 0.09), fill=colour)

    draw.rectangle([0, 0, size[0], fine * header], fill=(24, 25, 28))
    font, middle, margin = ImageFont.load_default(15 * fine), fine * header / 2, 10 * fine
    draw.text((margin, middle), title, fill=(225, 225, 225), font=font, anchor="lm")
    colour = {"won": (110, 220, 120), "lost": (240, 100, 90)}.get(outcome, (230, 200, 110))
    draw.text((size[0] - margin, middle), outcome, fill=colour, font=font, anchor="rm")
    return np.array(image.resize((size[0] // fine, size[1] // fine), Image.Resampling.LANCZOS))
