"""COMA: equations against enumerations and loops, the critic's inputs, one iteration, and the program."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from programs import A, N, Toy, games, in_double, rand, random_episodes, same, with_garbage

import coma

OBS, S = Toy.OBS, Toy.S


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
    return coma.CounterfactualCritic(games(True, Toy), coma.Args(critic_hidden_dim=16)).double()


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
    assert critic.fc1.out_features == critic.fc2.in_features == critic.fc2.out_features == 16
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
    actor = coma.Actor(games(True, Toy), coma.Args(hidden_dim=16)).double()
    critic, critic_target = random_critic(1), random_critic(2)
    optimizers = [torch.optim.SGD(x.parameters(), lr=1e-3) for x in (actor, critic)]
    batch = in_double(random_episodes([(7, 7)], limit))
    return args, actor, critic, critic_target, optimizers, batch


def iterate(parts, seed=0):
    """What `update` logs, and the gradients that it leaves."""
    logs = coma.update(*parts, 0.3, torch.Generator().manual_seed(seed))
    return logs, [x.grad for part in parts[1:3] for x in part.parameters()]


@pytest.mark.parametrize(("limit", "scale"), [(5, 1), (1, 1), (5, 1e5)])
def test_iteration_equals_a_loop_over_episodes_steps_and_agents(monkeypatch, limit, scale):
    """`scale` of what is learnt: where it is large both gradients are clipped."""
    parts = learner(limit)
    parts[-1].reward.mul_(scale)
    for network in parts[2:4]:
        network.head.weight.data.mul_(scale)
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
    assert scale == 1 or norm > 10
    for ours, slope in zip(gradients[-len(slopes) :], slopes, strict=True):
        torch.testing.assert_close(ours, slope * min(1, 10 / norm))
    for x, slope in zip(critic.parameters(), slopes, strict=True):
        x.data -= 1e-3 * slope * min(1, 10 / norm)
    for joint, n, pi, action in steps:  # the advantage is that of the critic after its step
        q_values = critic_oracle(critic, *joint, n).detach()
        losses.append(-(q_values[action] - pi.detach() @ q_values) * pi[action].log())
    slopes = torch.autograd.grad(torch.stack(losses).mean(), list(actor.parameters()))
    torch.testing.assert_close(logs["actor_loss"].item(), torch.stack(losses).mean().item())
    norm = torch.stack([x.norm() for x in slopes]).norm()
    assert (norm > 10) == (scale > 1)
    for ours, slope in zip(gradients, slopes, strict=False):
        torch.testing.assert_close(ours, slope * min(1, 10 / norm))
    entropies = [-sum(p * math.log(p) for p in pi.tolist() if p > 0) for _, _, pi, _ in steps]
    assert logs["entropy"].item() == pytest.approx(sum(entropies) / len(entropies))


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
    assert not batch.mask.all()
    noisy_logs, noisy = iterate((*learner()[:-1], with_garbage(batch)))
    assert same(logs, noisy_logs)
    assert all(torch.equal(x, y) for x, y in zip(plain, noisy, strict=True))


def test_minibatches_are_drawn():
    critics = []
    for seed in (0, 0, 1):
        parts = learner(limit=1, critic_updates=3)
        parts[-1].terminated[:] = True  # no joint actions are drawn for the last observations
        iterate(parts, seed)
        critics.append(parts[2].head.weight)
    assert torch.equal(*critics[:2]) and not torch.equal(*critics[1:])


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
def test_numbers_of_the_authors_code(parse):
    args = parse("--setting", "paper")
    numbers = (args.num_envs, args.batch_size, args.actor_lr, args.critic_lr, args.td_lambda)
    assert numbers == (8, 8, 5e-4, 5e-4, 0.8)
    assert (args.epsilon_start, args.epsilon_end, args.epsilon_steps) == (0.5, 0.01, 100_000)
    assert (args.critic_updates, args.target_period) == (
        60,
        3,
    )  # a target per 200 steps of the critic, nearly
