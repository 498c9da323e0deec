"""AppWorld through its own HTTP server: apps that are used by code, one line of Python a turn.

AppWorld pins pydantic below 2, so it needs a Python environment of its own and is called over HTTP, with only the
standard library on this side. A server has one world at a time: as many episodes are played at once as there are
servers, each on a port of its own. The calls are those of appworld 0.1.3: ``/initialize``, ``/execute``,
``/task_completed``, ``/evaluate``, ``/close``. The reward is 1 if its evaluation succeeds after the task was reported
as completed.

AppWorld downloads its data itself. This has not been run against a real server yet; tests run it against a stub.
"""

import json
import os
import urllib.error
import urllib.request
from itertools import count
from typing import Any

from ..spec import options, path_of
from . import EnvironmentTask

OURS: dict[str, Any] = {
    "train": "",
    "test": "",
    "ports": "8000",
    "host": "127.0.0.1",
    "turns": 30,
    "tokens": 8192,
    "action_tokens": 200,
    "shown": 2000,
}
PROMPT = (
    "Write one line of Python a turn. apis.APP.API(...) calls an app; print what you want to see. "
    "apis.supervisor.complete_task() ends the task.\n"
)


def load(rest: str, name: str) -> EnvironmentTask:
    """The task that ``appworld:REST`` names: files with an id a line, and the ports of the servers.

    Raises:
        ValueError: an unknown option, a file that does not exist, or ids that are in both files.
    """
    values = options(name, rest, OURS)
    train, test = (_ids(name, values, key) for key in ("train", "test"))
    both = sorted(set(train) & set(test))
    if both:
        raise ValueError(f"task {name!r}: {len(both)} ids are in train and test, such as {both[0]}; take them apart")
    ports = _share_of_ports(name, _ports(name, values["ports"]))
    number = count()
    return EnvironmentTask(
        name=name,
        description="Do what a person asks of their apps.",
        make=lambda: AppWorld(f"http://{values['host']}:{ports[next(number) % len(ports)]}", values["shown"]),
        train=lambda seed: [{"prompt": PROMPT, "task_id": i} for i in train],
        heldout=lambda: [{"prompt": PROMPT, "task_id": i} for i in test],
        max_turns=values["turns"],
        max_action_tokens=values["action_tokens"],
        max_completion_length=values["tokens"],
        parallel=len(ports),
    )


def _ids(name: str, values: dict[str, Any], key: str) -> list[str]:
    path = path_of(name, values[key])
    if not values[key] or not path.is_file():
        raise ValueError(f"task {name!r}: {key} must name a file with one task id per line, got {values[key]!r}")
    return list(dict.fromkeys(path.read_text(encoding="utf-8").split()))


def _ports(name: str, text: str) -> list[int]:
    """``8000``, or ``8000-8007``."""
    first, _, last = text.partition("-")
    try:
        ports = list(range(int(first), int(last or first) + 1))
    except ValueError:
        ports = []
    if not ports:
        raise ValueError(f"task {name!r}: ports must be a port or a range such as 8000-8007, got {text!r}")
    return ports


def _share_of_ports(name: str, ports: list[int]) -> list[int]:
    """This process's share of the servers; a server has one world, so two processes must not use the same one."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if len(ports) < ranks:
        raise ValueError(f"task {name!r}: ports: got {len(ports)} for {ranks} processes, must be one each; start more")
    return ports[rank::ranks]


class AppWorld:
    """One AppWorld server, as an environment; ``reset`` takes a ``task_id``.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        shown: characters of an output that the policy reads; a longer one is cut.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, url: str, shown: int = 2000, timeout: float = 120.0):
        self.url, self.shown, self.timeout = url.rstrip("/"), shown, timeout
        self._task: str | None = None

    def _call(self, method: str, **arguments: Any) -> Any:
        body = json.dumps({"task_id": self._task, **arguments}).encode()
        request = urllib.request.Request(f"{self.url}/{method}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read())["output"]
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")[:300]
            raise RuntimeError(f"AppWorld at {self.url} refused {method}: {error.code} {text}") from None
        except (urllib.error.URLError, TimeoutError) as error:
            raise RuntimeError(
                f"AppWorld at {self.url} does not answer {method}: {error}; start `appworld serve environment`"
            ) from None

    def reset(self, task_id: str, **row: Any) -> str:
        """Open the world of a task, and close the one before."""
        self.close()
        self._task = task_id
        world = self._call("initialize", experiment_name="isentropic")
        person = world["supervisor"]
        return f"{person['first_name']} {person['last_name']} <{person['email']}> asks: {world['instruction']}"

    def step(self, action: str) -> tuple[str, float, bool]:
        """Run a line of code; the episode is over once the task is reported as completed."""
        output = str(self._call("execute", code=action)).strip()
        done = bool(self._call("task_completed"))
        reward = float(bool(self._call("evaluate", suppress_errors=True)["success"])) if done else 0.0
        more = f" ... ({len(output) - self.shown} more characters)" if len(output) > self.shown else ""
        return output[: self.shown] + more, reward, done

    def close(self) -> None:
        """Close the world, if one is open."""
        if self._task is not None:
            self._call("close")
            self._task = None
