"""Cooperative multi-agent environments, batched on one device.

`make()` builds one, `list_ids()` names all, `evaluate()` plays a policy. `Stream` is a random stream that is
saved as networks are, `settings_for()` what a program should ask less of.
"""

import ast
import difflib
import importlib
import inspect
import json
import warnings
from pathlib import Path

import torch

from envs.base import NO_LIMIT, Stream, VecEnv, free_memory
from envs.evaluation import STEPS, evaluate

__all__ = ["Stream", "evaluate", "free_memory", "list_ids", "make", "settings_for"]

_SMAC_MAPS = json.loads((Path(__file__).parent / "smac_maps.json").read_text())["maps"]
# environment id -> (module, class, arguments of the class)
_REGISTRY = {name: ("envs.smac", "Smac", {"map_name": name}) for name in _SMAC_MAPS}
_REGISTRY |= {
    "quadratic": ("envs.quadratic", "Quadratic", {}),
    "cdm": ("envs.cdm", "CDM", {}),
    "spread": ("envs.mpe", "Spread", {}),
    "aggregation": ("envs.mpe", "Aggregation", {}),
    "aggregation_hard": ("envs.mpe", "Aggregation", {"radius": 0.5}),
    "mill": ("envs.mpe", "Mill", {}),
}
_OF_MAKE = {"num_envs", "device", "seed", "validate"}  # no options of an id


def list_ids():
    """All environment ids, in the order in which the documentation lists them."""
    return list(_REGISTRY)


def settings_for(env_id):
    """What a program's settings should be, by name, where an environment bears less than their defaults."""
    clients = env_id.strip().lower().startswith("sc2:")  # of a gigabyte each
    return dict(num_envs=8, eval_episodes=16) if clients else {}


def make(
    env_id, num_envs=1, device="cpu", seed=0, validate=True, actions=None, render=False, **kwargs
) -> VecEnv:
    """Build a batch of `num_envs` games of `env_id` (case does not matter) on `device`; "auto": cuda if any.

    `validate`: whether every step checks that its actions are allowed; `actions`: the only kind that the
    caller can play, "discrete" or "continuous"; `render`: whether pictures will be asked for.

    Further keyword arguments go to the environment's class. The id may carry some too, behind commas:
    `make("cdm,n_agents=5,n_actions=4")`; a value is a Python literal (with commas only in brackets), true or
    false in any case, or a bare word for a string, and a keyword argument wins over it.
    `make("pettingzoo:mpe2.simple_spread_v3")` plays any module that has PettingZoo's `parallel_env()`, which
    gets the arguments that envs.pettingzoo does not know; `make("sc2:mmm")` plays a map of SMAC in
    StarCraft II itself. Raises ValueError for an unknown id, for an argument that is malformed, that the
    environment does not have or does not take, for less than one game, for a GPU that this machine lacks, for
    the other kind of actions and for a game that is not installed; whatever the game raises that draws no
    pictures.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name, *pairs = _split(env_id)
    prefix, _, path = name.partition(":")
    foreign = prefix.lower() == "pettingzoo"
    registry = {name: ("envs.pettingzoo", "PettingZoo", {"path": path})} if foreign else _REGISTRY
    if prefix.lower() == "sc2" and path:
        registry = {f"sc2:{name}": ("envs.smac_sc2", "Sc2", {"map_name": name}) for name in _SMAC_MAPS}
    names = {known.lower(): known for known in registry}
    if name.lower() not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(names[n] for n in near)}?" if near else "no id is like it."
        raise ValueError(
            f"unknown environment {name!r}: {hint} "
            "List all with: python -c 'import envs; print(*envs.list_ids())'"
        )
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees no GPU here; use 'cpu'")
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    module, cls, arguments = registry[names[name.lower()]]
    cls = getattr(importlib.import_module(module), cls)
    options = dict(_parse(pair, env_id) for pair in pairs) | kwargs
    takes = inspect.signature(cls).parameters
    has = [option for option in takes if option not in _OF_MAKE | {"map_name", "path"}]  # which are the id
    if foreign:  # anything else may be an argument of the module's
        has += [option for option in options if option not in _OF_MAKE | {"path"}]
    if unknown := [option for option in options if option not in has]:
        way = f"; to pass the module's own, write {unknown[0]}_" if foreign else ""
        raise ValueError(
            f"{names[name.lower()]} has no argument {unknown[0]!r}; it has {', '.join(has)}{way}"
        )
    for option, value in options.items():  # any word is true to Python, "no" too
        if option in takes and type(takes[option].default) is bool and type(value) is not bool:
            raise ValueError(f"{option} of environment {env_id!r} must be true or false, got {value!r}")
    env = cls(num_envs=num_envs, device=device, seed=seed, validate=validate, **arguments | options)
    kind = "discrete" if env.n_actions else "continuous"
    if actions not in (None, kind):
        raise ValueError(f"{env_id} has {kind} actions; this algorithm needs {actions} ones")
    if env.episode_limit >= NO_LIMIT:
        advice = f"evaluations stop after {STEPS} steps; set episode_limit"
        warnings.warn(f"{env_id}: no episode limit known; {advice}", stacklevel=1)  # once, not per call
    if render:
        env.reset()
        env.render()
    return env


def _split(env_id):
    """An id at its commas, except for those within brackets."""
    parts = []
    for part in env_id.split(","):
        if parts and sum(map(parts[-1].count, "([{")) > sum(map(parts[-1].count, ")]}")):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return [part.strip() for part in parts]


def _parse(pair, env_id):
    """One `name=value` of an id -> name and value."""
    option, equals, value = (part.strip() for part in pair.partition("="))
    if not (option and equals and value):
        raise ValueError(f"argument {pair!r} of environment {env_id!r} must read name=value")
    try:
        return option, ast.literal_eval(value.title() if value.lower() in ("true", "false") else value)
    except (SyntaxError, TypeError, ValueError):
        return option, value
