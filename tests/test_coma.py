"""COMA: equations against enumerations and loops, the critic's inputs, one iteration, and the program."""

import copy
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import test_dop_stochastic as sibling
import torch
import torch.nn.functional as F
from test_dop_stochastic import OBS, A, N, S, checkpoint, same, scalars

import coma

run, toys, one_thread = sibling.run, sibling.toys, sibling.one_thread  # fixtures
SMALL = "--num-envs 4 --total-timesteps 400 --eval-every 200 --eval-episodes 6 --batch-size 4".split()
SMALL += "--critic-updates 2".split()
PARTS = ("actor", "critic", "critic_target", "actor_optimizer", "critic_optimizer")


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """The sibling's fixture `run` runs this program."""
    monkeypatch.setattr(sibling, "SCRIPT", Path(coma.__file__))
    monkeypatch.setattr(sibling, "SMALL", SMALL)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# ---- equations ----
def test_advantage_equals_a_loop_and_passes_no_gradient():
    q_values, pi = rand(2, 4, N, A).requires_grad_(), rand(2, 4, N, A, seed=1).softmax(-1).requires_grad_()
    actions = torch.randint(A, (2, 4, N), generator=torch.Generator().manual_seed(0))
    advantage = coma.counterfactual_advantage(q_values, pi, actions)
    assert advantage.shape == actions.shape and not advantage.requires_grad
    for i in itertools.product(range(2), range(4), range(N)):
        baseline = sum(pi[i][a].item() * q_values[i][a].item() for a in range(A))
        assert advantage[i].item() == pytest.approx(q_values[i][actions[i]].item() - baseline)


def test_baseline_leaves_the_expected_gradient_unchanged():
    """Over all joint actions, from any joint Q: with and without it, and the slope of E_pi[Q] itself."""
    legal = torch.ones(N, A, dtype=torch.bool)
    legal[1, 3] = False
    q_joint = rand(*[A] * N)  # Q of every joint action
    leaf = rand(N, A, seed=1).requires_grad_()
    pi = coma.epsilon_policy(leaf, legal, 0.3)
    with_baseline, without, value = 0, 0, 0
    for joint in itertools.product(range(A), repeat=N):
        p = math.prod(pi[i, joint[i]] for i in range(N))
        value = value + p * q_joint[joint]
        rows = [q_joint[tuple(slice(None) if j == i else joint[j] for j in range(N))] for i in range(N)]
        q_values, actions = torch.stack(rows), torch.tensor(joint)
        advantage = coma.counterfactual_advantage(q_values, pi, actions)
        with_baseline += p.detach() * coma.policy_gradient_loss(pi, actions, advantage)
        q_taken = q_joint[joint].expand(N)
        without += p.detach() * coma.policy_gradient_loss(pi, actions, q_taken)
    slopes = [
        torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (with_baseline, without, -value / N)
    ]
    assert slopes[0].abs().max() > 0.01 and not slopes[0][1, 3]
    torch.testing.assert_close(slopes[0], slopes[1])
    torch.testing.assert_close(slopes[0], slopes[2])


def lambda_return(rewards, q_taken, last_q, gamma, td_lambda):
    """Targets of one agent in one episode: the mixture of n-step returns; last_q: Q after the end."""
    T, q = len(rewards), [*q_taken, last_q]

    def n_step(t, n):
        return sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * q[t + n]

    return [
        sum((1 - td_lambda) * td_lambda ** (n - 1) * n_step(t, n) for n in range(1, T - t))
        + td_lambda ** (T - t - 1) * n_step(t, T - t)
        for t in range(T)
    ]


