"""A picture of one battle of SMAC, for videos: who stands where, lives, shoots and heals."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from envs.smac_sim import LOOPS_PER_STEP

GLYPHS = {"marine": "M", "marauder": "D", "stalker": "S", "zealot": "Z", "colossus": "C"}
GLYPHS |= {"zergling": "z", "hydralisk": "H", "baneling": "b", "spinecrawler": "X", "medivac": "+"}


def draw_battle(sim, units, title, outcome):
    """(H, 640, 3) uint8: `units` (U,), blue agents, red enemies, lines to whom they shoot at or heal.

    A shot is what a cooldown says that began in this step, to within the weapons' random delay; a medivac's
    line leads to its patient, hurt or not.
    """
    fine, header = 2, 32  # drawn at twice the size, then shrunk; pixels
    cells = np.argwhere(sim.walkable)  # (K, 2)
    west, south = cells.min(0) - 0.5
    width, height = cells.max(0) - cells.min(0) + 2.0  # tiles
    tile = fine * 640 / width
    size = (fine * 640, fine * 2 * round((header + 640 * height / width) / 2))  # even, for video codecs
    image = Image.new("RGB", size, (38, 40, 44))
    draw = ImageDraw.Draw(image, "RGBA")

    def at(x, y):
        return (x - west) * tile, size[1] - (y - south) * tile

    def box(x, y, half):
        return [*at(x - half, y + half), *at(x + half, y - half)]

    for x, y in cells.tolist():
        draw.rectangle(box(x + 0.5, y + 0.5, 0.5), fill=(92, 96, 88) if (x + y) % 2 else (88, 92, 84))
    kinds = {name: torch.tensor(sim.kinds[name]) for name in ("hp_max", "shield_max", "period", "radius")}
    life, shield = (units.hp / kinds["hp_max"]).tolist(), (units.shield / kinds["shield_max"]).tolist()
    shot = (units.cooldown > kinds["period"] - LOOPS_PER_STEP).tolist()  # within this step
    spots, size_of = torch.stack([units.x, units.y], 1).tolist(), kinds["radius"].tolist()
    sides = [(64, 128, 245) if i < sim.n_agents else (228, 66, 56) for i in range(sim.n_units)]
    tall = ("medivac", "colossus")
    for i in sorted(range(sim.n_units), key=lambda i: (life[i] > 0, sim.types[i] in tall, -spots[i][1])):
        (x, y), radius, name, side = spots[i], size_of[i], sim.types[i], sides[i]
        if life[i] <= 0:
            left, top, right, bottom = box(x, y, 0.6 * radius)
            draw.line([left, top, right, bottom], (*side, 80), 2 * fine)
            draw.line([left, bottom, right, top], (*side, 80), 2 * fine)
            continue
        lift, opacity = (0.3, 150) if name == "medivac" else (0.07, 255)
        draw.ellipse(box(x + lift, y - lift, radius), fill=(0, 0, 0, 70))
        draw.ellipse(box(x, y, radius), fill=(*side, opacity), outline=(20, 20, 24), width=fine)
        font = ImageFont.load_default(1.25 * radius * tile)
        draw.text(at(x, y), GLYPHS[name], fill=(255, 255, 255), font=font, anchor="mm")
        health = (96, 224, 92) if life[i] > 0.5 else (245, 200, 60) if life[i] > 0.25 else (255, 110, 70)
        left, base = at(x - radius, y + radius + 0.06)
        for share, colour in ((life[i], health), (shield[i], (130, 210, 255))):
            if share == share:  # not 0 / 0, a unit without shields
                for part, paint in ((1, (15, 15, 18, 200)), (share, colour)):
                    draw.rectangle([left, base - 2 * fine, left + 2 * radius * tile * part, base], fill=paint)
                base -= 3.5 * fine
    for i, j in enumerate(units.target.tolist()):
        heals = sim.types[i] == "medivac"
        if life[i] > 0 and j >= 0 and (shot[i] or heals):
            colour = (80, 255, 120) if heals else (255, 236, 120) if i < sim.n_agents else (255, 160, 90)
            draw.line([*at(*spots[i]), *at(*spots[j])], (*colour, 210), 3 * fine // 2)
            draw.ellipse(box(*spots[j], 0.09), fill=colour)

    draw.rectangle([0, 0, size[0], fine * header], fill=(24, 25, 28))
    font, middle, margin = ImageFont.load_default(15 * fine), fine * header / 2, 10 * fine
    draw.text((margin, middle), title, fill=(225, 225, 225), font=font, anchor="lm")
    colour = {"won": (110, 220, 120), "lost": (240, 100, 90)}.get(outcome, (230, 200, 110))
    draw.text((size[0] - margin, middle), outcome, fill=colour, font=font, anchor="rm")
    return np.array(image.resize((size[0] // fine, size[1] // fine), Image.Resampling.LANCZOS))
