"""What `isentropic eval` is given, and whether it is there: run directories, models by name. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from isentropic.models import check_saved, resolve_model
from isentropic.runs.record import Record


class Candidate(NamedTuple):
    """A model to evaluate.

    Attributes:
        name: as it was given.
        path: what `from_pretrained` takes.
        dtype: of weights and arithmetic; `auto` is that of the file.
        config: settings of the run, or None for a model.
        step: of the checkpoint, or None.
    """

    name: str
    path: str
    dtype: str
    config: dict[str, Any] | None
    step: int | None


def candidates(names: Sequence[str], step: int | None, dtype: str | None) -> list[Candidate]:
    """What the names mean: run directories with a complete checkpoint, directories, built-in models, hub ids.

    Raises:
        ValueError: a name that means nothing, or a run without the checkpoint.
    """
    if len(set(names)) < len(names):
        raise ValueError("eval: a model is named twice; leave one out")
    found = []
    for name in names:
        if (Path(name) / "run.json").is_file():
            found.append(_of_run(name, step, dtype))
            continue
        if Path(name).is_dir() and not any((Path(name) / f"{kind}config.json").exists() for kind in ("", "adapter_")):
            raise ValueError(f"{name} is not a run directory: it has no run.json; nor a model: it has no config.json")
        if not (Path(name) / "adapter_config.json").exists():
            check_saved(name)
        # The tiny model would be built here; everything else is only looked for.
        path = name if name == "tiny" or Path(name).is_dir() else resolve_model(name)
        found.append(Candidate(name, path, dtype or "auto", None, None))
    if step is not None and all(each.config is None for each in found):
        raise ValueError(f"--step: got {step}, and no run directory is named; leave it out")
    return found


def _of_run(name: str, step: int | None, dtype: str | None) -> Candidate:
    record = Record(name)
    config = record.header()["config"]
    checkpoints = dict(record.checkpoints())
    if not checkpoints:
        raise ValueError(f"{name} has no complete checkpoint; train with --save-every above 0")
    chosen = step if step is not None else max(checkpoints)
    if chosen not in checkpoints:
        raise ValueError(f"--step: got {chosen}, checkpoints are at {', '.join(map(str, sorted(checkpoints)))}")
    own = config.get("dtype", "float32")
    return Candidate(name, str(checkpoints[chosen]), dtype or ("float32" if own == "mixed" else own), config, chosen)
