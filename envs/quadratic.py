"""Max of Two Quadratics, the two-agent game of the paper on Multiagent Soft Q-Learning (MASQL).

r(a1, a2) = max(f1, f2), a broad hill f1 and a narrow, higher one f2:
    f1 = h1 (-((a1 - x1) / s1)^2 - ((a2 - y1) / s1)^2)
    f2 = h2 (-((a1 - x2) / s2)^2 - ((a2 - y2) / s2)^2) + c

[MASQL] Wei et al., "Multiagent Soft Q-Learning", AAAI Spring Symposium 2018, section Experiments.
Our reading of it:
1. It prints x1 = x2 = 5, y1 = y2 = -5, which would put both hills at (5, -5), but says that the worse one is
   at (-5, -5). We take (x1, y1) = (-5, -5), (x2, y2) = (5, 5).
2. The bounds of the actions are not given: we take [-10, 10].
3. Nothing ends the game, so the 100 steps of an epoch are a time limit: a truncation, not an end.
"""

import numpy as np
import torch
from gymnasium import spaces
from PIL import Image, ImageDraw, ImageFont

from envs.base import VecEnv, require_number, require_whole

SIDE, LEFT, TOP, MAP = 320, 36, 10, 274  # pixels of the picture: side, left and upper margin, side of the map
BANDS = 25  # of reward
COLOURS = (36, 46, 92), (44, 112, 142), (74, 168, 124), (190, 208, 96), (252, 238, 150)  # from low to high


class Quadratic(VecEnv):
    """B games without a state: agent i always sees <i>, the state is always <0, 1>.

    `bound` limits both actions, `episode_limit` counts steps, the rest are the coefficients above. Raises
    ValueError for one that is no number within a million, or less than 1e-9 where it has to be positive.
    """

    bounded_features = True

    def __init__(
        self, num_envs, device, seed, validate=True, episode_limit=100, bound=10.0,
        h1=0.8, s1=3.0, x1=-5.0, y1=-5.0, h2=1.0, s2=1.0, x2=5.0, y2=5.0, c=10.0,
    ):  # fmt: skip
        require_number(h1=h1, x1=x1, y1=y1, h2=h2, x2=x2, y2=y2, c=c)
        require_number(low=1e-9, bound=bound, s1=s1, s2=s2)
        require_whole(episode_limit=episode_limit)
        space = spaces.Box(-bound, bound, (2, 1), np.float32)
        super().__init__(num_envs, 2, 1, 2, episode_limit, space, device, seed, validate)
        self._centres = torch.tensor([[x1, y1], [x2, y2]], dtype=torch.float32, device=self.device)  # (2, 2)
        # minus h / s^2 of f1 and f2
        self._slopes = torch.tensor([-h1 / s1**2, -h2 / s2**2], device=self.device)  # (2,)
        self._tops = torch.tensor([0.0, c], device=self.device)  # (2,)
        self._never = torch.zeros(num_envs, dtype=torch.bool, device=self.device)  # (B,)
        state = torch.arange(2.0, device=self.device).repeat(num_envs, 1)  # (B, 2)
        self._features = state.unsqueeze(2).clone(), state, None  # the same at every step
        self._latest = None  # joint actions (B, 2, 1) to draw

    def reward(self, actions):
        """Team reward (B,) of joint actions (B, 2, 1)."""
        squares = (actions.transpose(1, 2) - self._centres).square().sum(2)  # (B, 2), of f1 and f2
        return torch.addcmul(self._tops, self._slopes, squares).amax(1)

    def reset(self, *, seed=None, options=None):
        self._latest = None
        return super().reset(seed=seed, options=options)

    def _restart(self, done):
        pass

    def _advance(self, actions):
        self._latest = actions
        return self.reward(actions), self._never, {}

    def _observe(self):
        return self._features

    def render(self):
        """(320, 320, 3) uint8: bands of the reward over both actions, crosses at the tops of the hills.

        Dots are the latest joint actions of all games, none right after a reset.
        """
        if self._obs is None:
            raise RuntimeError("call env.reset() before env.render()")
        actions = [] if self._latest is None else self._latest.squeeze(2).tolist()
        bound = float(self.single_action_space.high[0, 0])
        line = torch.linspace(-bound, bound, 2 * MAP, device=self.device)  # twice the pixels, see _draw
        grid = torch.cartesian_prod(line.flip(0), line).flip(1)  # (4 MAP^2, 2), from the upper left, by rows
        heights = self.reward(grid.unsqueeze(2)).view(2 * MAP, 2 * MAP).cpu().numpy()
        return _draw(heights, bound, self._centres.tolist(), actions)


# ---- picture ----
def _draw(heights, bound, centres, actions):
    """Picture of the rewards `heights` (2 MAP, 2 MAP) over a1 (right) and a2 (up); pairs of both as marks."""
    # equal steps of reward, each darker at its edge; drawn at twice the size, then shrunk
    share = (heights - heights.min()) / max(np.ptp(heights), 1e-6)
    band = (share * BANDS).clip(0, BANDS - 1).astype(int)  # (2 MAP, 2 MAP)
    stops = np.linspace(0, BANDS - 1, len(COLOURS))
    palette = np.stack([np.interp(range(BANDS), stops, channel) for channel in zip(*COLOURS, strict=True)], 1)
    picture = palette[band]  # (2 MAP, 2 MAP, 3)
    edge = (band != np.roll(band, 1, 0)) | (band != np.roll(band, 1, 1))
    edge[0] = edge[:, 0] = False  # the roll compares these with the opposite side
    picture[edge] *= 0.75

    image = Image.new("RGB", (2 * SIDE, 2 * SIDE), (38, 40, 44))
    image.paste(Image.fromarray(picture.astype(np.uint8)), (2 * LEFT, 2 * TOP))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(24)

    def at(a1, a2):
        return 2 * LEFT + MAP * (1 + a1 / bound), 2 * TOP + MAP * (1 - a2 / bound)

    for value in (-bound, 0, bound):
        x, y = at(value, value)
        draw.text((x, 2 * (TOP + MAP) + 14), f"{value:g}", (220, 220, 220), font, anchor="mt")
        draw.text((2 * LEFT - 8, y), f"{value:g}", (220, 220, 220), font, anchor="rm")
    draw.text((at(bound / 2, 0)[0], 2 * (TOP + MAP) + 14), "a1", (220, 220, 220), font, anchor="mt")
    draw.text((2 * LEFT - 8, at(0, bound / 2)[1]), "a2", (220, 220, 220), font, anchor="rm")
    for x, y in (at(*centre) for centre in centres):
        for colour, width in (((38, 40, 44), 10), ((255, 255, 255), 4)):
            draw.line([x - 12, y - 12, x + 12, y + 12], colour, width)
            draw.line([x - 12, y + 12, x + 12, y - 12], colour, width)
    for x, y in (at(*action) for action in actions):
        draw.ellipse([x - 7, y - 7, x + 7, y + 7], (214, 60, 50), (38, 40, 44), 2)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
