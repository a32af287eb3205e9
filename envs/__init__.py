"""Cooperative multi-agent environments, batched on one device: `make()` builds, `list_ids()` names."""

import difflib
import importlib
import json
from pathlib import Path

import torch

from envs.base import VecEnv

_SMAC_MAPS = json.loads((Path(__file__).parent / "smac_maps.json").read_text())["maps"]
# environment id -> (module, class, arguments of the class)
_REGISTRY = {name: ("envs.smac", "Smac", {"map_name": name}) for name in _SMAC_MAPS}


def list_ids():
    """All environment ids, in the order in which the documentation lists them."""
    return list(_REGISTRY)


def make(env_id, num_envs=1, device="cpu", seed=0, **kwargs) -> VecEnv:
    """Build a batch of `num_envs` games of `env_id` (case does not matter) on `device`.

    Further keyword arguments go to the environment's class. Raises ValueError for an unknown id, for less
    than one game and for a GPU that this machine lacks.
    """
    names = {name.lower(): name for name in _REGISTRY}
    if env_id.lower() not in names:
        near = difflib.get_close_matches(env_id.lower(), names, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(names[n] for n in near)}?" if near else "no id is like it."
        raise ValueError(
            f"unknown environment {env_id!r}: {hint} "
            "List all with: python -c 'import envs; print(*envs.list_ids())'"
        )
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees no GPU here; use 'cpu'")
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    module, cls, arguments = _REGISTRY[names[env_id.lower()]]
    return getattr(importlib.import_module(module), cls)(
        num_envs=num_envs, device=device, seed=seed, **{**arguments, **kwargs}
    )
