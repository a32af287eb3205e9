"""Particle tasks, batched in torch: `spread` of the package mpe2, and `aggregation` and `mill` of [DOP].

Points in the plane follow mpe2's world (version 1.1, `mpe2/_mpe_utils/core.py`) operation by operation; the
tests step both side by side. `spread` is its simple_spread_v3. [DOP] (Wang et al., ICLR 2021, section 5.2.1)
has one paragraph on the other two and no code: docs/envs.md says what is the paper's and what our reading.

    env = make("aggregation", num_envs=32, device="cuda", seed=1)

Letters: B games, N agents, L landmarks, O observation, S state, A discrete actions, D action dimensions.
Units are mpe2's: games begin in a square of 2 x 2, a step takes 0.1, every mass is 1.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from PIL import Image, ImageDraw, ImageFont

from envs.base import VecEnv, require_number, require_whole

DT, DAMPING = 0.1, 0.25  # time of a step; share of the velocity that is lost in it
SENSITIVITY = 5.0  # force of a full action
CONTACT_FORCE, CONTACT_MARGIN = 1e2, 1e-3  # stiffness of agents; softness of their edge
SPREAD_RADIUS = 0.15  # of the agents of spread; those of aggregation are points
MOST_AGENTS = 1000  # an observation holds every other agent: memory grows with the square of this
PUSHES = [[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]]  # discrete actions, mpe2's order
TURNS = [[-1.0], [0.0], [1.0]]  # discrete actions on the mill: counter-clockwise, nothing, clockwise
PAID_SPEED, WINNING_SPEED = 30.0, 100.0  # of the mill, both exclusive [DOP]


class World(NamedTuple):
    """Points of B games; landmarks stand still."""

    pos: torch.Tensor  # (B, N, 2)
    vel: torch.Tensor  # (B, N, 2)
    landmark: torch.Tensor  # (B, L, 2)


class Stone(NamedTuple):
    """Millstones of B games; clockwise is positive."""

    omega: torch.Tensor  # (B,) radians per unit of time
    angle: torch.Tensor  # (B,) radians
    won: torch.Tensor  # (B,) bool, was faster than the winning speed in this episode
    push: torch.Tensor  # (B, N) latest actions


# ---- physics ----
def offsets(a, b):
    """From points b (B, M, 2) to points a (B, N, 2): x and y, (B, N, M) each."""
    return [p[:, :, None] - q[:, None] for p, q in zip(a.unbind(2), b.unbind(2), strict=True)]


def distances(a, b):
    """(B, N, M) between points a (B, N, 2) and b (B, M, 2)."""
    return torch.hypot(*offsets(a, b))


def contact_forces(pos, radius):
    """Forces (B, N, 2) that push round agents at pos (B, N, 2) apart. get_collision_force() of mpe2."""
    away_x, away_y = offsets(pos, pos)  # (B, N, N)
    distance = torch.hypot(away_x, away_y)
    depth = CONTACT_MARGIN * F.softplus((2 * radius - distance) / CONTACT_MARGIN)
    # an agent is at distance 0 of itself, which must give no force, not NaN
    strength = CONTACT_FORCE * depth / distance.clamp_min(1e-12)
    return torch.stack([(strength * away_x).sum(2), (strength * away_y).sum(2)], 2)


def move(world, actions, radius=0.0):
    """The world one step later; actions (B, N, 2) from -1 to 1. World.step() of mpe2.

    Agents with a radius push each other apart. Positions move before velocities change, so an action shows
    in the positions one step late.
    """
    force = SENSITIVITY * actions.to(world.pos.dtype)  # (B, N, 2)
    if radius:
        force = force + contact_forces(world.pos, radius)
    return world._replace(pos=world.pos + DT * world.vel, vel=(1 - DAMPING) * world.vel + DT * force)


# ---- environments ----
class _Task(VecEnv):
    """Shared by the tasks: actions from -1 to 1, or one of `choices` (A, D) if discrete; restarts; pictures.

    A task has two more hooks: `_begin()` gives a new scene of every game, `_draw(scene)` a canvas of one.
    """

    def __init__(
        self, n_agents, obs_dim, state_dim, limit, choices,
        num_envs, device, seed, validate=True, discrete=False,
    ):  # fmt: skip
        if discrete:
            space = spaces.MultiDiscrete([len(choices)] * n_agents)
        else:
            space = spaces.Box(-1.0, 1.0, (n_agents, len(choices[0])), np.float32)
        super().__init__(num_envs, n_agents, obs_dim, state_dim, limit, space, device, seed, validate)
        self._choices = self._legal = None
        if discrete:
            self._choices = torch.tensor(choices, device=self.device)  # (A, D)
            legal = torch.ones(len(choices), dtype=torch.bool, device=self.device)  # (A,)
            self._legal = legal.expand(num_envs, n_agents, -1)  # (B, N, A)
        self._scene = self._picture = None

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        nobody = torch.zeros_like(self._episode_length).bool()  # (B,)
        self._picture = (self._scene, self._episode_length, self._episode_return, nobody, nobody)
        return obs, info

    def _restart(self, done):
        # Most steps end no game. Asking the device costs less than drawing and observing in vain, which
        # would take a third of a step on a CPU.
        self._renewed = bool(done.any())
        if not self._renewed:
            return
        fresh, scene = self._begin(), []
        for new, old in zip(fresh, self._scene or fresh, strict=True):
            ended = done.view(-1, *[1] * (new.dim() - 1))  # (B, 1, ...)
            scene.append(torch.where(ended, new, old))
        self._scene = fresh._make(scene)

    def _observe_restarted(self, done, final):
        return self._observe() if self._renewed else final

    def state_dict(self):
        return super().state_dict() | {"scene": tuple(self._scene)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._scene = self._scene._make(state["scene"])

    def _forces(self, actions):
        """Actions as (B, N, D) floats from -1 to 1."""
        return actions if self._choices is None else self._choices[actions]

    def _is_last(self):
        """Games (B,) whose step in progress is the last that the clock allows."""
        return self._episode_length + 1 >= self.episode_limit

    def _keep(self, reward, won, terminated):
        """Remember for `render()` what this step led to; all (B,)."""
        length, episode_return = self._episode_length + 1, self._episode_return + reward
        self._picture = (self._scene, length, episode_return, won, terminated)

    def render(self):
        """(512, 480, 3) uint8: game 0 as the latest step left it, even if that ended the episode."""
        if self._picture is None:
            raise RuntimeError("call env.reset() before env.render()")
        scene, *record = self._picture
        length, episode_return, won, terminated = (entry[0].item() for entry in record)
        outcome = "time out" if length >= self.episode_limit else ""
        if terminated:
            outcome = "won" if won else "lost"
        canvas = self._draw(scene._make(field[0].cpu() for field in scene))
        name = type(self).__name__.lower()
        return canvas.picture(f"{name}   step {length}   return {episode_return:.1f}", outcome)


class _Arena(_Task):
    """Agents and landmarks in the plane: 25 steps; all begin at rest, uniformly in the square from -1 to 1.

    obs: own velocity, own position, relative positions of the landmarks and of the other agents, the share
    of time left if `timed`, `silent` zeros. state: velocities, positions, landmarks, the same share if timed.
    """

    def __init__(self, n_agents, n_landmarks, timed, silent, dtype, *shared):
        state_dim = 4 * n_agents + 2 * n_landmarks + timed
        vel, pos, landmark = (
            torch.arange(state_dim - timed).view(-1, 2).split([n_agents, n_agents, n_landmarks])
        )
        # every entry of obs is one column of the state minus another, where column `state_dim` is zero
        clock, zero = state_dim - 1, state_dim
        plus, minus = [], []
        for i in range(n_agents):
            seen = torch.cat([landmark, pos[:i], pos[i + 1 :]])  # (L + N - 1, 2)
            rest = torch.tensor([clock] * timed + [zero] * silent, dtype=torch.long)
            plus += [vel[i], pos[i], seen.flatten(), rest]
            minus += [torch.full((4,), zero), pos[i].repeat(len(seen)), torch.full_like(rest, zero)]
        plus, minus = torch.cat(plus), torch.cat(minus)  # (N * O,)
        super().__init__(n_agents, len(plus) // n_agents, state_dim, 25, PUSHES, *shared)
        self._timed = timed
        self._plus, self._minus = plus.to(self.device), minus.to(self.device)
        self._zero = torch.zeros(self.num_envs, 1, device=self.device)
        self._n_landmarks, self._dtype = n_landmarks, dtype

    def _begin(self):
        shape = (self.num_envs, self.n_agents + self._n_landmarks, 2)
        pos = torch.rand(shape, generator=self.generator, device=self.device, dtype=self._dtype) * 2 - 1
        pos, landmark = pos.split([self.n_agents, self._n_landmarks], dim=1)
        return World(pos, torch.zeros_like(pos), landmark)

    def _observe(self):
        world = self._scene
        parts = [world.vel.flatten(1), world.pos.flatten(1), world.landmark.flatten(1)]
        if self._timed:
            parts.append((1 - self._episode_length / self.episode_limit).unsqueeze(1))
        columns = torch.cat([*parts, self._zero], 1)  # (B, S + 1)
        obs = columns.index_select(1, self._plus) - columns.index_select(1, self._minus)  # (B, N * O)
        return obs.view(self.num_envs, self.n_agents, -1).float(), columns[:, :-1].float(), self._legal

    def _draw_world(self, world, agent_radius, landmark_radius, marked):
        """One game and the square in which all begin; marked (N,) gives agents another colour, or False."""
        farthest = torch.cat([world.pos, world.landmark]).abs().max().item()
        canvas = _Canvas(max(1.2, farthest + 0.2))
        canvas.square(1)
        for x, y in world.landmark.tolist():
            canvas.disc(x, y, landmark_radius, (*YELLOW, 60))
            canvas.disc(x, y, 0.03, YELLOW)
        for (x, y), colour in zip(world.pos.tolist(), marked, strict=True):
            canvas.disc(x, y, agent_radius, colour or BLUE)
        return canvas


class Spread(_Arena):
    """N agents cover N landmarks without touching each other: simple_spread_v3 of mpe2; 25 steps, truncated.

    An agent's reward is (1 - local_ratio) * (minus the sum over landmarks of the distance of the nearest
    agent) + local_ratio * (minus the number of agents that it touches), in `info["agent_rewards"]` (B, N).
    The team reward is their mean. Raises ValueError for n_agents that is no whole number from 1 to 1,000 and
    a local_ratio that is no number from 0 to 1.
    """

    def __init__(
        self, num_envs, device, seed, validate=True, discrete=False, n_agents=3, local_ratio=0.5
    ):  # fmt: skip
        require_whole(high=MOST_AGENTS, n_agents=n_agents)
        require_number(low=0, high=1, local_ratio=local_ratio)
        # mpe2 shows two channels of every other agent, all silent. Its contacts are so stiff that they blow
        # rounding errors up, some a thousandfold: in float32 a game leaves mpe2's path.
        sizes = (n_agents, n_agents, False, 2 * (n_agents - 1), torch.float64)
        super().__init__(*sizes, num_envs, device, seed, validate, discrete)
        self._local_ratio = local_ratio
        self._never = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)  # (B,)

    def _advance(self, actions):
        world = self._scene = move(self._scene, self._forces(actions), SPREAD_RADIUS)
        shared = -distances(world.landmark, world.pos).amin(2).sum(1)  # (B,)
        # an agent is near itself too, which does not count
        touching = (distances(world.pos, world.pos) < 2 * SPREAD_RADIUS).sum(2) - 1  # (B, N)
        rewards = (1 - self._local_ratio) * shared.unsqueeze(1) - self._local_ratio * touching  # (B, N)
        rewards = rewards.float()
        reward = rewards.mean(1)
        self._keep(reward, self._never, self._never)
        return reward, self._never, {"agent_rewards": rewards}

    def _draw(self, world):
        near = distances(world.pos[None], world.pos[None])[0] < 2 * SPREAD_RADIUS  # (N, N)
        return self._draw_world(world, SPREAD_RADIUS, 0.05, [n > 1 and RED for n in near.sum(1).tolist()])


class Aggregation(_Arena):
    """N agents meet at a landmark [DOP]: +10 once all are within `radius` of it, or -10 at step 25.

    Both are terminal: the penalty is a part of the task. Agents do not collide. `info["battle_won"]` (B,)
    tells success. The positions of the state are relative to the landmark.
    Raises ValueError for n_agents that is no whole number from 1 to 1,000 and a radius of less than 1e-9.
    """

    def __init__(self, num_envs, device, seed, validate=True, discrete=False, n_agents=5, radius=0.8):
        require_whole(high=MOST_AGENTS, n_agents=n_agents)
        require_number(low=1e-9, radius=radius)
        sizes = (n_agents, 1, True, 0, torch.float32)
        super().__init__(*sizes, num_envs, device, seed, validate, discrete)
        self._radius = radius

    def _observe(self):
        obs, state, legal = super()._observe()
        pos = state[:, 2 * self.n_agents : 4 * self.n_agents].unflatten(1, (-1, 2))  # (B, N, 2)
        pos -= self._scene.landmark.float()  # in the state itself
        return obs, state, legal

    def _advance(self, actions):
        world = self._scene = move(self._scene, self._forces(actions))
        won = (distances(world.pos, world.landmark) < self._radius).all(1).squeeze(1)  # (B,)
        terminated = won | self._is_last()
        reward = torch.where(won, 10.0, -10.0) * terminated
        self._keep(reward, won, terminated)
        return reward, terminated, {"battle_won": won}

    def _draw(self, world):
        inside = distances(world.pos[None], world.landmark[None]).flatten() < self._radius  # (N,)
        return self._draw_world(world, 0.05, self._radius, [i and GREEN for i in inside.tolist()])


class Mill(_Task):
    """N agents turn a millstone clockwise [DOP]: +3 a step while faster than 30, at step 10 +10 or -10.

    The 10 are won by a speed above 100 at any step. The stone is a disc and each agent pushes its rim with up
    to SENSITIVITY: omega <- 0.75 omega + gain * sum of actions, gain = 2 SENSITIVITY DT / (mass radius) = 4.
    `end_on_win` pays and ends as soon as 100 is exceeded, so that a slow win returns more than a fast one.
    obs: omega / 100, sine and cosine of the angle, time / 10, own id. state: the same without the id, and
    whether 100 was exceeded, which is also `info["battle_won"]` (B,).
    Raises ValueError for n_agents that is no whole number from 1 to 1,000 and a radius or mass of less
    than 1e-9.
    """

    def __init__(
        self, num_envs, device, seed, validate=True, discrete=False,
        n_agents=10, radius=0.25, mass=1.0, end_on_win=False,
    ):  # fmt: skip
        require_whole(high=MOST_AGENTS, n_agents=n_agents)
        require_number(low=1e-9, radius=radius, mass=mass)
        super().__init__(n_agents, 4 + n_agents, 5, 10, TURNS, num_envs, device, seed, validate, discrete)
        inertia = mass * radius**2 / 2  # of a disc
        self.gain = SENSITIVITY * radius * DT / inertia
        self._end_on_win = end_on_win
        self._ids = torch.eye(n_agents, device=self.device).expand(self.num_envs, -1, -1)  # (B, N, N)

    def _begin(self):
        angle = 2 * math.pi * torch.rand(self.num_envs, generator=self.generator, device=self.device)  # (B,)
        push = torch.zeros(self.num_envs, self.n_agents, device=self.device)  # (B, N)
        return Stone(torch.zeros_like(angle), angle, torch.zeros_like(angle).bool(), push)

    def _advance(self, actions):
        stone, push = self._scene, self._forces(actions).squeeze(2)  # (B, N)
        omega = (1 - DAMPING) * stone.omega + self.gain * push.sum(1)  # (B,)
        won = stone.won | (omega > WINNING_SPEED)
        self._scene = Stone(omega, stone.angle + DT * omega, won, push)
        terminated = self._is_last() | won if self._end_on_win else self._is_last()
        reward = 3.0 * (omega > PAID_SPEED) + torch.where(won, 10.0, -10.0) * terminated
        self._keep(reward, won, terminated)
        return reward, terminated, {"battle_won": won}

    def _observe(self):
        omega, angle, won, _ = self._scene
        time = self._episode_length / self.episode_limit  # (B,)
        state = torch.stack([omega / 100, angle.sin(), angle.cos(), time, won.float()], 1)  # (B, 5)
        shared = state[:, None, :4].expand(-1, self.n_agents, -1)  # (B, N, 4)
        return torch.cat([shared, self._ids], 2), state, self._legal

    def _draw(self, stone):
        """The stone with its mark, the agents' forces, and the speed as an arc with ticks at 30 and 100."""
        canvas, omega, angle = _Canvas(1.3), stone.omega.item(), stone.angle.item()
        x, y = math.sin(angle), math.cos(angle)  # clockwise from the top
        canvas.disc(0, 0, 0.5, (120, 116, 110))
        canvas.line(0, 0, 0.4 * x, 0.4 * y, DARK, 0.03)
        canvas.disc(0.4 * x, 0.4 * y, 0.06, DARK)
        for i, force in enumerate(stone.push.tolist()):
            x, y = math.sin(2 * math.pi * i / self.n_agents), math.cos(2 * math.pi * i / self.n_agents)
            if force:
                turn = 0.25 * force  # of the arrow, along the rim
                canvas.arrow(0.66 * x, 0.66 * y, turn * y, -turn * x, GREEN if force > 0 else RED)
            canvas.disc(0.66 * x, 0.66 * y, 0.05, BLUE)
        colour = GREEN if omega > WINNING_SPEED else YELLOW if omega > PAID_SPEED else WHITE
        turns = omega * DAMPING / (self.gain * self.n_agents)  # a full circle: the fastest that they can
        canvas.arc(1.1, min(turns, 0), max(turns, 0), colour)
        for speed in (PAID_SPEED, WINNING_SPEED):
            at = 2 * math.pi * speed * DAMPING / (self.gain * self.n_agents)
            x, y = math.sin(at), math.cos(at)
            canvas.line(1.03 * x, 1.03 * y, 1.13 * x, 1.13 * y, GREY, 0.012)
            canvas.text(1.2 * x, 1.2 * y, f"{speed:.0f}", GREY)
        canvas.text(-1.05, 1.2, f"speed {omega:.1f}", colour)
        return canvas


