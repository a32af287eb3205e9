"""Worker process of envs/smac_sc2.py: one client of StarCraft II, through the game's own protocol.

It starts the client, then answers each order of the learner with what the units are. Whatever goes wrong ends
both, with the reason in their log. It imports neither torch nor numpy, to stay small. What it sends and reads
follows smac/env/starcraft2/starcraft2.py of oxwhirl/smac d6aab33.
"""

import atexit
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from array import array
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from s2clientprotocol import sc2api_pb2 as messages
from websocket import WebSocketException, create_connection

LOOPS_PER_STEP = 8  # step_mul
MOVES = {2: (0, 2), 3: (0, -2), 4: (2, 0), 5: (-2, 0)}  # north, south, east, west; move_amount
STOP, MOVE, ATTACK, HEAL = 4, 16, 23, 386  # ability ids
AGENTS, ENEMIES = 1, 2  # owners
RACES = {"T": 1, "Z": 2, "P": 3}
PATIENCE = 200  # loops to wait for the units of a new battle
# the last one to begin a battle at: StarCraft II ends a game by itself at 2^19 (pysc2/env/sc2_env.py)
LAST_LOOP = 2**19 - 8 * 400 - PATIENCE - 10
LIBC = ctypes.CDLL(None)  # loaded here, as nothing may be between fork and exec


class Game:
    """A client of StarCraft II and its battles. `units` (U,) in our order: the dead have health 0."""

    def __init__(self, recipe):
        """_launch."""
        battle, file = recipe.battle, recipe.map_file
        self.n_agents, self.n_enemies = battle["n_agents"], battle["n_enemies"]
        self.seen, self.loop, self.socket = [], 0, None
        with socket.create_server(("127.0.0.1", 0)) as server:  # a port that is free
            port = str(server.getsockname()[1])
        words = ["-listen", "127.0.0.1", "-port", port, "-tempDir", f"{recipe.folder}/"]
        # PR_SET_PDEATHSIG: the game ends with its worker, even with one that is killed
        options = dict(preexec_fn=lambda: LIBC.prctl(1, signal.SIGKILL)) if sys.platform == "linux" else {}
        program = subprocess.Popen([*recipe.command, *words], stdin=subprocess.DEVNULL, **options)
        atexit.register(program.wait)
        atexit.register(program.kill)  # comes before that
        while not self.socket:
            if program.poll() is not None:
                sys.exit(f"StarCraft II ended at once (exit code {program.returncode})")
            time.sleep(0.05)
            with contextlib.suppress(ConnectionError, WebSocketException):  # it does not listen yet
                self.socket = create_connection(f"ws://127.0.0.1:{port}/sc2api", http_no_proxy=["127.0.0.1"])
        ground = {"map_path": f"SMAC_Maps/{file.name}", "map_data": file.read_bytes()}
        agents, enemies = (RACES[battle[f"{side}_race"]] for side in ("ally", "enemy"))
        players = [{"type": 1}, {"type": 2, "race": enemies, "difficulty": recipe.difficulty}]
        self.ask(create_game={"local_map": ground, "random_seed": recipe.seed, "player_setup": players})
        self.ask(join_game={"race": agents, "options": {"raw": True, "score": False}})

    def ask(self, **request):
        """The game's answer to a request, as in `ask(step={"count": 8})`."""
        (name,) = request
        self.socket.send_binary(messages.Request(**request).SerializeToString())
        response = messages.Response.FromString(self.socket.recv() or b"")  # empty: it has closed the socket
        good = messages.init_game if name == "create_game" else messages.in_game
        if response.error or response.status != good:
            sys.exit(f"StarCraft II answers {name} with an error: {response}")
        return getattr(response, name)

    def observe(self):
        observation = self.ask(observation={}).observation
        self.loop, self.seen = observation.game_loop, observation.raw_data.units

    def step(self, actions, targets):
        """Play actions (N,), which act on units `targets` (N,), for 8 loops. step, update_units."""
        orders = map(self.order, self.units, actions, targets)
        commands = [{"action_raw": {"unit_command": order}} for order in orders if order]
        self.ask(action={"actions": commands})
        self.ask(step={"count": LOOPS_PER_STEP})
        self.observe()
        seen = {unit.tag: unit for unit in self.seen}
        for i, unit in enumerate(self.units):
            unit.health = 0  # of the dead: the rest stays as it was
            self.units[i] = seen.get(unit.tag, unit)
        return self.answer()

    def order(self, agent, action, target):
        """What an agent is told; None for no-op, of the dead. get_agent_action."""
        order = {"unit_tags": [agent.tag], "ability_id": STOP}
        if target >= 0:
            order["ability_id"] = HEAL if target < self.n_agents else ATTACK
            order["target_unit_tag"] = self.units[target].tag
        elif action in MOVES:
            x, y = MOVES[action]
            order["ability_id"] = MOVE
            order["target_world_space_pos"] = {"x": agent.pos.x + x, "y": agent.pos.y + y}
        return order if action else None

    def reset(self):
        """A new battle. reset, init_units."""
        killed = {unit.tag for unit in self.seen if unit.owner in (AGENTS, ENEMIES)}
        if killed:  # all that is there, also a battle that followed a tie by itself
            self.ask(debug={"debug": [{"kill_unit": {"tag": killed}}]})
            self.ask(step={"count": 2})
        for _ in range(PATIENCE):
            self.observe()
            new = [unit for unit in self.seen if unit.tag not in killed]
            agents, enemies = ([unit for unit in new if unit.owner == side] for side in (AGENTS, ENEMIES))
            if (len(agents), len(enemies)) == (self.n_agents, self.n_enemies):
                # agents by type and place, enemies as the game shows them
                agents.sort(key=lambda unit: (unit.unit_type, unit.pos.x, unit.pos.y))
                self.units = agents + enemies
                return self.answer()
            self.ask(step={"count": 1})
        sys.exit(f"StarCraft II begins a battle of {len(agents)} agents and {len(enemies)} enemies")

    def answer(self):
        """Enemies' types (M,), the most life of all units (U,), and FIELDS of envs/smac_sc2.py (U, 6)."""
        types, lives = [x.unit_type for x in self.units[self.n_agents :]], [x.health_max for x in self.units]
        rows = [(x.pos.x, x.pos.y, x.health, x.shield, x.energy, x.weapon_cooldown) for x in self.units]
        return types, lives, array("f", [value for row in rows for value in row]).tobytes()


def main():
    pipe = Connection(0)
    recipe = SimpleNamespace(**pipe.recv())
    atexit.register(shutil.rmtree, recipe.folder, ignore_errors=True)
    # leave within seconds of the learner's end, however that came and whatever the game does
    signal.signal(signal.SIGALRM, lambda *_: os.getppid() == recipe.learner or sys.exit())
    signal.setitimer(signal.ITIMER_REAL, 5, 5)
    try:
        game = Game(recipe)
        with contextlib.suppress(EOFError):  # the learner closes the pipe, or is gone
            while (order := pipe.recv()) or game.loop < LAST_LOOP:
                pipe.send(game.step(*order) if order else game.reset())
            print(f"StarCraft II ends a game in its loop {LAST_LOOP}, or soon after", file=sys.stderr)
        signal.alarm(10)  # so long the replay may take
        if recipe.replays:
            name = f"{recipe.map_file.stem}_{recipe.game}_{time.time_ns()}.SC2Replay"
            Path(recipe.replays, name).write_bytes(game.ask(save_replay={}).data)
    except (OSError, WebSocketException) as error:
        sys.exit(f"StarCraft II hung up: {error}")


if __name__ == "__main__":
    main()
