"""Whether this machine has the device that was asked for: found before a model loads, and before torch is imported."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from .config import ConfigError


def check_device(device: str) -> None:
    """Refuse ``cuda`` on a machine without CUDA, where training would be on the CPU.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: no driver, no device, or a torch that was built without CUDA.
    """
    if device != "cuda":
        return
    if problem := _no_driver() or _torch_without_cuda():
        raise ConfigError(f"--device: got cuda, and {problem}; use --device cpu or auto, or a machine with a GPU")


def _no_driver() -> str | None:
    """Why there can be no device, by NVIDIA's driver; AMD's, which torch calls cuda too, is left to torch."""
    if sys.platform != "linux" or Path("/dev/kfd").exists():
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no CUDA driver"
    num = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(num)) or not num.value:
        return "the CUDA driver finds no device"
    return None


def _torch_without_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"
