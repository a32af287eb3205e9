"""Peers of update_speed.py: one update of MADDPG or MAAC as their reference implementations are built.

Our code with their structure, in this PyTorch: networks, optimisers, losses and heads in Python lists, a pass
for each agent. Critics see all observations, as there is no state in these codes. Where they differ from each
other, the cheaper way is taken: the others' actions are those of the replay, and gradients are computed only
of the networks that learn.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


def mlp(*sizes):
    """Two hidden layers."""
    n_in, hidden, n_out = sizes
    return nn.Sequential(
        nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, n_out)
    )


def step(optimizer, network, loss, max_norm):
    """One step of one optimiser."""
    optimizer.zero_grad()
    loss.backward(inputs=list(network.parameters()))
    nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    optimizer.step()


@torch.no_grad()
def soft_update(target, network, tau):
    for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
        slow.copy_((1 - tau) * slow + tau * fast)


def encoded(batch):
    """Lists over agents: obs, next_obs (B, O) and actions (B, D) as the critics take them."""
    actions = F.one_hot(batch.actions, 5).float() if batch.avail_actions is not None else batch.actions
    return batch.obs.unbind(1), batch.next_obs.unbind(1), actions.unbind(1)


# ---- MADDPG: per agent an actor, a critic on everything, two optimisers ----
def maddpg(batch):
    """A function that does one update of all agents on `batch`, and the actors."""
    discrete, (obs, next_obs, actions) = batch.avail_actions is not None, encoded(batch)
    n_agents, obs_dim, action_dim = len(obs), obs[0].shape[1], actions[0].shape[1]
    actors = [mlp(obs_dim, 64, action_dim) for _ in range(n_agents)]
    critics = [mlp(n_agents * (obs_dim + action_dim), 64, 1) for _ in range(n_agents)]
    actor_targets, critic_targets = copy.deepcopy(actors), copy.deepcopy(critics)
    actor_optimizers, critic_optimizers = (
        [torch.optim.Adam(network.parameters(), lr=1e-2) for network in networks]
        for networks in (actors, critics)
    )
    reward, going_on = batch.reward.unsqueeze(1), 1 - batch.terminated.float().unsqueeze(1)

    def act(logits):
        return F.gumbel_softmax(logits, hard=True) if discrete else logits.tanh()

    def update():
        for i in range(n_agents):
            with torch.no_grad():
                next_actions = [act(actor(x)) for actor, x in zip(actor_targets, next_obs, strict=True)]
                next_q = critic_targets[i](torch.cat([*next_obs, *next_actions], 1))
                td_target = reward + 0.95 * going_on * next_q
            loss = F.mse_loss(critics[i](torch.cat([*obs, *actions], 1)), td_target)
            step(critic_optimizers[i], critics[i], loss, 0.5)
            logits = actors[i](obs[i])
            joint = [act(logits) if j == i else x for j, x in enumerate(actions)]
            loss = -critics[i](torch.cat([*obs, *joint], 1)).mean() + 1e-3 * logits.square().mean()
            step(actor_optimizers[i], actors[i], loss, 0.5)
        for i in range(n_agents):
            soft_update(actor_targets[i], actors[i], 0.01)
            soft_update(critic_targets[i], critics[i], 0.01)

    return update, actors


# ---- MAAC: one critic with lists of encoders, heads and outputs ----
class Attention(nn.Module):
    """Q of all own actions, (B, A) for each agent, with 4 heads that attend to the other agents."""

    def __init__(self, n_agents, obs_dim, n_actions, hidden=128, heads=4):
        super().__init__()

        def encoder(n_in):
            return nn.Sequential(nn.BatchNorm1d(n_in, affine=False), nn.Linear(n_in, hidden), nn.LeakyReLU())

        size = hidden // heads
        self.encoders = nn.ModuleList(encoder(obs_dim + n_actions) for _ in range(n_agents))
        self.state_encoders = nn.ModuleList(encoder(obs_dim) for _ in range(n_agents))
        self.keys = nn.ModuleList(nn.Linear(hidden, size, bias=False) for _ in range(heads))
        self.selectors = nn.ModuleList(nn.Linear(hidden, size, bias=False) for _ in range(heads))
        self.values = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, size), nn.LeakyReLU()) for _ in range(heads)
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, n_actions))
            for _ in range(n_agents)
        )

    def forward(self, obs, actions):
        """Lists over agents of (B, O), (B, A) -> list of q_values (B, A), square of the logits."""
        pairs = [torch.cat(x, 1) for x in zip(obs, actions, strict=True)]
        pairs = [encoder(x) for encoder, x in zip(self.encoders, pairs, strict=True)]  # (B, H) each
        states = [encoder(x) for encoder, x in zip(self.state_encoders, obs, strict=True)]
        attended, penalty = [[] for _ in states], 0.0
        for key, selector, value in zip(self.keys, self.selectors, self.values, strict=True):
            keys, values = [key(x) for x in pairs], [value(x) for x in pairs]
            for i, query in enumerate([selector(x) for x in states]):
                others = torch.stack([x for j, x in enumerate(keys) if j != i], 2)  # (B, K, N - 1)
                logits = query.unsqueeze(1) @ others  # (B, 1, N - 1)
                weights = (logits / others.shape[1] ** 0.5).softmax(2)
                others = torch.stack([x for j, x in enumerate(values) if j != i], 2)  # (B, K, N - 1)
                attended[i].append((others * weights).sum(2))
                penalty = penalty + logits.square().mean()
        inputs = [torch.cat([x, *y], 1) for x, y in zip(states, attended, strict=True)]
        return [output(x) for output, x in zip(self.outputs, inputs, strict=True)], penalty


def maac(batch):
    """A function that does one update of all agents on `batch`, with discrete actions, and the actors."""
    obs, next_obs, actions = encoded(batch)
    n_agents, obs_dim, n_actions = len(obs), obs[0].shape[1], actions[0].shape[1]
    actors = [nn.Sequential(nn.BatchNorm1d(obs_dim, affine=False), mlp(obs_dim, 128, n_actions)) for _ in obs]
    critic = Attention(n_agents, obs_dim, n_actions)
    actor_targets, critic_target = copy.deepcopy(actors), copy.deepcopy(critic)
    optimizers = [torch.optim.Adam(actor.parameters(), lr=1e-3) for actor in actors]
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, weight_decay=1e-3)

    def act(actor, x):
        """One-hot actions (B, A), their log pi (B, 1), pi and logits (B, A)."""
        logits = actor(x)
        pi = logits.softmax(1)
        taken = pi.multinomial(1)  # (B, 1)
        return F.one_hot(taken.squeeze(1), n_actions).float(), pi.gather(1, taken).log(), pi, logits

    def update():
        with torch.no_grad():
            drawn = [act(actor, x) for actor, x in zip(actor_targets, next_obs, strict=True)]
            next_q_values, _ = critic_target(next_obs, [x[0] for x in drawn])
        q_values, penalty = critic(obs, actions)
        loss = 1e-3 * penalty
        for i in range(n_agents):
            next_action, next_log_pi, _, _ = drawn[i]
            next_q = (next_q_values[i] * next_action).sum(1, keepdim=True) - 0.01 * next_log_pi
            td_target = (
                batch.reward.unsqueeze(1) + 0.99 * (1 - batch.terminated.float().unsqueeze(1)) * next_q
            )
            loss = loss + F.mse_loss((q_values[i] * actions[i]).sum(1, keepdim=True), td_target)
        step(critic_optimizer, critic, loss, 10 * n_agents)

        drawn = [act(actor, x) for actor, x in zip(actors, obs, strict=True)]
        with torch.no_grad():
            q_values, _ = critic(obs, [x[0] for x in drawn])
        for i in range(n_agents):
            action, log_pi, pi, logits = drawn[i]
            v = (pi * q_values[i]).sum(1, keepdim=True)
            advantage = (q_values[i] * action).sum(1, keepdim=True) - v
            loss = (log_pi * (0.01 * log_pi - advantage).detach()).mean() + 1e-3 * logits.square().mean()
            step(optimizers[i], actors[i], loss, 0.5)
        for i in range(n_agents):
            soft_update(actor_targets[i], actors[i], 0.001)
        soft_update(critic_target, critic, 0.001)

    return update, actors
