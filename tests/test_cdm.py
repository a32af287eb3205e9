"""The stateless mismatch game: its reward, the protocols of exploration, the contract."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from envs import make
from envs.base import VecEnv


def uniform(env, seed=0):
    """Random actions (B, N) without the first action, so that only guidance reaches the optimum."""
    n_actions = int(env.single_action_space.nvec[0])
    shape = (env.num_envs, env.n_agents)
    return torch.randint(1, n_actions, shape, generator=torch.Generator().manual_seed(seed))


def test_contract():
    env = make("CDM", num_envs=3)
    obs, info = env.reset()
    assert (env.num_envs, env.n_agents, env.obs_dim, env.state_dim, env.episode_limit) == (3, 10, 1, 1, 1)
    assert env.single_action_space == spaces.MultiDiscrete([10] * 10) and env.action_space.shape == (3, 10)
    assert (obs == 1).all() and obs.shape == (3, 10, 1) and obs.dtype == torch.float32 and info == {}
    assert (env.state() == 1).all() and env.state().shape == (3, 1)
    assert env.avail_actions().all() and env.avail_actions().shape == (3, 10, 10)
    assert env.observation_space.contains(obs.numpy())
    env.action_space.seed(1)
    actions = torch.from_numpy(env.action_space.sample())
    obs, reward, terminated, truncated, info = env.step(actions)
    assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == torch.bool
    assert terminated.all() and not truncated.any()
    assert info["actions"].dtype == torch.int64 and torch.equal(info["actions"], actions)
    assert torch.equal(info["final_obs"], obs) and torch.equal(info["final_state"], env.state())
    assert torch.equal(info["final_avail_actions"], env.avail_actions())


def test_only_the_first_action_of_all_pays():
    env = make("cdm,n_agents=5,n_actions=4", num_envs=6)
    assert env.reset()[0].shape == (6, 5, 1)
    actions = torch.zeros(6, 5, dtype=torch.int64)
    actions[torch.arange(5), torch.arange(5)] = torch.tensor([1, 2, 3, 1, 2])  # one agent of each strays
    for _ in range(3):
        _, reward, terminated, truncated, info = env.step(actions)
        assert reward.tolist() == [-10.0] * 5 + [10.0] and torch.equal(info["episode_return"], reward)
        assert info["optimum"].tolist() == [False] * 5 + [True]
        assert info["episode_length"].tolist() == [1] * 6 and terminated.all() and not truncated.any()


def test_actions_are_checked():
    env = make("cdm", num_envs=2)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(uniform(env))
    env.reset()
    for wrong in (10, -1):
        actions = uniform(env)
        actions[1, 7] = wrong
        with pytest.raises(ValueError, match=f"game 1, agent 7: action {wrong} is not allowed"):
            env.step(actions)
    with pytest.raises(ValueError, match="int64"):
        env.step(uniform(env).float())


def test_guidance_replaces_whole_joint_actions_of_the_first_steps():
    env = make("cdm,guided_share=0.3,guided_steps=10000", num_envs=64, seed=5)
    env.reset()
    visits, counts = [], []
    for step in range(200):
        asked = uniform(env, step)
        before = asked.clone()
        _, reward, _, _, info = env.step(asked)
        assert torch.equal(asked, before)
        optimum = info["optimum"]  # (64,)
        expected = torch.where(optimum[:, None], 0, asked)  # (64, 10)
        assert torch.equal(info["actions"], expected)
        assert torch.equal(reward, torch.where(optimum, 10.0, -10.0))
        visits.append(optimum)
        counts.append(optimum.sum().item())
    visits = torch.cat(visits)  # 12800 games in the order in which they count
    assert not visits[10_000:].any() and max(counts) < 64
    share = visits[:10_000].float().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 10_000) ** 0.5


def test_guidance_ends_within_a_batch():
    env = make("cdm,guided_share=1,guided_steps=5", num_envs=3)
    env.reset()
    rows = [env.step(uniform(env))[4]["optimum"].tolist() for _ in range(3)]
    assert rows == [[True] * 3, [True, True, False], [False] * 3]
    env.reset()  # the count goes on
    assert not env.step(uniform(env))[4]["optimum"].any()
    env.reset(seed=0)  # a new start of everything
    assert env.step(uniform(env))[4]["optimum"].all()


def test_same_seed_same_guidance():
    def play(seed, reset_seed=None):
        env = make("cdm,guided_share=0.5,guided_steps=1000", num_envs=20, seed=seed)
        env.reset(seed=reset_seed)
        return torch.stack([env.step(uniform(env))[4]["optimum"] for _ in range(10)])

    assert torch.equal(play(1), play(1)) and torch.equal(play(1), play(9, reset_seed=1))
    assert not torch.equal(play(1), play(2))


def test_evaluation_is_not_guided():
    env = make("cdm,guided_share=1.0,guided_steps=1000", num_envs=2)
    env.reset(options={"other": True})
    assert env.guided and env.step(uniform(env))[4]["optimum"].all()
    env.reset(seed=0, options={"evaluation": True})
    assert not env.guided and not env.step(uniform(env))[4]["optimum"].any()
    env.reset(seed=0)
    assert not env.step(uniform(env))[4]["optimum"].any()


def test_no_guidance_by_default():
    env = make("cdm", num_envs=50)
    env.reset()
    state = env.generator.get_state()
    assert not env.guided and not env.step(uniform(env))[4]["optimum"].any()
    assert torch.equal(env.generator.get_state(), state)  # nothing was drawn


@pytest.mark.parametrize("n_actions, share", [(10, 0.8), (4, 0.25), (2, 0.01)])
def test_action_bias_gives_the_first_action_its_probability(n_actions, share):
    bias = make(f"cdm,n_actions={n_actions},first_action={share}").action_bias
    assert bias.shape == (n_actions,) and bias.dtype == torch.float32
    others = [(1 - share) / (n_actions - 1)] * (n_actions - 1)
    torch.testing.assert_close(bias.softmax(0), torch.tensor([share, *others]))


def test_no_bias_by_default():
    assert make("cdm").action_bias is None and make("cdm,first_action=0").action_bias is None
    assert make("quadratic").action_bias is None and VecEnv.action_bias is None


@pytest.mark.parametrize(
    "env_id, sentence",
    [
        ("cdm,agents=5", "cdm has no argument 'agents'; it has n_agents, n_actions, guided"),
        ("cdm,n_agents=0", "n_agents must be a whole number, at least 1, got 0"),
        ("cdm,n_agents=five", "n_agents must be a whole number, at least 1, got 'five'"),
        ("cdm,n_actions=1", "n_actions must be a whole number, at least 2, got 1"),
        ("cdm,n_actions=2.5", "n_actions must be a whole number, at least 2, got 2.5"),
        ("cdm,guided_steps=-1", "guided_steps must be a whole number, at least 0, got -1"),
        ("cdm,guided_share=1.5", "guided_share must be a number from 0 to 1, got 1.5"),
        ("cdm,guided_share=True", "guided_share must be a number from 0 to 1, got True"),
        ("cdm,first_action=1.0", "first_action must be a number from 0 to less than 1, got 1.0"),
        ("cdm,first_action=nan", "first_action must be a number from 0 to less than 1, got 'nan'"),
        ("cdm,n_agents={[1]}", "n_agents must be a whole number, at least 1, got '{\\[1\\]}'"),
        ("3m,chase=no", "chase of environment '3m,chase=no' must be true or false, got 'no'"),
        ("mill,discrete=0", "discrete of environment 'mill,discrete=0' must be true or false, got 0"),
        ("mill,discrete='true'", "discrete of environment .* must be true or false, got 'true'"),
        ("mill,end_on_win=none", "end_on_win of environment .* must be true or false, got 'none'"),
    ],
)
def test_wrong_arguments_are_one_sentence(env_id, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make(env_id)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "false", "False", "fAlse"])
def test_true_and_false_in_any_case_are_booleans(word):
    assert make(f"3m,chase={word}").sim.world.chase is (word.lower() == "true")
    env = make(f"mill,discrete={word}")
    assert isinstance(env.single_action_space, spaces.MultiDiscrete) == (word.lower() == "true")


def test_render():
    env = make("cdm,n_agents=5,n_actions=4", num_envs=2)
    with pytest.raises(RuntimeError, match="reset"):
        env.render()
    env.reset()
    empty = env.render()
    assert empty.shape == (320, 256, 3) and empty.dtype == np.uint8
    env.step(torch.tensor([[0, 1, 2, 3, 0], [0, 0, 0, 0, 0]]))  # of game 0
    picture = env.render()
    changed = (picture != empty).any(2)[32::64, 32::64]  # (5, 4), the centres of the cells
    assert np.array_equal(changed, np.eye(4, dtype=bool)[[0, 1, 2, 3, 0]])
    red, green, _ = picture[32, 32].astype(int)
    assert red > green
    env.step(torch.zeros(2, 5, dtype=torch.int64))
    red, green, _ = env.render()[32, 32].astype(int)
    assert green > red
    env.reset()
    assert (env.render() == empty).all()


def test_the_end_of_guidance_is_saved():
    env, other = (make("cdm,guided_share=1.0,guided_steps=1000") for _ in range(2))
    env.reset(options={"evaluation": True})
    other.reset()
    other.load_state_dict(env.state_dict())
    assert not other.guided
