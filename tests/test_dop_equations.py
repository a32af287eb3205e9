"""Stochastic DOP against the paper: slow oracles in plain Python, written from the text of [DOP] alone.

[DOP] Wang et al., "DOP: Off-Policy Multi-Agent Decomposed Policy Gradients", ICLR 2021: Eq. 4, 5, 7, 8, 9,
Proposition 1, Theorem 3, Appendix A. Every expectation below is an enumeration of all joint actions, every
target a sum over t and a product over l as printed, every gradient of log pi a softmax derivative.
Letters: B games, T time, N agents, A actions.
"""

import itertools
import math
import random

import pytest
import torch

from dop_stochastic import (
    decomposed_q,
    epsilon_policy,
    expected_policy_gradient_loss,
    expected_q,
    sample_actions,
    sampled_expected_q,
    sampled_policy_gradient_loss,
    tree_backup_targets,
)
from dop_stochastic import td_lambda_targets as td_lambda_targets_of_siblings

GARBAGE = 1e6  # finite, so that a product with a mask of zero can remove it
DRAWS = 1_000_000


def td_lambda_targets(q_tot, **inputs):
    """Under its name in [DOP]: siblings that share the function have other values than Q_tot."""
    return td_lambda_targets_of_siblings(q_taken=q_tot, **inputs)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(ours, oracle, tolerance=1e-10):
    oracle = torch.as_tensor(oracle, dtype=torch.float64)
    assert ours.shape == oracle.shape
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.detach(), oracle, rtol=tolerance, atol=tolerance)


# ---- oracles ----
def softmax_oracle(logits, legal):
    """softmax over the legal actions of one agent; lists of A numbers."""
    if not any(legal):
        return [0.0] * len(logits)
    top = max(z for z, ok in zip(logits, legal, strict=True) if ok)
    weights = [math.exp(z - top) if ok else 0.0 for z, ok in zip(logits, legal, strict=True)]
    return [w / sum(weights) for w in weights]


def epsilon_policy_oracle(logits, legal, epsilon):
    """(1 - epsilon) softmax + epsilon uniform, both over the legal actions of one agent."""
    count = sum(legal)
    p = softmax_oracle(logits, legal)
    return [(1 - epsilon) * x + (epsilon / count if ok else 0.0) for x, ok in zip(p, legal, strict=True)]


def joint_actions(n_agents, n_actions):
    return list(itertools.product(range(n_actions), repeat=n_agents))


def joint_probability(pi, joint):
    """prod_i pi_i(a_i); pi is a list of N rows of A probabilities."""
    return math.prod(pi[i][a] for i, a in enumerate(joint))


def q_tot_oracle(k, b, q, joint):
    """Eq. 4 for one joint action; q is a list of N rows of A values."""
    return sum(k[i] * q[i][a] for i, a in enumerate(joint)) + b


def expected_q_oracle(k, b, q, pi):
    """The left side of Eq. 16: sum over all |A|^N joint actions."""
    joints = joint_actions(len(q), len(q[0]))
    return sum(joint_probability(pi, joint) * q_tot_oracle(k, b, q, joint) for joint in joints)


def tree_backup_oracle(reward, terminated, q_tot, next_v, pi_joint, gamma, tb_lambda, n_steps):
    """Eq. 7 with every step of ONE episode without padding as the start; lists of equal length."""
    targets = []
    for start in range(len(reward)):
        target = q_tot[start]
        for t in range(n_steps):
            if start + t >= len(reward):
                break
            c = 1.0  # c_t = prod_{l=1}^{t} lambda pi(a_l | tau_l), without the action of the start, l = 0
            for step in range(1, t + 1):
                c *= tb_lambda * pi_joint[start + step]
            bootstrap = 0.0 if terminated[start + t] else next_v[start + t]
            target += gamma**t * c * (reward[start + t] + gamma * bootstrap - q_tot[start + t])
        targets.append(target)
    return targets


def td_lambda_oracle(reward, terminated, q_tot, next_q, gamma, td_lambda):
    """Eq. 8 with every step of ONE episode without padding as the start."""
    targets = []
    for start in range(len(reward)):
        target = q_tot[start]
        for t in range(len(reward) - start):
            bootstrap = 0.0 if terminated[start + t] else next_q[start + t]
            target += (gamma * td_lambda) ** t * (reward[start + t] + gamma * bootstrap - q_tot[start + t])
        targets.append(target)
    return targets


def n_step_return_oracle(reward, terminated, next_v, gamma, n_steps):
    """sum_j gamma^j r_j, then one bootstrap unless the last of these steps terminated."""
    targets = []
    for start in range(len(reward)):
        stop = min(start + n_steps, len(reward))
        target = sum(gamma ** (t - start) * reward[t] for t in range(start, stop))
        if not terminated[stop - 1]:
            target += gamma ** (stop - start) * next_v[stop - 1]
        targets.append(target)
    return targets


def grad_log_pi(p, pi, action, epsilon=0.0):
    """d log pi(action) / d logits for pi = (1 - epsilon) softmax + epsilon uniform; p is the softmax."""
    outer = (1 - epsilon) * p[action] / pi[action]
    return [outer * ((x == action) - p[x]) for x in range(len(p))]


def policy_gradient_oracle(k, q, p, pi, epsilon=0.0):
    """Eq. 9 at one step: E_pi[sum_i k_i grad log pi_i(a_i) Q_i(a_i)] over all joint actions; N rows of A."""
    n_agents, n_actions = len(q), len(q[0])
    gradient = [[0.0] * n_actions for _ in range(n_agents)]
    for joint in joint_actions(n_agents, n_actions):
        weight = joint_probability(pi, joint)
        if weight == 0.0:
            continue
        for i, a in enumerate(joint):
            for x, score in enumerate(grad_log_pi(p[i], pi[i], a, epsilon)):
                gradient[i][x] += weight * k[i] * score * q[i][a]
    return gradient


# ---- episodes ----
def random_episode(rng, length, terminates):
    """One episode as lists; next_v is free of q_tot, as an expectation is."""
    draw = lambda low, high: [rng.uniform(low, high) for _ in range(length)]  # noqa: E731
    episode = {"reward": draw(-2, 2), "q_tot": draw(-3, 3), "next_v": draw(-3, 3), "pi_joint": draw(0, 1)}
    episode["terminated"] = [terminates and t == length - 1 for t in range(length)]
    # Q'_tot(tau_{t+1}, a_{t+1}) is the q_tot of the next step, except behind the last one.
    episode["next_q"] = episode["q_tot"][1:] + [episode["next_v"][-1]]
    return episode


def ragged_batch(seed, longest=7):
    """Every length 1..longest, once terminated and once truncated at its end."""
    rng = random.Random(seed)
    return [random_episode(rng, n, end) for n in range(1, longest + 1) for end in (True, False)]


