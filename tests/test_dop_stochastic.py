"""Stochastic DOP around its equations: networks, storage, one iteration, and the program itself."""

import copy
import itertools
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from programs import A, N, Toy, checkpoint, games, in_double, random_episodes, random_play, same
from test_dop_equations import td_lambda_oracle, tree_backup_oracle

import dop_stochastic as dop
import machine

SCRIPT, OBS, S = Path(dop.__file__), Toy.OBS, Toy.S
SMALL = dict(hidden_dim=16, critic_hidden_dim=16)


def make_actor():
    return dop.Actor(games(True, Toy), dop.Args(**SMALL))


def make_critic(separate=False, warmup=0):
    args = dop.Args(**SMALL, separate_critics=separate, critic_warmup=warmup)
    return dop.DecomposedCritic(games(True, Toy), args)


# ---- networks ----
@pytest.mark.parametrize("length", [[3, 70, 31, 1, 70, 32, 33], [1], [64, 63]])
def test_whole_episodes_and_single_steps_give_the_same_logits_and_gradients(double, length):
    torch.manual_seed(0)
    B, T, actor = len(length), max(length), make_actor()
    obs, actions = torch.randn(B, T + 1, N, OBS), torch.randint(A, (B, T, N))
    last_actions = F.pad(actions, (0, 0, 1, 0), value=-1)
    mask, hidden, steps = torch.arange(T) < torch.tensor(length).unsqueeze(1), None, []
    whole = actor.unroll(dop.Batch(obs, None, None, actions, None, None, mask, length))
    for t in range(T + 1):
        logits, hidden = actor(obs[:, t : t + 1], last_actions[:, t : t + 1], hidden)
        steps.append(logits)
    seen = F.pad(mask, (1, 0), value=True)[:, :, None, None]
    whole, steps = whole * seen, torch.cat(steps, 1) * seen
    torch.testing.assert_close(whole, steps)
    losses = [(x * x.detach().sin()).sum() for x in (whole, steps)]
    slopes = [torch.autograd.grad(loss, list(actor.parameters())) for loss in losses]
    torch.testing.assert_close(*slopes)


def test_looked_up_columns_equal_one_hot_inputs():
    torch.manual_seed(0)
    actor = make_actor()
    obs, last_actions = torch.randn(2, 1, N, OBS), torch.tensor([[[-1, 0, 4]], [[2, -1, -1]]])
    one_hot = F.one_hot(last_actions.clamp_min(0), A) * (last_actions >= 0).unsqueeze(-1)
    ids = torch.eye(N).expand(2, 1, N, N)
    x = torch.relu(actor.fc(torch.cat([obs, one_hot, ids], -1))).view(1, 2 * N, 16)
    logits = actor.head(actor.gru(x)[0]).view(2, 1, N, A)
    torch.testing.assert_close(actor(obs, last_actions)[0], logits)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("leading", [(), (4,), (4, 2)])
def test_weights_of_the_critic_are_a_distribution_over_agents(separate, leading):
    critic = make_critic(separate)
    q_values, k, b = critic(torch.randn(*leading, S))
    assert q_values.shape == (*leading, N, A) and k.shape == (*leading, N) and b.shape == leading
    assert (k >= 0).all()
    torch.testing.assert_close(k.sum(-1), torch.ones(leading))


def test_separate_critics_share_nothing_and_are_plain_networks():
    torch.manual_seed(0)
    critic = make_critic(separate=True)
    state = torch.randn(7, S)
    q_values, _, _ = critic(state)
    for i in range(N):
        x = state
        for layer, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            x = F.linear(x, weight[i].t(), bias[i, 0])
            x = torch.relu(x) if layer < 2 else x
        torch.testing.assert_close(q_values[:, i], x)
        gradients = torch.autograd.grad(q_values[:, i].sum(), list(critic.weights), retain_graph=True)
        assert all(grad[j].any() == (i == j) for grad in gradients for j in range(N))


