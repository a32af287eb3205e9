"""Battles for the tests of the engine: its rules on values that stay as they are, and its environment with
outcomes that a test decides. Everything that a test sees lies on the CPU, wherever the battles are played
(`pytest --device cuda`)."""

import functools
import os

import torch
import warp as wp

import envs
from envs.smac import Smac, fields
from envs.smac_sim import LOOPS_PER_STEP, UNIT, Pair, Unit, World, decide, obey, resolve

DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # set by conftest.py
FIELDS = (
    "x y hp shield energy cooldown speed since_hit second_hit second_target target attacker goal_x goal_y "
    "walks dying"
).split()  # of a unit, without its plan
wp.set_module_options({"enable_backward": False, "max_unroll": 1, "fuse_fp": False})  # as in envs/smac.py


@wp.kernel
def obey_all(w: World, units: wp.array2d(dtype=Unit), actions: wp.array2d(dtype=wp.int64)):
    b = wp.tid()
    for i in range(w.n_agents):
        obey(w, units[b], i, int(actions[b, i]))


@wp.kernel
def play_loops(w: World, units: wp.array2d(dtype=Unit), delays: wp.array3d(dtype=float)):
    b = wp.tid()
    u = units[b]
    for loop in range(delays.shape[0]):
        for i in range(w.n_units):
            decide(w, u, i, delays[loop, b, i])
        for i in range(w.n_units):
            resolve(w, u, i)


class Units:
    """Units of (B, U) on the CPU, field by field; `_replace` makes others, as of a named tuple."""

    _fields = FIELDS

    size = UNIT.itemsize  # bytes of one

    def __init__(self, memory):
        self.memory = memory  # (B, U, bytes)
        self.__dict__.update(vars(fields(memory)))

    @classmethod
    def of(cls, views):
        """A copy of an environment's units."""
        units = cls(torch.zeros(*views.hp.shape, UNIT.itemsize, dtype=torch.uint8))
        for name, values in vars(views).items():
            getattr(units, name).copy_(values)
        return units

    def __iter__(self):
        return (getattr(self, name) for name in FIELDS)

    def __getitem__(self, games):
        return Units(self.memory[games].clone())

    def _replace(self, **values):
        changed = Units(self.memory.clone())
        for name, value in values.items():
            getattr(changed, name).copy_(torch.as_tensor(value))
        return changed

    def write_to(self, views):
        for name in FIELDS:
            getattr(views, name).copy_(getattr(self, name))


class Battles:
    """The rules of a map as functions of Units."""

    def __init__(self, name):
        self._name = name
        self._sim = make(name).sim
        self._world = self._sim.world
        self.n_agents, self.n_enemies, self.n_units = (
            self._sim.n_agents,
            self._sim.n_enemies,
            self._sim.n_units,
        )
        self.types, self.walkable = self._sim.types, torch.tensor(self._sim.walkable)
        for field in ("hp_max", "shield_max", "period"):
            setattr(self, field, torch.tensor(self._sim.kinds[field]))  # (U,)

    def spawn(self, num_envs, generator):
        env = _env(self._name, num_envs)
        env.reset(seed=generator.initial_seed())
        return Units.of(env.units)

    def _launch(self, kernel, units, values):
        memory, values = units.memory.to(DEVICE, copy=True), values.to(DEVICE).contiguous()
        device = self._world.kind.device
        games = wp.array(ptr=memory.data_ptr(), dtype=Unit, shape=memory.shape[:-1], device=device)
        wp.launch(kernel, len(memory), [self._world, games, wp.from_torch(values)], device=device)
        wp.synchronize_device(device)
        return Units(memory.cpu())

    def obey(self, units, actions):
        return self._launch(obey_all, units, actions)

    def game_loop(self, units, delay):
        return self.game_loops(units, delay[None])

    def game_loops(self, units, delays):
        """delays (L, B, U) in game loops"""
        return self._launch(play_loops, units, delays)

    def step(self, units, actions, generator):
        delays = torch.rand(LOOPS_PER_STEP, *units.hp.shape, generator=generator) * 3 - 1
        return self.game_loops(self.obey(units, actions), delays)

    def without_collisions(self):
        pairs = self._sim.pairs.copy()
        pairs["separation"] = 0
        self._world.pair = wp.array(pairs, dtype=Pair, device=self._world.kind.device)
        return self

    def without_chase(self):
        self._world.chase = False
        return self

    def layers(self):
        """(3, 32, 32) bool [layer, x, y]"""
        return torch.tensor(self._world.walkable.numpy()).view(3, 32, 32)


def home(value):
    """The same value on the CPU."""
    if isinstance(value, tuple):
        return tuple(map(home, value))
    if isinstance(value, dict):
        return {key: home(entry) for key, entry in value.items()}
    return value.cpu() if torch.is_tensor(value) else value


class Real(Smac):
    """The environment as it is, seen from the CPU."""

    def reset(self, **options):
        return home(super().reset(**options))

    def step(self, actions):
        return home(super().step(actions.to(self.device)))

    def state(self):
        return home(super().state())

    def avail_actions(self):
        return home(super().avail_actions())


class Staged(Real):
    """The interface around battles that the test decides: `after`, Units, is what the next step leads to."""

    external = True
    after = None

    def _restart(self, done):
        super()._restart(done)
        for name in FIELDS:
            values, fresh = getattr(self.units, name), torch.tensor(self.sim.fresh[name], device=self.device)
            values.copy_(torch.where(done[:, None], fresh, values))

    def _launch(self, commands):
        if commands is self._play:
            units = self.units
            units.health.copy_(torch.where(units.hp > 0, units.hp + units.shield, 0.0))
            if self.after is not None:
                self.after.write_to(units)
        super()._launch(commands)

    def show(self):
        """What the battles show now, as after a step."""
        self.after = None
        kept = self._episode_return.clone(), self._episode_length.clone()
        self._launch(self._play)
        self._episode_return.copy_(kept[0])
        self._episode_length.copy_(kept[1])
        self._obs, self._state, self._avail_actions = self._shown()
        return home((self._obs, self._state, self._avail_actions))


def make(name, num_envs=1, seed=0, cls=Real, **rules):
    arguments = {known.lower(): entry for known, entry in envs._REGISTRY.items()}[name.lower()][2] | rules
    return cls(num_envs=num_envs, device=DEVICE, seed=seed, **arguments)


@functools.cache
def _env(name, num_envs):
    return make(name, num_envs)
