"""MADDPG: equations against slow loops from the papers, exploration, one update, and the program."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import test_dop_stochastic as sibling
import test_masql as step
import torch
from test_dop_stochastic import checkpoint, same, scalars
from test_masql import HIGH, LOW, OBS, SMALL, Aim, D, N, S, rand, seeded, slow_net

import maddpg

run, toys, one_thread = sibling.run, sibling.toys, sibling.one_thread  # fixtures
aims, double = step.program, step.double
A = 5
PARTS = ("actor", "critic", "actor_target", "critic_target", "actor_optimizer", "critic_optimizer")


@pytest.fixture(autouse=True)
def program(aims, monkeypatch):
    """The sibling's fixture `run` runs this program."""
    monkeypatch.setattr(sibling, "SCRIPT", Path(maddpg.__file__))
    monkeypatch.setattr(sibling, "SMALL", SMALL)


def make_actor(discrete=False, seed=0):
    torch.manual_seed(seed)
    low, high = torch.zeros(2, N, A) if discrete else torch.stack([LOW, HIGH]).to(torch.get_default_dtype())
    return maddpg.Actor(N, OBS, 8, low.shape[1], low=low, high=high, final_init=0.0)


# ---- equations ----
def test_joint_actions_hold_ones_own_and_the_others_in_the_order_of_agents():
    own, others = rand(4, N, D), rand(4, N, D, seed=1)
    joint = maddpg.own_in_joint(own, others)
    for b, i in itertools.product(range(4), range(N)):
        assert torch.equal(joint[b, i], torch.cat([own[b, j] if j == i else others[b, j] for j in range(N)]))


