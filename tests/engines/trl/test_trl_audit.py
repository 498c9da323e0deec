"""The audit of a TRL trainer finds each planted fault and nothing else. Also a script for torchrun: FSDP2 on gloo."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from trl_case import OTHER_HEAD, make, parts, same, save_model, weights

from isentropic.cli import main
from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.engines.trl.audit import StartAudit, audit_trainer


def trainer(out, kind=IsentropicTrainer, **settings):
    return make(kind, IsentropicConfig, out, **{"recipe": "loop", **settings})


def audited(out, **settings):
    return audit_trainer(trainer(out, **settings))


def codes(report):
    return {finding.code for finding in report.findings}


@pytest.mark.parametrize("recipe", ["loop", "dapo", "gspo", "rloo", "isentropic"])
def test_a_clean_set_up_is_silent(tmp_path, recipe):
    on_policy = {"steps_per_generation": 1} if recipe == "rloo" else {}
    report = audited(tmp_path, recipe=recipe, **on_policy)
    assert report.findings == []
    assert report.figures["logp_error"] < 1e-5
    assert report.figures["sampler_error"] < 1e-5
    assert ("ratio_error" in report.figures) == (recipe != "rloo")


def test_lora_another_temperature_and_native_settings_are_silent(tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    assert audited(tmp_path, peft_config=lora, temperature=0.7).findings == []
    assert audited(tmp_path, recipe=None, loss_type="cispo", epsilon_high=5.0).findings == []


class ZeroEntropy(IsentropicTrainer):
    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logp, entropy, aux = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return logp, torch.zeros_like(entropy) if entropy is not None else None, aux


class Stale(IsentropicTrainer):
    """Old log-probs of weights that are no longer the trainer's."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["old_per_token_logps"] = output["old_per_token_logps"] * 1.05
        return output