# ---- pictures ----
BLUE, GREEN, RED, YELLOW = (64, 128, 245), (96, 224, 92), (228, 66, 56), (255, 214, 102)
GREY, WHITE, DARK = (150, 150, 150), (235, 235, 235), (38, 40, 44)


class _Canvas:
    """The square from -reach to reach below a line of text; drawn at twice its size, then shrunk."""

    SIZE, HEADER = 960, 64  # pixels

    def __init__(self, reach):
        self._image = Image.new("RGB", (self.SIZE, self.SIZE + self.HEADER), DARK)
        self._pen = ImageDraw.Draw(self._image, "RGBA")
        self._font = ImageFont.load_default(30)
        self._reach = reach
        self._scale = self.SIZE / 2 / reach  # pixels per unit

    def _at(self, x, y):
        return (x + self._reach) * self._scale, (self._reach - y) * self._scale + self.HEADER

    def _box(self, x, y, half):
        return [*self._at(x - half, y + half), *self._at(x + half, y - half)]

    def disc(self, x, y, radius, colour):
        self._pen.ellipse(self._box(x, y, radius), fill=colour, outline=(20, 20, 24), width=2)

    def square(self, half):
        self._pen.rectangle(self._box(0, 0, half), outline=GREY, width=2)

    def line(self, x, y, to_x, to_y, colour, width):
        self._pen.line([*self._at(x, y), *self._at(to_x, to_y)], colour, round(width * self._scale))

    def arrow(self, x, y, dx, dy, colour):
        """From (x, y) by (dx, dy), the head beyond that."""
        length = max(math.hypot(dx, dy), 1e-9)
        along, across = 0.07 * dx / length, 0.07 * dy / length
        self.line(x, y, x + dx, y + dy, colour, 0.03)
        tip = [(dx + along, dy + across), (dx - across, dy + along), (dx + across, dy - along)]
        self._pen.polygon([self._at(x + u, y + v) for u, v in tip], fill=colour)

    def arc(self, radius, start, end, colour):
        """Clockwise from the top, in turns."""
        self._pen.arc(
            self._box(0, 0, radius), 360 * start - 90, 360 * end - 90, colour, round(0.05 * self._scale)
        )

    def text(self, x, y, text, colour):
        self._pen.text(self._at(x, y), text, fill=colour, font=self._font, anchor="mm")

    def picture(self, title, outcome):
        """(512, 480, 3) uint8 with a title on the left and an outcome on the right of the header."""
        self._pen.rectangle([0, 0, self.SIZE, self.HEADER], fill=(24, 25, 28))
        middle, margin = self.HEADER / 2, 20
        self._pen.text((margin, middle), title, fill=WHITE, font=self._font, anchor="lm")
        colour = {"won": GREEN, "lost": RED}.get(outcome, YELLOW)
        self._pen.text((self.SIZE - margin, middle), outcome, fill=colour, font=self._font, anchor="rm")
        return np.asarray(self._image.reduce(2)).copy()
