"""MAAC: attention, targets, gradients and policies against slow loops and enumeration, and the program."""

import inspect
import itertools

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
)
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import maac
import maddpg

OBS, HEADS, H = Aim.OBS, 2, 8


def make_actor(discrete=False, seed=0):
    torch.manual_seed(seed)
    return maac.Actor(games(discrete), maac.Args(hidden_dim=8))


def make_critic(discrete, n_agents=N):
    env = games(discrete)
    env.n_agents = n_agents
    return maac.AttentionCritic(env, maac.Args(critic_dim=H, heads=HEADS))


def learner(discrete=False, **settings):
    """The arguments of `update` up to the batch."""
    numbers = dict(gamma=0.9, tau=0.0, alpha=0.3, attention_penalty=0.2, logit_penalty=0.1)
    actor, actor_target = make_actor(discrete), make_actor(discrete, seed=1)
    critic, critic_target = make_critic(discrete), make_critic(discrete)
    optimizers = [torch.optim.SGD(x.parameters(), lr=1e-2) for x in (actor, critic)]
    args, batch = maac.Args(**numbers | settings), random_transitions(maac, discrete)
    return args, actor, critic, actor_target, critic_target, optimizers, batch


# ---- attention ----
def leaky(x):
    return torch.where(x > 0, x, 0.01 * x)


def slow_attention(i, query, keys, values):
    """What agent i sees by one head, and the logits of the others: lists over agents of vectors."""
    others = [j for j in range(len(keys)) if j != i]
    logits = [query[i] @ keys[j] for j in others]
    exponentials = [(x / len(query[i]) ** 0.5).exp() for x in logits]
    seen = [x / sum(exponentials) * values[j] for x, j in zip(exponentials, others, strict=True)]
    return sum(seen, torch.zeros_like(values[i])), logits