@pytest.mark.parametrize("td_lambda", [0.0, 0.8, 1.0])
def test_targets_equal_the_printed_mixture_of_n_step_returns(td_lambda):
    lengths, T = [6, 4, 1, 6], 6
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    terminated = torch.zeros(4, T, dtype=torch.bool)
    terminated[0, 5] = terminated[1, 3] = True
    reward, q_taken, next_q = rand(4, T), rand(4, T, N, seed=1), rand(4, T, N, seed=2)
    for i, length in enumerate(lengths):
        next_q[i, : length - 1] = q_taken[i, 1:length]
        reward[i, length:], next_q[i, length:] = 1e6, 1e6
    steps = [x.unsqueeze(-1).expand(4, T, N) for x in (reward, terminated, mask)]
    ours = coma.td_lambda_targets(*steps, q_taken, next_q, 0.9, td_lambda)
    for i, n in itertools.product(range(4), range(N)):
        length = lengths[i]
        last_q = 0 if terminated[i, length - 1] else next_q[i, length - 1, n].item()
        oracle = lambda_return(
            reward[i, :length].tolist(), q_taken[i, :length, n].tolist(), last_q, 0.9, td_lambda
        )
        assert ours[i, :length, n].tolist() == pytest.approx(oracle)


def test_an_agent_with_one_legal_action_learns_nothing():
    legal = torch.ones(4, N, A, dtype=torch.bool)
    legal[:, 1, 1:] = False
    leaf, actions = rand(4, N, A).requires_grad_(), torch.ones(4, N, dtype=torch.int64)
    actions[:, 1] = 0
    pi = coma.epsilon_policy(leaf, legal, 0.3)
    advantage = coma.counterfactual_advantage(rand(4, N, A, seed=1), pi, actions)
    torch.testing.assert_close(advantage[:, 1], torch.zeros(4, dtype=torch.float64))
    coma.policy_gradient_loss(pi, actions, torch.ones_like(advantage)).backward()  # whatever its advantage
    assert leaf.grad[:, 0].all() and leaf.grad[:, 2].all()
    torch.testing.assert_close(leaf.grad[:, 1], torch.zeros(4, A, dtype=torch.float64))


# ---- critic ----
def random_critic(seed=0):
    torch.manual_seed(seed)
    return coma.CounterfactualCritic(OBS, S, N, A, 16).double()


def critic_inputs(*leading):
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(A, (*leading, N), generator=generator)
    last_actions = torch.randint(-1, A, (*leading, N), generator=generator)
    return rand(*leading, S), rand(*leading, N, OBS), actions, last_actions


def critic_oracle(critic, state, obs, actions, last_actions, agent):
    """Q (A,) of one agent at one moment, from the whole input written out."""
    others = [F.one_hot(a, A) * (j != agent) for j, a in enumerate(actions)]
    last = [F.one_hot(a, A) if a >= 0 else torch.zeros(A) for a in last_actions]
    x = torch.cat([state, obs[agent], *others, *last, F.one_hot(torch.tensor(agent), N)])
    return critic.head(torch.relu(critic.fc2(torch.relu(critic.fc1(x)))))


@pytest.mark.parametrize("leading", [(7,), (2, 3)])
def test_critic_equals_a_plain_network_on_the_joined_input(leading):
    critic, inputs = random_critic(), critic_inputs(*leading)
    q_values = critic(*inputs)
    assert q_values.shape == (*leading, N, A) and (inputs[3] == -1).any()
    for i in itertools.product(*map(range, leading)):
        for agent in range(N):
            oracle = critic_oracle(critic, *(x[i] for x in inputs), agent)
            torch.testing.assert_close(q_values[(*i, agent)], oracle)


def test_own_action_stays_out_of_the_critic_and_the_others_do_not():
    critic, (state, obs, actions, last_actions) = random_critic(), critic_inputs(50)
    q_values = critic(state, obs, actions, last_actions)
    for agent in range(N):
        changed = actions.clone()
        changed[:, agent] = (changed[:, agent] + 1) % A
        differs = (critic(state, obs, changed, last_actions) != q_values).any(-1)  # (50, N)
        assert not differs[:, agent].any() and differs.sum() == 50 * (N - 1)