def padded(episodes, key, length, fill):
    return [list(e[key]) + [fill] * (length - len(e["reward"])) for e in episodes]


def batch(episodes, keys, length=None, fill=0.0, ended=False):
    """Keyword arguments (B, T) of a target function, with `fill` behind the end of each episode."""
    length = length or max(len(e["reward"]) for e in episodes)
    out = {key: tensor(padded(episodes, key, length, fill)) for key in keys}
    out["terminated"] = torch.tensor(padded(episodes, "terminated", length, ended))
    out["mask"] = tensor([[float(t < len(e["reward"])) for t in range(length)] for e in episodes])
    return out


TB_KEYS = ("reward", "q_tot", "next_v", "pi_joint")
TD_KEYS = ("reward", "q_tot", "next_q")
TARGETS = (
    (tree_backup_targets, TB_KEYS, {"gamma": 0.9, "tb_lambda": 0.8, "n_steps": 5}),
    (td_lambda_targets, TD_KEYS, {"gamma": 0.9, "td_lambda": 0.8}),
)


def tree_backup(episodes, gamma, tb_lambda, n_steps, **padding):
    inputs = batch(episodes, TB_KEYS, **padding)
    return tree_backup_targets(**inputs, gamma=gamma, tb_lambda=tb_lambda, n_steps=n_steps)


def td_lambda_(episodes, gamma, td_lambda, **padding):
    return td_lambda_targets(**batch(episodes, TD_KEYS, **padding), gamma=gamma, td_lambda=td_lambda)


def tree_backup_expected(e, gamma, tb_lambda, n_steps):
    return tree_backup_oracle(
        e["reward"], e["terminated"], e["q_tot"], e["next_v"], e["pi_joint"], gamma, tb_lambda, n_steps
    )


def td_lambda_expected(e, gamma, td_lambda):
    return td_lambda_oracle(e["reward"], e["terminated"], e["q_tot"], e["next_q"], gamma, td_lambda)


def assert_real_steps(targets, oracles):
    """Compare where the mask is 1; behind the end a target may be anything finite."""
    assert torch.isfinite(targets).all()
    for row, oracle in zip(targets, oracles, strict=True):
        close(row[: len(oracle)], oracle)


# ---- Eq. 4 and 5 ----
def random_critic(seed, leading, n_agents=3, n_actions=4):
    """k (..., N) >= 0, b (...), q_values (..., N, A)."""
    g = generator(seed)
    k = torch.rand(*leading, n_agents, generator=g, dtype=torch.float64)
    b = torch.randn(leading, generator=g, dtype=torch.float64)
    q_values = torch.randn(*leading, n_agents, n_actions, generator=g, dtype=torch.float64)
    return k, b, q_values


def random_policy(seed, leading, n_agents=3, n_actions=4):
    g = generator(seed)
    return torch.softmax(2 * torch.randn(*leading, n_agents, n_actions, generator=g, dtype=torch.float64), -1)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_decomposed_q_is_eq_4(leading):
    k, b, q_values = random_critic(0, leading)
    for joint in [(0, 0, 0), (3, 1, 2)]:
        q_taken = torch.stack([q_values[..., i, a] for i, a in enumerate(joint)], -1)  # (..., N)
        ours = decomposed_q(k, b, q_taken)
        rows = zip(
            k.reshape(-1, 3).tolist(),
            b.reshape(-1).tolist(),
            q_values.reshape(-1, 3, 4).tolist(),
            strict=True,
        )
        close(ours, tensor([q_tot_oracle(*row, joint) for row in rows]).reshape(leading))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_expected_q_is_the_sum_over_all_joint_actions(leading):
    k, b, q_values = random_critic(1, leading)
    pi = random_policy(2, leading)
    columns = (k.reshape(-1, 3), b.reshape(-1), q_values.reshape(-1, 3, 4), pi.reshape(-1, 3, 4))
    oracle = [expected_q_oracle(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    close(expected_q(k, b, q_values, pi), tensor(oracle).reshape(leading))


def test_expected_q_gradients_are_those_of_the_enumeration():
    leaves = [x.requires_grad_() for x in (*random_critic(3, ()), random_policy(4, ()))]
    k, b, q_values, pi = leaves
    enumerated = 0.0
    for joint in joint_actions(3, 4):
        weight, q_tot = 1.0, b
        for i, a in enumerate(joint):
            weight = weight * pi[i, a]
            q_tot = q_tot + k[i] * q_values[i, a]
        enumerated = enumerated + weight * q_tot
    oracle = torch.autograd.grad(enumerated, leaves[:3])
    ours = torch.autograd.grad(expected_q(k, b, q_values, pi), leaves[:3])
    for x, y in zip(ours, oracle, strict=True):
        close(x, y)


def test_sampled_expected_q_with_one_sample_is_the_q_tot_of_some_joint_action():
    k, b, q_values = random_critic(5, (), n_agents=2, n_actions=3)
    pi = random_policy(6, (), n_agents=2, n_actions=3)
    table = [q_tot_oracle(k.tolist(), b.item(), q_values.tolist(), joint) for joint in joint_actions(2, 3)]
    seen = set()
    for seed in range(100):
        value = sampled_expected_q(k, b, q_values, pi, 1, generator(seed))
        assert value.shape == () and value.dtype == torch.float64
        distance, index = min((abs(value.item() - x), i) for i, x in enumerate(table))
        assert distance < 1e-10
        seen.add(index)
    assert len(seen) > 1


def test_sampled_expected_q_of_a_deterministic_policy_is_exact():
    k, b, q_values = random_critic(7, (2, 3))
    joint = (1, 3, 0)
    pi = torch.zeros_like(q_values)
    for i, a in enumerate(joint):
        pi[..., i, a] = 1.0
    close(sampled_expected_q(k, b, q_values, pi, 3, generator(0)), expected_q(k, b, q_values, pi))


def test_sampled_expected_q_converges_at_the_rate_of_independent_agents():
    k, b, q_values = random_critic(8, ())
    pi = random_policy(9, ())
    mean = expected_q_oracle(k.tolist(), b.item(), q_values.tolist(), pi.tolist())
    joints = joint_actions(3, 4)
    variance = sum(
        joint_probability(pi.tolist(), joint)
        * (q_tot_oracle(k.tolist(), b.item(), q_values.tolist(), joint) - mean) ** 2
        for joint in joints
    )
    for n_samples in (1, 16, 256):  # 2000 rows of the same step, so 2000 estimates
        rows = [x.expand(2000, *x.shape) for x in (k, b, q_values, pi)]
        estimates = sampled_expected_q(*rows, n_samples, generator(n_samples))
        assert estimates.shape == (2000,)
        assert abs(estimates.mean().item() - mean) < 5 * math.sqrt(variance / n_samples / 2000)
        # One draw shared by the agents, or by the samples, would show here.
        assert estimates.var().item() == pytest.approx(variance / n_samples, rel=0.2)


# ---- epsilon_policy and sample_actions ----
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.5, 1.0])
def test_epsilon_policy_mixes_softmax_and_uniform_over_legal_actions(epsilon):
    g = generator(10)
    logits = 3 * torch.randn(4, 3, 2, 5, generator=g, dtype=torch.float64)
    avail_actions = torch.rand(4, 3, 2, 5, generator=g) < 0.6
    avail_actions[..., 0] |= ~avail_actions.any(-1)
    pi = epsilon_policy(logits, avail_actions, epsilon)
    rows = zip(logits.reshape(-1, 5).tolist(), avail_actions.reshape(-1, 5).tolist(), strict=True)
    close(pi, tensor([epsilon_policy_oracle(*row, epsilon) for row in rows]).reshape(logits.shape))
    close(pi.sum(-1), torch.ones(4, 3, 2))
    assert (pi[~avail_actions] == 0).all()
    if epsilon > 0:
        assert (pi[avail_actions] > 0).all()


