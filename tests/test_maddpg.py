"""MADDPG: equations against slow loops from the papers, exploration, one update, and the program."""

import itertools
import math

import pytest
import torch
from programs import (
    HIGH,
    LOW,
    A,
    Aim,
    D,
    N,
    check_update,
    checkpoint,
    clipping_norms,
    for_critics,
    games,
    gradients_of,
    rand,
    random_transitions,
    same,
    seeded,
    slow_net,
    slow_policy,
)

import maddpg
from envs import make

OBS, S = Aim.OBS, Aim.S


def make_actor(discrete=False, seed=0):
    torch.manual_seed(seed)
    return maddpg.Actor(games(discrete), maddpg.Args(hidden_dim=8))


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
def learner(discrete=False, team_reward=False, **settings):
    """The arguments of `update` up to the batch; a critic per agent gets a reward per agent, unless told."""
    own = {"hidden_dim": 8, "gamma": 0.9, "reward_scale": 0.5, "tau": 0.0, "logit_penalty": 0.1}
    args = maddpg.Args(**own | settings)
    actor, actor_target = make_actor(discrete), make_actor(discrete, seed=1)
    critic, critic_target = (maddpg.Critic(games(discrete), args) for _ in range(2))
    optimizers = [torch.optim.SGD(x.parameters(), lr=1e-2) for x in (actor, critic)]
    reward_shape = (6, N) if args.critic_per_agent and not team_reward else (6,)
    batch = random_transitions(maddpg, discrete, reward_shape)
    return args, actor, critic, actor_target, critic_target, optimizers, batch


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("others", ["replayed", "current"])
@pytest.mark.parametrize("per_agent, team_reward", [(False, True), (True, False), (True, True)])
def test_update_equals_a_loop_over_transitions_and_agents(
    double, monkeypatch, discrete, others, per_agent, team_reward
):
    # soft samples without noise, whose loop needs no luck
    soft, drawn = lambda logits, generator: drawn.append(logits) or logits.softmax(-1), []
    monkeypatch.setattr(maddpg, "gumbel_softmax", soft)
    parts = learner(discrete, team_reward, critic_per_agent=per_agent, others_actions=others)
    args, actor, critic, actor_target, critic_target, _, batch = parts
    logs, (critic_loss, critic_grads), (actor_loss, actor_grads) = gradients_of(monkeypatch, maddpg, parts)
    assert len(drawn) == 2 * discrete  # of next actions, and of own ones
    B, weights, targets = len(batch.obs), list(actor.parameters()), []
    loss, objective, ascent = 0, 0, [torch.zeros_like(x) for x in weights]
    for b in range(B):
        legal, next_legal = (
            [None] * N if x is None else x[b] for x in (batch.avail_actions, batch.next_avail_actions)
        )
        next_joint = [slow_policy(actor_target, j, batch.next_obs[b, j], next_legal[j])[0] for j in range(N)]
        replayed = for_critics(batch.actions[b])
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
        _, critic, actor = gradients_of(monkeypatch, maddpg, learner(discrete, others_actions=others))
        results.append((critic, actor))
    assert same(results[0][0], results[1][0]) and not same(results[0][1], results[1][1])
    if not discrete:  # the replay holds the current actions: no difference
        results = []
        for others in ("replayed", "current"):
            *parts, batch = learner(others_actions=others)
            played, _ = maddpg.act(parts[1], batch.obs, None)
            results.append(gradients_of(monkeypatch, maddpg, (*parts, batch._replace(actions=played)))[2][1])
        torch.testing.assert_close(*results)


def test_one_state_for_all_changes_nothing(monkeypatch):
    """Once with equal rows, once with rows that differ in what the target critic ignores."""
    *parts, batch = learner()
    parts[4].weights[0].data[0, S - 1] = 0
    equal = {name: getattr(batch, name)[:1].expand(6, -1, -1) for name in ("obs", "next_obs")}
    batch = batch._replace(**equal, state=batch.state[:1].expand(6, -1), next_state=torch.zeros(6, S))
    marked = batch.next_state.clone()
    marked[:, S - 1] = torch.arange(6)
    rows = [
        gradients_of(monkeypatch, maddpg, (*parts, x)) for x in (batch, batch._replace(next_state=marked))
    ]
    torch.testing.assert_close(*rows)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("train_actor", [False, True])
def test_actors_and_targets_may_wait_and_the_critic_does_not(discrete, train_actor):
    check_update(maddpg, learner(discrete, tau=0.25), train_actor)


def test_both_gradients_are_clipped(monkeypatch):
    assert clipping_norms(monkeypatch, maddpg, *learner(max_grad_norm=0.3), seeded()) == [0.3, 0.3]


# ---- the program ----
def test_a_battle_runs(run):
    code, out, folder = run("--total-timesteps", "320", "--eval-episodes", "2", env="3M")
    assert code == 0 and "win_rate" in out and checkpoint(folder)["iteration"] == (320 - 100) // 8 + 1


def test_an_untrained_policy_plays_the_first_action_as_often_as_the_environment_asks(run):
    probabilities = []
    for env in ("cdm", "cdm,first_action=0.8"):
        _, _, folder = run("--warmup-steps", "500", env=env)
        actor = maddpg.Actor(make(env), maddpg.Args(hidden_dim=16))
        actor.load_state_dict(checkpoint(folder)["actor"])
        policy = actor(torch.ones(1, 10, 1), torch.ones(1, 10, 10, dtype=torch.bool)).softmax(-1)[0]
        probabilities.append(policy[:, 0].mean().item())
    assert probabilities == pytest.approx([0.1, 0.8], abs=0.05)


@pytest.mark.parametrize("final_init", [0.0, 0.003])
def test_last_layers_may_begin_near_zero(final_init):
    for part in (maddpg.Actor, maddpg.Critic):
        net = part(games(False), maddpg.Args(final_init=final_init))
        first, *_, last = (weight.abs().max().item() for weight in net.weights)
        assert first > 0.05 and (0.002 < last <= 0.003 if final_init else last > 0.05)


def test_numbers_of_the_papers(parse):
    args = parse()
    assert (args.total_timesteps, args.warmup_steps, args.reward_scale) == (15_000, 1_000, 0.1)
    numbers = (args.actor_lr, args.critic_lr, args.critic_weight_decay, args.gamma, args.tau)
    assert numbers == (1e-4, 1e-3, 1e-2, 0.99, 1e-3)  # section 7 of [DDPG]
    assert (args.batch_size, args.noise_theta, args.noise_sigma) == (64, 0.15, 0.2)


@pytest.mark.parametrize(("max_grad_norm", "moved"), [(0.0, 5.0), (1.0, 1.0), (7.0, 5.0)])
def test_gradients_are_clipped_all_together(max_grad_norm, moved):
    weights = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2))]
    untouched = torch.nn.Parameter(torch.ones(1))
    loss = untouched.squeeze() * (3 * weights[0].sum() + 4 * weights[1][0])
    norm = maddpg.descend(torch.optim.SGD(weights, lr=1.0), loss, max_grad_norm)
    assert norm.item() == pytest.approx(5) and untouched.grad is None
    torch.testing.assert_close(torch.cat([*weights]), torch.tensor([-3.0, -4, 0]) * moved / 5)
