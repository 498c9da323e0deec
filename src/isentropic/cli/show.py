"""`isentropic explain`, `isentropic report` and `isentropic watch`: views of a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..experiments.config import ConfigError, config_errors
from ..runs.record import Record
from ..runs.text import as_json, show
from .failures import check_file
from .parser import add_command


def add_to(commands: Any) -> None:
    """Add the commands."""
    parser = add_command(commands, "explain", explain, "what moved the entropy of a run")
    parser.add_argument("run", metavar="RUN", help="run directory; the run need not have ended")
    parser.add_argument("--steps", metavar="A:B", help="optimizer steps, both ends included [all]")
    parser.add_argument("--json", action="store_true", help="the figures for a program")
    parser = add_command(commands, "report", report, "one page that shows runs, for any browser")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or directories of them")
    parser.add_argument("-o", "--out", help="the HTML file [RUN/report.html; report.html for several]")
    parser = add_command(commands, "watch", watch, "follow a run while it trains; q quits")
    parser.add_argument("run", metavar="RUN", help="run directory; the run need not have started")
    parser.add_argument("--once", action="store_true", help="print one picture and stop")
    parser.add_argument("--serve", action="store_true", help="serve the report on this machine, and refresh it")
    parser.add_argument("--port", type=int, help="of --serve [a free one]")


def explain(args: dict[str, Any]) -> int:
    """Print what moved the entropy of a run."""
    from ..runs.explain import explain, render

    with config_errors():
        explanation = explain(Record(args["run"]), args["steps"])
    if args["json"]:
        print(as_json(explanation))
    else:
        show(render(explanation))
    return 0


def report(args: dict[str, Any]) -> int:
    """Write the page of runs, and print its path."""
    from ..report import write

    runs = args["runs"]
    out = Path(args["out"] or (Path(runs[0]) / "report.html" if len(runs) == 1 else "report.html"))
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a directory; name a file in it, such as {out / 'report.html'}")
    if args["out"]:
        check_file("--out", out)
    try:
        show(str(write(runs, out)))
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    return 0


def watch(args: dict[str, Any]) -> int:
    """Show a run until the user quits."""
    from ..report.watch import serve, watch

    port = args["port"]
    if args["once"] and args["serve"]:
        raise ConfigError("--once prints in the terminal and --serve does not end; leave one out")
    if port is not None and not args["serve"]:
        raise ConfigError("--port belongs to --serve; add --serve, or leave --port out")
    if port is not None and not 0 <= port <= 65535:
        raise ConfigError(f"--port: got {port}, must be from 0 to 65535; 0 takes a free one")
    try:
        if args["serve"]:
            serve(args["run"], port or 0)
        else:
            watch(args["run"], args["once"])
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    except KeyboardInterrupt:
        pass
    return 0
