"""MASQL: equations against slow loops from the papers, the samplers, one update, storage and the program."""

import math
import statistics
import types

import pytest
import torch
from gymnasium import spaces
from programs import (
    HIGH,
    LOW,
    Aim,
    D,
    J,
    N,
    catch_gradients,
    clipping_norms,
    for_critics,
    games,
    rand,
    same,
    scalars,
    seeded,
    slow_net,
)

import masql

OBS, S = Aim.OBS, Aim.S


# ---- equations, from the papers ----
def slow_kernel(fixed, moving, width):
    """exp(-|a - f|^2 / h) of two vectors."""
    return math.exp(-sum((x - y) ** 2 for x, y in zip(fixed, moving, strict=True)) / width)


def slow_width(fixed, updated):
    squares = [sum((x - y) ** 2 for x, y in zip(a, f, strict=True)) for a in fixed for f in updated]
    return max(statistics.median(squares) / math.log(len(fixed)), 1e-3)


def slow_direction(fixed, score, updated):
    """Eq. 13 of [SQL] at one state: E_a[k(a, f) score + grad_a k(a, f)] for every f, of lists of vectors.

    The kernel's gradient is by central differences, the width is a constant in it.
    """
    width, directions = slow_width(fixed, updated), []
    for f in updated:
        total = [0.0] * len(f)
        for a, s in zip(fixed, score, strict=True):
            for d in range(len(f)):
                up, down = ([x + h * (e == d) for e, x in enumerate(a)] for h in (1e-5, -1e-5))
                slope = (slow_kernel(up, f, width) - slow_kernel(down, f, width)) / 2e-5
                total[d] += (slow_kernel(a, f, width) * s[d] + slope) / len(fixed)
        directions.append(total)
    return directions


def slow_soft_value(q_values, alpha, volume):
    """Eq. 10 of [SQL] with q(a) = 1 / volume, of one state."""
    return alpha * math.log(sum(math.exp(q / alpha) * volume for q in q_values) / len(q_values))


@pytest.mark.parametrize("K", [3, 7])  # odd: the median of K^2 distances is one of them
def test_direction_equals_a_loop_and_finite_differences_in_each_state(K):
    scale = torch.tensor([0.01, 0.5, 20.0]).double()[:, None, None]  # a width each, one at the floor
    fixed, score, updated = scale * rand(3, K, J), rand(3, K, J, seed=1), scale * rand(3, K, J, seed=2)
    ours = masql.svgd_direction(fixed, score, updated)
    widths = [slow_width(fixed[i].tolist(), updated[i].tolist()) for i in range(3)]
    assert widths[0] == 1e-3 < widths[1] < widths[2]
    for i in range(3):
        oracle = slow_direction(*(x[i].tolist() for x in (fixed, score, updated)))
        torch.testing.assert_close(ours[i], torch.tensor(oracle).to(ours), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spread", [0.3, 0.003])
def test_direction_of_as_many_particles_as_by_default_keeps_its_digits_where_they_meet(spread):
    """Far from the origin, in single precision; with this many torch.cdist multiplies matrices."""
    K = masql.Args().particles
    fixed, updated = (0.5 + spread * rand(8, K, J, seed=seed) for seed in (0, 2))
    score = rand(8, K, J, seed=1) / 1e-3
    exact = masql.svgd_direction(fixed, score, updated)
    pairs = (updated.unsqueeze(1) - fixed.unsqueeze(2)).double()  # (B, K, K, J), f - a
    distance = pairs.square().sum(-1)
    width = (distance.flatten(1).median(1).values / math.log(K)).clamp_min(1e-3)[:, None, None, None]
    kernel = (-distance.unsqueeze(-1) / width).exp()
    loop = (kernel * (score.unsqueeze(2) + 2 / width * pairs)).mean(1)  # (B, K, J)
    torch.testing.assert_close(exact, loop)
    ours = masql.svgd_direction(fixed.float(), score.float(), updated.float()).double()
    assert (ours - loop).norm() < 3e-6 * loop.norm()


def test_one_place_for_all_particles_is_plain_gradient_ascent_and_far_ones_do_not_interact():
    place, score = rand(1, 1, J).expand(1, 4, J), rand(1, 4, J, seed=1)
    torch.testing.assert_close(masql.svgd_direction(place, score, place), score.mean(1, True).expand(1, 4, J))
    fixed = place.clone()
    fixed[0, 3] += 100  # the kernel of a far particle is 0, so is its slope
    direction = masql.svgd_direction(fixed, score, place)
    torch.testing.assert_close(direction, (score[:, :3].sum(1, True) / 4).expand(1, 4, J))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_soft_value_is_the_integral_over_the_whole_space(alpha):
    centre, slope = torch.tensor([0.3, -0.6, 0.9], dtype=torch.float64), 1.5
    actions = 2 * torch.rand(1, 400_000, 3, dtype=torch.float64, generator=seeded()) - 1
    q_values = 2 - slope * (actions - centre).square().sum(-1)
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)  # the integral is a product of three
    integrals = [torch.trapezoid((-slope * (grid - c).square() / alpha).exp(), grid).item() for c in centre]
    v = 2 + alpha * math.log(math.prod(integrals))
    assert masql.soft_value(q_values, alpha, 3 * math.log(2)).item() == pytest.approx(v, abs=0.01)