def test_shared_trunk_has_a_head_per_agent():
    critic = make_critic()
    q_values, _, _ = critic(torch.randn(7, S))
    first, _, head = torch.autograd.grad(q_values[:, 1].sum(), list(critic.weights))
    assert first.any()
    assert (head.view(16, N, A).abs().sum((0, 2)) > 0).tolist() == [False, True, False]


def test_zero_init_silences_the_local_critics_only():
    q_values, k, b = make_critic(separate=True, warmup=1)(torch.randn(7, S))
    assert not q_values.any() and k.std() > 0 and b.std() > 0


def test_a_million_actions_of_an_actor_are_all_legal():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    actor = make_actor()
    avail_actions = torch.rand(1000, N, A) < 0.4
    avail_actions[..., 0] |= ~avail_actions.any(-1)
    obs, memory = 30 * torch.randn(1000, N, OBS), None
    for epsilon in torch.linspace(0, 1, 334).tolist():
        actions, memory = dop.act(actor, obs, avail_actions, memory, epsilon, generator)
        assert avail_actions.gather(-1, actions.unsqueeze(-1)).all()


# ---- storage ----
def test_buffer_returns_the_latest_episodes_as_they_were_played():
    buffer, episodes = random_play()
    assert buffer.n_episodes == len(episodes) > 3 * 5  # so the ring went around several times
    batch = buffer.sample([(5, 5)], torch.Generator().manual_seed(0))
    assert all(x.isfinite().all() for x in batch if torch.is_tensor(x))
    assert batch.obs.dtype == torch.half and batch.state.dtype == torch.float32
    assert batch.length == batch.mask.sum(1).tolist()
    assert batch.obs.shape[1] == batch.mask.shape[1] + 1 == max(batch.length) + 1
    order = batch.reward[:, 0].argsort()
    latest = sorted(episodes[-5:], key=lambda episode: episode[0][0]["reward"])
    for i, (steps, final) in zip(order.tolist(), latest, strict=True):
        length = len(steps)
        assert batch.mask[i].tolist() == [t < length for t in range(batch.mask.shape[1])]
        for name in ("actions", "reward", "terminated"):
            assert torch.equal(getattr(batch, name)[i, :length], torch.stack([step[name] for step in steps]))
        for name in ("obs", "state", "avail_actions"):
            seen = torch.stack([step[name] for step in steps] + [final[name].to(steps[0][name].dtype)])
            assert torch.equal(getattr(batch, name)[i, : length + 1].to(seen.dtype), seen)
            assert (getattr(batch, name)[i, length:] == seen[-1]).all()  # padding repeats the end


def test_buffer_draws_each_window_uniformly_and_without_repeats():
    buffer, episodes = random_play(capacity=6)
    names = [float(steps[0]["reward"]) for steps, _ in episodes]
    generator, counts = torch.Generator().manual_seed(0), dict.fromkeys(names[-6:], 0)
    for _ in range(600):
        batch = buffer.sample([(2, 3), (4, 6)], generator)
        first = [round(x, 2) for x in batch.reward[:, 0].tolist()]
        recent, old = first[:2], first[2:]
        assert len(set(recent)) == 2 and len(set(old)) == 4
        assert set(recent) <= {round(x, 2) for x in names[-3:]}
        for x in old:
            counts[min(counts, key=lambda name: abs(name - x))] += 1
    assert all(340 < count < 460 for count in counts.values())  # 400 each, standard deviation below 12


def test_buffer_before_it_is_full():
    buffer, episodes = random_play(capacity=500, steps=20)
    batch = buffer.sample([(400, 450)], torch.Generator().manual_seed(0))
    assert len(batch.obs) == len(episodes) < 50


# ---- one iteration ----
def learner(seed=0, **settings):
    torch.manual_seed(seed)
    args = dop.Args(on_policy_batch=3, off_policy_batch=4, **settings)
    actor = make_actor()
    critic, critic_target = (make_critic() for _ in range(2))
    optimizers = [torch.optim.RMSprop(x.parameters(), lr=1e-3) for x in (actor, critic)]
    draws = [(3, 8), (4, 20)][: 1 if args.tree_backup == "none" else 2]
    return args, actor, critic, critic_target, optimizers, random_episodes(draws, seed=seed)


