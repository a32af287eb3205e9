"""Worker process of envs/smac_sc2.py: one client of StarCraft II, through its own protocol.

Learner and worker talk over a socket: a recipe, then one command after the other, an answer to each. Imports
nothing of this repository, and neither torch nor numpy, so that it stays small. Everything that is sent to the
game and read from it follows smac/env/starcraft2/starcraft2.py of oxwhirl/smac d6aab33; the methods are named.
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

LOOPS_PER_STEP = 8  # step_mul
MOVES = {2: (0, 2), 3: (0, -2), 4: (2, 0), 5: (-2, 0)}  # north, south, east, west; move_amount
FIRST_TARGET = 6
STOP, MOVE, ATTACK, HEAL = 4, 16, 23, 386  # ability ids
AGENTS, ENEMIES = 1, 2  # owners
LAST_LOOP = 2**19  # where StarCraft II ends a game by itself (pysc2/env/sc2_env.py)
PATIENCE = 200  # single loops to wait for the units of a new battle
RACES = {"T": 1, "Z": 2, "P": 3}
LIBC = ctypes.CDLL(None)  # nothing may be loaded between fork and exec


class Broken(Exception):
    """What the client did instead of playing."""


class Client:
    """A program of the game, in a process of its own, and the websocket that it listens to."""

    def __init__(self, command, environ, folder, timeout):
        from websocket import WebSocketException, create_connection

        with socket.create_server(("127.0.0.1", 0)) as server:  # a port that is free
            port = server.getsockname()[1]
        words = ["-listen", "127.0.0.1", "-port", str(port), "-tempDir", os.path.join(folder, "")]
        self.process = subprocess.Popen(
            [*command, *words], env=os.environ | environ, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
        )
        self.end, self.socket, self.loop = time.monotonic() + timeout, None, 0
        while self.socket is None:
            options = dict(timeout=self.time_left(), http_no_proxy=["127.0.0.1"])
            with contextlib.suppress(ConnectionError, WebSocketException):  # it does not listen yet
                self.socket = create_connection(f"ws://127.0.0.1:{port}/sc2api", **options)
            if self.socket is None:
                if self.process.poll() is not None:
                    raise Broken(f"StarCraft II ended at its start (exit code {self.process.returncode})")
                time.sleep(0.05)

    def time_left(self):
        """Seconds until `end`, by when the command in progress must be done."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def ask(self, **request):
        """The answer to a request, `ask(step={"count": 8})`."""
        from s2clientprotocol import sc2api_pb2 as messages

        (name,) = request
        self.socket.settimeout(self.time_left())
        self.socket.send_binary(messages.Request(**request).SerializeToString())
        response = messages.Response.FromString(self.socket.recv())
        answer = getattr(response, name)
        trouble = list(response.error)
        if name in ("create_game", "join_game") and answer.HasField("error"):
            trouble += [f"{type(answer).Error.Name(answer.error)} {answer.error_details}".strip()]
        if trouble:
            raise Broken(f"StarCraft II answers {name} with an error: {' '.join(trouble)}")
        if name == "step" and response.status != messages.in_game:
            raise Broken("StarCraft II ended the game")
        return answer

    def leave(self):
        """End the program, which gets a moment for it."""
        self.end = time.monotonic() + 3
        with contextlib.suppress(Exception):
            self.ask(quit={})
        if self.socket:
            self.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(3)
        self.process.kill()
        self.process.wait()


