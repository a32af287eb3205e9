"""Let the policy of a run play greedily, as evaluations in training do: a row of results, a GIF of one game.

    python play.py runs/NAME
    python play.py runs/NAME --video
    python play.py runs/NAME --env cdm,n_agents=5

The run's program is the file of that name beside this one. Another environment must have the same sizes.
"""

import importlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

import machine
from envs import evaluate, make, settings_for


@dataclass
class Args:
    run: tyro.conf.Positional[str]  # run folder
    env: str | None = None  # environment id (None: the run's own)
    episodes: int | None = None  # games, all in parallel (None: as the run's evaluations, of sc2 at most 16)
    video: bool = False  # save one game as play.gif in the run folder
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where everything lives; auto takes cuda if there is one


def open_run(folder):
    """Program, settings and checkpoint of a run folder; SystemExit where it is none."""
    checkpoint = machine.read(folder, "cpu")
    if not Path(__file__).with_name(f"{checkpoint['program']}.py").exists():
        machine.fail(f"{folder} is a run of {checkpoint['program']}.py, which is not beside play.py")
    program = importlib.import_module(checkpoint["program"])
    settings = machine.settings_of(folder, program.__name__, program.Args.__annotations__)
    return program, program.Args(**settings), checkpoint


def greedy(program, settings, checkpoint, env, env_id):
    """The policy of a run, for evaluate(); SystemExit where `env` has other sizes or bounds than the run."""
    own, trained = env.sizes, checkpoint["env"]["sizes"]
    if own | {"state_dim": None} != trained | {"state_dim": None}:  # the state is for training alone
        machine.fail(f"{env_id} has the sizes {own}, the run {trained}")
    actor = program.Actor(env, settings).to(env.device)
    for name, value in actor.named_buffers():  # low and high
        if name in checkpoint["actor"] and not torch.equal(value.cpu(), checkpoint["actor"][name]):
            machine.fail(f"{env_id} has other bounds of actions ({name}) than the run")
    actor.load_state_dict(checkpoint.get("average", checkpoint["actor"]))  # what the run's evaluations play
    return partial(program.act, actor)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    program, settings, checkpoint = open_run(args.run)
    env_id, episodes = args.env or settings.env, args.episodes
    if episodes is None:
        episodes = min(settings.eval_episodes, settings_for(env_id).get("eval_episodes", math.inf))
    with machine.set_up():
        env = make(env_id, episodes, args.device, render=args.video, validate=False)
    try:
        policy = greedy(program, settings, checkpoint, env, env_id)
    except (KeyError, RuntimeError) as error:
        machine.fail(f"{args.run}/model.pt does not fit: {error}")
    video = Path(args.run, "play.gif") if args.video else None
    try:
        results = evaluate(env, policy, video)
    except KeyboardInterrupt:
        machine.fail(130)
    except (OSError, RuntimeError) as error:  # of a game that is a program of its own, or of the picture
        machine.fail(error)
    if video:
        print(f"saved {video}")
    print("run | step |", " | ".join(results))
    print(args.run, "|", checkpoint["global_step"], "|", " | ".join(f"{x:.3f}" for x in results.values()))
