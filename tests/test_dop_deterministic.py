"""Deterministic DOP: equations against slow loops and autograd, the theorem on variance, and the program."""

import inspect

import pytest
import torch
from programs import (
    Aim,
    D,
    N,
    check_update,
    clipping_norms,
    for_critics,
    games,
    gradients_of,
    random_transitions,
    seeded,
    slow_net,
    slow_policy,
)
from torch import nn

import dop_deterministic as dop
import dop_stochastic
import maddpg

OBS, S = Aim.OBS, Aim.S


def make_actor(discrete=False, seed=0):
    torch.manual_seed(seed)
    return dop.Actor(games(discrete), dop.Args(hidden_dim=8))


def make_critic(hidden=8, **sizes):
    """Of continuous actions; `sizes`: other ones than Aim's."""
    env = games(discrete=False)
    vars(env).update(sizes)
    return dop.DecomposedCritic(env, dop.Args(critic_hidden_dim=hidden))


def learner(discrete=False, **settings):
    """The arguments of `update` up to the batch."""
    args = dop.Args(**{"critic_hidden_dim": 8, "gamma": 0.9, "tau": 0.0} | settings)
    actor, actor_target = make_actor(discrete), make_actor(discrete, seed=1)
    critic, critic_target = (dop.DecomposedCritic(games(discrete), args) for _ in range(2))
    optimizers = [torch.optim.SGD(x.parameters(), lr=1e-2) for x in (actor, critic)]
    batch = random_transitions(dop, discrete)
    return args, actor, critic, actor_target, critic_target, optimizers, batch


def total(critic, state, actions):
    """Q_tot (B,) of actions (B, N, D)."""
    q, k, b = critic(state, actions)
    return dop.decomposed_q(k, b, q)


def actor_gradients(value, actor):
    return torch.autograd.grad(value, list(actor.parameters()), retain_graph=True)


# ---- critic ----
def test_weights_are_a_distribution_over_agents():
    torch.manual_seed(0)
    critic = make_critic()
    q, k, b = critic(torch.randn(50, S), torch.randn(50, N, D))
    assert q.shape == k.shape == (50, N) and b.shape == (50,)
    assert (k >= 0).all() and k.std() > 0.1
    torch.testing.assert_close(k.sum(-1), torch.ones(50))
    for x in critic.k.parameters():
        nn.init.zeros_(x)
    assert total(critic, torch.randn(50, S), torch.randn(50, N, D)).isfinite().all()


def test_a_local_critic_is_a_plain_network_of_state_and_own_action(double):
    torch.manual_seed(0)
    critic, state, actions = make_critic(), torch.randn(4, S), torch.randn(4, N, D)
    assert [x.shape[1:] for x in critic.weights] == [(S + D, 8), (8, 8), (8, 1)]
    q, _, _ = critic(state, actions.requires_grad_())
    for i in range(N):
        expected = torch.cat([slow_net(critic, i, state[b], actions[b, i]) for b in range(4)])
        torch.testing.assert_close(q[:, i], expected)
        networks = [*critic.weights, *critic.biases]
        *parts, slope = torch.autograd.grad(q[:, i].sum(), [*networks, actions], retain_graph=True)
        for grad in (*parts, slope.transpose(0, 1)):
            assert [bool(part.any()) for part in grad] == [j == i for j in range(N)]


def test_code_that_is_anothers_is_tested_there():
    for name in ("act", "encode"):
        assert inspect.getsource(getattr(dop, name)) == inspect.getsource(getattr(maddpg, name))
    assert inspect.getsource(dop.decomposed_q) == inspect.getsource(dop_stochastic.decomposed_q)