# ---- one iteration ----
def learner(limit=5, **settings):
    """The first arguments of `update`, in float64; 7 episodes of various lengths."""
    torch.manual_seed(0)
    args = coma.Args(**{"gamma": 0.9, "critic_updates": 1} | settings)
    actor, critic, critic_target = coma.Actor(OBS, N, A, 16).double(), random_critic(1), random_critic(2)
    optimizers = [torch.optim.SGD(x.parameters(), lr=1e-3) for x in (actor, critic)]
    buffer, _ = sibling.random_play(20, limit=limit)
    batch = buffer.sample([(7, 7)], torch.Generator().manual_seed(0))
    avail_actions = batch.avail_actions.clone()
    avail_actions[..., :2] = True
    floats = {name: getattr(batch, name).double() for name in ("obs", "state", "reward")}
    return (
        args,
        actor,
        critic,
        critic_target,
        optimizers,
        batch._replace(avail_actions=avail_actions, **floats),
    )


def iterate(parts):
    """What `update` logs, and the gradients that it leaves."""
    logs = coma.update(*parts, 0.3, torch.Generator().manual_seed(0))
    return logs, [x.grad for part in parts[1:3] for x in part.parameters()]


@pytest.mark.parametrize("limit", [5, 1])
def test_iteration_equals_a_loop_over_episodes_steps_and_agents(monkeypatch, limit):
    parts = learner(limit)
    args, actor, critic, critic_target, _, batch = copy.deepcopy(parts)
    drawn, sample_actions = [], coma.sample_actions
    monkeypatch.setattr(coma, "sample_actions", lambda *x: (drawn.append(sample_actions(*x)), drawn[-1])[1])
    logs, gradients = iterate(parts)
    lengths = batch.mask.sum(1).tolist()
    terminated = [bool(batch.terminated[i, lengths[i] - 1]) for i in range(7)]
    assert any(terminated) and not all(terminated) and batch.mask.shape[1] == limit

    errors, targets, losses, steps = [], [], [], []
    for i, length in enumerate(lengths):
        hidden, pi = None, []
        for t in range(length + 1):
            last = batch.actions[i, t - 1] if t else torch.full((N,), -1)
            logits, hidden = actor(batch.obs[i, t].view(1, 1, N, OBS), last.view(1, 1, N), hidden)
            pi.append(coma.epsilon_policy(logits[0, 0], batch.avail_actions[i, t], 0.3))

        def inputs(t, i=i, length=length):
            actions = drawn[0][i] if t == length else batch.actions[i, t]
            last = batch.actions[i, t - 1] if t else torch.full((N,), -1)
            return batch.state[i, t], batch.obs[i, t], actions, last

        for n in range(N):
            q = [critic_oracle(critic_target, *inputs(t), n) for t in range(length + 1)]
            q_taken = [q[t][batch.actions[i, t, n]].item() for t in range(length)]
            last_q = 0 if terminated[i] else (pi[length][n] @ q[length]).item()
            rewards = batch.reward[i, :length].tolist()
            targets += lambda_return(rewards, q_taken, last_q, args.gamma, args.td_lambda)
            for t in range(length):
                q_values = critic_oracle(critic, *inputs(t), n)
                errors.append(targets[t - length] - q_values[batch.actions[i, t, n]])
                steps.append((inputs(t), n, pi[t][n], batch.actions[i, t, n]))
    loss = torch.stack(errors).square().mean()
    torch.testing.assert_close(logs["critic_loss"].item(), loss.item())
    torch.testing.assert_close(logs["td_target"].item(), sum(targets) / len(targets))
    slopes = torch.autograd.grad(loss, list(critic.parameters()))
    norm = torch.stack([x.norm() for x in slopes]).norm()
    torch.testing.assert_close(logs["grad_norm_critic"], norm)
    for ours, slope in zip(gradients[-len(slopes) :], slopes, strict=True):
        torch.testing.assert_close(ours, slope * min(1, 10 / norm))
    for x, slope in zip(critic.parameters(), slopes, strict=True):
        x.data -= 1e-3 * slope * min(1, 10 / norm)
    for joint, n, pi, action in steps:  # the advantage is that of the critic after its step
        q_values = critic_oracle(critic, *joint, n).detach()
        losses.append(-(q_values[action] - pi.detach() @ q_values) * pi[action].log())
    slopes = torch.autograd.grad(torch.stack(losses).mean(), list(actor.parameters()))
    torch.testing.assert_close(logs["actor_loss"].item(), torch.stack(losses).mean().item())
    for ours, slope in zip(gradients, slopes, strict=False):
        torch.testing.assert_close(ours, slope)


