"""QMIX: equations against slow loops, a monotone mixer, one gradient step, and the program itself."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from programs import A, N, Toy, games, in_double, random_episodes, same, with_garbage

import qmix

OBS, S = Toy.OBS, Toy.S


def random_mixer(seed=0, n_agents=N):
    torch.manual_seed(seed)
    env = games(True, Toy)
    env.n_agents = n_agents
    return qmix.Mixer(env, qmix.Args(embed_dim=4, hyper_dim=7)).double()


def make_actor():
    return qmix.Actor(games(True, Toy), qmix.Args(hidden_dim=16))


def mixer_oracle(mixer, q, state):
    """Q_tot of one state (S,) and one list of N values, number by number."""

    def layer(weight, bias, x):
        rows = zip(weight.tolist(), bias.tolist(), strict=True)
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]

    def relu(x):
        return [max(v, 0.0) for v in x]

    n_hyper, n_embed = mixer.w_2.in_features, mixer.w_2.out_features
    first = layer(mixer.first.weight, mixer.first.bias, state.tolist())
    ends = (0, n_hyper, n_hyper + n_embed, 2 * n_hyper + n_embed, len(first))
    for_w_1, b_1, for_w_2, for_b_2 = (first[i:j] for i, j in itertools.pairwise(ends))
    w_1 = layer(mixer.w_1.weight, mixer.w_1.bias, relu(for_w_1))
    w_2 = layer(mixer.w_2.weight, mixer.w_2.bias, relu(for_w_2))
    (b_2,) = layer(mixer.b_2.weight, mixer.b_2.bias, relu(for_b_2))
    for e in range(n_embed):
        x = sum(q[i] * abs(w_1[i * n_embed + e]) for i in range(len(q))) + b_1[e]
        b_2 += abs(w_2[e]) * (x if x > 0 else math.exp(x) - 1)
    return b_2


def best_oracle(q_values, avail_actions):
    """The best legal action by a list of A numbers."""
    return max((x, -a) for a, (x, ok) in enumerate(zip(q_values, avail_actions, strict=True)) if ok)[1] * -1


# ---- mixing network ----
def test_mixer_equals_a_loop_over_its_numbers():
    mixer, generator = random_mixer(), torch.Generator().manual_seed(0)
    q = 3 * torch.randn(2, 5, N, dtype=torch.float64, generator=generator)
    state = torch.randn(2, 5, S, dtype=torch.float64, generator=generator)
    q_tot = mixer(q, state)
    assert q_tot.shape == (2, 5)
    for i, t in itertools.product(range(2), range(5)):
        assert q_tot[i, t].item() == pytest.approx(mixer_oracle(mixer, q[i, t].tolist(), state[i, t]))


@pytest.mark.parametrize("seed", range(5))
def test_q_tot_never_falls_with_an_agents_value(seed):
    mixer = random_mixer(seed)
    q = (10 * torch.randn(1000, N, dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(mixer(q, 5 * torch.randn(1000, S, dtype=torch.float64)).sum(), q)
    assert (slope >= 0).all() and (slope.mean(0) > 0).all()


def test_best_joint_action_is_every_agents_own_best_one():
    mixer, q_values = random_mixer(), torch.randn(20, N, A, dtype=torch.float64)
    avail_actions = torch.rand(20, N, A) < 0.6
    avail_actions[..., 2] = True
    for i in range(20):
        state = torch.randn(S, dtype=torch.float64)
        legal = [avail_actions[i, n].nonzero().flatten().tolist() for n in range(N)]
        joint = torch.tensor(list(itertools.product(*legal)))  # (J, N)
        q_tot = mixer(q_values[i].gather(1, joint.t()).t(), state.expand(len(joint), S))  # (J,)
        assert joint[q_tot.argmax()].tolist() == qmix.greedy(q_values[i], avail_actions[i]).tolist()


# ---- exploration ----
def test_epsilon_greedy_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    q_values = torch.randn(50, N, A, dtype=torch.float64, generator=generator) - 5
    avail_actions = torch.rand(50, N, A, generator=generator) < 0.5
    avail_actions[..., 1] |= ~avail_actions.any(-1)
    for epsilon in (0.0, 0.3, 1.0):
        pi = qmix.epsilon_greedy(q_values, avail_actions, epsilon)
        for i, n in itertools.product(range(50), range(N)):
            legal = avail_actions[i, n].tolist()
            best = best_oracle(q_values[i, n].tolist(), legal)
            for a in range(A):
                oracle = (1 - epsilon) * (a == best) + (epsilon / sum(legal) if legal[a] else 0)
                assert pi[i, n, a].item() == pytest.approx(oracle, abs=1e-6)


def test_exploration_is_drawn_per_agent_and_game_and_is_greedy_without_a_generator():
    torch.manual_seed(0)
    games, epsilon = 40_000, 0.4
    actor = make_actor()
    obs = torch.randn(1, N, OBS).expand(games, N, OBS)  # so all games prefer the same actions
    avail_actions = torch.ones(games, N, A, dtype=torch.bool)
    avail_actions[..., 4] = False
    best, _ = qmix.act(actor, obs, avail_actions, None, epsilon)
    assert (best == best[0]).all()
    actions, (last_actions, hidden) = qmix.act(
        actor, obs, avail_actions, None, epsilon, torch.Generator().manual_seed(0)
    )
    assert torch.equal(actions, last_actions) and hidden.shape == (games, N, 16)
    for n in range(N):
        share = actions[:, n].bincount(minlength=A) / games  # (A,), standard deviation at most 0.0025
        expected = torch.full((A,), epsilon / 4).index_fill(0, torch.tensor(4), 0)
        expected[best[0, n]] += 1 - epsilon
        torch.testing.assert_close(share, expected, atol=0.01, rtol=0)
    other = (actions != best).float()  # (games, N), 1 with probability 0.3 each
    covariance = torch.cov(other.t())
    torch.testing.assert_close(covariance, 0.21 * torch.eye(N), atol=0.006, rtol=0)


def test_a_million_actions_are_all_legal():
    torch.manual_seed(0)
    generator, memory = torch.Generator().manual_seed(0), None
    actor = make_actor()
    avail_actions = torch.rand(1000, N, A) < 0.4
    avail_actions[..., 0] |= ~avail_actions.any(-1)
    obs = 30 * torch.randn(1000, N, OBS)
    for epsilon in torch.linspace(0, 1, 334).tolist():
        actions, memory = qmix.act(actor, obs, avail_actions, memory, epsilon, generator)
        assert avail_actions.gather(-1, actions.unsqueeze(-1)).all()


# ---- one gradient step ----
def learner(lr=1e-3, same_targets=False, limit=9):
    """Arguments of `update` in float64: networks, optimiser and a batch of 7 episodes of various lengths."""
    torch.manual_seed(0)
    actor, actor_target = (make_actor().double() for _ in range(2))
    for x in (actor, actor_target):
        x.head.weight.data.mul_(10)  # so that the best action is now this one, now that
    mixer, mixer_target = random_mixer(1), random_mixer(2)
    if same_targets:
        actor_target, mixer_target = copy.deepcopy(actor), copy.deepcopy(mixer)
    optimizer = torch.optim.RMSprop([*actor.parameters(), *mixer.parameters()], lr=lr)
    batch = in_double(random_episodes([(7, 20)], limit))
    return qmix.Args(gamma=0.9), actor, mixer, actor_target, mixer_target, optimizer, batch


def gradients(parts):
    """What `update` logs, and the gradients that it leaves."""
    logs = qmix.update(*parts)
    return logs, [x.grad.clone() for x in (*parts[1].parameters(), *parts[2].parameters())]


@torch.no_grad()
def targets_oracle(parts):
    """Lists of target and Q_tot: each episode on its own, step by step, as long as it lasted."""
    args, actor, mixer, actor_target, mixer_target, _, batch = parts
    targets, q_tots = [], []
    for i, length in enumerate(batch.mask.sum(1).tolist()):
        hidden, hidden_target, q_values, q_values_target = None, None, [], []
        for t in range(length + 1):
            last_actions = batch.actions[i, t - 1] if t else torch.full((N,), -1)
            inputs = batch.obs[i, t].view(1, 1, N, OBS), last_actions.view(1, 1, N)
            q, hidden = actor(*inputs, hidden)
            q_target, hidden_target = actor_target(*inputs, hidden_target)
            q_values.append(q[0, 0].tolist())
            q_values_target.append(q_target[0, 0].tolist())
        for t in range(length):
            q_taken = [q_values[t][n][batch.actions[i, t, n]] for n in range(N)]
            q_tots.append(mixer_oracle(mixer, q_taken, batch.state[i, t]))
            legal = batch.avail_actions[i, t + 1].tolist()
            best = [best_oracle(q_values[t + 1][n], legal[n]) for n in range(N)]
            next_q = [q_values_target[t + 1][n][best[n]] for n in range(N)]
            target = batch.reward[i, t].item()
            if not batch.terminated[i, t]:
                target += args.gamma * mixer_oracle(mixer_target, next_q, batch.state[i, t + 1])
            targets.append(target)
    return torch.tensor([targets, q_tots], dtype=torch.float64)


@pytest.mark.parametrize("limit", [9, 1])
def test_loss_and_targets_equal_a_loop_over_episodes_and_steps(limit):
    parts = learner(limit=limit)
    batch = parts[-1]
    terminated = (batch.terminated & batch.mask).any(1)
    assert terminated.any() and not terminated.all()  # some episodes were cut by the clock
    assert batch.mask.shape[1] == limit and (limit == 1 or not batch.mask.all())
    td_target, q_tot = targets_oracle(parts)
    logs = qmix.update(*parts)
    torch.testing.assert_close(logs["critic_loss"].item(), (td_target - q_tot).square().mean().item())
    torch.testing.assert_close(logs["td_target"].item(), td_target.mean().item())
    torch.testing.assert_close(logs["q_taken"].item(), q_tot.mean().item())


def test_target_network_unrolled_from_the_start_equals_the_live_one_with_equal_weights(monkeypatch):
    seen, double_q = [], qmix.double_q
    monkeypatch.setattr(qmix, "double_q", lambda *x: (seen.append(x), double_q(*x))[1])
    qmix.update(*learner(same_targets=True))
    ((q_values, q_values_target, avail_actions),) = seen
    torch.testing.assert_close(q_values.detach(), q_values_target)
    best = q_values.masked_fill(~avail_actions, -math.inf).amax(-1)
    torch.testing.assert_close(double_q(*seen[0]), best.detach())


def test_termination_does_not_bootstrap_and_truncation_does():
    reward, next_q_tot = torch.tensor([1.0, 1.0]), torch.tensor([10.0, 10.0])
    target = qmix.td_targets(reward, torch.tensor([True, False]), next_q_tot, 0.9)
    assert target.tolist() == [1, 10]
    parts = learner()
    batch = parts[-1]
    end = (torch.arange(7), batch.mask.sum(1))  # the last observation of every episode
    means = []
    for terminated in (True, False):
        for change in (0, 1):
            obs, state = batch.obs.clone(), batch.state.clone()
            obs[end], state[end] = obs[end] + change, state[end] + change
            everywhere = torch.full_like(batch.terminated, terminated)
            changed = batch._replace(obs=obs, state=state, terminated=everywhere)
            last_only = batch.mask & ~F.pad(batch.mask[:, 1:], (0, 1))
            frozen = learner(lr=0.0)[:-1]
            means.append(qmix.update(*frozen, changed._replace(mask=last_only, length=[1] * 7))["td_target"])
    assert means[0] == means[1] and means[2] != means[3]


def test_padding_is_worth_nothing():
    parts = learner()
    batch = parts[-1]
    logs, plain = gradients(parts)
    assert not batch.mask.all()
    noisy_logs, noisy = gradients((*learner()[:-1], with_garbage(batch)))
    assert same(logs, noisy_logs)
    assert all(torch.equal(x, y) for x, y in zip(plain, noisy, strict=True))


def test_a_step_moves_the_live_networks_only_and_is_clipped():
    parts = learner()
    before = [copy.deepcopy(part.state_dict()) for part in parts[1:5]]
    batch = parts[-1]
    logs, clipped = gradients((*parts[:-1], batch._replace(reward=1e4 * batch.reward)))
    after = [part.state_dict() for part in parts[1:5]]
    assert [same(x, y) for x, y in zip(before, after, strict=True)] == [False, False, True, True]
    assert logs.keys() == {"critic_loss", "q_taken", "td_target", "grad_norm_critic"}
    assert logs["grad_norm_critic"] > 1000
    assert sum(x.square().sum() for x in clipped).sqrt().item() == pytest.approx(10)
    assert all(x.any() for x in clipped)


# ---- the program ----
def test_numbers_of_the_paper(parse):
    args = parse("--setting", "paper")
    numbers = (args.num_envs, args.episodes_per_iteration, args.target_period, args.buffer_size)
    assert numbers == (1, 1, 200, 5000)
    assert (args.epsilon_start, args.epsilon_end, args.epsilon_steps) == (1.0, 0.05, 50_000)


def test_a_batch_is_drawn_from_the_whole_replay(run):
    """Of 20 episodes, not of the latest 6 only: two draws of 6 have other ones."""
    assert run("--eval-every", "0")[0] == 0
    batch, buffer = Toy.program["batch"], Toy.program["buffer"]
    latest = (buffer.n_episodes - 1 - torch.arange(6)) % 20
    lengths = buffer.length[buffer.ring[latest]].tolist()
    assert len(batch.mask) == 6 and sorted(batch.length) != sorted(lengths)
