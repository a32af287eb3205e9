"""MASQL: equations against slow loops from the papers, the samplers, one update, storage and the program."""

import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import test_dop_stochastic as sibling
import torch
from gymnasium import spaces
from test_dop_stochastic import checkpoint, same, scalars

import envs
import masql
from envs.base import VecEnv

run, toys, one_thread = sibling.run, sibling.toys, sibling.one_thread  # fixtures
N, D, OBS, S, LIMIT, J = 3, 2, 4, 5, 5, 6
SMALL = "--num-envs 4 --total-timesteps 400 --eval-every 200 --eval-episodes 6 --log-every 40".split()
SMALL += "--warmup-steps 100 --update-every 8 --batch-size 16 --hidden-dim 16".split()
OWN = "--particles 6 --value-samples 8".split()
PARTS = ("actor", "critic", "critic_target", "actor_optimizer", "critic_optimizer")
LOW, HIGH = torch.tensor([[[-1.0, -2.0], [0, 1], [-5, -1]], [[3, -1], [1, 2], [-4, 7]]])  # both (N, D)


class Aim(VecEnv):
    """All see which of 3 goals counts, each has a pair to play there; ends at random or by the clock."""

    def __init__(self, num_envs, device, seed, validate=True, at_step=None, bounded=True):
        bounds = (LOW.numpy(), HIGH.numpy()) if bounded else (-np.inf, np.inf)
        space = spaces.Box(*bounds, (N, D), np.float32)
        super().__init__(num_envs, N, OBS, S, LIMIT, space, device, seed, at_step != "nan")
        # the pairs of each goal (3, N, D), of -1..1, where the bounds count as -1 and 1
        pairs = torch.tensor([[0.5, -0.5], [-0.8, 0.3], [0.0, 0.9]])
        self.targets = torch.tensor([1, -1, 0.5])[:, None, None] * pairs
        self.goal = self.time = torch.zeros(num_envs, dtype=torch.int64)  # (B,)
        self.at_step, self.log = at_step, []

    def _restart(self, done):
        goal = torch.randint(3, (self.num_envs,), generator=self.generator)
        self.goal, self.time = torch.where(done, goal, self.goal), self.time * ~done

    def _advance(self, actions):
        scaled = (actions - LOW) / (HIGH - LOW) * 2 - 1
        rewards = 1 - (scaled - self.targets[self.goal]).square().mean(2)  # (B, N)
        if len(self.log) == 60 and self.at_step == "interrupt":
            sibling.os.kill(sibling.os.getpid(), sibling.signal.SIGINT)
        if len(self.log) >= 60 and self.at_step == "nan":
            rewards = rewards / 0 * 0
        self.time = self.time + 1
        over = torch.rand(self.num_envs, generator=self.generator) < 0.2  # (B,)
        return rewards.mean(1), over, {"agent_rewards": rewards}

    def _observe(self):
        one_hot, time = torch.eye(3)[self.goal], (self.time / LIMIT)[:, None]
        obs = torch.cat([one_hot, time], 1).unsqueeze(1).repeat(1, N, 1)
        return obs, torch.cat([1 - one_hot, time, -time], 1), None

    def step(self, actions):
        before = self._obs, self._state, None, actions.clone()
        result = super().step(actions)
        info = result[-1]
        after = info["final_obs"], info["final_state"], None, info["agent_rewards"], result[3]
        self.log.append((*before, *result[1:3], *after))
        return result

    def close(self, **_):
        """The program closes its training games last of all: keep them, and the program's variables."""
        Aim.last, Aim.program = self, sys._getframe(1).f_globals

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """The sibling's fixture `run` runs this program; `aim` and its variants exist."""
    monkeypatch.setattr(sibling, "SCRIPT", Path(masql.__file__))
    monkeypatch.setattr(sibling, "SMALL", SMALL + OWN)
    variants = {"aim": {}, "boundless": {"bounded": False}}
    variants |= {f"aim_{x}": {"at_step": x} for x in ("interrupt", "nan")}
    for name, arguments in variants.items():
        monkeypatch.setitem(envs._REGISTRY, name, (__name__, "Aim", arguments))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def catch_gradients(monkeypatch, module):
    """Nothing moves any more in `update`; returns a list for the loss and gradients of critic, then actor."""
    seen = []

    def descend(optimizer, loss, max_grad_norm):
        parameters = optimizer.param_groups[0]["params"]
        seen.append((loss.item(), torch.autograd.grad(loss, parameters, retain_graph=True)))
        return torch.zeros(())

    monkeypatch.setattr(module, "descend", descend)
    return seen


