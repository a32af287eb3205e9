"""Stand-in for StarCraft II: speaks its messages over a websocket of its own and plays our embedded engine.

    python tests/fake_sc2.py install ~/standin && export SC2PATH=~/standin
    python tests/fake_sc2.py -listen 127.0.0.1 -port 5000 -dataDir X -tempDir Y      # as the game is started

Trouble comes from the environment. Counted in step requests of one process: FAKE_SC2_CRASH=n leaves,
FAKE_SC2_HANG=n never answers again, FAKE_SC2_END=n ends the game as StarCraft II does after 2^19 loops,
FAKE_SC2_ERROR=n answers with an error, FAKE_SC2_TIE=n kills everybody; FAKE_SC2_ONCE=path: all these only
in the first process that can create this file. FAKE_SC2_LAUNCH=1 leaves before it listens, FAKE_SC2_LOOP=n
begins at this loop, FAKE_SC2_LATE=n shows the last units of a battle n loops late, FAKE_SC2_REVERSED=1 shows
units from the last to the first, FAKE_SC2_LIFE=x: the first enemy has that much more life at most,
FAKE_SC2_SLEEP=n: a step takes n ms more. FAKE_SC2_LOG=path gets a line for each game: process id, port, seed,
difficulty and race of the computer. FAKE_SC2_HALL=path: a hall at this socket forks who plays (`hall()`).
"""

import base64
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
OURS, THEIRS = 1, 2
LAUNCHED, INIT_GAME, IN_GAME, ENDED = 1, 2, 3, 5  # messages.Status


def install(folder):
    """An installation of the game in `folder`, whose program is this file."""
    program = folder / "Versions" / "Base75689" / "SC2_x64"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "fake_sc2.py"}" "$@"\n')
    program.chmod(0o755)
    (folder / "Maps" / "SMAC_Maps").mkdir(parents=True)
    import envs

    for name in envs._SMAC_MAPS:
        (folder / "Maps" / "SMAC_Maps" / f"{name}.SC2Map").write_text(f"map {name}")
    return folder


def option(name):
    return int(os.environ.get(f"FAKE_SC2_{name}", 0))


# ---- processes that need not import torch first ----
def hall(path):
    """Fork a client for everyone who connects to `path`, that ends together with the one that did."""
    import torch

    import envs.smac  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(path)
    server.listen()
    print("open", flush=True)
    threading.Thread(target=end_with, args=[sys.stdin], daemon=True).start()
    while True:
        guest, _ = server.accept()
        if not os.fork():
            data, (stderr,), _, _ = socket.recv_fds(guest, 2**20, 1)
            threading.Thread(target=end_with, args=[guest.makefile()], daemon=True).start()
            os.dup2(stderr, 2)
            sys.argv[:], environ = json.loads(data)
            os.environ.clear()
            os.environ.update(environ)
            try:
                play()
            finally:
                os._exit(1)
        guest.close()


def end_with(file):
    file.read()
    os._exit(1)