# ---- Eq. 12 and Eq. 13 ----
@pytest.mark.parametrize("discrete", [False, True])
def test_update_equals_a_loop_over_transitions_and_agents(double, monkeypatch, discrete):
    # soft samples without noise, whose loop needs no luck
    monkeypatch.setattr(dop, "gumbel_softmax", lambda logits, generator: logits.softmax(-1))
    parts = learner(discrete)
    args, actor, critic, actor_target, critic_target, _, batch = parts
    logs, (critic_loss, critic_grads), (actor_loss, actor_grads) = gradients_of(
        monkeypatch, dop, parts, train_actor=True
    )

    def slow_total(network, state, actions):
        """Q_tot, and k of all agents."""
        scores = [(network.k.weight[i] @ state + network.k.bias[i]).abs() for i in range(N)]
        k = [score / sum(scores) for score in scores]
        q = [slow_net(network, i, state, actions[i])[0] for i in range(N)]
        b = network.b.weight[0] @ state + network.b.bias[0]
        return sum(k[i] * q[i] for i in range(N)) + b, k

    B, weights, targets, q_taken = len(batch.obs), list(actor.parameters()), [], []
    loss, objective, ascent = 0, 0, [torch.zeros_like(x) for x in weights]
    for b in range(B):
        legal, next_legal = (
            [None] * N if x is None else x[b] for x in (batch.avail_actions, batch.next_avail_actions)
        )
        following = [slow_policy(actor_target, i, batch.next_obs[b, i], next_legal[i])[0] for i in range(N)]
        next_q = slow_total(critic_target, batch.next_state[b], following)[0].item()
        targets.append(batch.reward[b].item() + (0 if batch.terminated[b] else args.gamma * next_q))
        replayed = for_critics(batch.actions[b])
        q_tot, k = slow_total(critic, batch.state[b], replayed)
        q_taken.append(q_tot.item())
        loss = loss + (targets[-1] - q_tot) ** 2 / B
        for i in range(N):  # Eq. 13: k_i, the slope of Q_i by a_i, the slope of mu_i
            policy, _ = slow_policy(actor, i, batch.obs[b, i], legal[i])
            own = policy.detach().requires_grad_()
            q = slow_net(critic, i, batch.state[b], own)[0]
            slope = k[i].detach() * torch.autograd.grad(q, own)[0]
            objective += (k[i] * q).item() / B
            for sum_, x in zip(ascent, torch.autograd.grad(policy, weights, slope), strict=True):
                sum_ += x / B
    assert logs["td_target"].item() == pytest.approx(sum(targets) / B)
    assert logs["q_taken"].item() == pytest.approx(sum(q_taken) / B)
    assert (critic_loss, actor_loss) == pytest.approx((loss.item(), -objective))
    torch.testing.assert_close(critic_grads, torch.autograd.grad(loss, list(critic.parameters())))
    torch.testing.assert_close(actor_grads, tuple(-x for x in ascent))


def test_an_actors_gradient_is_that_of_q_tot_whatever_the_others_do(double, monkeypatch):
    parts = learner()
    _, actor, critic, *_, batch = parts
    *_, (_, ours) = gradients_of(monkeypatch, dop, parts, train_actor=True)
    own = actor(batch.obs, None)
    choices = [own.detach(), dop.encode(actor, batch.actions), *torch.rand(3, *own.shape)]
    for others in choices:
        for i in range(N):
            is_own = (torch.arange(N) == i)[:, None]
            q_tot = total(critic, batch.state, torch.where(is_own, own, others))
            for mine, grad in zip(ours, actor_gradients(q_tot.mean(), actor), strict=True):
                torch.testing.assert_close(-mine[i], grad[i])  # of agent i's parameters
                assert [bool(x.any()) for x in grad] == [j == i for j in range(N)]


def test_truncated_steps_bootstrap_and_terminated_ones_do_not():
    reward, next_q, terminated = (
        torch.tensor([1.0, 2.0]),
        torch.tensor([10.0, 20.0]),
        torch.tensor([0, 1]).bool(),
    )
    assert dop.td_targets(reward, terminated, next_q, 0.5).tolist() == [6, 2]


def test_one_state_for_all_changes_nothing(monkeypatch):
    """Once with equal rows, once with rows that differ in what the target critic ignores."""
    for discrete in (False, True):
        monkeypatch.setattr(dop, "gumbel_softmax", lambda logits, generator: logits.softmax(-1))
        *parts, batch = learner(discrete)
        target = parts[4]
        for weight in (
            target.weights[0].data[:, S - 1],
            target.k.weight.data[:, -1],
            target.b.weight.data[:, -1],
        ):
            weight.zero_()
        equal = {name: getattr(batch, name)[:1].expand(6, -1, -1) for name in ("obs", "next_obs")}
        batch = batch._replace(**equal, next_state=torch.zeros(6, S))
        marked = batch.next_state.clone()
        marked[:, S - 1] = torch.arange(6)
        rows = [
            gradients_of(monkeypatch, dop, (*parts, x), train_actor=True)
            for x in (batch, batch._replace(next_state=marked))
        ]
        torch.testing.assert_close(*rows)


