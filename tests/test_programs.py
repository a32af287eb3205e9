"""What all programs promise: every kind of environment, learning, run folders, flags and their mistakes."""

import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import EPISODE, MODULES, SMALL, STEP, Aim, N, Toy, checkpoint, same, scalars, toy_of

import envs
import machine
from envs.base import VecEnv

PROGRAMS = (*EPISODE, *STEP)
TINY = {
    name: "--num-envs 2 --total-timesteps 40 --eval-every 20 --eval-episodes 3 --warmup-steps 10"
    " --update-every 10 --batch-size 6 --buffer-size 30 --hidden-dim 8"
    for name in STEP
}
TINY |= dict.fromkeys(EPISODE, "--total-timesteps 240 --eval-every 120 --eval-episodes 3 --log-every 40")
TINY["dop_stochastic"] += " --off-policy-size 9 --off-policy-batch 4 --on-policy-size 8 --on-policy-batch 2"
TINY["coma"] += " --batch-size 2"
TINY["qmix"] += " --buffer-size 30 --batch-size 4"
TINY["masql"] += " --particles 4"
TINY["maac"] += " --critic-dim 8"
DISCRETE = ["3m", "cdm,guided_share=0.5,guided_steps=20", "cdm,first_action=0.8,n_agents=3"]
DISCRETE += ["spread,discrete=True", "aggregation,discrete=True", "mill,discrete=True"]
CONTINUOUS = ["quadratic", "spread", "aggregation", "mill"]
CASES = [(name, env) for name in PROGRAMS if name != "masql" for env in DISCRETE]
CASES += [(name, env) for name in STEP for env in CONTINUOUS]
# what a checkpoint holds of networks and optimisers
PARTS = dict.fromkeys(PROGRAMS, ["actor", "critic", "critic_target", "actor_optimizer", "critic_optimizer"])
PARTS |= {name: ["actor_target", *PARTS[name]] for name in ("maddpg", "dop_deterministic", "maac")}
PARTS["dop_stochastic"] = PARTS["dop_stochastic"] + ["average"]
PARTS["qmix"] = ["actor", "mixer", "actor_target", "mixer_target", "optimizer"]
# flag of the learning rate of what has a target, and the optimiser that it is for
LEARNING_RATE = dict.fromkeys(PROGRAMS, ("critic_lr", "critic_optimizer")) | {"qmix": ("lr", "optimizer")}


def targets(state):
    """Pairs of a live network and its target."""
    return [(x, state[f"{name}_target"]) for name, x in state.items() if f"{name}_target" in state]


@pytest.mark.parametrize(("program", "env"), CASES)
def test_runs_and_plays(run, play, program, env):
    code, out, folder = run(*TINY[program].split(), env=env)
    assert code == 0 and len(re.findall(r"step \d+, .*greedy episodic_return", out)) == 2
    assert checkpoint(folder)["iteration"] > 0
    code, out = play(folder)
    assert code == 0 and "episodic_return" in out


# ---- learning ----
_LOSSES = "critic_loss actor_loss q_taken td_target grad_norm_actor grad_norm_critic".split()
LOSSES = dict.fromkeys(PROGRAMS, _LOSSES) | {
    "qmix": ["critic_loss", "q_taken", "td_target", "grad_norm_critic"]
}
LOSSES |= dict.fromkeys(("dop_stochastic", "coma", "maac"), [*_LOSSES, "entropy"])
DECAYS = {  # chart of a schedule -> its value at some steps
    "dop_stochastic": {"epsilon": {4000: 0.5 - 0.45 * 3996 / 50_000}},
    "coma": {"epsilon": {4000: 0.01}},
    "qmix": {"epsilon": {4000: 0.05}},
    "masql": {"alpha": {1200: 1, 3200: 1e-3}},
}
_EPISODE = "--total-timesteps 4000 --eval-every 1000"
_STEP = "--total-timesteps 3200 --eval-every 1600 --update-every 4 --gamma 0"
_DECAY = "--anneal-start 1200 --anneal-steps 800"
_CRITIC = "--critic-lr 0.003 --critic-hidden-dim 32"


