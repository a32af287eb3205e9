"""Stochastic DOP around its equations: networks, storage, one iteration, and the program itself."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dop_stochastic as dop
import envs
from envs.base import VecEnv

SCRIPT = Path(dop.__file__)
N, A, OBS, S, LIMIT = 3, 5, 8, 6, 12
SMALL = "--num-envs 4 --total-timesteps 400 --eval-every 200 --eval-episodes 6 --off-policy-size 20".split()
SMALL += (
    "--on-policy-size 8 --on-policy-batch 4 --off-policy-batch 6 --critic-updates 2 --critic-warmup 2".split()
)


class Toy(VecEnv):
    """Agents see a digit at first and should play it; action 4 is masked; ends at random or by the clock."""

    def __init__(self, num_envs, device, seed, validate=True, continuous=False, at_step=None):
        space = spaces.Box(-1, 1, (N, 2), np.float32) if continuous else spaces.MultiDiscrete([A] * N)
        super().__init__(num_envs, N, OBS, S, LIMIT, space, device, seed, True)
        self.digit = torch.zeros(num_envs, dtype=torch.int64)  # (B,)
        self.time = torch.zeros(num_envs, dtype=torch.int64)  # (B,)
        self.at_step, self.steps, self.evaluates = at_step, 0, seed == dop.EVALUATION_SEED

    def _restart(self, done):
        digit = torch.randint(1, 4, (self.num_envs,), generator=self.generator)
        self.digit, self.time = torch.where(done, digit, self.digit), self.time * ~done

    def _advance(self, actions):
        self.steps += 1
        reward = (actions == self.digit[:, None]).float().mean(1)  # (B,)
        if self.steps == 60 and self.at_step == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if self.steps == 3 and self.at_step == "interrupt evaluation" and self.evaluates:
            os.kill(os.getpid(), signal.SIGINT)
        if self.steps == 60 and self.at_step == "nan":
            reward = reward / 0 * 0
        self.time = self.time + 1
        over = torch.rand(self.num_envs, generator=self.generator) < 0.1  # (B,)
        return reward, over, {"battle_won": over & (reward == 1)}

    def _observe(self):
        obs, state = torch.zeros(self.num_envs, N, OBS), torch.zeros(self.num_envs, S)
        obs[torch.arange(self.num_envs), :, self.digit] = (self.time == 0).float()[:, None]
        state[torch.arange(self.num_envs), self.digit] = 1
        state[:, 5] = self.time / LIMIT
        avail_actions = torch.ones(self.num_envs, N, A, dtype=torch.bool)
        avail_actions[:, :, 4] = False
        return obs, state, avail_actions

    def render(self):
        return np.full((8, 8, 3), 10 * self.time[0].item(), np.uint8)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: a second thread would only wait for the first, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(envs._REGISTRY, "toy", (__name__, "Toy", {}))
    monkeypatch.setitem(envs._REGISTRY, "Toy2", (__name__, "Toy", {}))
    monkeypatch.setitem(envs._REGISTRY, "continuous", (__name__, "Toy", {"continuous": True}))
    monkeypatch.setitem(envs._REGISTRY, "interrupt", (__name__, "Toy", {"at_step": "interrupt"}))
    monkeypatch.setitem(envs._REGISTRY, "interrupt2", (__name__, "Toy", {"at_step": "interrupt evaluation"}))
    monkeypatch.setitem(envs._REGISTRY, "nan", (__name__, "Toy", {"at_step": "nan"}))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the program in this process: flags -> exit code or message, stdout, and its newest run folder."""

    def run(*flags, env="toy", small=True):
        handler = signal.getsignal(signal.SIGINT)
        env_flags = ["--env", env] if env else []
        argv = [SCRIPT.name, *env_flags, *(SMALL if small else ()), "--run-dir", str(tmp_path), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            with pytest.raises(SystemExit) as leaving:
                runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            signal.signal(signal.SIGINT, handler)
        folders = sorted(tmp_path.glob("*__*"), key=lambda folder: folder.stat().st_mtime)
        return leaving.value.code, capsys.readouterr().out, folders[-1] if folders else None

    return run


def checkpoint(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_mistake(outcome, script, words):
    """One sentence from the script and no run folder; sys.exit(str) prints it to stderr and exits with 1."""
    code, _, folder = outcome
    assert isinstance(code, str) and code.startswith(f"{script}: ") and words in code
    assert "\n" not in code and folder is None


def same(x, y):
    """Whether two checkpoints or parts of them hold the same numbers."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return torch.equal(x, y) if torch.is_tensor(x) else x == y


# ---- networks ----
def test_whole_episodes_and_single_steps_give_the_same_logits():
    torch.manual_seed(0)
    actor = dop.Actor(OBS, N, A, 16)
    obs, actions = torch.randn(4, 7, N, OBS), torch.randint(A, (4, 7, N))
    last_actions = F.pad(actions[:, :-1], (0, 0, 1, 0), value=-1)
    whole, last_hidden = actor(obs, last_actions)
    hidden = torch.zeros(4, N, 16)
    for t in range(7):
        logits, hidden = actor(obs[:, t : t + 1], last_actions[:, t : t + 1], hidden)
        torch.testing.assert_close(logits[:, 0], whole[:, t])
    torch.testing.assert_close(hidden, last_hidden)


def test_looked_up_columns_equal_one_hot_inputs():
    torch.manual_seed(0)
    actor = dop.Actor(OBS, N, A, 16)
    obs, last_actions = torch.randn(2, 1, N, OBS), torch.tensor([[[-1, 0, 4]], [[2, -1, -1]]])
    one_hot = F.one_hot(last_actions.clamp_min(0), A) * (last_actions >= 0).unsqueeze(-1)
    ids = torch.eye(N).expand(2, 1, N, N)
    x = torch.relu(actor.fc(torch.cat([obs, one_hot, ids], -1))).view(1, 2 * N, 16)
    logits = actor.head(actor.gru(x)[0]).view(2, 1, N, A)
    torch.testing.assert_close(actor(obs, last_actions)[0], logits)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("leading", [(), (4,), (4, 2)])
def test_weights_of_the_critic_are_a_distribution_over_agents(separate, leading):
    critic = dop.DecomposedCritic(S, N, A, 16, separate, zero_init=False)
    q_values, k, b = critic(torch.randn(*leading, S))
    assert q_values.shape == (*leading, N, A) and k.shape == (*leading, N) and b.shape == leading
    assert (k >= 0).all()
    torch.testing.assert_close(k.sum(-1), torch.ones(leading))


def test_separate_critics_share_nothing_and_are_plain_networks():
    torch.manual_seed(0)
    critic = dop.DecomposedCritic(S, N, A, 16, separate=True, zero_init=False)
    state = torch.randn(7, S)
    q_values, _, _ = critic(state)
    for i in range(N):
        x = state
        for layer, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            x = F.linear(x, weight[i].t(), bias[i, 0])
            x = torch.relu(x) if layer < 2 else x
        torch.testing.assert_close(q_values[:, i], x)
        gradients = torch.autograd.grad(q_values[:, i].sum(), list(critic.weights), retain_graph=True)
        assert all(grad[j].any() == (i == j) for grad in gradients for j in range(N))


def test_shared_trunk_has_a_head_per_agent():
    critic = dop.DecomposedCritic(S, N, A, 16, separate=False, zero_init=False)
    q_values, _, _ = critic(torch.randn(7, S))
    first, _, head = torch.autograd.grad(q_values[:, 1].sum(), list(critic.weights))
    assert first.any()
    assert (head.view(16, N, A).abs().sum((0, 2)) > 0).tolist() == [False, True, False]


def test_zero_init_silences_the_local_critics_only():
    q_values, k, b = dop.DecomposedCritic(S, N, A, 16, separate=True)(torch.randn(7, S))
    assert not q_values.any() and k.std() > 0 and b.std() > 0


def test_a_million_actions_of_an_actor_are_all_legal():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    actor = dop.Actor(OBS, N, A, 16)
    avail_actions = torch.rand(1000, N, A) < 0.4
    avail_actions[..., 0] |= ~avail_actions.any(-1)
    obs, memory = 30 * torch.randn(1000, N, OBS), None
    for epsilon in torch.linspace(0, 1, 334).tolist():
        actions, memory = dop.act(actor, obs, avail_actions, memory, epsilon, generator)
        assert avail_actions.gather(-1, actions.unsqueeze(-1)).all()


# ---- storage ----
def random_play(capacity=5, games=3, steps=200, limit=9, seed=0):
    """A buffer fed with numbered steps of games that end by themselves, and the episodes as plain lists."""
    rng = np.random.default_rng(seed)
    buffer = dop.EpisodeBuffer(capacity, games, limit, N, OBS, S, A, "cpu")
    for name in ("obs", "state", "reward"):
        buffer.steps[name].fill_(float("nan"))
    open_episodes, episodes, number = [[] for _ in range(games)], [], 0
    for _ in range(steps):
        number += 1
        names = {"obs": (N, OBS), "state": (S,), "avail_actions": (N, A), "actions": (N,), "reward": ()}
        step = {name: torch.tensor(rng.integers(0, 2, (games, *shape))) for name, shape in names.items()}
        step["reward"] = torch.arange(games) / 100 + number
        step["avail_actions"] = step["avail_actions"].bool()
        step["obs"], step["state"] = step["obs"].float(), step["state"].float()
        length = torch.tensor([len(x) + 1 for x in open_episodes])
        step["terminated"] = torch.tensor(rng.random(games) < 0.2)
        done = step["terminated"] | (length >= limit)
        info = {f"final_{name}": 1 - step[name].float() for name in ("obs", "state", "avail_actions")}
        buffer.add(step, info, done.nonzero().squeeze(1))
        for game in range(games):
            open_episodes[game].append({name: value[game] for name, value in step.items()})
        for game in done.nonzero().flatten().tolist():
            final = {name.removeprefix("final_"): value[game] for name, value in info.items()}
            episodes.append((open_episodes[game], final))
            open_episodes[game] = []
    return buffer, episodes


def test_buffer_returns_the_latest_episodes_as_they_were_played():
    buffer, episodes = random_play()
    assert buffer.n_episodes == len(episodes) > 3 * 5  # so the ring went around several times
    batch = buffer.sample([(5, 5)], torch.Generator().manual_seed(0))
    assert all(not x.is_floating_point() or x.isfinite().all() for x in batch)
    assert batch.obs.dtype == batch.state.dtype == torch.float32
    assert batch.obs.shape[1] == batch.mask.shape[1] + 1 == batch.mask.sum(1).max() + 1
    order = batch.reward[:, 0].argsort()
    latest = sorted(episodes[-5:], key=lambda episode: episode[0][0]["reward"])
    for i, (steps, final) in zip(order.tolist(), latest, strict=True):
        length = len(steps)
        assert batch.mask[i].tolist() == [t < length for t in range(batch.mask.shape[1])]
        for name in ("actions", "reward", "terminated"):
            assert torch.equal(getattr(batch, name)[i, :length], torch.stack([step[name] for step in steps]))
        for name in ("obs", "state", "avail_actions"):
            seen = torch.stack([step[name] for step in steps] + [final[name].to(steps[0][name].dtype)])
            assert torch.equal(getattr(batch, name)[i, : length + 1], seen)
            assert (getattr(batch, name)[i, length:] == seen[-1]).all()  # padding repeats the end


def test_buffer_draws_each_window_uniformly_and_without_repeats():
    buffer, episodes = random_play(capacity=6)
    names = [float(steps[0]["reward"]) for steps, _ in episodes]
    generator, counts = torch.Generator().manual_seed(0), dict.fromkeys(names[-6:], 0)
    for _ in range(600):
        batch = buffer.sample([(2, 3), (4, 6)], generator)
        first = [round(x, 2) for x in batch.reward[:, 0].tolist()]
        recent, old = first[:2], first[2:]
        assert len(set(recent)) == 2 and len(set(old)) == 4
        assert set(recent) <= {round(x, 2) for x in names[-3:]}
        for x in old:
            counts[min(counts, key=lambda name: abs(name - x))] += 1
    assert all(340 < count < 460 for count in counts.values())  # 400 each, standard deviation below 12


def test_buffer_before_it_is_full():
    buffer, episodes = random_play(capacity=500, steps=20)
    batch = buffer.sample([(400, 450)], torch.Generator().manual_seed(0))
    assert len(batch.obs) == len(episodes) < 50


# ---- one iteration ----
def learner(seed=0, **settings):
    torch.manual_seed(seed)
    args = dop.Args(on_policy_batch=3, off_policy_batch=4, **settings)
    actor = dop.Actor(OBS, N, A, 16)
    critic, critic_target = (dop.DecomposedCritic(S, N, A, 16, False, False) for _ in range(2))
    optimizers = [torch.optim.RMSprop(x.parameters(), lr=1e-3) for x in (actor, critic)]
    buffer, _ = random_play(capacity=20)
    draws = [(3, 8), (4, 20)][: 1 if args.tree_backup == "none" else 2]
    batch = buffer.sample(draws, torch.Generator().manual_seed(seed))
    avail_actions = batch.avail_actions.clone()
    avail_actions[..., :2] = True
    return args, actor, critic, critic_target, optimizers, batch._replace(avail_actions=avail_actions)


def iterate(parts, train_actor=True, epsilon=0.3):
    return dop.update(*parts, epsilon, torch.Generator().manual_seed(0), train_actor)


def targets_of(monkeypatch, parts):
    """One iteration, with what it handed to the two target functions."""
    calls = {}

    def spy(name, function):
        def call(*inputs):
            calls[name] = (inputs, function(*inputs))
            return calls[name][1]

        monkeypatch.setattr(dop, name, call)

    for name in ("td_lambda_targets", "tree_backup_targets"):
        spy(name, getattr(dop, name))
    return iterate(parts), calls


def test_targets_bootstrap_from_the_last_observation_of_a_truncated_episode(monkeypatch):
    parts = learner()
    _, actor, _, critic_target, _, batch = parts
    on = dop.Batch(*(x[:3] for x in batch))
    with torch.no_grad():
        pi = dop.policy(actor, on, 0.3)
        q_values, k, b = critic_target(on.state)
    _, calls = targets_of(monkeypatch, parts)
    (_, _, _, q_tot, next_q, *_), _ = calls["td_lambda_targets"]
    for i, length in enumerate(on.mask.sum(1).tolist()):
        for t in range(length):
            taken = q_values[i, t].gather(-1, on.actions[i, t].unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(q_tot[i, t], (k[i, t] * taken).sum() + b[i, t])
        torch.testing.assert_close(next_q[i, : length - 1], q_tot[i, 1:length])
        v = (k[i, length] * (pi[i, length] * q_values[i, length]).sum(-1)).sum() + b[i, length]
        torch.testing.assert_close(next_q[i, length - 1], v)


def test_critic_loss_mixes_both_means_and_padding_is_worth_nothing(monkeypatch):
    for updates, tolerance in ((1, 1e-5), (3, 1e-5)):
        parts = learner(critic_updates=updates, critic_lr=0.0, kappa=0.3)
        parts[4][1].param_groups[0]["lr"] = 0.0
        _, _, critic, _, _, batch = parts
        with torch.no_grad():
            q_values, k, b = critic(batch.state[:, :-1])
        q_tot = dop.decomposed_q(k, b, q_values.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1))
        logs, calls = targets_of(monkeypatch, parts)
        td_target = torch.cat([calls["td_lambda_targets"][1], calls["tree_backup_targets"][1]])
        error = (td_target - q_tot).square()
        loss = 0.7 * error[:3][batch.mask[:3]].mean() + 0.3 * error[3:][batch.mask[3:]].mean()
        torch.testing.assert_close(logs["critic_loss"], loss, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tree_backup", ["decomposed", "sampled", "none"])
@pytest.mark.parametrize("actor_gradient", ["expected", "sampled"])
def test_every_choice_moves_actor_and_critic_but_not_the_target(tree_backup, actor_gradient):
    parts = learner(tree_backup=tree_backup, actor_gradient=actor_gradient)
    before = [{name: x.clone() for name, x in part.state_dict().items()} for part in parts[1:4]]
    logs = iterate(parts)
    after = [part.state_dict() for part in parts[1:4]]
    assert [same(x, y) for x, y in zip(before, after, strict=True)] == [False, False, True]
    assert all(x.isfinite() for x in logs.values())
    assert {"critic_loss", "actor_loss", "entropy", "q_taken", "td_target"} <= logs.keys()
    assert {"grad_norm_actor", "grad_norm_critic"} <= logs.keys()


def test_actor_rests_while_the_critic_warms_up():
    parts = learner()
    before = {name: x.clone() for name, x in parts[1].state_dict().items()}
    logs = iterate(parts, train_actor=False)
    assert same(before, parts[1].state_dict()) and "actor_loss" not in logs


def test_both_actor_gradients_agree_on_average(monkeypatch):
    """Sampled actions from pi, many times, against the exact expectation, at the actor's parameters."""
    args, actor, critic, *_, batch = learner()
    batch = dop.Batch(*(x[:3] for x in batch))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        q_values, k, _ = critic(batch.state[:, :-1])
    pi = dop.policy(actor, batch, 0.3)[:, :-1]
    exact = torch.autograd.grad(
        dop.expected_policy_gradient_loss(k, q_values, pi, batch.mask), actor.head.weight, retain_graph=True
    )[0]
    leaf = pi.detach().requires_grad_()
    draws = [dop.sample_actions(pi.detach(), generator) for _ in range(4000)]
    sampled = [dop.sampled_policy_gradient_loss(k, q_values, leaf, x, batch.mask) for x in draws]
    mean = torch.autograd.grad(torch.stack(sampled).mean(), leaf)[0]
    mean = torch.autograd.grad((pi * mean).sum(), actor.head.weight)[0]
    assert (mean - exact).norm() < 0.1 * exact.norm()


# ---- the program ----
def test_a_run_learns_writes_and_prints(run):
    flags = "--total-timesteps 4000 --eval-every 1000 --capture-video --actor-lr 0.002 --critic-lr 0.002"
    code, out, folder = run(*flags.split())
    assert code == 0
    assert folder.name.startswith("toy__dop_stochastic__1__")
    assert {path.name for path in folder.iterdir()} >= {"args.json", "model.pt", "1000.gif", "4000.gif"}
    assert not list(folder.glob("*.tmp"))
    settings = json.loads((folder / "args.json").read_text())
    assert settings["env"] == "toy" and settings["num_envs"] == 4 and f"run folder {folder}" in out
    state = checkpoint(folder)
    assert state["args"] == settings and state["global_step"] == 4000 and state["iteration"] > 50
    curves = scalars(folder)
    names = "episodic_return episodic_length win_rate epsilon SPS train_seconds".split()
    losses = "critic_loss actor_loss entropy q_taken td_target grad_norm_actor grad_norm_critic".split()
    tags = {f"charts/{name}" for name in names} | {f"losses/{name}" for name in losses}
    assert curves.keys() == tags | {f"eval/{name}" for name in names[:3]}
    assert [step for step, _ in curves["eval/win_rate"]] == [1000, 2000, 3000, 4000]
    assert curves["eval/episodic_return"][-1] == curves["eval/episodic_length"][-1]  # always the right digit
    assert curves["charts/epsilon"][-1][1] == pytest.approx(0.5 - 0.45 * 3996 / 50_000)


def test_same_seed_same_numbers_and_evaluation_does_not_disturb(run):
    states = [checkpoint(run(*flags)[2]) for flags in ((), (), ("--eval-every", "0"), ("--seed", "2"))]
    parts = ("actor", "critic", "critic_target", "actor_optimizer", "critic_optimizer", "rng")
    equal = [all(same(states[0][part], state[part]) for part in parts) for state in states[1:]]
    assert equal == [True, True, False]


def test_resume_goes_on_in_the_same_folder(run):
    _, _, folder = run("--seed", "7", "--tb-lambda", "0.5")
    before = checkpoint(folder)
    code, _, after_folder = run("--resume", str(folder), "--total-timesteps", "800", env=None, small=False)
    after = checkpoint(folder)
    assert code == 0 and after_folder == folder
    assert after["global_step"] == 800 and after["iteration"] > before["iteration"] > 0
    assert after["train_seconds"] > before["train_seconds"] > 0
    assert after["args"] | {"resume": None, "total_timesteps": 400} == before["args"]
    steps = [step for step, _ in scalars(folder)["charts/epsilon"]]
    assert steps == sorted(steps) and steps[0] <= 400 and steps[-1] == 800
    assert not same(after["actor"], before["actor"])


def test_resume_restores_networks_optimisers_and_random_numbers(run):
    _, _, folder = run()
    before = checkpoint(folder)
    assert "raise --total-timesteps" in run("--resume", str(folder), env=None, small=False)[0]
    assert same(checkpoint(folder), before)
    run(
        "--resume", str(folder), "--total-timesteps", "404", env=None, small=False
    )  # one step, no iteration yet
    after = checkpoint(folder)
    for part in ("actor", "critic", "critic_target", "actor_optimizer", "critic_optimizer", "iteration"):
        assert same(after[part], before[part])
    assert not same(after["rng"], before["rng"])


def test_evaluate_plays_greedily_and_prints_a_line(run):
    _, _, folder = run()
    before = (folder / "model.pt").stat().st_mtime
    lines = []
    for _ in range(2):
        code, out, _ = run("--evaluate", str(folder), "--capture-video", env=None, small=False)
        assert not code
        lines.append(out.strip().splitlines()[-2:])
    assert lines[0] == lines[1]
    header, row = (line.split(" | ") for line in lines[0])
    assert header == ["run", "step", "episodic_return", "episodic_length", "win_rate"]
    assert row[:2] == [str(folder), "400"]
    assert float(row[2]) == pytest.approx(scalars(folder)["eval/episodic_return"][-1][1], abs=1e-3)
    assert (folder / "evaluate.gif").stat().st_size and (folder / "model.pt").stat().st_mtime == before


def test_ctrl_c_saves_and_leaves(run):
    code, _, folder = run("--total-timesteps", "4000", env="interrupt")
    assert code == 130
    assert checkpoint(folder)["global_step"] == 60 * 4


def test_ctrl_c_during_an_evaluation_saves_and_leaves(run):
    code, _, folder = run("--total-timesteps", "4000", "--eval-every", "200", env="interrupt2")
    assert code == 130
    assert checkpoint(folder)["global_step"] == 200


def test_random_numbers_of_another_kind_of_device_are_left_alone(run):
    _, _, folder = run()
    state = checkpoint(folder)
    state["rng"] = [torch.zeros(16, dtype=torch.uint8)] * 2  # the size of a CUDA generator's state
    torch.save(state, folder / "model.pt")
    assert run("--evaluate", str(folder), env=None, small=False)[0] in (None, 0)
    assert run("--resume", str(folder), "--total-timesteps", "800", env=None, small=False)[0] == 0


def test_exit_codes_of_the_real_program(tmp_path):
    flags = ["--env", "3m", "--run-dir", str(tmp_path), "--num-envs"]
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags, "2"], stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parent
    ) as program:
        for line in program.stdout:
            if line.startswith("run folder"):
                break
        time.sleep(1)  # into the loop; a signal before its first step would do as well
        program.send_signal(signal.SIGINT)
        assert program.wait(20) == 130
    assert 0 < checkpoint(next(tmp_path.iterdir()))["global_step"] < dop.Args().total_timesteps
    wrong = subprocess.run([sys.executable, str(SCRIPT), *flags, "0"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("dop_stochastic.py: --num-envs") and wrong.stderr.count("\n") == 1


def test_nan_stops_the_run_with_step_and_name(run):
    code, _, folder = run("--total-timesteps", "4000", env="nan")
    assert code.startswith("dop_stochastic.py: ") and "is nan at step 1000" in code and "loss" in code
    assert not (folder / "model.pt").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--env", "mmmm"], "unknown environment 'mmmm'"),
        (["--num-envs", "0"], "--num-envs must be at least 1"),
        (["--critic-updates", "0"], "--critic-updates must be at least 1"),
        (["--total-timesteps", "-5"], "--total-timesteps must be at least 1"),
        (["--eval-every", "-1"], "--eval-every must be at least 0"),
        (["--critic-lr", "-0.1"], "--critic-lr must be from 0"),
        (["--gamma", "1.5"], "--gamma must be from 0 to 1"),
        (["--kappa", "nan"], "--kappa must be from 0 to 1"),
        (["--on-policy-batch", "9"], "a batch is larger than its buffer"),
        (["--on-policy-size", "50", "--off-policy-size", "40"], "less than --on-policy-size"),
        (["--env", "continuous"], "continuous actions"),
        (["--resume", "nowhere"], "nowhere is no run folder"),
        (["--evaluate", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_mistakes_get_one_sentence(run, flags, words):
    check_mistake(run(*flags), "dop_stochastic.py", words)


def test_broken_and_foreign_checkpoints_get_one_sentence(run):
    _, _, folder = run()

    def message(*flags, env=None):
        code, _, _ = run(*flags, env=env, small=False)
        assert isinstance(code, str) and code.startswith("dop_stochastic.py: ") and "\n" not in code
        return code

    assert "has the env toy, which cannot become Toy2" in message("--resume", str(folder), env="Toy2")
    assert "has the env toy, which cannot become Toy2" in message("--evaluate", str(folder), env="Toy2")
    assert "has the setting default, which cannot" in message("--resume", str(folder), "--setting", "paper")
    assert "is broken or does not fit these settings" in message(
        "--resume", str(folder), "--separate-critics"
    )
    whole = (folder / "model.pt").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        (folder / "model.pt").write_bytes(broken)
        assert "is broken or does not fit these settings" in message("--resume", str(folder))
    (folder / "model.pt").unlink()
    assert "has no model.pt" in message("--evaluate", str(folder))
    (folder / "args.json").write_text('{"env": "toy", "alpha": 1}')
    assert "no run folder of this algorithm" in message("--resume", str(folder))


def test_presets_lie_between_defaults_and_flags(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["dop_stochastic.py", *flags])
        return dop.parse_args()

    assert parse() == dop.Args()
    paper = parse("--setting", "paper")
    assert paper == dop.Args(setting="paper", **dop.PRESETS["paper"])
    numbers = (paper.num_envs, paper.critic_lr, paper.actor_lr, paper.epsilon_start, paper.epsilon_steps)
    assert numbers == (4, 1e-4, 5e-4, 1.0, 500_000)  # Appendix G.1 of [DOP]
    flags = parse("--num-envs", "16", "--setting", "paper", "--no-separate-critics")
    assert flags == dop.Args(
        setting="paper", **dop.PRESETS["paper"] | {"num_envs": 16, "separate_critics": False}
    )
    monkeypatch.setitem(dop.PRESETS, "toy", {"num_envs": 3, "gamma": 0.9})
    both = parse("--env", "TOY", "--setting", "paper", "--gamma", "0.8")
    assert (both.num_envs, both.gamma, both.critic_lr) == (3, 0.8, 1e-4)
