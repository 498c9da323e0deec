"""``--device cuda`` on a machine without CUDA is refused: by the driver, else by torch."""

import pytest
import torch

from isentropic.experiments import devices
from isentropic.experiments.config import ConfigError
from isentropic.experiments.devices import check_device


class Driver:
    def __init__(self, num):
        self.num = num

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, pointer):
        pointer._obj.value = self.num
        return 0


def no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("driver", "torch_has_cuda", "says"),
    [
        (no_library, True, "this machine has no CUDA driver"),
        (lambda name: Driver(0), True, "the CUDA driver finds no device"),
        (lambda name: Driver(1), False, "torch finds no CUDA device"),
        (lambda name: Driver(1), True, None),
    ],
)
def test_cuda_is_refused_where_there_is_none(monkeypatch, driver, torch_has_cuda, says):
    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(devices.ctypes, "CDLL", driver)
    monkeypatch.setattr(devices.Path, "exists", lambda path: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_has_cuda)
    if says is None:
        check_device("cuda")
        return
    with pytest.raises(ConfigError, match=f"--device: got cuda, and {says}; use --device cpu or auto"):
        check_device("cuda")


def test_other_devices_need_nothing(monkeypatch):
    monkeypatch.setattr(devices.ctypes, "CDLL", no_library)
    check_device("cpu")
    check_device("auto")