def be_guest(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.connect(path)
        socket.send_fds(door, [json.dumps([sys.argv, dict(os.environ)]).encode()], [2])
        door.recv(1)


# ---- websocket, the server's side ----
class Websocket:
    def __init__(self, host, port):
        with socket.create_server((host, port)) as server:
            self.socket, _ = server.accept()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")
        head = b"".join(iter(self.file.readline, b"\r\n")).decode()
        key = re.search(r"(?i)sec-websocket-key: *(\S+)", head)[1]
        digest = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}", "", ""]
        assert head.startswith("GET /sc2api "), head
        self.socket.sendall("\r\n".join(lines).encode())

    def receive(self):
        """The next message, b"" when the client is gone."""
        head = self.file.read(2)
        if len(head) < 2 or head[0] & 15 == 8:
            return b""
        size = head[1] & 127
        if size > 125:
            size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
        mask, data = self.file.read(4), self.file.read(size)
        pad = (mask * (size // 4 + 1))[:size]
        return (int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")).to_bytes(size, "big")

    def send(self, data):
        n = len(data)
        size = bytes([n]) if n < 126 else b"\x7e" + n.to_bytes(2, "big")
        self.socket.sendall(b"\x82" + size + data)


# ---- the game ----
class Game:
    """One battle of a map, as StarCraft II shows it to player 1."""

    def __init__(self, request):
        import torch

        torch.set_num_threads(1)
        from envs.smac import Smac

        self.torch = torch
        name = request.local_map.map_path.removeprefix("SMAC_Maps/").removesuffix(".SC2Map")
        assert request.local_map.map_data == f"map {name}".encode(), request.local_map
        assert [player.type for player in request.player_setup] == [1, 2], request.player_setup
        self.env = Smac(name, 1, "cpu", request.random_seed, validate=False)
        self.env.reset()
        self.units, self.n = self.env.units, self.env.n_agents
        stats = json.loads((HERE.parent / "envs" / "smac_units.json").read_text())["units"]
        stock = {name: unit["game_ids"]["enemy"] or "0)" for name, unit in stats.items()}
        stock = {name: int(re.search(r"(\d+)\)", text)[1]) for name, text in stock.items()}
        order = list(dict.fromkeys(self.env.sim.types[: self.n]))
        self.kinds = [2000 + order.index(name) for name in self.env.sim.types[: self.n]]
        self.kinds += [stock[name] for name in self.env.sim.types[self.n :]]
        # what the kernels took for a battle: so the first one is as any other
        self.loop, self.next_tag, self.orders, self.ability = option("LOOP"), 2**32 + 1, {}, {}
        self.begin()

    def begin(self):
        self.tags = list(range(self.next_tag, self.next_tag + len(self.kinds)))
        self.next_tag += len(self.kinds)
        self.late = option("LATE")

    def alive(self):
        return (self.units.hp[0] > 0).tolist()

    def respawn(self):
        """The map's trigger: both sides are dead."""
        self.env._games.done.fill_(True)
        self.env._launch(self.env._begin)
        self.begin()

    def act(self, request):
        for action in request.actions:
            command = action.action_raw.unit_command
            for tag in command.unit_tags:
                i = self.tags.index(tag)
                if command.HasField("target_unit_tag"):
                    j = self.tags.index(command.target_unit_tag)
                    heals = self.env.sim.types[i] == "medivac"
                    assert command.ability_id == (386 if heals else 23), command
                    choice = 6 + (j if heals else j - self.n)
                elif command.HasField("target_world_space_pos"):
                    assert command.ability_id == 16, command
                    goal = command.target_world_space_pos
                    way = goal.x - self.units.x[0, i].item(), goal.y - self.units.y[0, i].item()
                    ways = {(0, 2): 2, (0, -2): 3, (2, 0): 4, (-2, 0): 5}
                    choice = ways[round(way[0]), round(way[1])]
                else:
                    assert command.ability_id == 4, command
                    choice = 1
                self.orders[i] = choice

    def kill(self, tags):
        for i, tag in enumerate(self.tags):
            if tag in tags:
                self.units.hp[0, i] = 0.0

    def step(self, count):
        self.loop += count
        self.late = max(0, self.late - count)
        if count == 8:  # the other steps only wait for units
            env, games = self.env, self.env._games
            actions = [
                self.orders.get(i, 1 if alive else 0) for i, alive in enumerate(self.alive()[: self.n])
            ]
            games.actions.copy_(self.torch.tensor([actions]))
            env._fight()
            env._launch(env._play)
            env._restart(self.torch.zeros_like(games.done))  # draws as Smac does, step by step
        if not any(self.alive()):
            self.respawn()
        self.orders = {}

    def observe(self, response):
        response.observation.game_loop = self.loop
        names = ("x", "y", "hp", "shield", "energy", "cooldown")
        fields = {name: getattr(self.units, name)[0].tolist() for name in names}
        shown = [i for i, alive in enumerate(self.alive()) if alive]
        if self.late:
            shown = shown[: len(shown) // 2]
        kinds = self.env.sim.kinds
        for i in reversed(shown) if option("REVERSED") else shown:
            unit = response.observation.raw_data.units.add()
            unit.tag, unit.unit_type = self.tags[i], self.kinds[i]
            unit.owner, unit.alliance = (OURS, 1) if i < self.n else (THEIRS, 4)
            unit.pos.x, unit.pos.y, unit.pos.z = fields["x"][i], fields["y"][i], 0.0
            unit.health, unit.health_max = fields["hp"][i], kinds["hp_max"][i]
            unit.shield, unit.shield_max = fields["shield"][i], kinds["shield_max"][i]
            unit.energy, unit.weapon_cooldown = fields["energy"][i], fields["cooldown"][i]
            if i == self.n:
                unit.health_max += option("LIFE")


def play():
    host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("-listen", "-port"))
    trouble = {name: option(name) for name in ("CRASH", "HANG", "END", "ERROR", "TIE")}
    if once := os.environ.get("FAKE_SC2_ONCE"):
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            trouble = dict.fromkeys(trouble, 0)
    websocket, status, steps = Websocket(host, int(port)), LAUNCHED, 0
    from s2clientprotocol import sc2api_pb2 as messages

    while data := websocket.receive():
        request, response = messages.Request.FromString(data), messages.Response()
        kind = request.WhichOneof("request")
        body = getattr(response, kind)
        body.SetInParent()
        if kind == "quit":
            break
        elif kind == "create_game":
            game, status = Game(request.create_game), INIT_GAME
            if log := os.environ.get("FAKE_SC2_LOG"):
                setup = request.create_game
                with open(log, "a") as file:
                    computer = setup.player_setup[1]
                    facts = os.getpid(), port, setup.random_seed, computer.difficulty, computer.race
                    print(*facts, file=file)
        elif kind == "join_game":
            body.player_id, status = 1, IN_GAME
        elif kind == "observation":
            game.observe(body)
        elif kind == "action":
            game.act(request.action)
            body.result.extend([1] * len(request.action.actions))
        elif kind == "step":
            steps += 1
            if steps == trouble["CRASH"]:
                os._exit(11)
            if steps == trouble["HANG"]:
                time.sleep(1e6)
            if steps == trouble["ERROR"]:
                response.error.append("out of order")
            if steps == trouble["END"]:
                status = ENDED
            if steps == trouble["TIE"]:
                game.kill(game.tags)
            game.step(request.step.count)
            time.sleep(option("SLEEP") / 1000)
        elif kind == "debug":
            for command in request.debug.debug:
                game.kill(set(command.kill_unit.tag))
        elif kind == "save_replay":
            body.data = f"replay of seed {os.getpid()}".encode()
        response.status = status
        websocket.send(response.SerializeToString())


def main():
    if sys.argv[1] == "install":
        install(Path(sys.argv[2]))
    elif sys.argv[1] == "hall":
        hall(sys.argv[2])
    elif option("LAUNCH"):
        sys.exit("no graphics here")
    elif path := os.environ.get("FAKE_SC2_HALL"):
        be_guest(path)
    else:
        play()


if __name__ == "__main__":
    main()