def test_termination_does_not_bootstrap_and_truncation_does():
    batch = learner()[-1]
    ends = (torch.arange(7), batch.mask.sum(1))  # the last observation of every episode
    targets = []
    for terminated, change in itertools.product((True, False), (0, 1)):
        state = batch.state.clone()
        state[ends] += change
        flags = torch.zeros_like(batch.terminated)
        flags[ends[0], ends[1] - 1] = terminated
        changed = batch._replace(state=state, terminated=flags)
        targets.append(iterate((*learner()[:-1], changed))[0]["td_target"])
    assert targets[0] == targets[1] and targets[2] != targets[3]


def test_padding_is_worth_nothing():
    batch = learner()[-1]
    logs, plain = iterate(learner())
    padding = ~batch.mask  # (B, T)
    behind = F.pad(padding, (1, 0))  # (B, T + 1), without the last observation
    assert padding.any()
    garbage = {name: getattr(batch, name).clone() for name in batch._fields}
    for name in ("obs", "state"):
        garbage[name][behind] = 1e6
    garbage["avail_actions"][behind] = False
    garbage["actions"][padding] = 3
    garbage["reward"][padding] = 1e6
    garbage["terminated"][padding] = True
    noisy_logs, noisy = iterate((*learner()[:-1], batch._replace(**garbage)))
    assert same(logs, noisy_logs)
    assert all(torch.equal(x, y) for x, y in zip(plain, noisy, strict=True))


def test_an_iteration_moves_actor_and_critic_but_not_the_target():
    parts = learner(critic_updates=3)
    before = [copy.deepcopy(part.state_dict()) for part in parts[1:4]]
    logs, _ = iterate(parts)
    after = [part.state_dict() for part in parts[1:4]]
    assert [same(x, y) for x, y in zip(before, after, strict=True)] == [False, False, True]
    names = {"critic_loss", "actor_loss", "q_taken", "td_target", "entropy"}
    assert logs.keys() == names | {"grad_norm_actor", "grad_norm_critic"}
    assert all(x.isfinite() for x in logs.values())


# ---- the program ----
def test_a_run_learns_writes_and_prints(run):
    flags = "--total-timesteps 4000 --eval-every 1000 --capture-video --actor-lr 0.002 --critic-lr 0.002"
    code, out, folder = run(*flags.split(), *"--gamma 0.5 --epsilon-steps 2000".split())
    assert code == 0 and f"run folder {folder}" in out
    assert folder.name.startswith("toy__coma__1__")
    assert {path.name for path in folder.iterdir()} >= {"args.json", "model.pt", "1000.gif", "4000.gif"}
    state = checkpoint(folder)
    assert state["args"] == json.loads((folder / "args.json").read_text())
    assert state["global_step"] == 4000 and state["iteration"] > 50
    curves = scalars(folder)
    names = "episodic_return episodic_length win_rate epsilon SPS train_seconds".split()
    losses = "critic_loss actor_loss entropy q_taken td_target grad_norm_actor grad_norm_critic".split()
    tags = {f"charts/{x}" for x in names} | {f"losses/{x}" for x in losses}
    assert curves.keys() == tags | {f"eval/{x}" for x in names[:3]}
    assert [step for step, _ in curves["eval/win_rate"]] == [1000, 2000, 3000, 4000]
    share = curves["eval/episodic_return"][-1][1] / curves["eval/episodic_length"][-1][1]
    assert share > 0.7  # of the right digit, which only the first observation shows; 0.25 by chance
    assert curves["charts/epsilon"][-1][1] == pytest.approx(0.01)


