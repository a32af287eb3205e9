"""Worker process of envs/smac_sc2.py: one client of StarCraft II, through the game's own protocol.

It gets a recipe and then orders from the learner, and answers each. It imports neither torch nor numpy, to
stay small. What it sends and reads follows smac/env/starcraft2/starcraft2.py of oxwhirl/smac d6aab33.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from array import array
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from s2clientprotocol import sc2api_pb2 as messages
from websocket import WebSocketException, create_connection

LOOPS_PER_STEP = 8  # step_mul
MOVES = {2: (0, 2), 3: (0, -2), 4: (2, 0), 5: (-2, 0)}  # north, south, east, west; move_amount
FIRST_TARGET = 6
STOP, MOVE, ATTACK, HEAL = 4, 16, 23, 386  # ability ids
AGENTS, ENEMIES = 1, 2  # owners
LAST_LOOP = 2**19  # where StarCraft II ends a game by itself (pysc2/env/sc2_env.py)
PATIENCE = 200  # loops to wait for the units of a new battle
RACES = {"T": 1, "Z": 2, "P": 3}
LIBC = ctypes.CDLL(None)  # loaded here, as nothing may be between fork and exec


class Broken(Exception):
    """What the client did instead of playing."""


class Game:
    """The battles of a map, in one client after the other. `end`: when the order in progress must be done."""

    def __init__(self, recipe):
        self.recipe, self.program, self.clients, self.end = SimpleNamespace(**recipe), None, 0, 0.0

    def ask(self, **request):
        """The game's answer to a request, as in `ask(step={"count": 8})`."""
        (name,) = request
        self.socket.settimeout(max(0.001, self.end - time.monotonic()))
        self.socket.send_binary(messages.Request(**request).SerializeToString())
        if not (data := self.socket.recv()):
            raise ConnectionError  # the game has closed it
        response = messages.Response.FromString(data)
        answer, trouble = getattr(response, name), list(response.error)
        if name in ("create_game", "join_game") and answer.HasField("error"):
            trouble += [type(answer).Error.Name(answer.error), answer.error_details]
        if trouble:
            raise Broken(f"StarCraft II answers {name} with an error: {' '.join(trouble).strip()}")
        if name == "step" and response.status != messages.in_game:
            raise Broken("StarCraft II ended the game")
        return answer

    def launch(self):
        """_launch: a client and a game in it. Each has a seed of its own."""
        with socket.create_server(("127.0.0.1", 0)) as server:  # a port that is free
            port = server.getsockname()[1]
        words = ["-listen", "127.0.0.1", "-port", str(port), "-tempDir", f"{self.recipe.folder}/"]
        options = dict(env=os.environ | self.recipe.environ, stdin=subprocess.DEVNULL, preexec_fn=follow)
        self.program, self.socket = subprocess.Popen([*self.recipe.command, *words], **options), None
        while self.socket is None:
            if self.program.poll() is not None:
                raise Broken(f"StarCraft II ended at once (exit code {self.program.poll()})")
            if time.monotonic() > self.end:
                raise TimeoutError
            with contextlib.suppress(ConnectionError, WebSocketException):  # it does not listen yet
                address, options = f"ws://127.0.0.1:{port}/sc2api", dict(http_no_proxy=["127.0.0.1"])
                self.socket = create_connection(address, timeout=self.end - time.monotonic(), **options)
            time.sleep(0.05)
        game, seed = self.recipe.game, (self.recipe.seed + 1_000_003 * self.clients) % 2**31
        agents, enemies = (RACES[race] for race in self.recipe.races)
        players = [{"type": 1}, {"type": 2, "race": enemies, "difficulty": self.recipe.difficulty}]
        self.ask(create_game={"local_map": game, "random_seed": seed, "player_setup": players})
        self.ask(join_game={"race": agents, "options": {"raw": True, "score": False}})
        self.clients += 1

    def observe(self):
        observation = self.ask(observation={}).observation
        self.loop, self.units = observation.game_loop, observation.raw_data.units

    def step(self, actions):
        """Play actions (N,) for 8 loops. step, update_units."""
        orders = [self.order(i, action) for i, action in enumerate(actions) if action]
        self.ask(action={"actions": [{"action_raw": {"unit_command": order}} for order in orders]})
        self.ask(step={"count": LOOPS_PER_STEP})
        self.observe()
        seen = {unit.tag: unit for unit in self.units}
        for i, tag in enumerate(self.tags):
            if tag in seen:
                self.rows[i] = row(seen[tag])
            else:  # dead: the rest stays as it was
                self.rows[i][2] = 0.0
        return self.table()

    def order(self, i, action):
        """What agent i is told. get_agent_action."""
        order, target = {"unit_tags": [self.tags[i]]}, action - FIRST_TARGET
        if target >= 0:
            heals = self.recipe.medics[i]
            tag = self.tags[target if heals else self.recipe.n_agents + target]
            return order | {"ability_id": HEAL if heals else ATTACK, "target_unit_tag": tag}
        if action not in MOVES:
            return order | {"ability_id": STOP}
        place = {"x": self.rows[i][0] + MOVES[action][0], "y": self.rows[i][1] + MOVES[action][1]}
        return order | {"ability_id": MOVE, "target_world_space_pos": place}

    def reset(self):
        """A new battle -> its enemies' types, its units' most life, and the units. reset, init_units."""
        killed, recipe = set(), self.recipe
        if self.program and self.loop + (recipe.limit + PATIENCE) * LOOPS_PER_STEP > LAST_LOOP:
            self.close()
        if self.program is None:
            self.end += recipe.start
            self.launch()
        else:  # all that is there, also a battle that followed a tie by itself
            killed = {unit.tag for unit in self.units if unit.owner in (AGENTS, ENEMIES)}
            self.ask(debug={"debug": [{"kill_unit": {"tag": killed}}]})
            self.ask(step={"count": 2})
        for _ in range(PATIENCE):
            self.observe()
            new = [unit for unit in self.units if unit.tag not in killed]
            agents, enemies = ([unit for unit in new if unit.owner == side] for side in (AGENTS, ENEMIES))
            if (len(agents), len(enemies)) == (recipe.n_agents, recipe.n_enemies):
                break
            self.ask(step={"count": 1})
        else:
            raise Broken(f"StarCraft II begins a battle of {len(agents)} agents and {len(enemies)} enemies")
        # agents by type and place, enemies as the game shows them
        units = sorted(agents, key=lambda unit: (unit.unit_type, unit.pos.x, unit.pos.y)) + enemies
        self.tags, self.rows = [unit.tag for unit in units], [row(unit) for unit in units]
        return [unit.unit_type for unit in enemies], [unit.health_max for unit in units], self.table()

    def table(self):
        return array("f", [value for row in self.rows for value in row]).tobytes()

    def close(self):
        """End the client; before that save its replay, if one is wanted."""
        self.end = time.monotonic() + 10
        with contextlib.suppress(Exception):  # of a client that is gone
            if self.recipe.replays:
                data = self.ask(save_replay={}).data
                Path(f"{self.recipe.replays}_{time.time_ns()}.SC2Replay").write_bytes(data)
        if self.program:
            self.program.kill()
            self.program.wait()
        self.program = None


