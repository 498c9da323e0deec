"""Environments by name: what is said, what is refused, and that held-out games are others than those trained on."""

import json
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from task_cases import corridor

from isentropic.tasks import load_task
from isentropic.tasks.environments import EnvironmentTask, demonstrate
from isentropic.tasks.environments.textworld import Games, content_hash, tidy
from isentropic.tasks.sequence import SEQUENCES
from isentropic.tasks.spec import options

NAME = "textworld:coin_collector:level=102:train=1:test=1:text=brief:turns=5:commands=4"


def test_a_demonstration_is_the_text_that_the_policy_will_read():
    texts, total = demonstrate(corridor(), {"prompt": "Walk. ", "size": 2})
    assert "".join(text for text, _ in texts) == "Walk. 2 steps\n>east\n1 left\n>east\n"
    assert [text for text, is_action in texts if is_action] == ["east\n", "east\n"]
    assert total == 1.0


def test_noise_takes_turns_and_the_same_seed_gives_the_same_noise():
    row = {"prompt": "Walk. ", "size": 3}
    always, total = demonstrate(corridor(), row, noise=1.0)
    assert [t for t, is_action in always if is_action] == ["stay\n"] * 4
    assert total == 0.0
    some = [demonstrate(corridor(max_turns=9), row, noise=0.5, seed=i) for i in range(20)]
    assert some == [demonstrate(corridor(max_turns=9), row, noise=0.5, seed=i) for i in range(20)]
    assert len({len(texts) for texts, _ in some}) > 1


def test_an_environment_without_advice_is_not_imitated():
    class Silent:
        def reset(self, **row):
            return ""

        def step(self, action):
            return "", 0.0, True

    task = EnvironmentTask(
        name="silent",
        description="",
        make=Silent,
        train=lambda seed: [],
        heldout=list,
        max_turns=1,
        max_action_tokens=1,
        max_completion_length=1,
    )
    with pytest.raises(ValueError, match="method advice"):
        demonstrate(task, {"prompt": ""})


def test_limits_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match="max_turns must be at least 1, got 0"):
        corridor(max_turns=0)
    with pytest.raises(ValueError, match="64 > 16"):
        corridor(max_action_tokens=64, max_completion_length=16)


def test_the_reward_is_what_the_player_handed_over():
    task = corridor()
    assert task.reward(["x", "y"], prompts=["p", "p"], episode_return=[0.25, 1.0], size=[2, 2]) == [0.25, 1.0]
    with pytest.raises(ValueError, match="give the trainer a rollout_func"):
        task.reward(["x"], prompts=["p"], size=[2])


def test_options_are_read_by_the_type_of_their_default():
    known = {"level": 1, "hard": False, "text": "full", "action_tokens": 4}
    assert options("t", "action_tokens=9:hard=false:text=8000", known) == {**known, "action_tokens": 9, "text": "8000"}
    wrong = (
        ("lvl=3", "mean level"),
        ("level=x", "an integer"),
        ("hard=maybe", "true or false"),
        ("level", "OPTION=VALUE"),
    )
    for text, message in wrong:
        with pytest.raises(ValueError, match=message):
            options("t", text, known)