# share of the best possible return: by chance 0.25 in Toy, whose digit is seen at first only, 0.7 in Aim
@pytest.mark.parametrize(
    ("program", "share", "flags"),
    [
        ("dop_stochastic", 1, f"{_EPISODE} --actor-lr 0.002 --critic-lr 0.002 --averaging 0.8"),
        ("coma", 0.7, f"{_EPISODE} --actor-lr 0.002 --critic-lr 0.002 --gamma 0.5 --epsilon-steps 2000"),
        ("qmix", 0.7, f"{_EPISODE} --lr 0.002 --gamma 0.9 --total-timesteps 6000 --eval-episodes 60"),
        ("maddpg", 0.9, f"{_STEP} --actor-lr 0.001"),
        ("maddpg", 0.9, f"{_STEP} --actor-lr 0.001 --critic-per-agent --others-actions current"),
        ("masql", 0.9, f"{_STEP} --actor-lr 0.003 --critic-lr 0.01 --hidden-dim 32 {_DECAY}"),
        ("dop_deterministic", 0.9, f"{_STEP} --update-every 2 --actor-lr 0.001 {_CRITIC}"),
        ("maac", 0.85, f"{_STEP} --actor-lr 0.005 --critic-lr 0.01 --total-timesteps 2400 --eval-every 1200"),
    ],
)
def test_a_run_learns_writes_and_prints(run, program, share, flags):
    code, out, folder = run(*flags.split(), "--capture-video")
    state, toy = checkpoint(folder), toy_of(program)
    args = state["args"]
    assert code == 0 and f"run folder {folder}" in out and folder.name.startswith(f"{toy}__{program}__1__")
    assert args == json.loads((folder / "args.json").read_text())
    assert args["env"] == toy and args["num_envs"] == 4
    evaluations = list(range(args["eval_every"], args["total_timesteps"] + 1, args["eval_every"]))
    files = {path.name for path in folder.iterdir()}
    assert files >= {"args.json", "model.pt", *(f"{step}.gif" for step in evaluations)}
    assert not list(folder.glob("*.tmp"))

    assert state["global_step"] == args["total_timesteps"]
    if program in STEP:  # the first update comes with the last step of the warmup
        assert state["iteration"] == (args["total_timesteps"] - 100 + 4) // args["update_every"]
        check_stored(rewards=9 if args.get("critic_per_agent") else 4)
    else:
        assert state["iteration"] > 50
    if "tau" in args:
        assert not any(same(*pair) for pair in targets(state))

    curves, decays = scalars(folder), DECAYS.get(program, {})
    play = "episodic_return episodic_length".split() + ["win_rate"] * (program in EPISODE)
    tags = {f"charts/{x}" for x in (*play, *decays, "SPS", "train_seconds")}
    assert curves.keys() == tags | {f"losses/{x}" for x in LOSSES[program]} | {f"eval/{x}" for x in play}
    assert [step for step, _ in curves["eval/episodic_return"]] == evaluations
    assert curves["eval/episodic_return"][-1][1] >= share * curves["eval/episodic_length"][-1][1]
    for name, decay in decays.items():
        values = dict(curves[f"charts/{name}"])
        assert {step: values[step] for step in decay} == pytest.approx(decay)


def check_stored(rewards):
    """The buffer of the latest run holds what its games did; log column `rewards` is the reward."""
    log, buffer = Aim.last.log, Aim.program["buffer"]
    whole = ~torch.cat([row[11] for row in log])  # (steps * B,)
    assert buffer.n_steps == whole.sum() <= buffer.capacity
    terminated, truncated = (torch.stack([row[x] for row in log]) for x in (5, 10))
    assert terminated.any() and truncated.any()
    columns = [0, 1, 2, 3, rewards, 5, 6, 7, 8]
    for stored, column in zip(buffer.steps, columns, strict=True):
        if log[0][column] is not None:
            assert torch.equal(stored[: buffer.n_steps], torch.cat([row[column] for row in log])[whole])


@pytest.mark.parametrize("program", STEP)
def test_the_made_up_step_of_a_game_that_broke_is_not_learnt_from(run, program):
    assert run("--eval-every", "0", env="aim_lost")[0] == 0
    assert sum(row[11].sum() for row in Aim.last.log) == 4 + 14
    check_stored(rewards=4)


def played():
    """Whole episodes and those still running (B,) of the latest run on Toy: lists of steps, of columns."""
    episodes, running = [], [[] for _ in range(4)]
    for step in Toy.last.log:
        columns = [x for x in step if x is not None]
        for game, (*shown, truncated, broken) in enumerate(zip(*columns, strict=True)):
            running[game].append(shown)
            if shown[5] or truncated:
                episodes += [] if broken else [running[game]]
                running[game] = []
    return episodes, running


def check_memory(running):
    """The agents' memory is what the actor makes of the steps of the running games."""
    actor, (last_actions, hidden) = Toy.program["actor"], Toy.program["memory"]
    explored = False
    for game, episode in enumerate(running):
        actions, memory = torch.full((N,), -1), torch.zeros(hidden[game].shape)
        for obs, _, legal, chosen, *_ in episode:
            scores, memory = actor(obs.view(1, 1, N, -1), actions.view(1, 1, N), memory.unsqueeze(0))
            explored |= not torch.equal(chosen, scores[0, 0].masked_fill(~legal, -math.inf).argmax(-1))
            actions, memory = chosen, memory[0]
        assert torch.equal(last_actions[game], actions)
        torch.testing.assert_close(hidden[game], memory)
    assert explored


UNLEARNT = {"dop_stochastic": "--actor-lr=0", "coma": "--actor-lr=0", "qmix": "--lr=0"}