def slow_net(network, group, *x):
    """One plain perceptron of a network: vectors (n,), which it sees joined -> vector."""
    x = torch.cat(x)
    for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        x = (torch.relu(x) if layer else x) @ weight[group] + bias[group, 0]
    return x


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
def make_actor(hidden=16, seed=0, obs=OBS, low=LOW, high=HIGH):
    torch.manual_seed(seed)
    low, high = low.to(torch.get_default_dtype()), high.to(torch.get_default_dtype())
    return masql.Actor(len(low), obs + low.numel(), hidden, hidden, low.numel(), low=low, high=high)


def test_samplers_cover_both_modes_of_a_density():
    low, high = -torch.ones(2, 1), torch.ones(2, 1)
    actor, generator, obs = make_actor(32, obs=1, low=low, high=high), seeded(), torch.ones(1, 2, 1)
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
    actor = masql.Actor(N, OBS + J, J, low=LOW, high=HIGH)  # a single layer, which passes the noise on
    actor.weights[0].data = torch.cat([torch.zeros(OBS, J), torch.eye(J)]).repeat(N, 1, 1)
    actor.biases[0].data.zero_()
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
def learner(rows=range(5)):
    """The arguments of `update` up to alpha, with transitions between the states of these numbers."""
    torch.manual_seed(0)
    args = masql.Args(particles=3, value_samples=4, gamma=0.9, reward_scale=0.5)
    actor = make_actor(8)
    critic, critic_target = (masql.Critic(1, S + J, 8, 8, 1) for _ in range(2))
    optimizers = [torch.optim.SGD(x.parameters(), lr=1e-2) for x in (actor, critic)]
    B = len(rows)
    obs, state, next_obs, next_state = (torch.randn(B, *x)[list(rows)] for x in [(N, OBS), (S,)] * 2)
    actions = LOW.to(obs) + torch.rand(B, N, D) * (HIGH - LOW)
    reward, terminated = torch.randn(B), torch.arange(B) % 3 == 0
    batch = masql.Batch(obs, state, None, actions, reward, terminated, next_obs, next_state, None)
    return args, actor, critic, critic_target, optimizers, batch


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
        scaled = [(batch.actions[b, i] - LOW[i]) / (HIGH[i] - LOW[i]) * 2 - 1 for i in range(N)]
        error = targets[-1] - slow_net(critic, 0, batch.state[b], *scaled)
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


def check_stored(rewards=4):
    """The buffer of the latest run holds what its games did; log column `rewards` is the reward."""
    log, buffer = Aim.last.log, Aim.program["buffer"]
    assert buffer.n_steps == 4 * len(log) <= buffer.capacity
    terminated, truncated = (torch.stack([row[x] for row in log]) for x in (5, 10))
    assert terminated.any() and truncated.any()
    columns = [0, 1, 2, 3, rewards, 5, 6, 7, 8]
    for stored, column in zip(buffer.steps, columns, strict=True):
        if log[0][column] is not None:
            assert torch.equal(stored[: buffer.n_steps], torch.cat([row[column] for row in log]))


# ---- the program ----
def test_a_run_learns_writes_and_prints(run):
    flags = "--total-timesteps 3200 --eval-every 1600 --capture-video --actor-lr 0.003 --critic-lr 0.01"
    flags += " --anneal-start 1200 --anneal-steps 800 --gamma 0 --update-every 4 --hidden-dim 32"
    code, out, folder = run(*flags.split(), env="aim")
    assert code == 0 and f"run folder {folder}" in out and folder.name.startswith("aim__masql__1__")
    assert {path.name for path in folder.iterdir()} >= {"args.json", "model.pt", "1600.gif", "3200.gif"}
    state = checkpoint(folder)
    assert state["args"] == json.loads((folder / "args.json").read_text())
    assert state["global_step"] == 3200 and state["iteration"] == (3200 - 100) // 4 + 1
    curves = scalars(folder)
    charts = "episodic_return episodic_length alpha SPS train_seconds".split()
    losses = "critic_loss actor_loss q_taken td_target grad_norm_actor grad_norm_critic".split()
    tags = {f"charts/{x}" for x in charts} | {f"losses/{x}" for x in losses}
    assert curves.keys() == tags | {f"eval/{x}" for x in charts[:2]}
    alphas = dict(curves["charts/alpha"])
    assert alphas[1200] == 1 and alphas[3200] == pytest.approx(1e-3)
    share = curves["eval/episodic_return"][-1][1] / curves["eval/episodic_length"][-1][1]
    assert share > 0.9  # untrained: 0.7
    check_stored()


