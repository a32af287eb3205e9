"""Max of Two Quadratics against a slow loop of its equation, the contract, and arguments inside an id."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from envs import list_ids, make


def joint(*pairs):
    """Pairs (a1, a2) -> actions (B, 2, 1)."""
    return torch.tensor(pairs, dtype=torch.float32).unsqueeze(2)


def slow_reward(a1, a2, h1=0.8, s1=3, x1=-5, y1=-5, h2=1, s2=1, x2=5, y2=5, c=10):
    """The printed equation, one joint action at a time."""
    f1 = h1 * (-(((a1 - x1) / s1) ** 2) - ((a2 - y1) / s1) ** 2)
    f2 = h2 * (-(((a1 - x2) / s2) ** 2) - ((a2 - y2) / s2) ** 2) + c
    return max(f1, f2)


def test_reward_at_known_points():
    reward = make("quadratic").reward(joint((5, 5), (-5, -5), (0, 0), (5, -5)))
    torch.testing.assert_close(reward, torch.tensor([10, 0, -4 - 4 / 9, -8 - 8 / 9]))


@pytest.mark.parametrize(
    "coefficients", [{}, dict(h1=0.5, s1=2, x1=-4, y1=-3, h2=2, s2=1.5, x2=3, y2=6, c=7.5)]
)
def test_reward_equals_a_slow_loop(coefficients):
    env = make(",".join(["quadratic", *(f"{name}={value}" for name, value in coefficients.items())]))
    actions = torch.rand(500, 2, 1, generator=torch.Generator().manual_seed(0)) * 20 - 10
    expected = [slow_reward(*pair, **coefficients) for pair in actions.squeeze(2).tolist()]
    torch.testing.assert_close(env.reward(actions), torch.tensor(expected))


def test_contract():
    env = make("QUADRATIC", num_envs=3)
    obs, info = env.reset()
    assert (env.num_envs, env.n_agents, env.obs_dim, env.state_dim, env.episode_limit) == (3, 2, 1, 2, 100)
    assert env.single_action_space == spaces.Box(-10, 10, (2, 1), np.float32)
    assert env.action_space.shape == (3, 2, 1) and env.observation_space.shape == (3, 2, 1)
    assert obs.tolist() == [[[0.0], [1.0]]] * 3 and env.state().tolist() == [[0.0, 1.0]] * 3 and info == {}
    assert env.avail_actions() is None and env.action_bias is None
    assert env.observation_space.contains(obs.numpy())
    env.action_space.seed(1)
    obs, reward, terminated, truncated, info = env.step(torch.from_numpy(env.action_space.sample()))
    assert obs.dtype == reward.dtype == torch.float32 and reward.shape == (3,)
    assert terminated.dtype == truncated.dtype == torch.bool
    assert not terminated.any() and not truncated.any()


def test_step_truncates_at_the_limit():
    env = make("quadratic", num_envs=2)
    env.reset()
    for step in range(1, 202):
        obs, reward, terminated, truncated, info = env.step(joint((5, 5), (-5, -5)))
        assert reward.tolist() == [10.0, 0.0] and not terminated.any()
        assert truncated.tolist() == [step % 100 == 0] * 2
        length = (step - 1) % 100 + 1
        assert info["episode_length"].tolist() == [length] * 2
        assert info["episode_return"].tolist() == [10.0 * length, 0.0]
        assert torch.equal(info["final_obs"], obs) and torch.equal(info["final_state"], env.state())
        assert info["final_avail_actions"] is None


def test_games_do_not_influence_each_other():
    actions = torch.rand(5, 2, 1, generator=torch.Generator().manual_seed(0)) * 20 - 10
    env, alone = make("quadratic", num_envs=5), make("quadratic", num_envs=1)
    env.reset(), alone.reset()
    together = env.step(actions)[1]  # (5,)
    for game in range(5):
        torch.testing.assert_close(alone.step(actions[game : game + 1])[1], together[game : game + 1])


def test_what_was_handed_out_stays():
    env = make("quadratic", num_envs=2, seed=3)
    obs, state = env.reset()[0], env.state()
    kept, copies = [obs, state], [obs.clone(), state.clone()]
    for _ in range(3):
        *step, info = env.step(joint((1, 2), (3, 4)))
        kept += [x for x in (*step, *info.values()) if torch.is_tensor(x)]
        copies += [x.clone() for x in kept[len(copies) :]]
    env.reset(seed=3)
    env.step(joint((5, 5), (5, 5)))
    assert len(kept) == 32 and all(map(torch.equal, kept, copies))


def test_actions_are_checked():
    env = make("quadratic", num_envs=2)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(joint((0, 0), (0, 0)))
    env.reset()
    with pytest.raises(ValueError, match="game 1, agent 0: action .* bounds are \\[-10.0\\] to \\[10.0\\]"):
        env.step(joint((0, 0), (10.5, 0)))
    with pytest.raises(ValueError, match="game 0, agent 1"):
        env.step(joint((0, math.nan), (0, 0)))
    with pytest.raises(ValueError, match="shape"):
        env.step(torch.zeros(2, 2))


def test_render():
    env = make("quadratic", num_envs=3)
    with pytest.raises(RuntimeError, match="reset"):
        env.render()
    env.reset()
    empty = env.render()
    assert empty.shape == (320, 320, 3) and empty.dtype == np.uint8
    env.step(joint((0, 0), (5, -5), (-10, 10)))
    dots = (empty != env.render()).any(2)  # (320, 320)
    rows, columns = dots.nonzero()
    # one dot of about 8 pixels each: near the left edge of the map, its middle, and three quarters of it
    assert 60 < dots.sum() < 250 and columns.min() < 40 and rows.min() < 14
    assert dots[140:154, 166:180].any() and dots[208:222, 234:248].any()
    env.reset()
    assert (env.render() == empty).all()


def test_ids():
    assert list_ids().count("quadratic") == 1
    with pytest.raises(ValueError, match="unknown environment 'quadratc': did you mean quadratic"):
        make("quadratc,c=8")


def test_arguments_in_the_id():
    env = make("Quadratic, c=8, episode_limit = 2,bound=6", num_envs=1)
    assert env.episode_limit == 2 and env.single_action_space.high.tolist() == [[6.0], [6.0]]
    assert env.reward(joint((5, 5))).tolist() == [8.0]
    assert make("quadratic,c=8", c=9).reward(joint((5, 5))).tolist() == [9.0]  # a keyword wins
    assert make("quadratic", validate=False).validate is False
    assert make("3m,chase=False").map_name == "3m"


def test_actions_of_another_precision_are_refused():
    env = make("quadratic")
    env.reset()
    with pytest.raises(ValueError, match="continuous actions must be float32, got torch.float64"):
        env.step(joint((5, 5)).double())


@pytest.mark.parametrize(
    "env_id, sentence",
    [
        ("quadratic,c", "argument 'c' of environment 'quadratic,c' must read name=value"),
        ("quadratic,", "argument '' of environment"),
        ("quadratic,=8", "argument '=8' of environment"),
        ("quadratic,c=", "argument 'c=' of environment"),
        ("quadratic,d=8", "quadratic has no argument 'd'; it has episode_limit, bound, h1, .*, c$"),
        ("quadratic,num_envs=8", "quadratic has no argument 'num_envs'; it has episode_limit"),
        ("3M,map_name=8m", "3m has no argument 'map_name'; it has chase, ladder$"),
        # of make(), not of ids
        ("3m,validate=false", "3m has no argument 'validate'; it has chase, ladder$"),
        ("quadratic,c=high", "c must be a number from -1e.06 to 1e.06, got 'high'"),
        ("quadratic,x1=1e999", "x1 must be a number from -1e.06 to 1e.06, got inf"),
        ("quadratic,x1=True", "x1 must be a number from -1e.06 to 1e.06, got True"),
        ("quadratic,s1=0", "s1 must be a number from 1e-09 to 1e.06, got 0"),
        ("quadratic,bound=-1.5", "bound must be a number from 1e-09 to 1e.06, got -1.5"),
        ("quadratic,episode_limit=0", "episode_limit must be a whole number, at least 1, got 0"),
        ("quadratic,episode_limit=2.0", "episode_limit must be a whole number, at least 1, got 2.0"),
    ],
)
def test_wrong_arguments_are_one_sentence(env_id, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make(env_id)
    assert "\n" not in str(error.value)


def test_keywords_only_where_the_class_has_them():
    with pytest.raises(ValueError, match="quadratic has no argument 'discrete'"):
        make("quadratic", discrete=True)
    assert isinstance(make("mill", discrete=True).single_action_space, spaces.MultiDiscrete)


def test_a_picture_has_its_axes_where_they_belong():
    env = make("quadratic,x1=-5,y1=5,x2=5,y2=-5")
    env.reset()
    picture = env.render()

    def at(a1, a2):
        return picture[round(10 + 137 * (1 - a2 / 10)), round(36 + 137 * (1 + a1 / 10))].astype(int)

    brightest = [abs(at(*beside_top) - [252, 238, 150]).max() < 8 for beside_top in ((5.6, -5), (-5.6, 5))]
    assert brightest == [True, False]  # the second top is the higher one
    assert all(at(*top).min() > 200 for top in ((5, -5), (-5, 5)))  # white crosses