@pytest.mark.parametrize("program", EPISODE)
@pytest.mark.parametrize("env", ["toy", "toy_guided", "toy_lost"])
def test_the_replay_and_the_agents_memory_hold_what_was_played(run, program, env):
    assert run(UNLEARNT[program], "--eval-every", "0", env=env)[0] == 0
    episodes, running = played()
    check_memory(running)
    buffer, capacity = Toy.program["buffer"], len(Toy.program["buffer"].ring)
    assert buffer.n_episodes == len(episodes) > capacity
    for k, episode in [*enumerate(episodes)][-capacity:]:
        slot, length = buffer.ring[k % capacity], len(episode)
        assert buffer.length[slot] == length
        for column, name in enumerate("obs state avail_actions actions reward terminated".split()):
            rows = [x[column] for x in episode] + ([episode[-1][column + 6]] if column < 3 else [])
            stored = buffer.steps[name][slot, : len(rows)]
            assert torch.equal(stored, torch.stack(rows).to(stored.dtype))


@pytest.mark.parametrize(
    ("program", "flags", "needed"),
    [
        ("dop_stochastic", "--episodes-per-iteration=3", 6),
        ("qmix", "--episodes-per-iteration=3", 6),
        ("coma", "--batch-size=3", 3),
    ],
)
@pytest.mark.parametrize("env", ["toy", "toy_together"])
def test_three_new_episodes_start_an_iteration(run, program, flags, needed, env):
    assert run(flags, "--eval-every", "0", env=env)[0] == 0
    iterations, new, total = 0, 0, 0
    for step in Toy.last.log:
        ended = (step[5] | step[10]).sum().item()
        new, total = new + ended, total + ended
        if program == "coma":  # takes all that are new
            iterations, new = iterations + (new >= 3), new * (new < 3)
        else:
            iterations, new = iterations + new // 3 * (total >= needed), new % 3
    assert Toy.program["iteration"] == iterations > 7
    if program == "coma" and env == "toy_together":
        assert len(Toy.program["batch"].mask) == 4


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_network_is_learnt_at_its_own_rate(run, program):
    learnt = {"optimizer": ("actor", "mixer")} if program == "qmix" else {}
    learnt = learnt or {"actor_optimizer": ("actor",), "critic_optimizer": ("critic",)}
    rates = {name: 0.001 * k for k, name in enumerate(learnt, 1)}
    flags = [f"--{x.removesuffix('optimizer')}lr={rate}".replace("_", "-") for x, rate in rates.items()]
    decays = {"critic_optimizer": 0.004} if program in ("maddpg", "maac") else {}
    run(*flags, *("--critic-weight-decay=0.004" for _ in decays))
    for name, networks in learnt.items():
        (group,) = Toy.program[name].param_groups
        parameters = [x for network in networks for x in Toy.program[network].parameters()]
        assert (group["lr"], group["weight_decay"]) == (rates[name], decays.get(name, 0))
        assert all(x is y for x, y in zip(group["params"], parameters, strict=True))


@pytest.mark.parametrize("program", ["maddpg", "dop_deterministic"])
def test_noise_is_forgotten_where_an_episode_ends(run, program):
    run("--num-envs", "64", "--total-timesteps", "640", "--eval-every", "0")
    terminated, truncated = (Aim.last.log[-1][x] for x in (5, 10))
    memory = Aim.program["memory"].flatten(1)
    assert torch.equal((memory == 0).all(1), terminated | truncated) and 0 < terminated.sum() < 64


@pytest.mark.parametrize("program", ["maddpg", "dop_deterministic"])
@pytest.mark.parametrize("warmup_actions", ["untrained", "uniform"])
def test_who_acts_during_the_warmup(run, program, warmup_actions):
    """Without noise and learning, the untrained policies repeat themselves."""
    flags = f"--noise-sigma 0 --actor-lr 0 --warmup-steps 200 --warmup-actions {warmup_actions}"
    _, _, folder = run(*flags.split())
    for more in ((), ("--resume", folder, "--total-timesteps", "800")):  # the replay fills anew
        if more:
            run(*more, env=None)
        act, actor = Aim.program["act"], Aim.program["actor"]
        follows = [torch.allclose(row[3], act(actor, row[0], None)[0], atol=1e-5) for row in Aim.last.log]
        assert follows == [warmup_actions == "untrained"] * 50 + [True] * 50


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("coma", "--actor-lr 0.005 --critic-lr 0.005"),
        ("qmix", "--episodes-per-iteration 4 --epsilon-end 1.0 --lr 0.005"),
        ("maddpg", "--noise-sigma 0 --actor-lr 0.005"),
        ("dop_deterministic", "--actor-lr 0.005 --critic-lr 0.005"),
        ("maac", "--actor-lr 0.005 --critic-lr 0.005"),
    ],
)
def test_one_step_games_and_actions_played_by_the_environment_are_learnt(run, program, flags):
    """Every game ends after its only step."""
    env = "cdm,n_agents=2,n_actions=3,guided_share=0.3,guided_steps=200"
    if program in EPISODE:
        env = "cdm,n_agents=2,n_actions=2,guided_share=0.5,guided_steps=100"
    code, _, folder = run("--total-timesteps", "2000", "--eval-every", "2000", *flags.split(), env=env)
    curves = scalars(folder)
    assert code == 0 and curves["eval/episodic_return"][-1][1] == 10
    assert curves["charts/episodic_length"][-1][1] == 1 and "win_rate" not in str(curves.keys())
    if program == "qmix":
        assert curves["losses/critic_loss"][-1][1] < 10


