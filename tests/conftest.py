"""Offline, one thread, and every array signature of the core checked at run time."""

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)

# Before any import of isentropic: the hook rewrites a module as it is loaded.
MODULES = """types losses entropy.statistics entropy.prediction entropy.audit.casts entropy.audit.checks runs.statistics
    engines.tabular""".split()
install_import_hook([f"isentropic.{module}" for module in MODULES], "beartype.beartype")