def slow_critic(critic, obs, actions, own_actions=None):
    """Of one game: outputs of every agent's critic, and the sum of squares of all logits."""
    agents, outputs, squares = range(len(obs)), [], 0
    own = [leaky(slow_net(critic.own_encoder, i, obs[i])) for i in agents]
    other = [leaky(slow_net(critic.other_encoder, i, obs[i], actions[i])) for i in agents]
    query, keys = ([net.weight @ x for x in xs] for net, xs in ((critic.query, own), (critic.key, other)))
    values = [leaky(critic.value.weight @ x + critic.value.bias) for x in other]
    for i in agents:
        seen = []
        for h in range(HEADS):
            part = slice(h * H // HEADS, (h + 1) * H // HEADS)
            x, logits = slow_attention(i, *([x[part] for x in xs] for xs in (query, keys, values)))
            seen.append(x)
            squares = squares + sum(x**2 for x in logits)
        extra = [] if critic.discrete else [(actions if own_actions is None else own_actions)[i]]
        outputs.append(slow_net(critic.head, i, own[i], *seen, *extra))
    return outputs, squares


def test_nobody_attends_to_itself_and_one_agent_sees_nothing():
    query, keys, values = (rand(N, 5, 4, seed=seed).requires_grad_() for seed in range(3))
    seen, _ = maac.attention(query, 1e3 * keys, values)
    for i in range(N):
        for grad in torch.autograd.grad(seen[i].sum(), (keys, values), retain_graph=True):
            assert not grad[i].any() and grad.isfinite().all()
    alone = [x[:1] for x in (query, keys, values)]
    seen, logits = maac.attention(*alone)
    assert not seen.any() and not logits.any() and seen.shape == (1, 5, 4)
    assert not any(grad.any() for grad in torch.autograd.grad(seen.sum() + logits.sum(), alone))


@pytest.mark.parametrize("n_agents", [1, 3])
@pytest.mark.parametrize("discrete", [False, True])
def test_critics_equal_a_loop_over_agents_and_heads(double, discrete, n_agents):
    torch.manual_seed(0)
    critic, obs = make_critic(discrete, n_agents), torch.randn(4, n_agents, OBS)
    actions = torch.eye(A)[torch.randint(A, (4, n_agents))] if discrete else torch.randn(4, n_agents, D)
    own_actions = torch.randn(4, n_agents, D)
    q_taken, q_values, _ = critic(obs, actions, own_actions)
    for b in range(4):
        outputs, _ = slow_critic(critic, obs[b], actions[b], own_actions[b])
        torch.testing.assert_close(q_values[b], torch.stack(outputs))
        taken = [x[action.argmax() if discrete else 0] for x, action in zip(outputs, actions[b], strict=True)]
        torch.testing.assert_close(q_taken[b], torch.stack(taken))


# ---- targets and gradients ----
def test_values_and_entropy_follow_truncated_steps_and_not_terminated_ones():
    reward, terminated, next_q, log_pi = rand(6), torch.arange(6) % 2 == 0, rand(6, N, seed=1), rand(6, N)
    ours = maac.soft_td_targets(reward, terminated, next_q, log_pi, 0.9, 0.3)
    for b, i in itertools.product(range(6), range(N)):
        value = 0 if terminated[b] else 0.9 * (next_q[b, i] - 0.3 * log_pi[b, i]).item()
        assert ours[b, i].item() == pytest.approx(reward[b].item() + value)


def test_the_baseline_is_the_mean_over_own_actions_and_leaves_the_expected_gradient_alone(double):
    """One place: the sampled loss of every own action, weighted by its probability."""
    logits, q_values, alpha = rand(1, N, A).requires_grad_(), 3 * rand(1, N, A, seed=1), 0.3
    pi, log_pi = logits.softmax(-1), logits.log_softmax(-1)
    exact = torch.autograd.grad((pi * (alpha * log_pi - q_values)).sum(), logits, retain_graph=True)[0]
    for centred in (True, False):
        total = 0
        for i, a in itertools.product(range(N), range(A)):
            advantage = q_values[:, :, a]
            if centred:
                actions = torch.eye(A)[a].expand(1, N, A)
                advantage = maac.counterfactual_advantage(q_values, pi.detach(), actions)
                b_i = sum(pi[0, i, x].item() * q_values[0, i, x].item() for x in range(A))
                assert advantage[0, i].item() == pytest.approx(q_values[0, i, a].item() - b_i)
            loss = maac.soft_policy_gradient_loss(log_pi[:, i : i + 1, a], advantage[:, i : i + 1], alpha)
            total = total + pi[0, i, a].detach() * loss
        torch.testing.assert_close(torch.autograd.grad(total, logits, retain_graph=True)[0], exact)


# ---- policies ----
def test_the_squashed_density_is_that_of_torch_and_a_density(double):
    policy = 0.5 * rand(200, 2 * D)
    actions, log_pi = maac.sample_squashed(policy, seeded())
    mean, log_std = policy.split(D, -1)
    oracle = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(log_pi, oracle.log_prob(actions).sum(-1), atol=1e-6, rtol=1e-6)
    # E[1 / pi(a)] is the volume of all actions
    _, log_pi = maac.sample_squashed(torch.zeros(400_000, 2), seeded())
    assert log_pi.neg().exp().mean().item() == pytest.approx(2, rel=0.02)


def test_squashed_policies_stay_finite_far_out_and_greedy_ones_play_the_mean():
    policy = torch.tensor([[1e4, -1e4, 50.0, -50.0], [30.0, -30, -50, 50]]).requires_grad_()
    actions, log_pi = maac.sample_squashed(policy, seeded())
    grad = torch.autograd.grad((actions.sum() + log_pi.sum()), policy)[0]
    assert all(x.isfinite().all() for x in (actions, log_pi, grad)) and (actions.abs() <= 1).all()
    for far, bound in ((-99.0, -5.0), (99.0, 2.0)):  # log deviations
        samples = [maac.sample_squashed(torch.tensor([0.3, x]), seeded()) for x in (far, bound, 0.99 * bound)]
        assert same(samples[0], samples[1]) and not same(samples[0], samples[2])
    actor, obs = make_actor(), torch.randn(5, N, OBS)
    actions, _ = maac.act(actor, obs, None)
    expected = LOW + (actor(obs, None)[..., :D].tanh() + 1) / 2 * (HIGH - LOW)
    torch.testing.assert_close(actions, expected.detach())
    for sign, bound in ((-1, LOW), (1, HIGH)):
        actor.biases[-1].data.fill_(sign * 50)
        actions, _ = maac.act(actor, obs, None, generator=seeded())
        torch.testing.assert_close(actions, bound.expand(5, N, D))


def test_discrete_policies_are_sampled_as_they_say_and_never_play_masked_actions():
    legal = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 0, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    obs, many = torch.randn(N, OBS).expand(40_000, N, OBS), legal.expand(40_000, N, A)
    actor = make_actor(discrete=True)
    actor.biases[-1].data[..., 3] = 100.0
    policy = actor(obs[:1], many[:1])[0]
    actions, memory = maac.act(actor, obs, many, None, seeded())
    shares = maac.encode(actor, actions).mean(0)
    assert memory is None and not shares[~legal].any()
    torch.testing.assert_close(shares, policy.softmax(-1).detach(), atol=0.01, rtol=0)
    assert torch.equal(maac.act(actor, obs[:1], many[:1])[0][0], policy.argmax(-1))
    samples, log_pi = maac.sample_categorical(policy.expand(50, N, A), seeded())
    taken = policy.log_softmax(-1).expand(50, N, A).gather(-1, samples.argmax(-1, True)).squeeze(-1)
    torch.testing.assert_close(log_pi, taken)
    assert (samples.sum(-1) == 1).all() and not samples[:, ~legal].any()


def test_code_that_is_anothers_is_tested_there():
    assert inspect.getsource(maac.encode) == inspect.getsource(maddpg.encode)


# ---- one update ----
@pytest.mark.parametrize("discrete", [False, True])
def test_update_equals_a_loop_over_transitions_and_agents(double, monkeypatch, discrete):
    parts = learner(discrete)
    args, actor, critic, actor_target, critic_target, _, batch = parts
    logs, (critic_loss, critic_grads), (actor_loss, actor_grads) = gradients_of(monkeypatch, maac, parts)
    sample, generator = maac.sample_categorical if discrete else maac.sample_squashed, seeded()
    following, next_log_pi = sample(actor_target(batch.next_obs, batch.next_avail_actions), generator)
    played, log_pi = sample(actor(batch.obs, batch.avail_actions), generator)

    def value(outputs, i, action):
        return outputs[i][action.argmax()] if discrete else outputs[i][0]

    B, targets, loss, penalty, objective = len(batch.obs), [], 0, 0, 0
    for b in range(B):
        next_values, _ = slow_critic(critic_target, batch.next_obs[b], following[b])
        replayed = for_critics(batch.actions[b])
        values, squares = slow_critic(critic, batch.obs[b], replayed)
        current, _ = slow_critic(critic, batch.obs[b], played[b].detach(), played[b])
        penalty = penalty + args.attention_penalty * squares / (B * (N - 1))
        for i in range(N):
            soft = value(next_values, i, following[b, i]) - args.alpha * next_log_pi[b, i]
            targets.append(batch.reward[b] + (0 if batch.terminated[b] else args.gamma * soft.detach()))
            loss = loss + (targets[-1] - value(values, i, replayed[i])) ** 2 / B
            if not discrete:
                objective = objective + (current[i][0] - args.alpha * log_pi[b, i]) / B
                continue
            logits = slow_net(actor, i, batch.obs[b, i])[batch.avail_actions[b, i]]
            pi, q = logits.softmax(0), current[i][batch.avail_actions[b, i]]
            weight = value(current, i, played[b, i]) - (pi * q).sum() - args.alpha * log_pi[b, i]
            objective = objective + weight.detach() * log_pi[b, i] / B
            objective = objective - args.logit_penalty * logits.square().sum() / A / B
    torch.testing.assert_close(logs["td_target"], torch.stack(targets).mean())
    torch.testing.assert_close(logs["entropy"], -log_pi.mean().detach())
    assert logs["critic_loss"].item() == pytest.approx(loss.item())
    assert (critic_loss, actor_loss) == pytest.approx(((loss + penalty).item(), -objective.item()))
    torch.testing.assert_close(critic_grads, torch.autograd.grad(loss + penalty, list(critic.parameters())))
    torch.testing.assert_close(actor_grads, torch.autograd.grad(-objective, list(actor.parameters())))


def test_a_continuous_policy_learns_from_its_own_critic_through_its_own_action_only():
    _, actor, critic, *_, batch = learner()
    own, _ = maac.sample_squashed(actor(batch.obs, None), seeded())
    q_own, _, _ = critic(batch.obs, own.detach(), own)
    q_all, _, _ = critic(batch.obs, own)
    for i in range(N):
        for q, touched in ((q_own, [j == i for j in range(N)]), (q_all, [True] * N)):
            for grad in torch.autograd.grad(q[:, i].sum(), list(actor.parameters()), retain_graph=True):
                assert [bool(part.any()) for part in grad] == touched


@pytest.mark.parametrize("discrete", [False, True])
def test_one_observation_for_all_changes_nothing(double, monkeypatch, discrete):
    """Once with equal rows, once with rows that differ in what the targets ignore."""
    *parts, batch = learner(discrete)
    actor_target, critic_target = parts[3:5]
    for network in (actor_target, critic_target.own_encoder, critic_target.other_encoder):
        network.weights[0].data[:, OBS - 1] = 0
    batch = batch._replace(obs=batch.obs[:1].expand(6, -1, -1), next_obs=batch.next_obs[:1].repeat(6, 1, 1))
    marked = batch.next_obs.clone()
    marked[..., OBS - 1] += torch.arange(6)[:, None]
    rows = [gradients_of(monkeypatch, maac, (*parts, x)) for x in (batch, batch._replace(next_obs=marked))]
    torch.testing.assert_close(*rows)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("train_actor", [False, True])
def test_policies_and_targets_may_wait_and_the_critics_do_not(discrete, train_actor):
    check_update(maac, learner(discrete, tau=0.25), train_actor)


def test_each_gradient_is_clipped_at_its_own_norm(monkeypatch):
    parts = learner(max_grad_norm=0.3, critic_max_grad_norm=2.0)
    assert clipping_norms(monkeypatch, maac, *parts, seeded()) == [N * 2.0, 0.3]


# ---- the program ----
def test_a_lone_agent_in_a_lone_game_learns(run):
    assert run("--num-envs", "1", "--total-timesteps", "200", env="cdm,n_agents=1")[0] == 0


def test_settings_reach_networks_and_targets_start_as_copies(run):
    state = checkpoint(run(*"--warmup-steps 500 --critic-dim 24 --heads 2".split())[2])
    assert Aim.program["critic"].heads == 2 and state["critic"]["query.weight"].shape == (24, 24)
    assert all(same(state[name], state[f"{name}_target"]) for name in ("actor", "critic"))


def test_numbers_of_the_official_code(parse):
    args = parse("--env", "aim")
    numbers = (args.actor_lr, args.critic_lr, args.tau, args.gamma, args.alpha)
    assert numbers == (1e-3, 1e-3, 1e-3, 0.99, 0.01)
    assert (args.batch_size, args.update_every) == (1024, 25)