def test_limits_of_the_soft_value():
    q_values = 30 * rand(4, 50)
    torch.testing.assert_close(masql.soft_value(q_values, 1e-6, 4.2), q_values.amax(1), atol=1e-4, rtol=0)
    mean = q_values.mean(1) + 1e6 * 4.2
    torch.testing.assert_close(masql.soft_value(q_values, 1e6, 4.2), mean, atol=1e-2, rtol=0)
    huge = masql.soft_value((1e4 * q_values).float(), 1e-3, 4.2)
    assert huge.isfinite().all()


@pytest.mark.parametrize(
    "annealing, middle", [("linear", 0.5005), ("exponential", 1e-3**0.5), ("instant", 1e-3)]
)
def test_schedules_of_alpha(annealing, middle):
    alphas = [masql.annealed_alpha(x, 100, 50, 1.0, 1e-3, annealing) for x in (0, 99, 100, 125, 150, 10**6)]
    start = 1e-3 if annealing == "instant" else 1.0
    assert alphas == pytest.approx([1, 1, start, middle, 1e-3, 1e-3])


# ---- samplers ----
def make_actor(hidden=16, seed=0, env=None):
    torch.manual_seed(seed)
    return masql.Actor(env or games(discrete=False), masql.Args(hidden_dim=hidden))


def test_samplers_cover_both_modes_of_a_density():
    env = types.SimpleNamespace(n_agents=2, obs_dim=1, single_action_space=spaces.Box(-1, 1, (2, 1)))
    actor, generator, obs = make_actor(32, env=env), seeded(), torch.ones(1, 2, 1)
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    modes, deviation = torch.tensor([[-0.4, -0.4], [0.4, 0.4]]), 0.3
    for _ in range(500):
        noise = torch.randn(1, 64, 2, 2, generator=generator)
        actions = actor(obs, noise)[0].transpose(0, 1)  # (N, 2 K, J)
        fixed, updated = actions.detach()[:, :32].requires_grad_(), actions[:, 32:]
        squares = (fixed.unsqueeze(2) - modes).square().sum(-1)  # (N, K, 2)
        log_density = (-squares / (2 * deviation**2)).logsumexp(-1)  # (N, K)
        score = torch.autograd.grad(log_density.sum(), fixed)[0]
        direction = masql.svgd_direction(fixed.detach(), score, updated.detach())
        masql.descend(optimizer, -(direction * updated).sum(-1).mean(), 0)
    with torch.no_grad():
        actions = actor(obs, torch.randn(1, 2000, 2, 2, generator=generator))[0]
    distances, nearest = (actions.unsqueeze(2) - modes).norm(dim=-1).min(-1)  # (2000, N)
    for agent in range(2):
        assert 0.4 < nearest[:, agent].float().mean() < 0.6
        for mode in range(2):  # a Gaussian's mean distance is deviation * sqrt(pi / 2)
            distance = distances[nearest[:, agent] == mode, agent].mean().item()
            assert distance == pytest.approx(deviation * math.sqrt(math.pi / 2), rel=0.2)