def row(unit):
    """In the order of FIELDS of envs/smac_sc2.py."""
    return [unit.pos.x, unit.pos.y, unit.health, unit.shield, unit.energy, unit.weapon_cooldown]


def follow():
    """The game ends with its worker, even with one that is killed."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def watch(learner, folder):
    """End the whole process group once the learner is gone, however it went and whatever the game does."""
    while os.getppid() == learner:
        time.sleep(0.5)
    os.killpg(0, signal.SIGTERM)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def main():
    signal.signal(signal.SIGTERM, lambda *_: None)  # is for the learner; by default again in the game
    learner = Connection(int(sys.argv[1]))
    game = Game(learner.recv())
    threading.Thread(target=watch, args=(game.recipe.learner, game.recipe.folder), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the learner is gone
        while order := learner.recv():
            game.end = time.monotonic() + game.recipe.timeout
            try:
                answer = getattr(game, order[0])(*order[1:])
            except Exception as error:
                answer = RuntimeError(reason_of(error, game.recipe.timeout))
            learner.send(answer)
    game.close()
    shutil.rmtree(game.recipe.folder, ignore_errors=True)


def reason_of(error, timeout):
    """Why a client does not play on, in a few words."""
    if "timeout" in type(error).__name__.lower():
        return f"StarCraft II has not answered for {timeout} s"
    if isinstance(error, (OSError, WebSocketException)):
        return "StarCraft II hung up"
    if not isinstance(error, Broken):
        traceback.print_exc()  # into the log: a mistake of ours
    return str(error)


if __name__ == "__main__":
    main()