def iterate(parts, train_actor=True, epsilon=0.3, seed=0):
    return dop.update(*parts, epsilon, torch.Generator().manual_seed(seed), train_actor)


@pytest.mark.parametrize(
    ("tree_backup", "actor_gradient", "scale"),
    [
        ("decomposed", "expected", 1),
        ("decomposed", "sampled", 1e5),  # of what is learnt: both gradients are clipped
        ("sampled", "expected", 1e5),
        ("none", "sampled", 1),
    ],
)
def test_iteration_equals_a_loop_over_episodes_and_steps(monkeypatch, tree_backup, actor_gradient, scale):
    """Algorithm 1 with Eq. 6 to 9; each network's step by hand, and where Eq. 5 is sampled, its samples."""
    settings = dict(gamma=0.9, kappa=0.3, n_steps=2, critic_updates=1, uniform_coef=0.0)
    args, *networks, _, batch = learner(tree_backup=tree_backup, actor_gradient=actor_gradient, **settings)
    batch, networks = in_double(batch), [x.double() for x in networks]
    batch.reward.mul_(scale / 100)
    for x in networks[1:]:
        x.weights[-1].data.mul_(scale)
    batch.terminated[0] = False  # one of three on-policy episodes, of the others two
    optimizers = [torch.optim.SGD(x.parameters(), lr=1e-2) for x in networks[:2]]
    actor, critic, critic_target = copy.deepcopy(networks)
    drawn, sampled_expected_q = [], dop.sampled_expected_q

    def spy(*inputs):
        assert inputs[4] == 200  # section 5.1.1 of [DOP], three agents
        drawn.extend((sampled_expected_q(*inputs), dop.expected_q(*inputs[:4])))
        return drawn[0]

    monkeypatch.setattr(dop, "sampled_expected_q", spy)
    logs = iterate((args, *networks, optimizers, batch))
    assert len(drawn) == 2 * (tree_backup == "sampled")

    def policies(i):
        hidden = None
        for t in range(batch.length[i] + 1):
            last = batch.actions[i, t - 1] if t else torch.full((N,), -1)
            logits, hidden = actor(batch.obs[i, t].view(1, 1, N, -1), last.view(1, 1, N), hidden)
            yield dop.epsilon_policy(logits[0, 0], batch.avail_actions[i, t], 0.3)  # (N, A)

    def q_tot(network, i, t):
        q_values, k, b = network(batch.state[i, t])
        return k @ q_values[range(N), batch.actions[i, t]] + b

    def descended(network, ours, loss):
        """A step down the gradient of `loss`, which our network must have taken too. Returns its norm."""
        slopes = torch.autograd.grad(loss, [*network.parameters()])
        norm = torch.cat([x.flatten() for x in slopes]).norm()
        for x, y, slope in zip(network.parameters(), ours.parameters(), slopes, strict=True):
            x.data -= 1e-2 * slope * min(1, 20 / norm)
            torch.testing.assert_close(x, y)
        assert (norm > 20) == (scale > 1)
        return norm

    # actor: Eq. 9 with the critic as it is, on the on-policy episodes
    on, utilities = range(3), []
    pi = [[*policies(i)] for i in on]
    for i in on:
        for t in range(batch.length[i]):
            q_values, k, _ = (x.detach() for x in critic(batch.state[i, t]))
            for n, a in enumerate(batch.actions[i, t].tolist()):
                v = pi[i][t][n] @ q_values[n]
                score = pi[i][t][n, a].log() * (q_values[n, a] - v.detach())
                utilities.append(k[n] * (v if actor_gradient == "expected" else score))
    actor_loss = -sum(utilities) / sum(batch.length[:3])
    torch.testing.assert_close(logs["actor_loss"], actor_loss.detach())
    torch.testing.assert_close(logs["grad_norm_actor"], descended(actor, networks[0], actor_loss))

    # critic: Eq. 8 with the policies before the actor's step, Eq. 7 with those after it
    targets, errors, ends = [], [], []
    for i, length in enumerate(batch.length):
        probabilities = pi[i] if i in on else [*policies(i)]
        values = []
        for t in range(length + 1):
            q_values, k, b = critic_target(batch.state[i, t])
            values.append((k @ (probabilities[t] * q_values).sum(-1) + b).item())
        if drawn and i not in on:
            sampled, exact = (x[i - 3, : length + 1].tolist() for x in drawn)
            assert values == pytest.approx(exact)
            values = sampled
        q = [q_tot(critic_target, i, t).item() for t in range(length)]
        joint = [probabilities[t][range(N), batch.actions[i, t]].prod().item() for t in range(length)]
        steps = batch.reward[i, :length].tolist(), batch.terminated[i, :length].tolist(), q
        if i in on:
            target = td_lambda_oracle(*steps, [*q[1:], values[length]], 0.9, args.td_lambda)
        else:
            target = tree_backup_oracle(*steps, values[1:], joint, 0.9, args.tb_lambda, 2)
        targets += target
        errors += [(y - q_tot(critic, i, t)) ** 2 for t, y in enumerate(target)]
        ends.append(steps[1][-1])
    assert ends == [False, True, True, True, True, False, False][: len(ends)]
    n_on = sum(batch.length[:3])
    losses = sum(errors[:n_on]) / n_on, sum(errors[n_on:]) / max(1, len(errors) - n_on)
    critic_loss = losses[0] if tree_backup == "none" else 0.7 * losses[0] + 0.3 * losses[1]
    torch.testing.assert_close(logs["critic_loss"], critic_loss.detach())
    torch.testing.assert_close(logs["td_target"].item(), sum(targets) / len(targets))
    torch.testing.assert_close(logs["grad_norm_critic"], descended(critic, networks[1], critic_loss))