def test_each_agent_executes_its_own_part_of_its_own_sample():
    actor, passes_noise_on = make_actor(), torch.cat([torch.zeros(OBS, J), torch.eye(J)]).repeat(N, 1, 1)
    actor.layers = [(passes_noise_on, torch.zeros(N, 1, J))]
    actions, _ = masql.act(actor, torch.randn(7, N, OBS), None, generator=seeded())
    noise = torch.randn(7, 1, N, J, generator=seeded())
    for b in range(7):
        for i in range(N):
            for d in range(D):
                own = noise[b, 0, i, i * D + d].tanh()
                expected = LOW[i, d] + (own + 1) / 2 * (HIGH[i, d] - LOW[i, d])
                assert actions[b, i, d].item() == pytest.approx(expected.item(), abs=1e-5)
    centre, _ = masql.act(actor, torch.randn(7, N, OBS), None)  # zero noise
    torch.testing.assert_close(centre, ((LOW + HIGH) / 2).expand(7, N, D))


def test_actions_reach_the_bounds_and_the_critic_sees_them_as_minus_one_to_one():
    actor = make_actor()
    for sign, bound in ((-1, LOW), (1, HIGH)):
        actor.biases[-1].data.fill_(sign * 50)
        actions, _ = masql.act(actor, torch.randn(4, N, OBS), None, generator=seeded())
        torch.testing.assert_close(actions, bound.expand(4, N, D))
        torch.testing.assert_close(masql.encode(actor, actions), torch.full((4, N, D), float(sign)))


def test_a_sampler_depends_on_its_own_parameters_observation_and_noise_only():
    actor = make_actor()
    obs, noise = torch.randn(2, N, OBS, requires_grad=True), torch.randn(2, 5, N, J, requires_grad=True)
    actions = actor(obs, noise)
    for i in range(N):
        inputs = [*actor.parameters(), obs, noise]
        gradients = torch.autograd.grad(actions[:, :, i].sum(), inputs, retain_graph=True)
        for grad, x in zip(gradients, inputs, strict=True):
            agents = grad.movedim(-2, 0) if x is obs or x is noise else grad  # (N, ...)
            assert [bool(part.any()) for part in agents] == [j == i for j in range(N)]


# ---- one update ----
def learner(rows=range(5), **settings):
    """The arguments of `update` up to alpha, with transitions between the states of these numbers."""
    torch.manual_seed(0)
    args = masql.Args(particles=3, value_samples=4, gamma=0.9, reward_scale=0.5, hidden_dim=8, **settings)
    actor = make_actor(8)
    critic, critic_target = (masql.Critic(games(discrete=False), args) for _ in range(2))
    optimizers = [torch.optim.SGD(x.parameters(), lr=1e-2) for x in (actor, critic)]
    B = len(rows)
    obs, state, next_obs, next_state = (torch.randn(B, *x)[list(rows)] for x in [(N, OBS), (S,)] * 2)
    actions = LOW.to(obs) + torch.rand(B, N, D) * (HIGH - LOW)
    reward, terminated = torch.randn(B), torch.arange(B) % 3 == 0
    batch = masql.Batch(obs, state, None, actions, reward, terminated, next_obs, next_state, None)
    return args, actor, critic, critic_target, optimizers, batch


def test_both_gradients_are_clipped(monkeypatch):
    assert clipping_norms(monkeypatch, masql, *learner(max_grad_norm=0.3), 0.3, seeded()) == [0.3, 0.3]


def test_update_equals_a_loop_over_transitions_agents_and_particles(double, monkeypatch):
    args, actor, critic, critic_target, _, batch = parts = learner()
    B, K, alpha, gradients = len(batch.reward), args.particles, 0.3, catch_gradients(monkeypatch, masql)
    logs = masql.update(*parts, alpha, seeded())
    generator = seeded()
    samples = torch.empty(B, args.value_samples, J).uniform_(-1, 1, generator=generator)
    noise = torch.randn(B, 2 * K, N, J, generator=generator)
    critic_loss, actor_loss, targets = 0, 0, []
    for b in range(B):
        q_values = [slow_net(critic_target, 0, batch.next_state[b], a).item() for a in samples[b]]
        v = 0 if batch.terminated[b] else slow_soft_value(q_values, alpha, 2**J)
        targets.append(args.reward_scale * batch.reward[b].item() + args.gamma * v)
        error = targets[-1] - slow_net(critic, 0, batch.state[b], *for_critics(batch.actions[b]))
        critic_loss = critic_loss + (error**2 / 2 / B).squeeze()
        for i in range(N):
            moved = [slow_net(actor, i, batch.obs[b, i], noise[b, k, i]).tanh() for k in range(2 * K)]
            fixed = [x.detach().requires_grad_() for x in moved[:K]]
            score = [torch.autograd.grad(slow_net(critic, 0, batch.state[b], a), a)[0] / alpha for a in fixed]
            # d log(1 - a^2) / da, with the official code's 1e-6
            score = [
                s - 2 * a.detach() / (1 - a.detach() ** 2 + 1e-6) for s, a in zip(score, fixed, strict=True)
            ]
            direction = slow_direction(*([x.tolist() for x in xs] for xs in (fixed, score, moved[K:])))
            for f, vector in zip(moved[K:], direction, strict=True):
                actor_loss = actor_loss - (f @ torch.tensor(vector)) / K / B
    assert logs["td_target"].item() == pytest.approx(statistics.mean(targets))
    for loss, network, (value, ours) in zip(
        (critic_loss, actor_loss), (critic, actor), gradients, strict=True
    ):
        assert value == pytest.approx(loss.item(), rel=1e-6)
        for x, y in zip(ours, torch.autograd.grad(loss, list(network.parameters())), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)