def test_same_seed_same_numbers_and_evaluation_does_not_disturb(run):
    states = [checkpoint(run(*x, env="aim")[2]) for x in ((), ("--eval-every", "0"), ("--seed", "2"))]
    equal = [all(same(states[0][part], state[part]) for part in (*PARTS, "rng")) for state in states[1:]]
    assert equal == [True, False]


def check_resume(run, parts):
    _, _, folder = run("--seed", "7", "--gamma", "0.5", env="aim")
    before = checkpoint(folder)
    assert "raise --total-timesteps" in run("--resume", str(folder), env=None, small=False)[0]
    run("--resume", str(folder), "--total-timesteps", "404", env=None, small=False)  # no update yet
    after = checkpoint(folder)
    assert all(same(after[part], before[part]) for part in (*parts, "iteration"))
    assert after["global_step"] == 404 and not same(after["rng"], before["rng"])
    flags = ["--resume", str(folder), "--total-timesteps", "800", "--critic-lr", "0.125"]
    code, _, _ = run(*flags, env=None, small=False)
    after = checkpoint(folder)
    assert code == 0 and after["global_step"] == 800 and after["iteration"] > before["iteration"] > 0
    old = {"resume": None, "total_timesteps": 400, "critic_lr": before["args"]["critic_lr"]}
    assert after["args"] | old == before["args"]
    assert after["critic_optimizer"]["param_groups"][0]["lr"] == 0.125  # a flag, unlike the rest
    assert not same(after["actor"], before["actor"])


def check_evaluate(run):
    _, _, folder = run(env="aim")
    code, out, _ = run("--evaluate", str(folder), "--capture-video", env=None, small=False)
    header, row = (line.split(" | ") for line in out.strip().splitlines()[-2:])
    assert not code and header == ["run", "step", "episodic_return", "episodic_length"]
    assert float(row[2]) == pytest.approx(scalars(folder)["eval/episodic_return"][-1][1], abs=1e-3)
    assert (folder / "evaluate.gif").stat().st_size


def check_stops(run, script):
    code, _, folder = run("--total-timesteps", "4000", env="aim_interrupt")
    assert code == 130 and checkpoint(folder)["global_step"] == 61 * 4
    code, _, folder = run("--total-timesteps", "4000", "--log-every", "400", env="aim_nan")
    assert code.startswith(f"{script}: ") and "is nan at step 400" in code and "\n" not in code
    assert not (folder / "model.pt").exists()


def test_resume_restores_and_goes_on(run):
    check_resume(run, PARTS)


def test_evaluate_plays_without_noise_and_prints_a_line(run):
    check_evaluate(run)


def test_ctrl_c_saves_and_nan_stops(run):
    check_stops(run, "masql.py")


def test_target_is_copied_every_period(run):
    for period, equal in (("1", True), ("1000", False)):
        state = checkpoint(run("--target-period", period, env="aim")[2])
        assert same(state["critic"], state["critic_target"]) == equal


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--env", "toy"], "toy has discrete actions; this algorithm needs continuous ones"),
        (["--env", "boundless"], "boundless has actions without finite bounds"),
        (["--env", "quadratik"], "unknown environment 'quadratik': did you mean quadratic"),
        (["--alpha-start", "-1"], "--alpha-start must be at least 1e-06"),
        (["--alpha-end", "0"], "--alpha-end must be at least 1e-06"),
        (["--particles", "1"], "--particles must be at least 2"),
        (["--buffer-size", "3"], "--buffer-size must be at least --num-envs, 4"),
        (["--resume", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_mistakes_get_one_sentence(run, flags, words):
    sibling.check_mistake(run(*flags, env="aim"), "masql.py", words)


def test_presets_lie_between_defaults_and_flags(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["masql.py", *flags])
        return masql.parse_args()

    assert parse("--env", "aim") == masql.Args(env="aim")
    paper = parse()
    assert paper == masql.Args(**masql.PRESETS["quadratic"])
    numbers = (paper.total_timesteps, paper.warmup_steps, paper.reward_scale, paper.hidden_dim)
    assert numbers == (15_000, 1_000, 0.1, 100)
    assert (paper.alpha_start, paper.alpha_end, paper.anneal_start, paper.anneal_steps) == (
        1,
        1e-3,
        10_000,
        1_500,
    )
    flags = parse("--env", "QUADRATIC,bound=5", "--reward-scale", "0.3")
    own = {"env": "QUADRATIC,bound=5", "reward_scale": 0.3}
    assert flags == masql.Args(**masql.PRESETS["quadratic"] | own)