# ---- Theorem 6 ----
def test_the_joint_gradient_varies_with_the_others_and_the_decomposed_one_does_not(double):
    """One state, own action fixed, the others' actions with exploration noise."""
    torch.manual_seed(0)
    actor, critic, samples = make_actor(), make_critic(16), 200
    joint = nn.Sequential(nn.Linear(S + N * D, 16), nn.ReLU(), nn.Linear(16, 1))
    obs, state = torch.randn(1, N, OBS), torch.randn(1, S).expand(samples, -1)
    policy = actor(obs, None).detach()
    played = (policy + 0.3 * torch.randn(samples, N, D)).clamp(-1, 1)
    for i in range(N):
        actions = torch.where((torch.arange(N) == i)[:, None], policy, played).requires_grad_()
        q, k, _ = critic(state, actions)
        own = torch.autograd.grad((k * q)[:, i].sum(), actions, retain_graph=True)[0][:, i]  # g2
        whole = torch.autograd.grad(total(critic, state, actions).sum(), actions)[0][:, i]  # g1
        central = torch.autograd.grad(joint(torch.cat([state, actions.flatten(1)], 1)).sum(), actions)[0][
            :, i
        ]
        torch.testing.assert_close(own, whole)
        assert own.var(0).sum() < 1e-20 < 1e-6 < central.var(0).sum()


@pytest.mark.parametrize("n", [2, 5, 10, 32])
def test_the_share_of_the_own_part_in_the_variance_of_q_tot_is_1_over_n(double, n):
    """What the proof of Theorem 6 bounds, under its assumption: k_i Q_i of all agents alike."""
    torch.manual_seed(0)
    critic = make_critic(16, n_agents=n)
    for x in [*critic.weights, *critic.biases, *critic.k.parameters()]:
        x.data[:] = x.data[:1].clone()
    actions = torch.randn(20_000, n, D)
    q, k, b = critic(torch.randn(1, S).expand(20_000, -1), actions)
    ratio = (k * q)[:, 0].var() / dop.decomposed_q(k, b, q).var()
    assert ratio.item() == pytest.approx(1 / n, rel=0.1)


# ---- one update ----
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("train_actor", [False, True])
def test_actors_and_targets_wait_and_the_critic_does_not(discrete, train_actor):
    check_update(dop, learner(discrete, tau=0.25), train_actor)


def test_discrete_policies_learn_from_their_own_samples(monkeypatch):
    """The critic is asked about legal one-hot actions, and the slope reaches all legal logits."""
    asked, parts = [], learner(discrete=True)
    forward = dop.DecomposedCritic.forward
    monkeypatch.setattr(
        dop.DecomposedCritic, "forward", lambda *x: (asked.append(x[-1].detach()), forward(*x))[1]
    )
    *_, (_, grads) = gradients_of(monkeypatch, dop, parts, train_actor=True)
    batch = parts[-1]
    for actions, legal in zip(
        asked, (batch.next_avail_actions, batch.avail_actions, batch.avail_actions), strict=True
    ):
        torch.testing.assert_close(actions, actions.round())
        assert (actions.round().sum(-1) == 1).all() and not actions[~legal].any()
    assert all(x.any() for grad in grads for x in grad)


def test_both_gradients_are_clipped(monkeypatch):
    assert clipping_norms(monkeypatch, dop, *learner(max_grad_norm=0.3), seeded()) == [0.3, 0.3]


# ---- the program ----
def test_numbers_of_the_paper_in_every_task(parse):
    names = "buffer_size batch_size actor_lr critic_lr critic_hidden_dim num_envs update_every tau".split()
    for setting, numbers in (
        ("paper", [250_000, 1024, 5e-4, 5e-4, 256, 1, 1, 0.01]),
        ("appendix", [10_000, 1250, 5e-3, 5e-3, 256, 1, 1, 0.01]),
    ):
        for env in ("aim", "aggregation", "mill"):
            args = parse("--env", env, "--setting", setting)
            assert [getattr(args, name) for name in names] == numbers