def test_update_moves_critic_and_samplers_but_not_the_target():
    parts = learner()
    before = [{name: x.clone() for name, x in part.state_dict().items()} for part in parts[1:4]]
    logs = masql.update(*parts, 0.3, seeded())
    assert [same(x, part.state_dict()) for x, part in zip(before, parts[1:4], strict=True)] == [0, 0, 1]
    assert all(x.isfinite() for x in logs.values())


def test_one_state_for_all_leaves_the_expected_gradients_unchanged(monkeypatch):
    """Once with equal rows, once with rows that differ in what the target ignores; means of many draws."""
    draws, (*parts, batch), seen = 500, learner([0] * 6), catch_gradients(monkeypatch, masql)
    parts[3].weights[0].data[0, S - 1] = 0
    next_state = batch.next_state.clone()
    next_state[:, S - 1] = torch.arange(6)
    critics, samplers = [], []
    for offset, rows in enumerate((batch, batch._replace(next_state=next_state))):
        seen.clear()
        for draw in range(draws):
            masql.update(*parts, rows, 0.3, seeded(2 * draw + offset))
        flat = [torch.cat([x.flatten() for x in gradients]) for _, gradients in seen]
        critics.append(torch.stack(flat[::2]))  # (draws, parameters)
        samplers.append(torch.stack(flat[1::2]))
    for one, each in (critics, samplers):
        difference = one.mean(0) - each.mean(0)
        error = ((one.var(0) + each.var(0)) / draws).sqrt()
        assert (difference.abs() <= 5 * error + 1e-6).all()
        assert difference.norm() < 0.15 * each.mean(0).norm() and one.var(0).sum() > 2 * each.var(0).sum()


# ---- storage ----
def test_buffer_keeps_the_latest_rows_together():
    buffer, number = masql.ReplayBuffer(10), 0
    for added in range(1, 6):
        numbers = torch.arange(number, number + 4).float()
        number += 4
        rows = [numbers.view(4, *[1] * n).expand(4, *[2] * n) for n in (2, 1, 2, 0, 0, 2, 1)]
        buffer.add(masql.Batch(*rows[:2], None, *rows[2:], None))
        batch = buffer.sample(300, seeded(added))
        held = range(max(0, number - 10), number)
        assert set(batch.reward.tolist()) == set(map(float, held))
        assert all((x.flatten(1).T == batch.reward).all() for x in batch if x is not None and x.dim() > 1)
    assert batch.avail_actions is None and batch.obs.shape == (300, 2, 2)


# ---- the program ----
def test_alpha_falls_as_told(run):
    flags = "--anneal-start 100 --anneal-steps 200 --alpha-end 0.1"
    for annealing, alpha in (("linear", 0.55), ("exponential", 0.1**0.5), ("instant", 0.1)):
        curve = dict(scalars(run(*flags.split(), "--annealing", annealing)[2])["charts/alpha"])
        assert curve[200] == pytest.approx(alpha, abs=0.03)  # halfway, but for a step


def test_numbers_of_the_paper(parse):
    args = parse()
    numbers = (args.total_timesteps, args.warmup_steps, args.reward_scale, args.hidden_dim)
    assert numbers == (15_000, 1_000, 0.1, 100)
    alphas = (args.alpha_start, args.alpha_end, args.anneal_start, args.anneal_steps)
    assert alphas == (1, 1e-3, 10_000, 1_500)