@pytest.mark.parametrize("program", ["dop_stochastic", "coma", "qmix", "masql"])
def test_targets_are_copied_every_period(run, program):
    flag = f"--{LEARNING_RATE[program][0].replace('_', '-')}"
    assert all(same(*pair) for pair in targets(checkpoint(run("--target-period", "1")[2])))
    never, unlearnt = (checkpoint(run("--target-period", "1000", *x)[2]) for x in ((), (flag, "0")))
    for (live, target), (start, _) in zip(targets(never), targets(unlearnt), strict=True):
        assert same(target, start) and not same(live, start)
    last = str(never["iteration"])
    assert all(same(*pair) for pair in targets(checkpoint(run("--target-period", last)[2])))


@pytest.mark.parametrize("program", ["maddpg", "dop_deterministic", "maac"])
def test_actors_and_targets_are_updated_every_policy_delay(run, program):
    for delay, moved in ((100, False), (38, True)):
        states = checkpoint(run("--policy-delay", str(delay))[2])
        assert states["iteration"] == 38
        assert same(states["actor"], states["actor_target"]) != moved  # equal at the start
        assert not same(states["critic"], states["critic_target"])
        assert ("step" in str(states["actor_optimizer"]["state"])) == moved


@pytest.mark.parametrize("program", ["maddpg", "dop_deterministic", "maac"])
def test_actors_wait_in_the_tasks_of_the_dop_paper(parse, program):
    """Appendix G.2: DOP's delay, "also" of "all the baselines"."""
    assert [parse("--env", env).policy_delay for env in ("aggregation", "mill")] == [2, 2]


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "masql"])
def test_an_environment_biases_the_untrained_policy_and_targets_start_as_copies(run, program):
    """One update would change them, so none happens."""
    biases = []
    for env in ("cdm", "cdm,first_action=0.8"):
        state = checkpoint(run("--num-envs", "1", "--total-timesteps", "1", env=env)[2])
        assert state["iteration"] == 0 and all(same(*pair) for pair in targets(state))
        biases.append(state["actor"]["head.bias" if program in EPISODE else "biases.2"])
    shift = torch.tensor([math.log(0.8 / (0.2 / 9))] + [0.0] * 9)
    torch.testing.assert_close(biases[1] - biases[0], shift.expand_as(biases[0]))


@pytest.mark.parametrize(
    ("program", "env"),
    [(name, "toy") for name in PROGRAMS if name != "masql"] + [(name, "aim") for name in STEP],
)
def test_same_seed_same_numbers_and_evaluation_does_not_disturb(run, program, env):
    flags = ((), (), ("--eval-every", "0"), ("--seed", "2"))
    first, *others = [checkpoint(run(*x, env=env)[2]) for x in flags]
    equal = [
        all(same(first[part], x[part]) for part in (*PARTS[program], "generator", "env")) for x in others
    ]
    assert equal == [True, True, False]


@pytest.mark.parametrize("program", PROGRAMS)
def test_training_explores_and_evaluations_do_not(run, program):
    """With policies that stay as they are, so that evaluations repeat the same games."""
    still = [UNLEARNT[program]] if program in EPISODE else ["--warmup-steps", "1000"]
    _, _, folder = run(*still, "--eval-every", "80")
    returns = [x for _, x in scalars(folder)["eval/episodic_return"]]
    assert len(returns) == 5 and len(set(returns)) == 1
    if program in STEP:
        act, actor = Aim.program["act"], Aim.program["actor"]
        assert not any(torch.equal(row[3], act(actor, row[0], None)[0]) for row in Aim.last.log)


@pytest.mark.parametrize("program", PROGRAMS)
def test_weights_games_and_exploration_have_streams_of_their_own(run, program):
    seeds = []
    for seed in ("1", "2"):
        state = checkpoint(run("--seed", seed, "--total-timesteps", "4", "--eval-every", "0")[2])
        seeds.append(torch.initial_seed())
        for part in (state["generator"], state["env"]["generator"]):
            stream = envs.Stream("cpu")
            stream.load_state_dict(part)
            seeds.append(stream.initial_seed())
    assert len(set(seeds)) == 6 and max(seeds) < 2**31