class DropsFirst(IsentropicTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["tool_mask"] = None
        output["completion_mask"][:, 0] = 0
        return {name: value for name, value in output.items() if value is not None}


class CountsPadding(IsentropicTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["completion_mask"] = torch.ones_like(output["completion_mask"])
        return output


class Bf16LogProbs(IsentropicTrainer):
    """Rounded and stored as fp32 again, so that no dtype tells."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return tuple(x if x is None else x.bfloat16().float() for x in out)


def bf16_head():
    model, _ = parts()
    head = model.lm_head
    head.to(torch.bfloat16)
    head.forward = lambda hidden: torch.nn.functional.linear(hidden, head.weight.float())
    return model


def with_dropout():
    model, _ = parts()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return model


# What is planted, and every code it may and must show.
FAULTS = {
    "bf16 head": ({"model": bf16_head}, {"head_dtype"}),
    "bf16 logits": ({"bf16": True}, {"logits_dtype", "sampler_mismatch"}),
    "bf16 model": ({"model": lambda: parts()[0].bfloat16()}, {"head_dtype", "logits_dtype", "sampler_mismatch"}),
    "bf16 log-probs": ({"kind": Bf16LogProbs}, {"logp_dtype", "entropy_dtype", "sampler_mismatch"}),
    "top-p": ({"top_p": 0.9}, {"truncation"}),
    "top-k": ({"top_k": 5}, {"truncation"}),
    "min-p": ({"min_p": 0.1}, {"truncation"}),
    "temperature": ({"generation_kwargs": {"temperature": 0.7}}, {"temperature"}),
    "top-p and temperature": ({"generation_kwargs": {"temperature": 0.7}, "top_p": 0.9}, {"truncation", "temperature"}),
    "penalty": ({"repetition_penalty": 1.3}, {"sampler_mismatch"}),
    "zeros as entropy": ({"kind": ZeroEntropy}, {"entropy_zero"}),
    "stale log-probs": ({"kind": Stale}, {"stale_logp"}),
    "dropout": ({"model": with_dropout}, {"dropout", "sampler_mismatch"}),
    "wrong mask": ({"kind": DropsFirst}, {"wrong_mask", "sampler_mismatch", "stale_logp"}),
    "padding": ({"kind": CountsPadding}, {"padding_counted"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(tmp_path, name):
    settings, expected = FAULTS[name]
    settings = {key: value() if key == "model" else value for key, value in settings.items()}
    report = audited(tmp_path, **settings)
    # TRL's head scores in the sampler's own precision.
    assert codes(report) == expected - ({"sampler_mismatch"} if OTHER_HEAD and name == "bf16 model" else set())
    for finding in report.findings:
        assert finding.nats > 1e-5
        assert all((finding.what, finding.where, finding.effect, finding.remedy))
        if finding.clipped_frac is not None:
            # The measured effect decides, and not the dtype.
            assert (finding.severity == "serious") == (finding.clipped_frac >= 1e-3 or finding.nats >= 0.05)
    assert any(f.severity in ("serious", "warning") for f in report.findings)


class FullFirst(IsentropicTrainer):
    """A mask that counts padding, and a first batch whose completions are all as long as the shortest."""

    calls = 0

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.calls += 1
        lengths = output["completion_mask"].sum(1)
        if self.calls > 1:
            return {**output, "completion_mask": torch.ones_like(output["completion_mask"])}
        return {
            name: x[:, : lengths.min()] if torch.is_tensor(x) and x.shape == output["completion_mask"].shape else x
            for name, x in output.items()
        }


def test_a_mask_that_counts_padding_does_not_hide_behind_a_full_first_batch(tmp_path):
    made = trainer(tmp_path, kind=FullFirst)
    first = audit_trainer(made, batches=1)
    assert "padding_counted" not in codes(first)
    assert first.checked["padding"] == "none in these batches"
    made.calls = 0
    report = audit_trainer(made)
    assert "padding_counted" in {f.code for f in report.serious}
    assert re.fullmatch(r"\d+% of positions", report.checked["padding"])
    assert report.checked["tokens"].endswith("in 3 batches")


def test_padding_is_made_if_no_batch_holds_any(tmp_path):
    model, _ = parts()
    made = trainer(tmp_path, kind=CountsPadding, model=model)
    ends, kwargs = list(made.eos_token_ids), dict(made.generation_kwargs)
    made.model.generation_config.suppress_tokens = made.generation_config.suppress_tokens = ends
    report = audit_trainer(made)
    assert "padding_counted" in {f.code for f in report.serious}
    assert report.checked["tokens"].endswith("in 4 batches")
    assert (made.eos_token_ids, made.generation_kwargs) == (ends, kwargs)
    assert made.generation_config.eos_token_id in (ends, ends[0])


def test_a_sampling_temperature_is_noted_where_a_target_is_set(tmp_path):
    (note,) = audited(tmp_path / "target", recipe="isentropic", target="80%", temperature=0.7).findings
    assert (note.severity, note.code) == ("note", "sampling_temperature")
    assert "80%" in note.what
    assert "0.7" in note.what
    assert audited(tmp_path / "none", temperature=0.7).findings == []


def test_experts_are_found_with_the_remedy_of_trl(tmp_path):
    made = trainer(tmp_path)
    made.model.config.num_experts = 4
    (finding,) = audit_trainer(made).findings
    assert (finding.severity, finding.code) == ("warning", "moe_routing")
    assert "TRL has no router replay" in finding.remedy


def test_an_audit_leaves_no_trace(tmp_path):
    plain = trainer(tmp_path / "a", steps=4)
    plain.train()
    watched = trainer(tmp_path / "b", steps=4)
    before = set(vars(watched))
    audit_trainer(watched)
    assert set(vars(watched)) == before
    assert "generate" not in vars(watched.model)
    watched.add_callback(StartAudit(watched))
    watched.train()
    assert same(weights(plain), weights(watched))
    drop = {"seconds"}
    rows = [
        [{k: v for k, v in row.items() if k not in drop} for row in t.record.rows("metrics")] for t in (plain, watched)
    ]
    assert rows[0] == rows[1]


def test_a_run_warns_as_it_starts_and_keeps_the_report(tmp_path, caplog):
    made = trainer(tmp_path, steps=1, top_p=0.9)
    made.add_callback(StartAudit(made))
    with caplog.at_level(logging.WARNING, "isentropic"):
        made.train()
    assert "truncated sampling" in caplog.text
    kept = json.loads((tmp_path / "audit.json").read_text())
    assert kept["serious"] == 1
    assert kept["findings"][0]["code"] == "truncation"
    assert kept["checked"]["logits"] == "float32"


def test_the_command_line(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    assert main(["audit", "--model", model]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no findings"
    # A bf16 model whose rounding pushes no token out of the clip is a warning; it does push sequences out of GSPO's.
    assert main(["audit", "--model", model, "--dtype", "bfloat16"]) == 0
    assert "0.00% of tokens" in capsys.readouterr().out
    assert main(["audit", "--model", model, "--dtype", "bfloat16", "--recipe", "gspo", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["serious"] == len([f for f in report["findings"] if f["severity"] == "serious"]) > 0
    assert {f["code"] for f in report["findings"]} >= {"head_dtype", "logits_dtype"}
    flags = ["train", "--model", model, "--steps", "4", "--eval-k", "0", "--prompts", "4", "--generations", "8"]
    assert main([*flags, "--out", str(tmp_path / "on")]) == 0
    assert json.loads((tmp_path / "on" / "audit.json").read_text())["findings"] == []
    assert main([*flags, "--out", str(tmp_path / "off"), "--audit", "off"]) == 0
    assert not (tmp_path / "off" / "audit.json").exists()
    with pytest.raises(SystemExit) as stop:
        main(["audit", "--steps", "0"])
    assert stop.value.code == 2


def test_fsdp2_output_dtype_is_found_and_its_cure_is_seen(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "helpers")}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    output = [f for f in found["accelerate"]["findings"] if f["code"] == "fsdp_output_dtype"]
    assert output[0]["severity"] in ("serious", "warning")
    assert output[0]["nats"] > 1e-3
    assert found["accelerate"]["checked"]["fsdp_output"] == "bfloat16"
    assert found["accelerate"]["checked"]["logp"] == "bfloat16"
    # The cure ends the rounding of what is returned; bf16 parameters still give bf16 logits and a bf16 sampler.
    assert found["cure"]["checked"]["logp"] == "float32"
    sampler = set() if OTHER_HEAD else {"sampler_mismatch"}
    assert {f["code"] for f in found["cure"]["findings"]} == {"logits_dtype", *sampler}
    assert {f["code"] for f in found["only output"]["findings"]} == {"fsdp_output_dtype", "sampler_mismatch"}
    assert found["fp32"]["findings"] == []


def _policies():
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    return {
        "accelerate": plugin.mixed_precision_policy,
        "cure": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None),
        "only output": MixedPrecisionPolicy(output_dtype=torch.bfloat16),
        "fp32": MixedPrecisionPolicy(),
    }


def _rank(out):
    """Two ranks: a trainer whose model FSDP2 has wrapped, under each policy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name, policy in _policies().items():
        made = trainer(out / name, per_device_train_batch_size=8)
        assert made.accelerator.num_processes == 2, "this case needs two processes"
        mesh = init_device_mesh("cpu", (2,))
        for part in (*made.model.model.layers, made.model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        found[name] = audit_trainer(made).as_dict()
    if made.accelerator.is_main_process:
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _rank(Path(sys.argv[1]))