def test_a_name_is_checked_without_torch_and_without_the_games():
    code = (
        "import sys; from isentropic.tasks import load_task, environments\n"
        "try: load_task('textworld:chess')\n"
        "except ValueError as error: print(error)\n"
        "assert not {'torch', 'textworld', 'textarena'} & set(sys.modules)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "game must be one of coin_collector" in made.stdout


def test_a_missing_extra_is_told_in_one_line(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'isentropic\[textworld\]'"):
        load_task("textworld:simple")
    with pytest.raises(ValueError, match=r"pip install 'isentropic\[textarena\]'"):
        load_task("textarena:FrozenLake-v0")


# TextWorld.


@pytest.fixture(scope="module")
def textworld(tmp_path_factory):
    pytest.importorskip("textworld", reason="the extra textworld is not installed")
    patch = pytest.MonkeyPatch()
    patch.setenv("ISENTROPIC_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield load_task(NAME)
    patch.undo()


def test_textworld_plays_a_game_that_its_advice_wins(textworld):
    (row,) = textworld.heldout()
    assert row["seed"] >= 1_000_000
    parts, total = demonstrate(textworld, row)
    text = "".join(part for part, _ in parts)
    assert total == 1.0
    assert text.endswith(">take coin\n")
    # Level 102 is a chain of two rooms with two dead ends: one move, then the coin.
    assert next(t for t, is_action in parts if is_action).startswith("go ")
    assert len([1 for _, is_action in parts if is_action]) == 2
    player = textworld.make()
    first = player.reset(**row)
    assert first.splitlines()[-1] == "Commands: " + ", ".join(player.choices()[:4]) + (
        f" and {len(player.choices()) - 4} more" if len(player.choices()) > 4 else ""
    )
    assert player.reset(**row) == first


def test_a_command_that_is_no_move_never_reaches_the_game(textworld):
    (row,) = textworld.heldout()
    player = textworld.make()
    first = player.reset(**row)
    for action in ("quit", "restart", "save", "", "go nowhere", "\x00\ud800", "look " * 500):
        said, reward, done = player.step(action)
        assert said.startswith("You can't do that.\nCommands: ")
        assert (reward, done) == (0.0, False)
    step = player.advice()
    assert player.step(f"  {step.upper()} ")[0] != said
    assert player.reset(**row) == first


def test_textworld_games_that_are_held_out_are_others(textworld):
    train, test = textworld.train(0), textworld.heldout()
    assert [row["seed"] for row in train] == [0]
    assert textworld.train(7) == train
    store = Games("coin_collector", {"level": 102})
    found = [store._game(row["seed"])["hash"] for row in (*train, *test)]
    assert len(set(found)) == 2
    # A training seed whose game is held out is passed over.
    twin = store._game(0)
    store._known = {0: twin, 1: {**twin, "seed": 1}, 2: {**twin, "hash": "", "seed": 2}, 1_000_000: {**twin, "seed": 5}}
    assert [row["seed"] for row in store.rows("test", 1, 1)] == [5]
    assert [row["seed"] for row in store.rows("train", 1, 1)] == [2]


def test_in_treasure_hunter_a_wrong_thing_taken_loses(textworld):
    task = load_task("textworld:treasure_hunter:level=1:train=1:test=1:text=brief:turns=9")
    (row,) = task.heldout()
    player, draw = task.make(), random.Random(0)
    parts, total = demonstrate(task, row, player)
    right = [text.strip() for text, is_action in parts if is_action][-1]
    assert (total, right[:5]) == (1.0, "take ")
    player.reset(**row)
    done = False
    for _ in range(300):
        wrong = [c for c in player.choices() if c.startswith("take ") and c != right]
        _, reward, done = player.step((wrong or draw.sample([c for c in player.choices() if c[:3] == "go "], 1))[0])
        if done:
            break
    assert (wrong != [], reward, done) == (True, 0.0, True)


def test_the_games_of_a_sequence_ask_by_texts_and_have_different_names(textworld):
    tasks = [load_task(name) for name in SEQUENCES["textworld-two-games"].tasks]
    assert all(isinstance(task, EnvironmentTask) for task in tasks)
    assert len({task.name.split(":text")[0] for task in tasks}) == len(tasks) == 2


def test_a_game_s_hash_forgets_names_and_sees_the_map(textworld):
    class Made:
        def __init__(self, facts):
            self.world = type("World", (), {"facts": facts})()

    one = Made(["north_of(r_1, r_0)", "in(o_0, r_1)"])
    assert content_hash(one, ["go north"]) == content_hash(Made(one.world.facts[::-1]), ["go north"])
    assert content_hash(one, ["go north"]) != content_hash(Made(["south_of(r_1, r_0)", "in(o_0, r_1)"]), ["go north"])
    assert content_hash(one, ["go north"]) != content_hash(one, ["go south"])


def test_tidy_keeps_the_game_s_words_alone():
    assert tidy("\n\n-= Bar =-\n  A  bar.\n\n\n>      -= Bar =-0/1") == "-= Bar =-\nA bar."
    assert tidy(None) == ""


# textarena.


def test_textarena_keeps_to_its_seed_and_leaves_randomness_alone():
    pytest.importorskip("textarena", reason="textarena is not installed")
    task = load_task("textarena:GuessTheNumber-v0:train=2:test=1:turns=12")
    assert [row["seed"] for row in (*task.train(0), *task.heldout())] == [0, 1, 1_000_000]
    before = random.getstate()
    one, two = task.make(), task.make()
    first = one.reset(seed=3)
    assert "between 1 and 20" in first
    two.reset(seed=4)
    said, reward, done = one.step("[20]")
    assert "lower" in said
    assert "[20]" not in said
    assert (reward, done) == (0.0, False)
    again = task.make()
    again.reset(seed=3)
    answers = [again.step(f"[{i}]") for i in range(1, 6)]
    two.step("[1]")
    assert answers == [one.step(f"[{i}]") for i in range(1, 6)]
    assert random.getstate() == before


@pytest.mark.parametrize(("game", "reason"), [("Nim-v0", "not for one player"), ("Nothing-v0", "cannot be made")])
def test_textarena_games_that_cannot_be_played_alone_are_refused_by_the_rows(game, reason):
    pytest.importorskip("textarena", reason="textarena is not installed")
    with pytest.raises(ValueError, match=reason):
        load_task(f"textarena:{game}").train(0)


# AppWorld, against a stub.


class Stub(BaseHTTPRequestHandler):
    """AppWorld's server as far as an environment calls it: a task is completed by `done`, and right where x was 2."""

    state: dict = {}  # noqa: RUF012
    calls: list = []  # noqa: RUF012

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.calls.append((self.path, given))
        if self.path != "/initialize" and given["task_id"] != self.state.get("task_id"):
            self.send_error(500, "another world is open")
            return
        output = getattr(self, self.path[1:])(given)
        body = json.dumps({"output": output}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def initialize(self, given):
        self.state.update(task_id=given["task_id"], done=False, right=False)
        person = {"first_name": "Ann", "last_name": "Lee", "email": "ann@example.org", "phone_number": "1"}
        return {"task_id": given["task_id"], "instruction": "Set x to 2.", "supervisor": person, "datetime": "now"}

    def execute(self, given):
        code = given["code"]
        self.state["right"] |= code == "x = 2"
        self.state["done"] |= code == "done"
        return "y" * 30 if code == "long" else "Execution successful."

    def task_completed(self, given):
        return self.state["done"]

    def evaluate(self, given):
        return {"success": self.state["right"], "difficulty": 1, "num_tests": 1, "passes": [], "failures": []}

    def close(self, given):
        self.state.clear()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Stub.calls.clear()
    Stub.state.clear()
    made = HTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made.server_port
    made.shutdown()
    made.server_close()


def test_appworld_is_spoken_to_over_its_server(server, tmp_path):
    (tmp_path / "train.txt").write_text("a_1\na_2\n")
    (tmp_path / "test.txt").write_text("b_1\n")
    task = load_task(f"appworld:train={tmp_path}/train.txt:test={tmp_path}/test.txt:ports={server}:shown=10")
    assert [row["task_id"] for row in task.train(0)] == ["a_1", "a_2"]
    assert task.parallel == 1
    world = task.make()
    assert world.reset(**task.train(0)[0]) == "Ann Lee <ann@example.org> asks: Set x to 2."
    assert world.step("long") == ("yyyyyyyyyy ... (20 more characters)", 0.0, False)
    assert world.step("x = 2")[1:] == (0.0, False)
    assert world.step("done") == ("Execution  ... (11 more characters)", 1.0, True)
    world.reset(**task.train(0)[1])
    assert world.step("done")[1:] == (0.0, True)
    assert [path for path, _ in Stub.calls].count("/close") == 1
    assert Stub.calls[0] == ("/initialize", {"task_id": "a_1", "experiment_name": "isentropic"})
    world._task = "another"
    with pytest.raises(RuntimeError, match="refused execute: 500"):
        world.step("x")


def test_appworld_s_servers_are_shared_out_over_processes(tmp_path, monkeypatch):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name}_1\n")
    files = f"appworld:train={tmp_path}/train.txt:test={tmp_path}/test.txt"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    task = load_task(f"{files}:ports=8000-8003")
    assert [task.make().url for _ in range(task.parallel)] == ["http://127.0.0.1:8001", "http://127.0.0.1:8003"]
    with pytest.raises(ValueError, match="got 1 for 2 processes"):
        load_task(files)


def test_appworld_without_a_server_or_with_ids_in_both_files_is_refused(tmp_path):
    for name, ids in (("train", "a_1\nb_1\n"), ("test", "b_1\n")):
        (tmp_path / f"{name}.txt").write_text(ids)
    with pytest.raises(ValueError, match="1 ids are in train and test, such as b_1"):
        load_task(f"appworld:train={tmp_path}/train.txt:test={tmp_path}/test.txt")
    with pytest.raises(ValueError, match="must name a file"):
        load_task("appworld:train=nowhere.txt")
    (tmp_path / "test.txt").write_text("c_1\n")
    with pytest.raises(ValueError, match="a range such as"):
        load_task(f"appworld:train={tmp_path}/train.txt:test={tmp_path}/test.txt:ports=9-8")
    task = load_task(f"appworld:train={tmp_path}/train.txt:test={tmp_path}/test.txt:ports=1")
    with pytest.raises(RuntimeError, match="start `appworld serve environment`"):
        task.make().reset(task_id="a_1")
