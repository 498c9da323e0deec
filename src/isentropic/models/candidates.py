"""The arguments of `isentropic eval`, resolved: run directories, models by name, directories, hub ids. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..runs.record import Record
from . import check_saved, resolve_model


class Candidate(NamedTuple):
    """A model to evaluate.

    Attributes:
        name: as the user wrote it.
        path: what `from_pretrained` takes, or `tiny`, which is built when it is loaded.
        dtype: of weights and arithmetic; `auto` is that of the file.
        config: settings of the run, or None for a model.
        step: of the checkpoint, or None.
    """

    name: str
    path: str
    dtype: str
    config: dict[str, Any] | None
    step: int | None

    def resolve(self) -> str:
        """What `from_pretrained` takes; the tiny model is built if it is not in the cache."""
        return resolve_model("tiny") if self.path == "tiny" else self.path


def candidates(names: Sequence[str], step: int | None, dtype: str | None) -> list[Candidate]:
    """The models that the names refer to.

    Args:
        names: run directories with a complete checkpoint, model directories, built-in models, hub ids.
        step: of runs: the checkpoint after this optimizer step; None is the last one.
        dtype: of weights and arithmetic; None is the run's, or that of the file.

    Raises:
        ValueError: a name that refers to nothing, or a run without the checkpoint.
    """
    if len(set(names)) < len(names):
        raise ValueError("eval: a model is named twice; leave one out")
    models = []
    for name in names:
        if (Path(name) / "run.json").is_file():
            models.append(_of_run(name, step, dtype))
            continue
        if Path(name).is_dir() and not any((Path(name) / f"{kind}config.json").exists() for kind in ("", "adapter_")):
            raise ValueError(f"{name} is not a run directory: it has no run.json; nor a model: it has no config.json")
        if not (Path(name) / "adapter_config.json").exists():
            check_saved(name)
        # The tiny model would be built here; everything else is only looked up.
        path = name if name == "tiny" or Path(name).is_dir() else resolve_model(name)
        models.append(Candidate(name, path, dtype or "auto", None, None))
    if step is not None and all(model.config is None for model in models):
        raise ValueError(f"--step: got {step}, and no run directory is named; leave it out")
    return models


def _of_run(name: str, step: int | None, dtype: str | None) -> Candidate:
    record = Record(name)
    config = record.header()["config"]
    checkpoints = dict(record.checkpoints())
    if not checkpoints:
        raise ValueError(f"{name} has no complete checkpoint; train with --save-every above 0")
    chosen = step if step is not None else max(checkpoints)
    if chosen not in checkpoints:
        raise ValueError(f"--step: got {chosen}, checkpoints are at {', '.join(map(str, sorted(checkpoints)))}")
    run_dtype = config.get("dtype", "float32")
    weights = "float32" if run_dtype == "mixed" else run_dtype
    return Candidate(name, str(checkpoints[chosen]), dtype or weights, config, chosen)