def test_same_seed_same_numbers_and_evaluation_does_not_disturb(run):
    states = [checkpoint(run(*flags)[2]) for flags in ((), ("--eval-every", "0"), ("--seed", "2"))]
    equal = [all(same(states[0][part], state[part]) for part in (*PARTS, "rng")) for state in states[1:]]
    assert equal == [True, False]


def test_resume_goes_on_and_restores(run):
    _, _, folder = run("--seed", "7", "--gamma", "0.5")
    before = checkpoint(folder)
    run("--resume", str(folder), "--total-timesteps", "404", env=None, small=False)  # no iteration yet
    after = checkpoint(folder)
    assert all(same(after[part], before[part]) for part in (*PARTS, "iteration"))
    code, _, _ = run("--resume", str(folder), "--total-timesteps", "800", env=None, small=False)
    after = checkpoint(folder)
    assert code == 0 and after["global_step"] == 800 and after["iteration"] > before["iteration"] > 0
    assert after["args"] | {"resume": None, "total_timesteps": 400} == before["args"]
    assert not same(after["actor"], before["actor"])


def test_evaluate_plays_greedily_and_prints_a_line(run):
    _, _, folder = run()
    code, out, _ = run("--evaluate", str(folder), env=None, small=False)
    header, row = (line.split(" | ") for line in out.strip().splitlines()[-2:])
    assert not code and header == ["run", "step", "episodic_return", "episodic_length", "win_rate"]
    assert float(row[2]) == pytest.approx(scalars(folder)["eval/episodic_return"][-1][1], abs=1e-3)


def test_target_is_copied_every_period(run):
    state = checkpoint(run("--target-period", "1")[2])
    assert same(state["critic"], state["critic_target"])
    early, late = (checkpoint(run("--target-period", "1000", *x)[2]) for x in ((), ("--critic-lr", "0")))
    assert same(early["critic_target"], late["critic"]) and not same(early["critic"], late["critic"])


def test_an_iteration_takes_each_new_episode_once(run):
    """All four games of one step end together, so 6 new episodes are 8, and 4 are 4, one step's."""
    for batch_size, episodes in (("6", 8), ("4", 4)):
        _, _, folder = run("--batch-size", batch_size, env="cdm,n_agents=2,n_actions=2")
        assert checkpoint(folder)["iteration"] == 400 / episodes


def test_one_step_episodes_and_actions_played_by_the_environment(run):
    env = "cdm,n_agents=2,n_actions=2,guided_share=0.5,guided_steps=100"
    flags = "--total-timesteps 2000 --actor-lr 0.005 --critic-lr 0.005 --eval-every 2000"
    code, _, folder = run(*flags.split(), env=env)
    curves = scalars(folder)
    assert code == 0 and curves["eval/episodic_return"][-1][1] == 10
    assert curves["charts/episodic_length"][-1][1] == 1 and "win_rate" not in str(curves.keys())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--target-period", "0"], "--target-period must be at least 1"),
        (["--td-lambda", "1.5"], "--td-lambda must be from 0 to 1"),
        (["--env", "continuous"], "continuous actions"),
        (["--resume", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_mistakes_get_one_sentence(run, flags, words):
    sibling.check_mistake(run(*flags), "coma.py", words)


def test_presets_lie_between_defaults_and_flags(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["coma.py", *flags])
        return coma.parse_args()

    assert parse() == coma.Args()
    paper = parse("--setting", "paper", "--gamma", "0.5")
    assert paper == coma.Args(setting="paper", gamma=0.5, **coma.PRESETS["paper"])
    numbers = (paper.num_envs, paper.batch_size, paper.actor_lr, paper.critic_lr, paper.td_lambda)
    assert numbers == (8, 8, 5e-4, 5e-4, 0.8)  # authors' code
    assert (paper.epsilon_start, paper.epsilon_end, paper.epsilon_steps) == (0.5, 0.01, 100_000)
    assert parse("--env", "CDM,n_agents=3") == coma.Args(env="CDM,n_agents=3", **coma.PRESETS["cdm"])