def test_minibatches_share_the_critics_loss_and_are_drawn():
    losses, weights = [], []
    for updates, rate, seed in ((1, 0.0, 0), (3, 0.0, 0), (3, 0.1, 0), (3, 0.1, 1)):
        parts = learner(critic_updates=updates, kappa=0.3)
        parts[4][1].param_groups[0]["lr"] = rate
        losses.append(iterate(parts, seed=seed)["critic_loss"])
        weights.append(parts[2].k.weight)
    torch.testing.assert_close(*losses[:2])
    assert torch.equal(*weights[:2]) and not torch.equal(*weights[2:])


@pytest.mark.parametrize("tree_backup", ["decomposed", "sampled", "none"])
@pytest.mark.parametrize("actor_gradient", ["expected", "sampled"])
def test_every_choice_moves_actor_and_critic_but_not_the_target(tree_backup, actor_gradient):
    parts = learner(tree_backup=tree_backup, actor_gradient=actor_gradient)
    before = [{name: x.clone() for name, x in part.state_dict().items()} for part in parts[1:4]]
    logs = iterate(parts)
    after = [part.state_dict() for part in parts[1:4]]
    assert [same(x, y) for x, y in zip(before, after, strict=True)] == [False, False, True]
    assert all(x.isfinite() for x in logs.values())
    assert {"critic_loss", "actor_loss", "entropy", "q_taken", "td_target"} <= logs.keys()
    assert {"grad_norm_actor", "grad_norm_critic"} <= logs.keys()


def test_actor_rests_while_the_critic_warms_up():
    parts = learner()
    before = {name: x.clone() for name, x in parts[1].state_dict().items()}
    logs = iterate(parts, train_actor=False)
    assert same(before, parts[1].state_dict()) and "actor_loss" not in logs


@pytest.mark.parametrize("actor_gradient", ["expected", "sampled"])
def test_the_actors_loss_is_a_mean_over_steps_or_over_agents_too(actor_gradient):
    settings = dict(actor_gradient=actor_gradient)
    over_steps, over_both = (
        iterate(learner(**settings, actor_loss_mean=x))["actor_loss"] for x in ("steps", "agents")
    )
    torch.testing.assert_close(over_steps, N * over_both)


