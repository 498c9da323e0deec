"""verl on the CPU, for tests: a platform by its plugin interface, and gloo as the process group."""

import contextlib
import os
import types
from importlib.util import find_spec

import torch
import transformers.modeling_flash_attention_utils as packing
import verl.utils.attention_utils
import verl.utils.distributed
from verl.plugin.platform import PlatformBase, PlatformRegistry


class Device(types.ModuleType):
    """torch.cpu, and the memory queries that verl makes."""

    def __getattr__(self, name):
        if name == "mem_get_info":
            return lambda *args, **kwargs: (0, 0)
        if name.startswith(("max_memory", "memory_")):
            return lambda *args, **kwargs: 0
        if name in ("reset_peak_memory_stats", "empty_cache", "ipc_collect"):
            return lambda *args, **kwargs: None
        if name == "get_device_name":
            return lambda *args: "CPU"
        if name in ("get_rng_state", "set_rng_state"):
            return getattr(torch, name)
        return getattr(torch.cpu, name)


def nothing(self, *args, **kwargs):
    return None


@PlatformRegistry.register(platform="cpu")
class CPU(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = Device("cpu_device")
    set_device = synchronize = set_allocator_settings = empty_cache = nothing
    profiler_start = profiler_stop = cudart = nothing

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, message):
        yield

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False


def process_group(timeout_second=None, backend=None):
    """verl asks for "cpu:gloo,cpu:gloo", which torch refuses."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo",
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )


verl.utils.distributed.initialize_global_process_group_ray = process_group
if find_spec("flash_attn") is None and not hasattr(verl.utils.attention_utils, "_fallback_unpad_input"):
    # verl 0.9.0 unpads by flash-attn alone, which only has wheels for CUDA.
    functions = (packing._index_first_axis, packing._pad_input, None, packing._unpad_input)
    verl.utils.attention_utils._get_attention_functions = lambda: functions