def test_gumbel_softmax_samples_the_softmax_with_the_gradient_of_a_soft_sample():
    logits = torch.tensor([0.3, -1.2, 2.0, -1e9, 0.0], dtype=torch.float64, requires_grad=True)
    samples = maddpg.gumbel_softmax(logits.expand(200_000, A), seeded())
    values = samples.detach().round()
    torch.testing.assert_close(samples.detach(), values)
    assert (values.sum(-1) == 1).all() and not values[:, 3].any()
    torch.testing.assert_close(values.mean(0), logits.detach().softmax(-1), atol=0.005, rtol=0)
    weights = rand(200_000, A, seed=1)
    gumbel = -torch.empty_like(weights).exponential_(generator=seeded()).log()
    soft = (logits + gumbel).softmax(-1)
    assert torch.equal(soft.argmax(-1), values.argmax(-1))
    slopes = [torch.autograd.grad((weights * x).sum(), logits)[0] for x in (samples, soft)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("theta, sigma", [(0.15, 0.2), (1.0, 0.3)])
def test_noise_has_the_stationary_deviation_and_memory_of_its_process(theta, sigma):
    noise, generator = torch.zeros(50_000), seeded()
    for _ in range(40):
        before, noise = noise, maddpg.noise_step(noise, theta, sigma, generator)
    assert noise.std().item() == pytest.approx(sigma / math.sqrt(1 - (1 - theta) ** 2), rel=0.02)
    assert torch.corrcoef(torch.stack([before, noise]))[0, 1].item() == pytest.approx(1 - theta, abs=0.02)


# ---- acting ----
def test_actions_reach_the_bounds_and_the_critic_sees_them_as_minus_one_to_one():
    actor, obs = make_actor(), torch.randn(5, N, OBS)
    for sign, bound in ((-1, LOW), (1, HIGH)):
        actor.biases[-1].data.fill_(sign * 50)
        actions, memory = maddpg.act(actor, obs, None, generator=seeded(), theta=0.15, sigma=1e-3)
        assert memory.any()
        actions, _ = maddpg.act(actor, obs, None)
        torch.testing.assert_close(actions, bound.expand(5, N, D))
        torch.testing.assert_close(maddpg.encode(actor, actions), torch.full((5, N, D), float(sign)))


def test_noise_goes_on_from_step_to_step_and_is_scaled_to_the_bounds():
    actor, obs, memory = make_actor(), torch.randn(5, N, OBS), None
    plain = maddpg.encode(actor, maddpg.act(actor, obs, None)[0])
    for seed in range(3):
        before = torch.zeros(5, N, D) if memory is None else memory
        actions, memory = maddpg.act(actor, obs, None, memory, seeded(seed), theta=0.15, sigma=0.2)
        torch.testing.assert_close(memory, maddpg.noise_step(before, 0.15, 0.2, seeded(seed)))
        expected = (plain + memory).clamp(-1, 1)
        torch.testing.assert_close(maddpg.encode(actor, actions), expected, atol=1e-5, rtol=0)


def test_uniform_actions_fill_the_bounds_and_discrete_ones_the_legal_actions():
    actions, _ = maddpg.act(make_actor(), torch.randn(20_000, N, OBS), None, None, seeded(), uniform=True)
    share = (actions - LOW) / (HIGH - LOW)
    torch.testing.assert_close(share.mean(0), torch.full((N, D), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(share.std(0), torch.full((N, D), 12**-0.5), atol=0.01, rtol=0)
    avail_actions = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 0, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    obs, many = torch.randn(N, OBS).expand(40_000, N, OBS), avail_actions.expand(40_000, N, A)
    actor = make_actor(discrete=True)
    policy = actor(obs[:1], many[:1]).softmax(-1)[0]
    for uniform, expected in ((True, avail_actions / avail_actions.sum(1, True)), (False, policy)):
        actions, _ = maddpg.act(actor, obs, many, None, seeded(), uniform=uniform)
        shares = maddpg.encode(actor, actions).mean(0)
        torch.testing.assert_close(shares, expected.detach().float(), atol=0.01, rtol=0)
        assert not shares[~avail_actions].any()
    assert torch.equal(maddpg.act(actor, obs[:1], many[:1])[0][0], policy.argmax(-1))


# ---- one update ----
def learner(discrete=False, team_reward=False, B=6, **settings):
    """The arguments of `update` up to the batch; a critic per agent gets a reward per agent, unless told."""
    args = maddpg.Args(**{"gamma": 0.9, "reward_scale": 0.5, "tau": 0.0, "logit_penalty": 0.1} | settings)
    actor, actor_target = make_actor(discrete), make_actor(discrete, seed=1)
    sizes = (N if args.critic_per_agent else 1, S + actor.high.numel(), 8, 1)
    critic, critic_target = maddpg.Critic(*sizes), maddpg.Critic(*sizes)
    optimizers = [torch.optim.SGD(x.parameters(), lr=1e-2) for x in (actor, critic)]
    masks, actions = [None] * 2, (LOW + torch.rand(B, N, D) * (HIGH - LOW)).to(torch.get_default_dtype())
    if discrete:
        masks = torch.rand(2, B, N, A) < 0.6
        masks[..., 0] = True
        actions = masks[0].float().flatten(0, 1).multinomial(1, generator=seeded()).view(B, N)
    reward = torch.randn(B, N) if args.critic_per_agent and not team_reward else torch.randn(B)
    rows = torch.randn(B, N, OBS), torch.randn(B, S), masks[0], actions, reward, torch.arange(B) % 3 == 0
    batch = maddpg.Batch(*rows, torch.randn(B, N, OBS), torch.randn(B, S), masks[1])
    return args, actor, critic, actor_target, critic_target, optimizers, batch


def gradients_of(monkeypatch, parts):
    """Logs, then loss and gradients of the critic and of the actor, without any step."""
    with monkeypatch.context() as patch:
        seen = step.catch_gradients(patch, maddpg)
        return maddpg.update(*parts, seeded()), *seen


def slow_policy(network, i, obs, avail_actions):
    """Agent i's action in -1..1, or its softmax over legal actions; also its legal logits."""
    x = slow_net(network, i, obs)
    return (x.tanh(), None) if avail_actions is None else (soft(x, avail_actions), x[avail_actions])


def soft(logits, avail_actions):
    p = logits.exp() * avail_actions
    return p / p.sum()


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("others", ["replayed", "current"])
@pytest.mark.parametrize("per_agent, team_reward", [(False, True), (True, False), (True, True)])
def test_update_equals_a_loop_over_transitions_and_agents(
    double, monkeypatch, discrete, others, per_agent, team_reward
):
    # soft samples without noise, whose loop needs no luck
    monkeypatch.setattr(maddpg, "gumbel_softmax", lambda logits, generator: logits.softmax(-1))
    parts = learner(discrete, team_reward, critic_per_agent=per_agent, others_actions=others)
    args, actor, critic, actor_target, critic_target, _, batch = parts
    logs, (critic_loss, critic_grads), (actor_loss, actor_grads) = gradients_of(monkeypatch, parts)
    B, weights, targets = len(batch.obs), list(actor.parameters()), []
    loss, objective, ascent = 0, 0, [torch.zeros_like(x) for x in weights]
    for b in range(B):
        legal, next_legal = (
            [None] * N if x is None else x[b] for x in (batch.avail_actions, batch.next_avail_actions)
        )
        next_joint = [slow_policy(actor_target, j, batch.next_obs[b, j], next_legal[j])[0] for j in range(N)]
        if discrete:
            replayed = [torch.eye(A)[a] for a in batch.actions[b]]
        else:
            replayed = [(batch.actions[b, j] - LOW[j]) / (HIGH[j] - LOW[j]) * 2 - 1 for j in range(N)]
        for g in range(critic.groups):
            reward = args.reward_scale * (batch.reward[b, g] if batch.reward.dim() == 2 else batch.reward[b])
            next_q = slow_net(critic_target, g, batch.next_state[b], *next_joint).detach()[0]
            targets.append(reward + (0 if batch.terminated[b] else args.gamma * next_q))
            loss = loss + (slow_net(critic, g, batch.state[b], *replayed)[0] - targets[-1]) ** 2 / B
        current = [slow_policy(actor, j, batch.obs[b, j], legal[j]) for j in range(N)]
        for i in range(N):  # Eq. 5 of [MADDPG]: the slope of Q by a_i, through the slope of mu_i
            joint = list(replayed) if others == "replayed" else [x.detach() for x, _ in current]
            joint[i] = own = current[i][0].detach().requires_grad_()
            q = slow_net(critic, i if per_agent else 0, batch.state[b], *joint)
            outputs, slopes = [current[i][0]], [torch.autograd.grad(q, own)[0]]
            objective += q.item() / B
            if discrete:  # of the mean over all actions, illegal ones count as 0
                legal_logits = current[i][1]
                objective -= 0.1 * legal_logits.square().sum().item() / A / B
                outputs, slopes = [*outputs, legal_logits], [*slopes, -0.2 * legal_logits.detach() / A]
            for total, x in zip(ascent, torch.autograd.grad(outputs, weights, slopes), strict=True):
                total += x / B
    torch.testing.assert_close(logs["td_target"], torch.stack(targets).mean())
    assert (critic_loss, actor_loss) == pytest.approx((loss.item(), -objective))
    torch.testing.assert_close(critic_grads, torch.autograd.grad(loss, list(critic.parameters())))
    torch.testing.assert_close(actor_grads, tuple(-x for x in ascent))


@pytest.mark.parametrize("per_agent", [True, False])
@pytest.mark.parametrize("current", [True, False])
def test_an_agents_critic_value_moves_its_own_parameters_only(per_agent, current):
    _, actor, critic, *_, batch = learner(critic_per_agent=per_agent)
    own = actor(batch.obs, None)
    others = own.detach() if current else maddpg.encode(actor, batch.actions)
    q_values = critic(batch.state, maddpg.own_in_joint(own, others))
    for i in range(N):
        for grad in torch.autograd.grad(q_values[:, i].sum(), list(actor.parameters()), retain_graph=True):
            assert [bool(part.any()) for part in grad] == [j == i for j in range(N)]


@pytest.mark.parametrize("discrete", [False, True])
def test_whose_actions_enter_changes_the_actors_gradient_and_nothing_else(monkeypatch, discrete):
    results = []
    for others in ("replayed", "current"):
        _, critic, actor = gradients_of(monkeypatch, learner(discrete, others_actions=others))
        results.append((critic, actor))
    assert same(results[0][0], results[1][0]) and not same(results[0][1], results[1][1])
    if not discrete:  # the replay holds the current actions: no difference
        results = []
        for others in ("replayed", "current"):
            *parts, batch = learner(others_actions=others)
            played, _ = maddpg.act(parts[1], batch.obs, None)
            results.append(gradients_of(monkeypatch, (*parts, batch._replace(actions=played)))[2][1])
        torch.testing.assert_close(*results)


def test_one_state_for_all_changes_nothing(monkeypatch):
    """Once with equal rows, once with rows that differ in what the target critic ignores."""
    *parts, batch = learner()
    parts[4].weights[0].data[0, S - 1] = 0
    equal = {name: getattr(batch, name)[:1].expand(6, -1, -1) for name in ("obs", "next_obs")}
    batch = batch._replace(**equal, state=batch.state[:1].expand(6, -1), next_state=torch.zeros(6, S))
    marked = batch.next_state.clone()
    marked[:, S - 1] = torch.arange(6)
    rows = [gradients_of(monkeypatch, (*parts, x)) for x in (batch, batch._replace(next_state=marked))]
    torch.testing.assert_close(*rows)


def test_update_moves_networks_and_targets():
    parts = learner(tau=0.25)
    before = [[x.clone() for x in part.parameters()] for part in parts[1:5]]
    logs = maddpg.update(*parts, seeded())
    after = [list(part.parameters()) for part in parts[1:5]]
    assert not same(before[0], after[0]) and not same(before[1], after[1])
    for live, target in ((0, 2), (1, 3)):
        expected = [0.75 * x + 0.25 * y for x, y in zip(before[target], after[live], strict=True)]
        torch.testing.assert_close(after[target], expected)
    assert all(x.isfinite() for x in logs.values())


# ---- the program ----
@pytest.mark.parametrize("flags", [(), ("--critic-per-agent", "--others-actions", "current")])
def test_a_run_learns_writes_and_prints(run, flags):
    settings = "--total-timesteps 3200 --eval-every 1600 --update-every 4 --gamma 0 --actor-lr 0.001"
    code, out, folder = run(*settings.split(), "--capture-video", *flags, env="aim")
    assert code == 0 and f"run folder {folder}" in out and folder.name.startswith("aim__maddpg__1__")
    assert {path.name for path in folder.iterdir()} >= {"args.json", "model.pt", "1600.gif", "3200.gif"}
    state = checkpoint(folder)
    assert state["args"] == json.loads((folder / "args.json").read_text())
    assert state["global_step"] == 3200 and state["iteration"] == (3200 - 100) // 4 + 1
    curves = scalars(folder)
    charts = "episodic_return episodic_length SPS train_seconds".split()
    losses = "critic_loss actor_loss q_taken td_target grad_norm_actor grad_norm_critic".split()
    tags = {f"charts/{x}" for x in charts} | {f"losses/{x}" for x in losses}
    assert curves.keys() == tags | {f"eval/{x}" for x in charts[:2]}
    share = curves["eval/episodic_return"][-1][1] / curves["eval/episodic_length"][-1][1]
    assert share > 0.9  # untrained: 0.7
    step.check_stored(rewards=9 if flags else 4)


@pytest.mark.parametrize("env", ["aim", "toy"])
def test_same_seed_same_numbers_and_evaluation_does_not_disturb(run, env):
    states = [checkpoint(run(*x, env=env)[2]) for x in ((), ("--eval-every", "0"), ("--seed", "2"))]
    equal = [all(same(states[0][part], state[part]) for part in (*PARTS, "rng")) for state in states[1:]]
    assert equal == [True, False]


def test_discrete_actions_are_learnt(run):
    flags = "--total-timesteps 2000 --eval-every 2000 --noise-sigma 0 --actor-lr 0.005"
    code, _, folder = run(*flags.split(), env="cdm,n_agents=2,n_actions=3,guided_share=0.3,guided_steps=200")
    assert code == 0 and scalars(folder)["eval/episodic_return"][-1][1] == 10


def test_a_battle_runs(run):
    code, out, folder = run("--total-timesteps", "320", "--eval-episodes", "2", env="3M")
    assert code == 0 and "win_rate" in out and checkpoint(folder)["iteration"] == (320 - 100) // 8 + 1


def test_noise_is_forgotten_where_an_episode_ends(run):
    run("--num-envs", "64", "--total-timesteps", "640", "--eval-every", "0", env="aim")
    terminated, truncated = (Aim.last.log[-1][x] for x in (5, 10))
    memory = Aim.program["memory"].flatten(1)
    assert torch.equal((memory == 0).all(1), terminated | truncated) and 0 < terminated.sum() < 64


@pytest.mark.parametrize("warmup_actions", ["untrained", "uniform"])
def test_who_acts_during_the_warmup(run, warmup_actions):
    """Without noise and learning, the untrained policies repeat themselves."""
    flags = f"--noise-sigma 0 --actor-lr 0 --warmup-steps 200 --warmup-actions {warmup_actions}"
    run(*flags.split(), env="aim")
    actor = Aim.program["actor"]
    same_as_policy = [
        torch.allclose(row[3], maddpg.act(actor, row[0], None)[0], atol=1e-5) for row in Aim.last.log
    ]
    assert same_as_policy == [warmup_actions == "untrained"] * 50 + [True] * 50


def test_an_environment_biases_the_untrained_policy(run):
    """One update would change it, so none happens."""
    probabilities, biases = [], []
    for env in ("cdm", "cdm,first_action=0.8"):
        _, _, folder = run("--warmup-steps", "500", env=env)
        state = checkpoint(folder)
        assert state["iteration"] == 0 and same(state["actor"], state["actor_target"])
        biases.append(state["actor"]["biases.2"])
        torch.manual_seed(0)
        actor = maddpg.Actor(
            10, 1, 16, 16, 10, low=torch.zeros(10, 10), high=torch.zeros(10, 10), final_init=0
        )
        actor.load_state_dict(state["actor"])
        policy = actor(torch.ones(1, 10, 1), torch.ones(1, 10, 10, dtype=torch.bool)).softmax(-1)[0]
        probabilities.append(policy[:, 0].mean().item())
    assert probabilities == pytest.approx([0.1, 0.8], abs=0.05)
    expected = torch.tensor([math.log(0.8 / (0.2 / 9))] + [0.0] * 9).expand(10, 1, 10)
    torch.testing.assert_close(biases[1] - biases[0], expected)


def test_resume_restores_and_goes_on(run):
    step.check_resume(run, PARTS)


def test_evaluate_plays_without_noise_and_prints_a_line(run):
    step.check_evaluate(run)


def test_ctrl_c_saves_and_nan_stops(run):
    step.check_stops(run, "maddpg.py")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--env", "boundless"], "boundless has actions without finite bounds"),
        (["--env", "quadratik"], "unknown environment 'quadratik': did you mean quadratic"),
        (["--noise-sigma", "-1"], "--noise-sigma must be at least 0"),
        (["--noise-theta", "1.5"], "--noise-theta must be from 0 to 1"),
        (["--tau", "nan"], "--tau must be from 0 to 1"),
        (["--buffer-size", "3"], "--buffer-size must be at least --num-envs, 4"),
        (["--evaluate", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_mistakes_get_one_sentence(run, flags, words):
    sibling.check_mistake(run(*flags, env="aim"), "maddpg.py", words)


def test_presets_lie_between_defaults_and_flags(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["maddpg.py", *flags])
        return maddpg.parse_args()

    assert parse("--env", "aim") == maddpg.Args(env="aim")
    paper = parse()
    assert paper == maddpg.Args(**maddpg.PRESETS["quadratic"])
    assert (paper.total_timesteps, paper.warmup_steps, paper.reward_scale) == (15_000, 1_000, 0.1)
    numbers = (paper.actor_lr, paper.critic_lr, paper.critic_weight_decay, paper.gamma, paper.tau)
    assert numbers == (1e-4, 1e-3, 1e-2, 0.99, 1e-3)  # section 7 of [DDPG]
    assert (paper.batch_size, paper.noise_theta, paper.noise_sigma) == (64, 0.15, 0.2)
    flags = parse("--env", "QUADRATIC", "--tau", "0.5", "--noise-theta", "1")
    own = {"env": "QUADRATIC", "tau": 0.5, "noise_theta": 1.0}
    assert flags == maddpg.Args(**maddpg.PRESETS["quadratic"] | own)


@pytest.mark.parametrize(("max_grad_norm", "moved"), [(0.0, 5.0), (1.0, 1.0), (7.0, 5.0)])
def test_gradients_are_clipped_all_together(max_grad_norm, moved):
    weights = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2))]
    untouched = torch.nn.Parameter(torch.ones(1))
    loss = untouched.squeeze() * (3 * weights[0].sum() + 4 * weights[1][0])
    norm = maddpg.descend(torch.optim.SGD(weights, lr=1.0), loss, max_grad_norm)
    assert norm.item() == pytest.approx(5) and untouched.grad is None
    torch.testing.assert_close(torch.cat([*weights]), torch.tensor([-3.0, -4, 0]) * moved / 5)