def test_entropy_is_the_mean_over_steps_and_agents():
    parts = learner()
    args, actor, batch = parts[0], parts[1], parts[-1]
    with torch.no_grad():
        pi = dop.policy(actor, dop.Batch(*(x[: args.on_policy_batch] for x in batch)), 0.3)
    entropies = [
        -sum(p * math.log(p) for p in pi[b, t, i].tolist() if p > 0)
        for b in range(args.on_policy_batch) for t in range(batch.length[b]) for i in range(N)
    ]  # fmt: skip
    entropy = iterate(parts)["entropy"].item()
    assert entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def test_the_pull_to_uniform_policies_is_a_mean_over_steps_and_agents_of_the_actors_loss():
    plain, parts = iterate(learner(uniform_coef=0.0)), learner(uniform_coef=0.3)
    args, actor, batch = parts[0], parts[1], parts[-1]
    with torch.no_grad():
        softmax = dop.policy(actor, dop.Batch(*(x[: args.on_policy_batch] for x in batch)), 0.0)
    divergences = []
    for b in range(args.on_policy_batch):
        for t in range(batch.length[b]):
            for i in range(N):
                legal = softmax[b, t, i][batch.avail_actions[b, t, i]].tolist()
                divergences.append(sum(math.log(1 / len(legal) / p) for p in legal) / len(legal))
    expected = 0.3 * sum(divergences) / len(divergences)
    torch.testing.assert_close(iterate(parts)["actor_loss"], plain["actor_loss"] + expected)


def test_the_pull_to_uniform_policies_does_not_vanish_where_the_softmax_is_sharp():
    logits = torch.tensor([60.0, 0.0, -60.0, 5.0], requires_grad=True)
    legal = torch.tensor([True, True, True, False])
    dop.uniform_divergence(logits, legal).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([2 / 3, -1 / 3, -1 / 3, 0.0]))
    alone = torch.tensor([False, True, False, False])  # a dead agent has one action, and nothing to choose
    assert dop.uniform_divergence(logits.detach(), alone) == 0


def test_the_critic_can_step_once_per_time_step(monkeypatch):
    parts, descend, stepped = learner(critic_updates=0), dop.descend, []
    monkeypatch.setattr(dop, "descend", lambda *x: (stepped.append(x[0]), descend(*x))[1])
    iterate(parts)
    mask, (_, critic_optimizer) = parts[-1].mask, parts[4]
    # as even parts as possible, which may be fewer
    expected = len(torch.arange(mask.sum()).chunk(mask.shape[1]))
    assert sum(x is critic_optimizer for x in stepped) == expected > mask.shape[1] / 2


def test_both_actor_gradients_agree_on_average(monkeypatch):
    """Sampled actions from pi, many times, against the exact expectation, at the actor's parameters."""
    args, actor, critic, *_, batch = learner()
    batch = dop.Batch(*(x[:3] for x in batch))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        q_values, k, _ = critic(batch.state[:, :-1])
    pi = dop.policy(actor, batch, 0.3)[:, :-1]
    exact = torch.autograd.grad(
        dop.expected_policy_gradient_loss(k, q_values, pi, batch.mask), actor.head.weight, retain_graph=True
    )[0]
    leaf = pi.detach().requires_grad_()
    draws = [dop.sample_actions(pi.detach(), generator) for _ in range(4000)]
    sampled = [dop.sampled_policy_gradient_loss(k, q_values, leaf, x, batch.mask) for x in draws]
    mean = torch.autograd.grad(torch.stack(sampled).mean(), leaf)[0]
    mean = torch.autograd.grad((pi * mean).sum(), actor.head.weight)[0]
    assert (mean - exact).norm() < 0.1 * exact.norm()


# ---- the program ----
@pytest.mark.parametrize(("bounded", "dtype"), [(True, torch.half), (False, torch.float32)])
def test_only_bounded_features_are_stored_in_half_precision(monkeypatch, run, bounded, dtype):
    """Half precision makes 70,000 infinite, and 3000.4 becomes 3000."""
    monkeypatch.setattr(Toy, "bounded_features", bounded)
    steps = checkpoint(run("--save-replay")[2])["buffer"]["steps"]
    assert steps["obs"].dtype == steps["state"].dtype == dtype and steps["reward"].dtype == torch.float32