def test_epsilon_policy_of_a_row_without_legal_actions_is_zero_with_zero_gradient():
    logits = torch.tensor([[1.0, -2.0, 1e4], [0.5, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    avail_actions = torch.tensor([[False, False, False], [True, True, False]])
    pi = epsilon_policy(logits, avail_actions, 0.3)
    close(pi[0], torch.zeros(3))
    (gradient,) = torch.autograd.grad((pi * tensor([3.0, -1.0, 2.0])).sum(), logits)
    close(gradient[0], torch.zeros(3))
    assert torch.isfinite(gradient).all() and gradient[1, :2].abs().min() > 1e-3


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_dead_agent_takes_its_only_action_whatever_the_logits(epsilon):
    logits = torch.tensor([[-1e4, 1e4, 3.0], [2.0, 0.1, -5.0]], dtype=torch.float64, requires_grad=True)
    avail_actions = torch.tensor([[True, False, False], [False, False, True]])
    pi = epsilon_policy(logits, avail_actions, epsilon)
    close(pi, tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    (gradient,) = torch.autograd.grad((pi * tensor([[3.0, -1.0, 2.0], [1.0, 2.0, 5.0]])).sum(), logits)
    close(gradient, torch.zeros(2, 3))


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_epsilon_policy_gradient_is_the_softmax_jacobian(epsilon):
    legal = [True, False, True, True]
    logits = torch.tensor([0.3, 2.0, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    pi = epsilon_policy(logits, torch.tensor(legal), epsilon)
    p = softmax_oracle(logits.tolist(), legal)
    for a in range(4):
        (row,) = torch.autograd.grad(pi[a], logits, retain_graph=True)
        close(row, [(1 - epsilon) * p[a] * ((x == a) - p[x]) for x in range(4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 1.0])
def test_epsilon_policy_is_finite_with_extreme_logits(dtype, epsilon):
    values = list(itertools.product([-1e4, 0.0, 1e4], repeat=3))
    masks = list(itertools.product([False, True], repeat=3))
    rows = [(v, m) for v in values for m in masks]
    logits = torch.tensor([v for v, _ in rows], dtype=dtype, requires_grad=True)
    pi = epsilon_policy(logits, torch.tensor([m for _, m in rows]), epsilon)
    assert pi.dtype == dtype
    oracle = [epsilon_policy_oracle(v, m, epsilon) if any(m) else [0.0] * 3 for v, m in rows]
    torch.testing.assert_close(pi.detach().double(), tensor(oracle), rtol=1e-6, atol=1e-6)
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=dtype)
    (gradient,) = torch.autograd.grad((pi * weights).sum(), logits)
    jacobian = []
    for v, m in rows:
        p = softmax_oracle(v, m)
        mean = sum(w * x for w, x in zip(weights.tolist(), p, strict=True))
        jacobian.append([(1 - epsilon) * x * (w - mean) for w, x in zip(weights.tolist(), p, strict=True)])
    torch.testing.assert_close(gradient.double(), tensor(jacobian), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_million_draws_match_pi_and_never_take_a_masked_action(dtype):
    avail_actions = torch.tensor(
        [
            [False, True, True, False, True, False],  # the first and the last action are illegal
            [True, True, True, True, True, True],
            [False, False, False, False, False, True],  # dead
            [True, False, False, False, False, True],
        ]
    )
    logits = 2 * torch.randn(4, 6, generator=generator(11), dtype=dtype)
    pi = epsilon_policy(logits, avail_actions, 0.1)  # (N, A)
    rows = DRAWS // 4
    actions = sample_actions(pi.expand(rows, 4, 6), generator(12))  # (rows, N)
    assert actions.shape == (rows, 4) and actions.dtype == torch.int64
    for agent in range(4):
        counts = torch.bincount(actions[:, agent], minlength=6)
        assert counts.shape == (6,) and counts.sum() == rows
        assert (counts[~avail_actions[agent]] == 0).all()
        for count, p in zip(counts.tolist(), pi[agent].tolist(), strict=True):
            assert abs(count - rows * p) <= 5 * math.sqrt(rows * p * abs(1 - p)) + 0.1


def test_agents_and_games_are_drawn_independently():
    row = [0.5, 0.2, 0.3]
    pi = tensor(row).expand(50_000, 2, 3)
    actions = sample_actions(pi, generator(13))  # (B, N)
    for first, second in ((actions[:, 0], actions[:, 1]), (actions[:-1, 0], actions[1:, 0])):
        for x, y in joint_actions(2, 3):
            p = row[x] * row[y]
            share = ((first == x) & (second == y)).double().mean().item()
            assert abs(share - p) < 6 * math.sqrt(p * (1 - p) / len(first))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 4)])
def test_sampling_keeps_leading_dims_and_draws_from_its_generator_only(leading):
    pi = random_policy(14, leading, 20, 5)
    before = torch.get_rng_state()
    actions = sample_actions(pi, generator(15))
    assert actions.shape == (*leading, 20) and actions.dtype == torch.int64
    assert torch.equal(actions, sample_actions(pi, generator(15)))
    assert not torch.equal(actions, sample_actions(pi, generator(16)))
    k, b, q_values = random_critic(17, leading, 20, 5)
    estimate = sampled_expected_q(k, b, q_values, pi, 4, generator(15))
    assert torch.equal(estimate, sampled_expected_q(k, b, q_values, pi, 4, generator(15)))
    assert not torch.equal(estimate, sampled_expected_q(k, b, q_values, pi, 4, generator(16)))
    assert torch.equal(before, torch.get_rng_state())


# ---- Eq. 7, tree backup ----
def hand_episode(terminates):
    """gamma = lambda = 0.5 in both examples. One-step errors, by hand:

    d0 = 1 + 0.5 * 4 - 2 = 1
    d1 = 2 + 0.5 * 6 - 4 = 1        with next_v   (Eq. 7)
    d1 = 2 + 0.5 * 2 - 4 = -1       with next_q   (Eq. 8)
    d2 = 4 - 2 = 2                  terminated: the 8 is not used
    d2 = 4 + 0.5 * 8 - 2 = 6        truncated
    """
    return {
        "reward": [1.0, 2.0, 4.0],
        "q_tot": [2.0, 4.0, 2.0],
        "next_v": [4.0, 6.0, 8.0],
        "next_q": [4.0, 2.0, 8.0],
        "pi_joint": [0.9, 0.5, 0.25],
        "terminated": [False, False, terminates],
    }


@pytest.mark.parametrize(
    ("terminates", "n_steps", "by_hand"),
    [
        # One step: y = q + d.
        (True, 1, [3.0, 5.0, 4.0]),
        (False, 1, [3.0, 5.0, 8.0]),
        # gamma c_1 is 0.5 * 0.5 * 0.5 = 0.125 from t = 0 and 0.5 * 0.5 * 0.25 = 0.0625 from t = 1; no 0.9.
        # y0 = 2 + 1 + 0.125 * 1, y1 = 4 + 1 + 0.0625 * 2 (terminated) or 4 + 1 + 0.0625 * 6 (truncated).
        (True, 2, [3.125, 5.125, 4.0]),
        (False, 2, [3.125, 5.375, 8.0]),
        # gamma^2 c_2 from t = 0 is 0.125 * 0.0625 = 0.0078125: y0 = 3.125 + 0.0078125 * 2, or * 6.
        (True, 3, [3.140625, 5.125, 4.0]),
        (False, 3, [3.171875, 5.375, 8.0]),
    ],
)
def test_tree_backup_by_hand(terminates, n_steps, by_hand):
    close(tree_backup([hand_episode(terminates)], 0.5, 0.5, n_steps), [by_hand])


@pytest.mark.parametrize("n_steps", [1, 2, 3, 5, 7, 12])  # 12 is longer than every episode
@pytest.mark.parametrize(("gamma", "tb_lambda"), [(0.99, 0.93), (0.7, 1.0), (1.0, 0.4), (0.9, 0.0)])
def test_tree_backup_is_eq_7(gamma, tb_lambda, n_steps):
    episodes = ragged_batch(20)
    targets = tree_backup(episodes, gamma, tb_lambda, n_steps)
    assert_real_steps(targets, [tree_backup_expected(e, gamma, tb_lambda, n_steps) for e in episodes])


@pytest.mark.parametrize("n_steps", [1, 3, 5, 20])
def test_tree_backup_ignores_what_lies_behind_the_end(n_steps):
    episodes = ragged_batch(21)
    oracles = [tree_backup_expected(e, 0.99, 0.8, n_steps) for e in episodes]
    for length, fill, ended in [
        (7, GARBAGE, False),
        (7, -GARBAGE, True),
        (15, GARBAGE, True),
        (15, -GARBAGE, False),
    ]:
        targets = tree_backup(episodes, 0.99, 0.8, n_steps, length=length, fill=fill, ended=ended)
        assert_real_steps(targets, oracles)


@pytest.mark.parametrize("n_steps", [1, 2, 5])
@pytest.mark.parametrize("terminates", [True, False])
def test_tree_backup_of_a_single_step(terminates, n_steps):
    episode = random_episode(random.Random(22), 1, terminates)
    ours = tree_backup([episode], 0.9, 0.8, n_steps)
    assert ours.shape == (1, 1)
    close(ours, [[episode["reward"][0] + (0 if terminates else 0.9 * episode["next_v"][0])]])


@pytest.mark.parametrize("n_steps", [1, 2, 5, 12])
def test_tree_backup_with_lambda_one_and_a_matching_deterministic_policy_is_the_n_step_return(n_steps):
    episodes = ragged_batch(23)
    for e in episodes:
        e["pi_joint"] = [1.0] * len(e["reward"])
        e["next_v"] = e[
            "next_q"
        ]  # E_pi[Q(tau_{t+1}, .)] = Q(tau_{t+1}, a_{t+1}) when pi takes a_{t+1} for sure
    oracles = [
        n_step_return_oracle(e["reward"], e["terminated"], e["next_v"], 0.9, n_steps) for e in episodes
    ]
    assert_real_steps(tree_backup(episodes, 0.9, 1.0, n_steps), oracles)


@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_actions_of_probability_zero_leave_the_one_step_expected_target(n_steps):
    episodes = ragged_batch(24)
    for e in episodes:
        e["pi_joint"] = [0.7] + [0.0] * (len(e["reward"]) - 1)  # that of the start is not in the product
    oracles = [n_step_return_oracle(e["reward"], e["terminated"], e["next_v"], 0.9, 1) for e in episodes]
    assert_real_steps(tree_backup(episodes, 0.9, 1.0, n_steps), oracles)


def test_one_action_of_probability_zero_cuts_the_trace_there():
    episode = random_episode(random.Random(25), 6, False)
    episode["pi_joint"] = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    changed = {key: list(value) for key, value in episode.items()}
    for key in TB_KEYS:
        changed[key][3:] = [9.0] * 3  # behind the cut: not seen from t = 0, 1, 2
    changed["pi_joint"][3] = 0.0
    ours = tree_backup([episode, changed], 0.9, 0.9, 6)
    close(ours[0, :3], ours[1, :3])
    assert (ours[0, 3:] - ours[1, 3:]).abs().min() > 1e-3
    close(ours[0], tree_backup_expected(episode, 0.9, 0.9, 6))


# ---- Eq. 8, TD(lambda) ----
@pytest.mark.parametrize(
    ("terminates", "by_hand"),
    [
        # gamma lambda = 0.25 and d2 = 2 or 6.
        # y2 = 2 + d2, y1 = 4 - 1 + 0.25 d2, y0 = 2 + 1 + 0.25 * (-1) + 0.0625 d2.
        (True, [2.875, 3.5, 4.0]),
        (False, [3.125, 4.5, 8.0]),
    ],
)
def test_td_lambda_by_hand(terminates, by_hand):
    close(td_lambda_([hand_episode(terminates)], 0.5, 0.5), [by_hand])


@pytest.mark.parametrize(
    ("gamma", "td_lambda"), [(0.99, 0.8), (0.7, 1.0), (1.0, 0.4), (0.9, 0.0), (1.0, 1.0)]
)
def test_td_lambda_is_eq_8(gamma, td_lambda):
    episodes = ragged_batch(30)
    oracles = [td_lambda_expected(e, gamma, td_lambda) for e in episodes]
    assert_real_steps(td_lambda_(episodes, gamma, td_lambda), oracles)


def test_td_lambda_is_eq_8_as_printed_when_next_q_is_not_the_q_tot_of_the_next_step():
    episodes = ragged_batch(31)
    for e in episodes:
        e["next_q"] = e["next_v"]
    assert_real_steps(td_lambda_(episodes, 0.9, 0.8), [td_lambda_expected(e, 0.9, 0.8) for e in episodes])


def test_td_lambda_ignores_what_lies_behind_the_end():
    episodes = ragged_batch(32)
    oracles = [td_lambda_expected(e, 0.99, 0.8) for e in episodes]
    for length, fill, ended in [
        (7, GARBAGE, False),
        (7, -GARBAGE, True),
        (15, GARBAGE, True),
        (15, -GARBAGE, False),
    ]:
        assert_real_steps(td_lambda_(episodes, 0.99, 0.8, length=length, fill=fill, ended=ended), oracles)


def test_td_lambda_zero_is_one_step():
    episodes = ragged_batch(33)
    oracles = [n_step_return_oracle(e["reward"], e["terminated"], e["next_q"], 0.9, 1) for e in episodes]
    assert_real_steps(td_lambda_(episodes, 0.9, 0.0), oracles)


def test_td_lambda_one_is_monte_carlo_plus_a_bootstrap_if_truncated():
    episodes = ragged_batch(34)
    oracles = []
    for e in episodes:
        total = 0.0 if e["terminated"][-1] else e["next_v"][-1]
        returns = []
        for reward in reversed(e["reward"]):
            total = reward + 0.9 * total
            returns.insert(0, total)
        oracles.append(returns)
    assert_real_steps(td_lambda_(episodes, 0.9, 1.0), oracles)


@pytest.mark.parametrize("terminates", [True, False])
def test_td_lambda_of_a_single_step(terminates):
    episode = random_episode(random.Random(35), 1, terminates)
    ours = td_lambda_([episode], 0.9, 0.8)
    assert ours.shape == (1, 1)
    close(ours, [[episode["reward"][0] + (0 if terminates else 0.9 * episode["next_q"][0])]])


def test_targets_leave_their_inputs_as_they_were():
    episodes = ragged_batch(36)
    for function, keys, settings in TARGETS:
        inputs = batch(episodes, keys, fill=GARBAGE)
        copies = {key: value.clone() for key, value in inputs.items()}
        targets = function(**inputs, **settings)
        assert targets.shape == inputs["reward"].shape
        for key, value in inputs.items():
            assert torch.equal(value, copies[key]), key


# ---- Proposition 1: the fixed point ----
class SmallMDP:
    """Four states, two agents with two actions each, deterministic transitions, some of them final."""

    gamma = 0.8
    joints = joint_actions(2, 2)

    def __init__(self, seed, deterministic_policy=False):
        rng = random.Random(seed)
        pairs = list(itertools.product(range(4), self.joints))
        self.reward = {pair: rng.uniform(-1, 1) for pair in pairs}
        self.successor = {pair: rng.randrange(4) for pair in pairs}
        self.final = {pair: rng.random() < 0.25 for pair in pairs}
        self.pairs = pairs
        first = [
            [float(rng.random() < 0.5) if deterministic_policy else rng.random() for _ in range(2)]
            for _ in range(4)
        ]
        self.pi = [[[p, 1 - p] for p in row] for row in first]  # per state, agent, action
        self.q = {pair: 0.0 for pair in pairs}
        for _ in range(400):  # 0.8^400 is below the precision of a float
            self.q = {pair: self.backup(pair) for pair in pairs}

    def backup(self, pair):
        return self.reward[pair] + (
            0.0 if self.final[pair] else self.gamma * self.value(self.q, self.successor[pair])
        )

    def value(self, q, state):
        return sum(joint_probability(self.pi[state], joint) * q[state, joint] for joint in self.joints)

    def rollouts(self, horizon):
        """Every trajectory of at most `horizon` steps from every (s, a), as lists of such pairs."""
        done, open_ = [], [[pair] for pair in self.pairs]
        for _ in range(horizon - 1):
            done += [path for path in open_ if self.final[path[-1]]]
            live = [path for path in open_ if not self.final[path[-1]]]
            open_ = [[*path, (self.successor[path[-1]], joint)] for path in live for joint in self.joints]
        return done + open_

    def episodes(self, paths, q):
        """The batch that a learner with target critic `q` would build from these trajectories."""
        out = []
        for path in paths:
            values = [self.value(q, self.successor[pair]) for pair in path]
            q_tot = [q[pair] for pair in path]
            out.append(
                {
                    "reward": [self.reward[pair] for pair in path],
                    "terminated": [self.final[pair] for pair in path],
                    "q_tot": q_tot,
                    "next_v": values,
                    "next_q": q_tot[1:] + [values[-1]],
                    "pi_joint": [joint_probability(self.pi[state], joint) for state, joint in path],
                }
            )
        return out

    def average(self, paths, first_targets, policy):
        """E[target of the first step | its (s, a)] when every later action is drawn from `policy`."""
        mean, total = dict.fromkeys(self.pairs, 0.0), dict.fromkeys(self.pairs, 0.0)
        for path, target in zip(paths, first_targets, strict=True):
            weight = math.prod(joint_probability(policy[state], joint) for state, joint in path[1:])
            mean[path[0]] += weight * target
            total[path[0]] += weight
        assert all(abs(x - 1) < 1e-9 for x in total.values())
        return mean


UNIFORM = [[[0.5, 0.5], [0.5, 0.5]]] * 4


@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_tree_backup_returns_the_true_q_on_any_trajectory(n_steps):
    mdp = SmallMDP(40)
    paths = mdp.rollouts(4)
    assert {len(path) for path in paths} == {1, 2, 3, 4}
    targets = tree_backup(mdp.episodes(paths, mdp.q), mdp.gamma, 0.9, n_steps, fill=GARBAGE)
    assert_real_steps(targets, [[mdp.q[pair] for pair in path] for path in paths])


@pytest.mark.parametrize("td_lambda", [0.0, 0.8, 1.0])
def test_td_lambda_returns_the_true_q_of_a_deterministic_policy(td_lambda):
    mdp = SmallMDP(41, deterministic_policy=True)
    # The actions after the first are the policy's own: the data of Eq. 8 are on-policy.
    paths = [
        p for p in mdp.rollouts(4) if all(joint_probability(mdp.pi[s], joint) == 1.0 for s, joint in p[1:])
    ]
    assert max(len(path) for path in paths) == 4
    targets = td_lambda_(mdp.episodes(paths, mdp.q), mdp.gamma, td_lambda, fill=GARBAGE)
    assert_real_steps(targets, [[mdp.q[pair] for pair in path] for path in paths])


@pytest.mark.parametrize("td_lambda", [0.0, 0.8, 1.0])
def test_td_lambda_returns_the_true_q_in_expectation_over_on_policy_trajectories(td_lambda):
    mdp = SmallMDP(42)
    paths = mdp.rollouts(4)
    targets = td_lambda_(mdp.episodes(paths, mdp.q), mdp.gamma, td_lambda, fill=GARBAGE)
    mean = mdp.average(paths, targets[:, 0].tolist(), mdp.pi)
    assert mean == pytest.approx(mdp.q, abs=1e-9)


@pytest.mark.parametrize("which", ["tree backup, off-policy", "TD(lambda), on-policy"])
def test_iterating_the_targets_from_zero_converges_to_the_true_q(which):
    mdp = SmallMDP(43)
    paths = mdp.rollouts(3)
    q = dict.fromkeys(mdp.pairs, 0.0)
    assert max(abs(x) for x in mdp.q.values()) > 0.5
    for _ in range(90):
        episodes = mdp.episodes(paths, q)
        if which.startswith("tree"):  # whatever the behaviour policy
            q = mdp.average(
                paths, tree_backup(episodes, mdp.gamma, 1.0, 3, fill=GARBAGE)[:, 0].tolist(), UNIFORM
            )
        else:
            q = mdp.average(paths, td_lambda_(episodes, mdp.gamma, 0.8, fill=GARBAGE)[:, 0].tolist(), mdp.pi)
    assert q == pytest.approx(mdp.q, abs=1e-6)


def test_targets_of_decomposed_critic_with_dead_agents():
    """Eq. 5 and 7 together: three agents, the second dies after one step, joint quantities by enumeration."""
    length, gamma, tb_lambda, epsilon = 4, 0.9, 0.8, 0.1
    g = generator(44)
    k, b, q_values = random_critic(45, (1, length + 1), 3, 3)
    logits = torch.randn(1, length + 1, 3, 3, generator=g, dtype=torch.float64)
    avail_actions = torch.ones(1, length + 1, 3, 3, dtype=torch.bool)
    avail_actions[:, 1:, 1, 1:] = False  # only the no-op
    avail_actions[:, 2, 2, 0] = False
    actions = torch.tensor([[[0, 2, 1], [1, 0, 0], [2, 0, 2], [1, 0, 1]]])  # (1, T, N)
    reward = tensor([[0.5, -1.0, 2.0, 0.3]])

    pi = epsilon_policy(logits, avail_actions, epsilon)  # (1, T + 1, N, A)
    q_taken = q_values[:, :-1].gather(3, actions.unsqueeze(3)).squeeze(3)  # (1, T, N)
    q_tot = decomposed_q(k[:, :-1], b[:, :-1], q_taken)  # (1, T)
    next_v = expected_q(k, b, q_values, pi)[:, 1:]  # (1, T)
    pi_joint = pi[:, :-1].gather(3, actions.unsqueeze(3)).squeeze(3).prod(2)  # (1, T)
    terminated, mask = torch.zeros(1, length, dtype=torch.bool), torch.ones(1, length, dtype=torch.float64)
    ours = tree_backup_targets(reward, terminated, mask, q_tot, next_v, pi_joint, gamma, tb_lambda, 5)

    rows = [
        [
            epsilon_policy_oracle(logits[0, t, i].tolist(), avail_actions[0, t, i].tolist(), epsilon)
            for i in range(3)
        ]
        for t in range(length + 1)
    ]
    critic = [(k[0, t].tolist(), b[0, t].item(), q_values[0, t].tolist()) for t in range(length + 1)]
    joints = actions[0].tolist()
    for t in range(1, length):  # the dead agent is no factor of the product
        close(pi_joint[0, t], rows[t][0][joints[t][0]] * rows[t][2][joints[t][2]])
    oracle = tree_backup_oracle(
        reward[0].tolist(),
        [False] * length,
        [q_tot_oracle(*critic[t], joints[t]) for t in range(length)],
        [expected_q_oracle(*critic[t + 1], rows[t + 1]) for t in range(length)],
        [joint_probability(rows[t], joints[t]) for t in range(length)],
        gamma,
        tb_lambda,
        5,
    )
    close(ours, [oracle])


# ---- Eq. 9, the policy gradient ----
def actor_batch(seed, lengths=(3, 1, 2), n_agents=2, n_actions=3, fill=GARBAGE):
    """k (B, T, N), q_values, logits, avail_actions (B, T, N, A), mask (B, T); garbage behind the ends."""
    g = generator(seed)
    leading = (len(lengths), max(lengths))
    k, _, q_values = random_critic(seed + 1, leading, n_agents, n_actions)
    logits = torch.randn(*leading, n_agents, n_actions, generator=g, dtype=torch.float64)
    avail_actions = torch.ones(*leading, n_agents, n_actions, dtype=torch.bool)
    avail_actions[0, 0, 0, 1] = False  # an illegal action
    avail_actions[0, 1:, 1, :-1] = False  # a dead agent
    mask = tensor([[float(t < n) for t in range(leading[1])] for n in lengths])
    real = mask.bool()
    k[~real], q_values[~real], logits[~real] = fill, -fill, fill
    avail_actions[~real] = False  # as a buffer that was filled with zeros
    return k, q_values, logits, avail_actions, mask


def real_steps(mask):
    return [tuple(index) for index in mask.nonzero().tolist()]


def policy_rows(logits, avail_actions, epsilon, b, t):
    """The softmax and the epsilon-policy of all agents at one step, by the oracle."""
    rows = list(zip(logits[b, t].tolist(), avail_actions[b, t].tolist(), strict=True))
    return [softmax_oracle(*row) for row in rows], [epsilon_policy_oracle(*row, epsilon) for row in rows]


def eq_9_gradient(k, q_values, logits, avail_actions, mask, epsilon):
    """The gradient of a loss that descends where Eq. 9 ascends, averaged over real steps."""
    gradient = torch.zeros_like(logits)
    for b, t in real_steps(mask):
        p, pi = policy_rows(logits, avail_actions, epsilon, b, t)
        step = policy_gradient_oracle(k[b, t].tolist(), q_values[b, t].tolist(), p, pi, epsilon)
        gradient[b, t] = -tensor(step) / len(real_steps(mask))
    return gradient


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [(3, 1, 2), (1,)])
def test_expected_loss_is_minus_the_mean_of_eq_5_without_b(lengths, epsilon):
    k, q_values, logits, avail_actions, mask = actor_batch(50, lengths)
    value = 0.0
    for b, t in real_steps(mask):
        _, pi = policy_rows(logits, avail_actions, epsilon, b, t)
        value -= expected_q_oracle(k[b, t].tolist(), 0.0, q_values[b, t].tolist(), pi) / len(real_steps(mask))
    pi = epsilon_policy(logits, avail_actions, epsilon)
    close(expected_policy_gradient_loss(k, q_values, pi, mask), value)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [(3, 1, 2), (1,)])
def test_expected_loss_has_the_gradient_of_eq_9(lengths, epsilon):
    k, q_values, logits, avail_actions, mask = actor_batch(50, lengths)
    leaf = logits.clone().requires_grad_()
    loss = expected_policy_gradient_loss(k, q_values, epsilon_policy(leaf, avail_actions, epsilon), mask)
    (gradient,) = torch.autograd.grad(loss, leaf)
    oracle = eq_9_gradient(k, q_values, logits, avail_actions, mask, epsilon)
    assert oracle.abs().max() > 0.01
    close(gradient, oracle)
    assert (gradient[~mask.bool()] == 0).all() and (gradient[~avail_actions] == 0).all()


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_sampled_loss_is_the_centred_score_of_the_actions(epsilon):
    k, q_values, logits, avail_actions, mask = actor_batch(52)
    leaf = logits.clone().requires_grad_()
    pi = epsilon_policy(leaf, avail_actions, epsilon)
    rng = random.Random(53)
    actions = torch.zeros(*mask.shape, 2, dtype=torch.int64)
    value, oracle = 0.0, torch.zeros_like(logits)
    for b, t in real_steps(mask):
        p, rows = policy_rows(logits, avail_actions, epsilon, b, t)
        for i in range(2):
            a = rng.choice([x for x in range(3) if avail_actions[b, t, i, x]])
            actions[b, t, i] = a
            q = q_values[b, t, i].tolist()
            utility = k[b, t, i].item() * (q[a] - sum(x * y for x, y in zip(rows[i], q, strict=True)))
            value -= math.log(rows[i][a]) * utility / len(real_steps(mask))
            oracle[b, t, i] = (
                -utility * tensor(grad_log_pi(p[i], rows[i], a, epsilon)) / len(real_steps(mask))
            )
    loss = sampled_policy_gradient_loss(k, q_values, pi, actions, mask)
    close(loss, value)
    (gradient,) = torch.autograd.grad(
        loss, leaf
    )  # behind the end pi is zero: no log of it may reach the gradient
    assert oracle.abs().max() > 0.01
    close(gradient, oracle)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_sampled_loss_averaged_over_all_joint_actions_has_the_gradient_of_eq_9(epsilon):
    k, q_values, logits, avail_actions, mask = actor_batch(54, lengths=(1,))
    leaf = logits.clone().requires_grad_()
    pi = epsilon_policy(leaf, avail_actions, epsilon)
    mean = torch.zeros_like(logits)
    for joint in joint_actions(2, 3):
        weight = joint_probability(pi[0, 0].tolist(), joint)
        if weight == 0.0:  # an illegal action
            continue
        loss = sampled_policy_gradient_loss(k, q_values, pi, torch.tensor([[joint]]), mask)
        mean += weight * torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    close(mean, eq_9_gradient(k, q_values, logits, avail_actions, mask, epsilon))
    (expected,) = torch.autograd.grad(expected_policy_gradient_loss(k, q_values, pi, mask), leaf)
    close(mean, expected)


def test_losses_ignore_what_lies_behind_the_end():
    """Also where the policy behind the end is an ordinary one: padding need not have been masked."""
    k, q_values, logits, avail_actions, mask = actor_batch(56)
    actions = torch.full((*mask.shape, 2), 2)
    results = []
    for fill in (0.5, GARBAGE):
        behind = ~mask.bool()
        k[behind], q_values[behind], logits[behind], avail_actions[behind] = fill, -fill, 0.1, True
        leaf = logits.clone().requires_grad_()
        pi = epsilon_policy(leaf, avail_actions, 0.0)
        sampled = sampled_policy_gradient_loss(k, q_values, pi, actions, mask)
        expected = expected_policy_gradient_loss(k, q_values, pi, mask)
        gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (sampled, expected)]
        assert all((gradient[behind] == 0).all() for gradient in gradients)
        results.append((sampled, expected, *gradients))
    for x, y in zip(*results, strict=True):
        close(x, y)


def test_losses_average_over_real_steps_and_sum_over_agents():
    k, q_values, logits, avail_actions, mask = actor_batch(58, lengths=(3, 1))
    actions = torch.full((2, 3, 2), 2)  # legal for the dead agent too
    leaf = logits.clone().requires_grad_()
    pi = epsilon_policy(leaf, avail_actions, 0.1)

    def gradient(function, k, rows=slice(None)):
        extra = (actions[rows],) if function is sampled_policy_gradient_loss else ()
        return torch.autograd.grad(
            function(k[rows], q_values[rows], pi[rows], *extra, mask[rows]), leaf, retain_graph=True
        )[0]

    for function in (expected_policy_gradient_loss, sampled_policy_gradient_loss):
        whole = gradient(function, k)
        assert whole.abs().max() > 1e-3
        close(whole, (3 * gradient(function, k, slice(0, 1)) + gradient(function, k, slice(1, 2))) / 4)
        close(whole, gradient(function, k * tensor([1, 0])) + gradient(function, k * tensor([0, 1])))


def test_a_boolean_mask_is_as_good_as_one_of_numbers():
    episodes = ragged_batch(59)
    for function, keys, settings in TARGETS:
        inputs = batch(episodes, keys, fill=GARBAGE)
        targets = function(**inputs, **settings)
        close(function(**{**inputs, "mask": inputs["mask"].bool()}, **settings), targets)
    k, q_values, logits, avail_actions, mask = actor_batch(59)
    pi = epsilon_policy(logits, avail_actions, 0.1)
    actions = torch.full((*mask.shape, 2), 2)
    for function, extra in ((expected_policy_gradient_loss, ()), (sampled_policy_gradient_loss, (actions,))):
        close(function(k, q_values, pi, *extra, mask.bool()), function(k, q_values, pi, *extra, mask))


def test_no_gradient_reaches_k_and_q():
    k, q_values, logits, avail_actions, mask = actor_batch(60)
    k, q_values, logits = (x.clone().requires_grad_() for x in (k, q_values, logits))
    pi = epsilon_policy(logits, avail_actions, 0.1)
    actions = torch.full((*mask.shape, 2), 2)
    for loss in (
        expected_policy_gradient_loss(k, q_values, pi, mask),
        sampled_policy_gradient_loss(k, q_values, pi, actions, mask),
    ):
        to_k, to_q, to_logits = torch.autograd.grad(
            loss, (k, q_values, logits), retain_graph=True, allow_unused=True
        )
        assert to_k is None or (to_k == 0).all()
        assert to_q is None or (to_q == 0).all()
        assert to_logits.abs().max() > 1e-3


def test_sampled_loss_weighs_the_score_by_the_aristocrat_utility():
    """U_i = Q_tot(a) - sum_x pi_i(x) Q_tot(x, a_-i), for every joint action (Appendix A.3.1)."""
    k, b, q_values = random_critic(62, (1, 1))
    leaf = torch.randn(1, 1, 3, 4, generator=generator(63), dtype=torch.float64).requires_grad_()
    pi = torch.softmax(leaf, -1)
    rows = pi[0, 0].tolist()
    mask = torch.ones(1, 1, dtype=torch.float64)

    def q_tot(joint):
        q_taken = torch.stack([q_values[0, 0, i, a] for i, a in enumerate(joint)])  # (N,)
        return decomposed_q(k[0, 0], b[0, 0], q_taken).item()

    for joint in joint_actions(3, 4):
        loss = sampled_policy_gradient_loss(k, q_values, pi, torch.tensor([[joint]]), mask)
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        oracle = []
        for i, a in enumerate(joint):
            others = [q_tot((*joint[:i], x, *joint[i + 1 :])) for x in range(4)]
            utility = q_tot(joint) - sum(p * q for p, q in zip(rows[i], others, strict=True))
            oracle.append([-utility * score for score in grad_log_pi(rows[i], rows[i], a)])
        close(gradient[0, 0], oracle)


# ---- Theorem 3 ----
def alike_agents(n):
    """Policies (n, A), k (n,), values (n, A) of mean zero: the k_i Q_i(a_i) are i.i.d., as in [DOP]."""
    q_values = [1.0, -0.5, -2.0, 1.5]  # 0.4 - 0.15 - 0.4 + 0.15 = 0
    return tensor([[0.4, 0.3, 0.2, 0.1]] * n), tensor([1 / n] * n), tensor([q_values] * n)


def unlike_agents(n):
    """The same with random ones, three actions each."""
    draw = generator(70)
    pi = torch.rand(n, 3, generator=draw, dtype=torch.float64) + 0.2
    pi = pi / pi.sum(-1, keepdim=True)
    k = torch.rand(n, generator=draw, dtype=torch.float64) + 0.5
    q_values = torch.randn(n, 3, generator=draw, dtype=torch.float64)
    return pi, k / k.sum(), q_values - (pi * q_values).sum(-1, keepdim=True)


def gradients_of_both_critics(pi, k, q_values, actions):
    """g1 and g2 (J, n, A) of joint actions (J, n): agent i's score times Q_tot, or times k_i Q_i, as ours."""
    J, n = actions.shape
    logits = pi.log().expand(J, 1, n, -1).clone().requires_grad_()
    mask, weights = torch.ones(J, 1, dtype=torch.float64), k.expand(J, 1, n)
    values = q_values.expand(J, 1, n, -1)
    loss = sampled_policy_gradient_loss(weights, values, logits.softmax(-1), actions.unsqueeze(1), mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    g2 = -J * gradient.squeeze(1)  # the loss is a mean over joint actions
    score = torch.nn.functional.one_hot(actions, pi.shape[-1]) - pi  # of the softmax, (J, n, A)
    q_tot = decomposed_q(
        k, torch.zeros((), dtype=torch.float64), q_values.gather(-1, actions.t()).t()
    )  # (J,)
    return score * q_tot[:, None, None], g2


def variances(gradients, probability):
    """Sum over agents and actions of the variance of gradients (J, n, A) under a probability (J,)."""
    mean = (probability[:, None, None] * gradients).sum(0)
    return (probability[:, None, None] * (gradients - mean).square()).sum().item()


def variances_by_moments(pi, k, q_values):
    """The same of g1 and g2 without joint actions: the n - 1 others of g1 are independent of the score."""
    eye = torch.eye(pi.shape[-1], dtype=torch.float64)
    scores = eye - pi[:, None]  # (n, A played, A)
    own = (k[:, None] * q_values)[..., None] * scores  # k_i Q_i(a_i) grad log pi_i(a_i)
    mean = (pi[..., None] * own).sum(1, keepdim=True)
    g2 = (pi[..., None] * (own - mean).square()).sum()
    spread = k.square() * (pi * q_values.square()).sum(-1)  # (n,), Var(k_j Q_j)
    size = (pi[..., None] * scores.square()).sum((1, 2))  # (n,), E[score^2]
    return (g2 + (size * (spread.sum() - spread)).sum()).item(), g2.item()


def enumerated_or_drawn(pi, draws=20_000):
    """Joint actions (J, n) and their probabilities (J,): all of them where they are few, else draws."""
    n, n_actions = pi.shape
    if n_actions**n > draws:
        return sample_actions(pi.expand(draws, -1, -1), generator(73)), tensor([1 / draws] * draws)
    joints = torch.tensor(joint_actions(n, n_actions))
    return joints, pi.gather(-1, joints.t()).prod(0)


@pytest.mark.parametrize("agents", [alike_agents, unlike_agents])
@pytest.mark.parametrize("n", [2, 4, 7])
def test_variances_of_both_gradients_over_all_joint_actions(agents, n):
    team = agents(n)
    joints, probability = enumerated_or_drawn(team[0])
    assert probability.sum().item() == pytest.approx(1)
    ours = [variances(g, probability) for g in gradients_of_both_critics(*team, joints)]
    assert ours == pytest.approx(variances_by_moments(*team), rel=1e-9)


def test_variance_ratio_falls_as_one_over_n():
    """n Var(g2) / Var(g1) stays near a constant from 2 to 32 agents; g1 has no baseline, as in [DOP].

    The constant is c = Var(s X) / (E[s^2] Var(X)) of score s and X = k Q: the ratio is c / (c + n - 1).
    """
    g1, g2 = variances_by_moments(*alike_agents(2))
    c = g2 / (g1 - g2)  # 0.81
    for n in (2, 4, 8, 16, 32):
        team = alike_agents(n)
        joints, probability = enumerated_or_drawn(team[0])
        g1, g2 = (variances(g, probability) for g in gradients_of_both_critics(*team, joints))
        assert g2 / g1 == pytest.approx(c / (c + n - 1), rel=0.03)
        assert 0.95 * c < n * g2 / g1 < 1.15 * c
