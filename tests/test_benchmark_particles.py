"""The pages of the particle tasks: particles.py on made-up files, credit.py on a run of 320 steps."""

import json
import types

import pytest
import torch
from PIL import Image

from benchmark import common, credit, particles, stats
from envs import make


def write_report(folder, name, curves, **more):
    """A file as run_seeds.py writes it; curves: a dict {tag: values} per run."""
    runs = []
    for i, tags in enumerate(curves):
        steps = [100 * (k + 1) for k in range(len(next(iter(tags.values()))))]
        runs.append({"seed": i + 1, "commit": "abc", "summary": {"steps": steps[-1]}})
        runs[-1]["curves"] = {tag: {"step": steps, "value": values} for tag, values in tags.items()}
    facts = dict(
        name=name, command=f"python {name}", date="today", workers=2, hardware={"cpu": "x", "threads": 1}
    )
    facts |= dict(metric="eval/win_rate", target=0.9)
    facts |= dict(seeds=[1, len(runs)], failed={}, settings={"eval_episodes": 128}, runs=runs) | more
    common.write_json(folder / f"{name}.json", facts)


# ---- particles.py ----
def test_tables_count_seeds(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rliable", reason="pip install -r requirements-benchmark.txt")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(stats, "REPS", 50)
    with pytest.raises(SystemExit, match="no sets of runs in fig4 or spread"):
        particles.main([])
    rates = [
        [0.0] * 8 + [0.95, 1.0],  # solved, and throughout the last fifth
        [1.0] * 8 + [0.9, 1.0],  # solved at the end only
        [0.0, 1.0] + [0.0] * 8,  # found and lost
    ]
    curves = [{"eval/win_rate": rate, "eval/episodic_return": [20 * x - 10 for x in rate]} for rate in rates]
    write_report(tmp_path / "fig4", "dop_aggregation", curves, failed={"9": 1})
    write_report(
        tmp_path / "spread", "maac", [{"eval/episodic_return": [-20.0] * 5 + [x]} for x in (-8, -12)]
    )
    write_report(tmp_path / "spread", "maddpg", [{"eval/episodic_return": [-20.0] * 6 + [-10.0]}])
    particles.main([])
    text = (tmp_path / "fig4" / "README.md").read_text()
    counts = " | ".join(stats.success_rate([i < n for i in range(3)]) for n in (3, 2, 1))
    rate, total = stats.iqm_of([0.975, 0.95, 0]), stats.iqm_of([9.5, 9, -10])  # of the last two evaluations
    row = f"| deterministic DOP | 3 (1 failed) | 1,000 | {rate} | 0.00 | {total} | {counts} |"
    assert row in text and "128 games" in text
    assert "throughout the last fifth in 1 of 3 seeds and the mill in not run" in text
    text = (tmp_path / "spread" / "README.md").read_text()
    assert "| return at 600 steps | at its own end |" in text and "python maac" in text
    end = stats.iqm_of([-8, -12])
    assert f"| MAAC | 2 | 600 | {end} | {end} | -12.00 | {stats.iqm_of([-24, -36])} |" in text
    assert "| MADDPG | 1 | 700 | -20.00 | -10.00 | -10.00 | -30.00 |" in text


def test_reference_teams():
    returns = particles.reference_returns(games=512)
    still = make("spread", 512, seed=0)
    still.reset()
    for _ in range(25):
        *_, info = still.step(torch.zeros(512, 3, 2))
    random, choices, assigned = returns.values()
    assert random < info["episode_return"].mean() < -20 and abs(choices - random) < 2
    assert -7 < assigned < -5


def test_units_of_published_returns():
    """Our returns, counted as the original environments and early PettingZoo did, come back."""
    env = make("spread", 64, seed=0)
    env.reset()
    original, early = torch.zeros(2, 64)
    for _ in range(25):
        *_, info = env.step(2 * torch.rand(64, 3, 2) - 1)
        rewards = 2 * info["agent_rewards"]  # (B, N), - distances - contacts, weight 1 instead of 0.5
        original += (rewards - 1).sum(1)  # and each in contact with itself
        early += (rewards / 2 - 0.5).mean(1)
    ours = info["episode_return"]
    torch.testing.assert_close(particles.from_shared_sum(original), ours, atol=1e-3, rtol=0)
    torch.testing.assert_close(particles.from_early_pettingzoo(early), ours, atol=1e-3, rtol=0)


# ---- credit.py ----
def test_credit_of_a_short_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    small = ["--total-timesteps", "320", "--warmup-steps", "64", "--eval-every", "0", "--batch-size", "8"]
    credit.main(["--seed", "3", "--save-every", "160", "--", *small, "--critic-hidden-dim", "8"])
    content = json.loads((tmp_path / "fig4" / "credit.json").read_text())
    last = content["checkpoints"][-1]  # an earlier one may have been too short-lived to be seen
    assert last["step"] == 320 and last["seed"] == 3 and len(last["credit"]) == 10
    assert len(last["q"][0]) == len(content["forces"]) and content["forces"][0] == -1
    text = credit.section(content)
    assert f"and {credit.above(last)} agents" in text and "| 10 | " in text
    with Image.open(tmp_path / "fig4" / "credit.png") as image:
        assert image.width > 1000
    monkeypatch.setattr(credit.sys, "executable", "false")
    with pytest.raises(SystemExit, match="ended with exit code 1"):
        credit.main([])


def test_credit_by_hand(tmp_path, monkeypatch, capsys):
    """A critic whose Q_i is the own force times a slope of agent i, and whose k_i are 1 to 10 over 55."""
    slopes = torch.tensor([1.0] * 9 + [-2.0])
    args = {"env": "mill", "seed": 5, "hidden_dim": 4, "critic_hidden_dim": 2}
    sizes = types.SimpleNamespace(**args)
    actor, critic = credit.Actor(make("mill"), sizes), credit.DecomposedCritic(make("mill"), sizes)
    for parameter in (*actor.parameters(), *critic.parameters()):
        parameter.data.zero_()
    actor.biases[-1].data.fill_(9.0)  # full force clockwise
    critic.k.bias.data = torch.arange(1.0, 11)
    first, second, third = critic.weights
    # relu(force) and relu(-force), then their difference
    first.data[:, 5, 0], first.data[:, 5, 1] = 1, -1
    second.data[:, 0, 0] = second.data[:, 1, 1] = 1
    third.data[:, 0, 0], third.data[:, 1, 0] = slopes, -slopes
    checkpoint = {
        "program": "dop_deterministic",
        "args": args,
        "global_step": 7,
        "actor": actor.state_dict(),
        "critic": critic.state_dict(),
    }
    measured = credit.measure(checkpoint)
    assert measured["win_rate"] == 1.0 and measured["force"] == pytest.approx([1.0] * 10)
    assert credit.differences(measured, "q") == pytest.approx((2 * slopes).tolist())
    share = torch.arange(1.0, 11) / 55
    assert credit.differences(measured, "credit") == pytest.approx((2 * slopes * share).tolist(), abs=2e-4)
    assert credit.above(measured) == "9 of 10"

    # a finished run gets a row
    torch.save(checkpoint, tmp_path / "model.pt")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(credit, "train", lambda *_: [checkpoint, checkpoint | {"global_step": 9}])
    credit.main(["--runs", str(tmp_path)])
    content = json.loads((tmp_path / "fig4" / "credit.json").read_text())
    assert "| 5 | 7 | 1.00 | 9 of 10 |" in credit.section(content)
    with pytest.raises(SystemExit):
        credit.main(["--runs", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="needs dop_deterministic on mill, got dop_deterministic on cdm"):
        credit.measure(checkpoint | {"args": args | {"env": "cdm"}})
    with pytest.raises(SystemExit, match="got maddpg on mill"):
        credit.measure(checkpoint | {"program": "maddpg"})