def test_exit_codes_of_the_real_program(tmp_path):
    flags = ["--env", "3m", "--run-dir", str(tmp_path), "--num-envs"]
    loop = [
        *flags,
        "2",
        "--eval-every",
        "0",
        "--log-every",
        "40",
    ]  # the loop prints
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *loop], stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parent
    ) as program:
        for line in program.stdout:
            if line.startswith("step "):
                break
        program.send_signal(signal.SIGINT)
        assert program.wait(20) == 130
    assert 0 < checkpoint(next(tmp_path.iterdir()))["global_step"] < dop.Args().total_timesteps
    wrong = subprocess.run([sys.executable, str(SCRIPT), *flags, "0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--num-envs must be at least 1" in wrong.stdout + wrong.stderr


def test_networks_step_once_the_critic_is_warm_on_draws_from_their_windows(run):
    state = checkpoint(run("--critic-warmup", "3", "--critic-updates", "2")[2])
    actor, critic = (state[f"{name}_optimizer"]["state"][0]["step"] for name in ("actor", "critic"))
    assert actor == state["iteration"] - 3 > 0 and critic == 2 * state["iteration"]
    assert Toy.program["draws"] == [(4, 8), (6, 20)]


def test_critics_of_another_kind_cannot_go_on(run):
    _, _, folder = run()
    code, _, _ = run("--resume", folder, "--separate-critics", env=None)
    assert "has the separate_critics False, which cannot become True" in code


def test_numbers_of_the_official_code(parse):
    args = parse("--setting", "official")
    assert (args.num_envs, args.critic_lr, args.critic_updates) == (4, 1e-4, 0)
    assert args.actor_loss_mean == "agents" and args.uniform_coef == args.averaging == args.critic_warmup == 0
    assert (args.kappa, args.target_period) == (0.67, 10)  # 16 + 32 episodes, 600 of the critic's steps
    assert (args.epsilon_start, args.epsilon_end, args.epsilon_steps) == (0.5, 0.05, 500_000)


def test_numbers_of_the_paper(parse):
    args = parse("--setting", "paper")
    numbers = (args.num_envs, args.critic_lr, args.actor_lr, args.epsilon_start, args.epsilon_steps)
    assert numbers == (4, 1e-4, 5e-4, 1.0, 500_000)  # Appendix G.1 of [DOP]
    assert args.uniform_coef == args.averaging == args.critic_warmup == 0
    assert (args.kappa, args.critic_updates, args.target_period) == (0.5, 1, 8)
    assert args.separate_critics and not parse("--setting", "paper", "--no-separate-critics").separate_critics


def test_evaluations_play_the_average_of_actors(run, play, monkeypatch):
    """After every step: the average and the actor of the checkpoint, one iteration of 0.9 to 0.1 later."""
    saved = []

    def keep(folder, args, parts, progress):
        networks = [[x.clone() for x in parts[name].state_dict().values()] for name in ("average", "actor")]
        saved.append((progress["iteration"], *networks))

    with monkeypatch.context() as patch:
        patch.setattr(machine, "save", keep)
        assert run("--averaging", "0.9", "--save-every", "4")[0] == 0
    moved = 0
    for (before, old, _), (after, new, actor) in itertools.pairwise(saved):
        if after - before < 2:
            share = 0.1 * (after - before)
            for x, y, z in zip(old, new, actor, strict=True):
                torch.testing.assert_close(y, (1 - share) * x + share * z)
            moved += after - before and not torch.equal(new[0], actor[0])
    assert moved > 3
    _, _, folder = run("--averaging", "0")
    state = checkpoint(folder)
    assert all(torch.equal(x, state["average"][name]) for name, x in state["actor"].items())
    played = play(folder)
    state["actor"] = {name: torch.full_like(x, math.nan) for name, x in state["actor"].items()}
    torch.save(state, folder / "model.pt")
    assert play(folder) == played