class Battles:
    """The battles of one game: commands of the learner -> what the units are afterwards."""

    def __init__(self, command, environ, folder, timeout, game, n_agents, n_enemies, limit, replays, medics):
        self.command, self.environ, self.folder, self.timeout = command, environ, folder, timeout
        self.game, self.n_agents, self.n_enemies = game, n_agents, n_enemies
        self.longest = (limit + PATIENCE) * LOOPS_PER_STEP  # loops that an episode may take
        self.replays, self.medics = replays, medics
        self.client, self.launches = None, 0
        self.units = []  # those of the game's latest observation
        self.tags, self.rows = [], []  # of the units of the battle, and what they showed last

    def launch(self):
        """_launch: a new client and a game in it; each has a seed of its own."""
        game = dict(self.game)
        races, difficulty = game.pop("races"), game.pop("difficulty")
        game["random_seed"] = (game["random_seed"] + 1_000_003 * self.launches) % 2**31
        self.launches += 1
        self.client = Client(self.command, self.environ, self.folder, self.timeout)
        agents, enemies = (RACES[race] for race in races)
        players = [
            {"type": 1},
            {"type": 2, "race": enemies, "difficulty": difficulty},
        ]  # participant, computer
        self.client.end = time.monotonic() + self.timeout
        self.client.ask(create_game=game | {"realtime": False, "player_setup": players})
        self.client.ask(join_game={"race": agents, "options": {"raw": True, "score": False}})

    def observe(self):
        observation = self.client.ask(observation={}).observation
        self.client.loop, self.units = observation.game_loop, observation.raw_data.units

    def step(self, actions):
        """Play actions (N,) for 8 loops -> the units. step, update_units."""
        self.client.end = time.monotonic() + self.timeout
        orders = [self.order(i, action) for i, action in enumerate(actions) if action]
        orders = [{"action_raw": {"unit_command": order}} for order in orders]
        self.client.ask(action={"actions": orders})
        self.client.ask(step={"count": LOOPS_PER_STEP})
        self.observe()
        seen = {unit.tag: unit for unit in self.units}
        for i, tag in enumerate(self.tags):
            if tag in seen:
                self.rows[i] = self.row(seen[tag])
            else:  # dead: the rest stays as it was
                self.rows[i][2] = 0.0
        return self.table()

    def order(self, i, action):
        """What agent i is told. get_agent_action."""
        order = {"unit_tags": [self.tags[i]], "queue_command": False}
        if action < FIRST_TARGET:
            if action not in MOVES:
                return order | {"ability_id": STOP}
            (x, y), (east, north) = self.rows[i][:2], MOVES[action]
            return order | {"ability_id": MOVE, "target_world_space_pos": {"x": x + east, "y": y + north}}
        heals, target = self.medics[i], action - FIRST_TARGET
        tag = self.tags[target if heals else self.n_agents + target]
        return order | {"ability_id": HEAL if heals else ATTACK, "target_unit_tag": tag}

    def reset(self):
        """A new battle -> its enemies' types and their units' life at most, and the units. reset, init_units."""
        if self.client and self.client.loop + self.longest > LAST_LOOP:
            self.close()
        killed = set()
        if self.client is None:
            self.launch()
        else:  # all that is there, also a battle that has followed a tie by itself
            self.client.end = time.monotonic() + self.timeout
            killed = {unit.tag for unit in self.units if unit.owner in (AGENTS, ENEMIES)}
            self.client.ask(debug={"debug": [{"kill_unit": {"tag": killed}}]})
            self.client.ask(step={"count": 2})
        for _ in range(PATIENCE):
            self.observe()
            new = [unit for unit in self.units if unit.tag not in killed]
            agents, enemies = ([unit for unit in new if unit.owner == side] for side in (AGENTS, ENEMIES))
            if (len(agents), len(enemies)) == (self.n_agents, self.n_enemies):
                break
            self.client.ask(step={"count": 1})
        else:
            found = f"{len(agents)} agents and {len(enemies)} enemies"
            raise Broken(f"no new battle in StarCraft II, but {found} after {PATIENCE} loops")
        # agents by type and place, enemies as the game shows them
        agents.sort(key=lambda unit: (unit.unit_type, unit.pos.x, unit.pos.y))
        units = agents + enemies
        self.tags, self.rows = [unit.tag for unit in units], [self.row(unit) for unit in units]
        return [unit.unit_type for unit in enemies], [unit.health_max for unit in units], self.table()

    def row(self, unit):
        """In the order of FIELDS of envs/smac_sc2.py."""
        place, charge = unit.pos, (unit.energy, unit.weapon_cooldown)
        return [place.x, place.y, unit.health, unit.shield, *charge]

    def table(self):
        return array("f", [value for row in self.rows for value in row]).tobytes()

    def close(self):
        """Save the replay, if one is asked for, and end the client."""
        client, self.client = self.client, None
        if client and self.replays:
            folder, prefix = self.replays
            with contextlib.suppress(Exception):  # of a client that is gone
                client.end = time.monotonic() + 10
                data = client.ask(save_replay={}).data
                save(Path(folder), prefix, data)
        if client:
            client.leave()


def save(folder, prefix, data):
    """Write a replay under the first free number: no game overwrites another's."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(10**6):
        with (
            contextlib.suppress(FileExistsError),
            open(folder / f"{prefix}_{number}.SC2Replay", "xb") as file,
        ):
            file.write(data)
            return


def die_with_parent():
    """The game ends with the worker, even with one that is killed."""
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
    signal.signal(signal.SIGTERM, lambda *_: None)  # for the learner, which saves; the game's is the default
    learner = Connection(int(sys.argv[1]))
    recipe = learner.recv()
    threading.Thread(target=watch, args=(recipe.pop("learner"), recipe["folder"]), daemon=True).start()
    battles = Battles(**recipe)
    try:
        while order := learner.recv():
            learner.send(getattr(battles, order[0])(*order[1:]))
    except EOFError:  # the learner is gone
        battles.close()
    except Exception as error:
        traceback.print_exc()  # into the log
        code = battles.client and battles.client.process.poll()
        sentence = str(error) if isinstance(error, Broken) else f"{type(error).__name__} {error}"
        if "timeout" in type(error).__name__.lower():
            sentence = f"StarCraft II has not answered for {recipe['timeout']} s"
        elif code is not None and not isinstance(error, Broken):
            sentence = f"StarCraft II ended (exit code {code})"
        if battles.client:
            battles.client.process.kill()
        with contextlib.suppress(OSError):
            learner.send(RuntimeError(sentence))
    else:
        battles.close()


if __name__ == "__main__":
    main()