# ---- run folders ----
@pytest.mark.parametrize("program", PROGRAMS)
def test_resume_restores_and_goes_on(run, program):
    name, optimizer = LEARNING_RATE[program]
    _, _, folder = run("--seed", "7", "--gamma", "0.5")
    before = checkpoint(folder)
    assert "raise --total-timesteps" in run("--resume", folder, env=None)[0]
    assert same(checkpoint(folder), before)
    run("--resume", folder, "--total-timesteps", "404", env=None)  # one step, no update yet
    after = checkpoint(folder)
    assert all(same(after[part], before[part]) for part in (*PARTS[program], "iteration"))
    assert after["global_step"] == 404 and not same(after["env"], before["env"])
    losses = {tag: points for tag, points in scalars(folder).items() if tag.startswith("losses/")}
    assert losses.keys() == {f"losses/{name}" for name in LOSSES[program]}
    assert {points[-1][0] for points in losses.values()} == {404}

    flags = ("--total-timesteps", "800", f"--{name.replace('_', '-')}", "0.125")
    code, _, same_folder = run("--resume", folder, *flags, env=None)
    after = checkpoint(folder)
    assert code == 0 and same_folder == folder and after["global_step"] == 800
    assert after["iteration"] > before["iteration"] > 0
    assert after["train_seconds"] > before["train_seconds"] > 0
    old = {"resume": None, "total_timesteps": 400, name: before["args"][name]}
    assert after["args"] | old == before["args"]
    assert after[optimizer]["param_groups"][0]["lr"] == 0.125  # a flag, unlike the rest
    assert not same(after["actor"], before["actor"])
    steps = [step for step, _ in scalars(folder)["charts/SPS"]]
    assert steps == sorted(steps) and steps[0] <= 400 and steps[-1] == 800


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_killed_run_with_its_replay_goes_on_to_the_bit(run, program, tmp_path):
    """Weights, optimisers, games, replay and curves; kill -9 at any step, which may be one of evaluation."""
    env, killed = "spread" if program in STEP else "spread,discrete=True", random.randrange(60, 120)
    flags = ["--save-replay", "--save-every", "220", "--total-timesteps", "800", "--eval-every", "400"]
    flags += ["--log-every", "320"]  # within episodes
    flags += ["--buffer-size", "150"] if program in STEP else []  # the oldest steps drop out
    _, _, whole = run(*flags, env=env)
    words = [MODULES[program].__file__, "--env", env, *SMALL[program].split(), *flags]
    words = [*words, "--run-dir", str(tmp_path / "killed"), "--device", "cpu"]
    process = subprocess.run(
        [sys.executable, "-c", KILL.format(killed), *words], cwd=ROOT, capture_output=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    (folder,) = (tmp_path / "killed").iterdir()
    step = checkpoint(folder)["global_step"]
    code, out, _ = run("--resume", folder, env=None)
    assert code == 0 and f"resumed at step {step}" in out and "fills anew" not in out, killed
    expected, resumed = checkpoint(whole), checkpoint(folder)
    assert 220 <= step < 800 and resumed["iteration"] > 0
    for state in (expected, resumed):
        del state["args"], state["train_seconds"]
        if program not in STEP:
            blank_unwritten(state["buffer"], state["env"]["_episode_length"])
    assert [name for name in expected if not same(expected[name], resumed[name])] == [], killed
    curves = [{tag: dict(x) for tag, x in scalars(path).items()} for path in (whole, folder)]
    for tag in curves[0].keys() - {"charts/SPS", "charts/train_seconds"}:
        assert curves[0][tag] == curves[1][tag], (tag, killed)


def blank_unwritten(buffer, played):
    """Zeros in the rows of a saved replay of episodes that were not written; `played` (B,): of open ones."""
    ends, complete = torch.zeros_like(buffer["length"]), buffer["ring"][: buffer["n_episodes"]]
    ends[complete], ends[buffer["open_slot"]] = buffer["length"][complete], played
    for name, x in buffer["steps"].items():
        last = ends.clone()  # of complete episodes there is one observation more
        last[complete] += name in ("obs", "state", "avail_actions")
        x[torch.arange(x.shape[1]) >= last[:, None]] = 0


ROOT = Path(__file__).parent.parent
KILL = """import os, runpy, sys, torch
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
torch.set_num_threads(1)
from envs.base import VecEnv
step, steps = VecEnv.step, []
def counted(env, actions):
    steps.append(1)
    if len(steps) == {}:
        os.kill(os.getpid(), 9)
    return step(env, actions)
VecEnv.step = counted
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", EPISODE)
@pytest.mark.parametrize(("trouble", "count", "end"), [("external", 2, "408"), ("lost", 1, "480")])
def test_games_that_cannot_be_saved_begin_anew_with_their_agents_memory(
    run, program, monkeypatch, trouble, count, end
):
    flags = ("--save-replay", "--eval-every", "0", UNLEARNT[program])
    flags += ("--batch-size=5",) if program == "coma" else ("--episodes-per-iteration=5",)
    _, _, folder = run(*flags, env=f"toy_{trouble}")
    reset, resets = VecEnv.reset, []
    monkeypatch.setattr(VecEnv, "reset", lambda env, **more: resets.append(env) or reset(env, **more))
    old = Toy.program["new_episodes"]
    code, out, _ = run("--resume", folder, "--total-timesteps", end, env=None)
    assert code == 0 and "fills anew" not in out and len(resets) == count
    episodes, running = played()
    check_memory(running)
    if trouble == "external":  # their unfinished episodes are lost, and what they had counted for
        assert Toy.program["new_episodes"] == len(episodes) < 4 and old > 0


@pytest.mark.parametrize("program", ["coma"])
def test_an_environment_in_capitals_is_the_same(run, program):
    _, _, folder = run()
    assert run("--resume", folder, "--env", "TOY", "--total-timesteps", "480", env=None)[0] == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_resumed_run_cannot_do(run, program):
    _, _, folder = run("--total-timesteps", "40", "--eval-every", "0")
    before = checkpoint(folder)
    for flag, value in FIXED.items():
        if flag in vars(MODULES[program].Args()):
            code, _, _ = run("--resume", folder, f"--{flag.replace('_', '-')}", value, env=None)
            old = before["args"][flag]
            assert code == f"{program}.py: {folder} has the {flag} {old}, which cannot become {value}"
    other = next(name for name in PROGRAMS if name != program)
    torch.save(before | {"program": other}, folder / "model.pt")
    assert f"is a run of {other}.py, not of {program}.py" in run("--resume", folder, env=None)[0]
    torch.save(before | {"args": before["args"] | {"alphabet": 1}}, folder / "model.pt")
    assert f"made by another version of {program}.py: alphabet" in run("--resume", folder, env=None)[0]
    odd = before["env"] | {"sizes": before["env"]["sizes"] | {"obs_dim": 99}}
    torch.save(before | {"env": odd}, folder / "model.pt")
    flags = ("--resume", folder, "--total-timesteps", "80")
    assert "'obs_dim': 99" in run(*flags, env=None)[0]
    whole = (folder / "model.pt").read_bytes()
    for broken in (b"", whole[:-100], b"x" * 100):
        (folder / "model.pt").write_bytes(broken)
        assert "model.pt is broken" in run(*flags, env=None)[0]
    (folder / "model.pt").unlink()
    assert "has no model.pt" in run(*flags, env=None)[0]


# setting that decides shapes or meaning -> another value of it
FIXED = {"env": "cdm", "seed": "77", "num_envs": "3", "hidden_dim": "5", "heads": "2", "setting": "paper"}
FIXED |= {"critic_dim": "24", "critic_hidden_dim": "5", "reward_scale": "0.25", "embed_dim": "5"}
FIXED |= {"hyper_dim": "5", "off_policy_size": "77"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_replay_that_was_not_saved_fills_anew_and_the_run_says_so(run, program):
    _, out, folder = run()
    before = checkpoint(folder)
    assert "fills anew" not in out and "buffer" not in before
    _, out, _ = run("--resume", folder, "--total-timesteps", "520", env=None)
    assert "resumed at step 400; the replay fills anew" in out
    if program in STEP:  # the warmup of 100 steps comes again, then an update every 8
        assert checkpoint(folder)["iteration"] == before["iteration"] + 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_without_any_update_says_so_at_both_ends(run, program):
    _, out, folder = run("--total-timesteps", "12" if program in EPISODE else "80", "--eval-every", "0")
    assert "this run may end before its first update" in out and "after no updates" in out
    assert ("alpha has not fallen yet" in out) == (program == "masql")
    _, out, _ = run()
    assert "before its first update" not in out and re.search(r"after \d+ updates", out)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_replay_that_does_not_fit_is_refused_at_the_start(run, program, monkeypatch):
    flag = {"dop_stochastic": "--off-policy-size", "coma": "--batch-size"}.get(program, "--buffer-size")
    monkeypatch.setattr(machine, "free_memory", lambda: 2**20)
    code, _, _ = run(flag, "100000")
    assert re.match(rf"{program}.py: this needs [\d.]+ GiB .* 0.0 GiB are free; lower {flag}", code)


@pytest.mark.parametrize("program", PROGRAMS)
def test_play_plays_greedily_and_prints_a_line(run, play, program):
    _, _, folder = run()
    before, lines = (folder / "model.pt").stat().st_mtime, []
    for _ in range(2):
        code, out = play(folder, "--video")
        assert code == 0
        lines.append(out.strip().splitlines()[-2:])
    assert lines[0] == lines[1]
    header, row = (line.split(" | ") for line in lines[0])
    win_rate = ["win_rate"] * (program in EPISODE)
    assert header == ["run", "step", "episodic_return", "episodic_length", *win_rate]
    assert row[:2] == [str(folder), "400"]
    assert float(row[2]) == pytest.approx(scalars(folder)["eval/episodic_return"][-1][1], abs=1e-3)
    assert (folder / "play.gif").stat().st_size and (folder / "model.pt").stat().st_mtime == before
    assert play(folder, "--env", toy_of(program) + "_kill", "--episodes", "2")[0] == 0
    code, _ = play(folder, "--env", "3m")
    assert (
        code.startswith("play.py: 3m has the sizes {'n_agents': 3, 'obs_dim': 30,") and "'obs_dim': " in code
    )
    (folder / "play.gif").unlink()
    (folder / "play.gif").mkdir()
    assert str(play(folder, "--video")[0]).startswith("play.py: [Errno ")
    assert play(folder, "--episodes", "0")[0] == "play.py: num_envs must be at least 1, got 0"
    file = folder / "model.pt"
    assert play(file)[0] == f"play.py: {file} is a file: give the run folder, {folder}"
    state = checkpoint(folder)
    del state["env"]
    torch.save(state, file)
    assert play(folder)[0] == f"play.py: {file} does not fit: 'env'"


@pytest.mark.parametrize("program", ["coma"])
def test_play_takes_no_more_games_than_the_environment_bears_unless_told(run, play, program, monkeypatch):
    _, _, folder = run()
    made, make = [], envs.make
    monkeypatch.setattr(envs, "settings_for", lambda env_id: {"eval_episodes": 2})
    monkeypatch.setattr(envs, "make", lambda *x, **more: made.append(x[1]) or make(*x, **more))
    assert play(folder)[0] == 0 and play(folder, "--episodes", "3")[0] == 0
    assert made == [2, 3]


@pytest.mark.parametrize("program", ["coma"])
def test_play_does_not_mind_another_state(run, play, program):
    """It is for critics."""
    _, _, folder = run()
    saved = checkpoint(folder)
    saved["env"]["sizes"]["state_dim"] += 1
    torch.save(saved, folder / "model.pt")
    assert play(folder)[0] == 0


@pytest.mark.parametrize("program", ["maddpg"])
def test_play_refuses_other_bounds_of_actions(run, play, program):
    _, _, folder = run(env="quadratic")
    code, _ = play(folder, "--env", "quadratic,bound=2")
    assert code == "play.py: quadratic,bound=2 has other bounds of actions (low) than the run"


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("trouble", "step"),
    [("interrupt", 60 * 4), ("interrupt_evaluation", 200), ("kill", 60 * 4), ("hangup", 60 * 4)],
)
def test_ctrl_c_and_kill_save_and_leave(run, program, trouble, step):
    code, _, folder = run("--total-timesteps", "4000", env=f"{toy_of(program)}_{trouble}")
    assert code == 130 and checkpoint(folder)["global_step"] == step


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_before_the_first_step_leaves_with_a_sentence(run, program):
    code, out, folder = run(env=f"{toy_of(program)}_early")
    assert code == 130 and folder is None
    assert out == "stopped before the first step: there is nothing to save\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_game_that_breaks_costs_no_training(run, program):
    code, out, folder = run("--total-timesteps", "4000", env=f"{toy_of(program)}_break")
    assert code == f"{program}.py: the game broke" and f"saved {folder}/model.pt of step 236" in out
    assert checkpoint(folder)["global_step"] == 59 * 4


@pytest.mark.parametrize("program", PROGRAMS)
def test_video_of_a_game_without_pictures_is_refused_at_once(run, program):
    code, _, folder = run("--capture-video", env=f"{toy_of(program)}_blind")
    assert code == f"{program}.py: it draws no picture" and folder is None


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_evaluations_and_terminal_it_prints_what_it_logs(run, program):
    assert "\nstep 400, " in run("--eval-every", "0", "--log-every", "400")[1]
    assert "SPS" not in run()[1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_nan_stops_the_run_with_step_and_name(run, program):
    flags = ("--total-timesteps", "4000", "--log-every", "400")
    code, _, folder = run(*flags, env=f"{toy_of(program)}_nan")
    assert re.match(rf"{program}\.py: \w+_loss is nan at step 400; .*$", code)
    assert not (folder / "model.pt").exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_nan_is_not_saved(run, program):
    """Where no point is due, a checkpoint is as good a place to notice."""
    flags = ("--total-timesteps", "4000", "--log-every", "4000", "--save-every", "220", "--eval-every", "0")
    code, _, folder = run(*flags, env=f"{toy_of(program)}_nan")
    assert re.match(rf"{program}\.py: \w+ is nan, so nothing is saved; .*/model.pt is of step \d+$", code)
    state = checkpoint(folder)
    assert state["global_step"] % 220 < 4 and all(x.isfinite().all() for x in state["actor"].values())


# ---- flags ----
MISTAKES = {  # what comes behind which flags
    PROGRAMS: {
        "--num-envs 0": "--num-envs must be at least 1",
        "--resume nowhere": "nowhere has no model.pt: it is no run folder",
        "--resume=": "has no model.pt: it is no run folder",
        "--capture-video --eval-every 0": "--capture-video saves games of evaluations, which",
        "--seed -1": "--seed must be at least 0",
        "--run-dir /dev/null": "cannot write the run folder: ",
        "--env mmmm": "unknown environment 'mmmm'",
    },
    EPISODE: {
        "--env continuous": "continuous has continuous actions; this algorithm needs discrete ones",
        "--env quadratic": "quadratic has continuous actions; this algorithm needs discrete ones",
        "--target-period 0": "--target-period must be at least 1",
    },
    STEP: {
        "--env boundless": "continuous actions need finite bounds",
        "--env quadratik": "unknown environment 'quadratik': did you mean quadratic",
        "--buffer-size 3": "--buffer-size must be at least --num-envs, 4",
    },
    ("dop_stochastic",): {
        "--total-timesteps -5": "--total-timesteps must be at least 1",
        "--eval-every -1": "--eval-every must be at least 0",
        "--gamma 1.5": "--gamma must be from 0 to 1",
        "--critic-updates -1": "--critic-updates must be at least 0",
        "--critic-lr -0.1": "--critic-lr must be from 0",
        "--kappa nan": "--kappa must be from 0 to 1",
        "--on-policy-batch 9": "--on-policy-batch or --off-policy-batch is larger than its buffer",
        "--on-policy-size 50 --off-policy-size 40": "less than --on-policy-size",
        "--env spread": "spread has continuous actions; this algorithm needs discrete ones",
    },
    ("coma",): {
        "--batch-size 0": "--batch-size must be at least 1",
        "--td-lambda 1.5": "--td-lambda must be from 0 to 1",
    },
    ("qmix",): {
        "--batch-size 30": "--buffer-size is less than --batch-size or --num-envs",
        "--num-envs 30": "--buffer-size is less than --batch-size or --num-envs",
        "--lr -0.1": "--lr must be from 0 to 1",
        "--env mill": "mill has continuous actions; this algorithm needs discrete ones",
    },
    ("maddpg",): {
        "--env quadratic,hight=1": "quadratic has no argument 'hight'; it has episode_limit,",
        "--env aggregations": "did you mean aggregation",
        "--noise-sigma -1": "--noise-sigma must be at least 0",
        "--noise-theta 1.5": "--noise-theta must be from 0 to 1",
        "--tau nan": "--tau must be from 0 to 1",
    },
    ("masql",): {
        "--env toy": "toy has discrete actions; this algorithm needs continuous ones",
        "--env 3m": "3m has discrete actions; this algorithm needs continuous ones",
        "--alpha-start -1": "--alpha-start must be at least 1e-06",
        "--alpha-end 0": "--alpha-end must be at least 1e-06",
        "--particles 1": "--particles must be at least 2",
    },
    ("dop_deterministic",): {
        "--env agregation": "unknown environment 'agregation': did you mean aggregation",
        "--policy-delay 0": "--policy-delay must be at least 1",
        "--noise-sigma -1": "--noise-sigma must be at least 0",
    },
    ("maac",): {
        "--env mil": "unknown environment 'mil': did you mean mill",
        "--alpha -1": "--alpha must be at least 0",
        "--heads 3": "--critic-dim 16 is no multiple of --heads 3",
    },
}


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [(name, *row) for names, rows in MISTAKES.items() for name in names for row in rows.items()],
)
def test_mistakes_get_one_sentence(run, program, flags, words):
    """From the script and without a run folder; sys.exit(str) prints it to stderr and exits with 1."""
    code, _, folder = run(*flags.split())
    assert isinstance(code, str) and words in code and "Traceback" not in code
    assert (
        code.startswith((f"{program}.py: ", " Value error ", " Parsing error "))
        and "\n" not in code
        and folder is None
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_defaults_without_flags(parse, program):
    Args, presets = MODULES[program].Args, MODULES[program].PRESETS
    assert parse() == Args(**presets.get(Args().env, {}))
    assert parse("--env", "aim") == Args(env="aim")


@pytest.mark.parametrize(
    ("program", "preset"), [(name, preset) for name in PROGRAMS for preset in MODULES[name].PRESETS]
)
def test_presets_lie_between_defaults_and_flags(parse, monkeypatch, program, preset):
    Args, presets = MODULES[program].Args, MODULES[program].PRESETS
    values = presets[preset]
    chosen = {"env": f"{preset.upper()},n_agents=3"}
    if preset in ("paper", "official", "appendix"):
        chosen = {"env": "AIM", "setting": preset}
    flags = [x for name, value in chosen.items() for x in (f"--{name}", value)]
    assert parse(*flags) == Args(**chosen | values)
    own = {name: x + 1 if type(x) is int else x / 2 for name, x in values.items() if type(x) in (int, float)}
    words = [x for name, value in own.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    assert own and parse(*flags, *words) == Args(**chosen | values | own)
    if "setting" in chosen:  # it beats an environment's preset
        monkeypatch.setitem(presets, "aim", {"num_envs": 333, "seed": 9, "gamma": 0.9})
        assert "num_envs" in values
        assert parse(*flags, "--gamma", "0.8") == Args(**chosen | {"seed": 9} | values | {"gamma": 0.8})


@pytest.mark.parametrize("program", ["dop_stochastic", "dop_deterministic", "coma", "qmix"])
def test_a_setting_leaves_nothing_of_the_method_to_an_environment(program):
    """Only how long a run is and what it logs may come from the environment's preset beside a setting."""
    presets = MODULES[program].PRESETS
    settings = presets.keys() & {"paper", "official", "appendix"}
    length = {"total_timesteps", "warmup_steps", "eval_every", "eval_episodes", "log_every", "save_every"}
    for setting, env in itertools.product(settings, presets.keys() - settings):
        assert presets[env].keys() - presets[setting].keys() <= length, (setting, env)


@pytest.mark.parametrize("program", ["coma"])
def test_help_shows_the_presets_in_force(parse, capsys, program):
    for flags, games in (((), 16), (("--env", "cdm ,n_agents=3"), 8)):
        with pytest.raises(SystemExit):
            parse(*flags, "--help")
        assert f"games played in parallel (default: {games})" in capsys.readouterr().out
