"""Loading: a model that cannot be used is one line, and a tiny one takes one thread."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from trl_case import parts

from isentropic.models import loading


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch):
    import huggingface_hub

    def unreachable(self, name, timeout):
        raise OSError(f"no route to {name}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(ValueError, match="no route to nobody/nothing"):
        loading.load_model("nobody/nothing")


def test_weights_without_their_head_are_refused(tmp_path):
    from transformers import Qwen3Model

    model, _ = parts()
    model.config.architectures = None
    Qwen3Model(model.config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    with pytest.raises(ValueError, match=r"was saved without lm_head.weight, which would be random"):
        loading.load_weights(str(tmp_path))


def test_a_directory_that_holds_no_model_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"model: .* cannot be loaded: .*; name a saved model's directory") as error:
        loading.load_model(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("variable", "wanted"), [(None, (2, 1)), ("2", (2, 2))])
def test_a_tiny_model_takes_one_thread_unless_told(monkeypatch, variable, wanted):
    before = torch.get_num_threads()
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(2)
        for parameters, num in zip((2 * loading.SMALL_MODEL, 2), wanted, strict=True):
            loading.suit_threads(SimpleNamespace(num_parameters=lambda n=parameters: n))
            assert torch.get_num_threads() == num
    finally:
        torch.set_num_threads(before)
