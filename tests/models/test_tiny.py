"""The embedded tiny model: built once a setting, found again, replaced on demand, and loadable like any other."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from isentropic.models import MODELS, resolve_model
from isentropic.models import tiny as module
from isentropic.tasks.expressions import (
    DIGITS,
    HELD_OUT,
    OPERATORS,
    enumerate_expressions,
    evaluate,
    expr,
    expr_digit,
)

pytest.importorskip("transformers")

MINUTE = module.TinySettings(hidden=16, layers=1, heads=2, steps=3, batch=8)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISENTROPIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(home):
    from safetensors.torch import load_file

    return load_file(home / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_builds_and_loads_like_any_other_model(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = module.tiny_model(MINUTE, progress=False)
    assert home.parent == cache
    assert [path.name for path in cache.iterdir()] == [home.name]
    model = AutoModelForCausalLM.from_pretrained(home)
    assert model.config.model_type == "qwen3"
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(home)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    inputs = tokenizer(["07 5>", "73 5>"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=True).shape == (2, 13)
    facts = json.loads((home / "warm_start.json").read_text())
    assert facts["settings"]["hidden"] == 16
    assert set(facts["heldout"]) == {"pass@1", "pass@16", "entropy", "distinct"}


def test_the_tokenizer_round_trips_and_pads_left(cache):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(module.tiny_model(MINUTE, progress=False))
    for text in ["73 5>9*8-3+4", "  two  spaces ", "it 's n't , . !", "a\n\nb", module.ALPHABET]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("é→")["input_ids"]) == ["<unk>", "<unk>"]
    batch = tokenizer(["7>", "73 5>"], padding=True)
    assert batch["attention_mask"] == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["input_ids"][0][:3] == [tokenizer.pad_token_id] * 3
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["7>", "73 5>"]


def test_the_same_settings_are_built_once(cache):
    home = module.tiny_model(MINUTE, progress=False)
    written = (home / "model.safetensors").stat().st_mtime_ns
    assert module.tiny_model(MINUTE, progress=False) == home
    assert (home / "model.safetensors").stat().st_mtime_ns == written


def test_rebuild_replaces_and_gives_the_same_weights(cache):
    home = module.tiny_model(MINUTE, progress=False)
    before = weights(home)
    (home / "stray").touch()
    assert module.tiny_model(MINUTE, rebuild=True, progress=False) == home
    assert not (home / "stray").exists()
    assert same(before, weights(home))
    assert [path.name for path in cache.iterdir()] == [home.name]


def test_every_setting_names_another_directory(cache):
    other = {
        "hidden": 32,
        "heads": 4,
        "noise": 0.5,
        "hint": 0.25,
        "hard": 0.75,
        "noise_from": 0.5,
        "lr": 1e-3,
        "matrix_lr": 1e-3,
    }
    homes = {module._fingerprint(MINUTE)}
    for name, value in vars(MINUTE).items():
        homes.add(module._fingerprint(replace(MINUTE, **{name: other.get(name, value + 1)})))
    assert len(homes) == 1 + len(vars(MINUTE))


def test_another_seed_gives_other_weights(cache):
    first = module.tiny_model(MINUTE, progress=False)
    second = module.tiny_model(replace(MINUTE, seed=1), progress=False)
    assert first != second
    assert not same(weights(first), weights(second))


def test_nothing_global_changes(cache):
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    module.tiny_model(MINUTE, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_failed_build_leaves_nothing(cache, monkeypatch):
    def fail():
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "character_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        module.tiny_model(MINUTE, progress=False)
    assert list(cache.iterdir()) == []


def test_a_lost_race_uses_the_winner(cache, monkeypatch):
    winner = module.tiny_model(MINUTE, progress=False)
    (winner / "stray").touch()
    answers = iter([False, True])
    monkeypatch.setattr(module, "_is_model", lambda home: next(answers))
    assert module.tiny_model(MINUTE, progress=False) == winner
    assert (winner / "stray").exists()
    assert [path.name for path in cache.iterdir()] == [winner.name]


def test_progress_goes_to_stderr_and_only_if_wanted(cache, capsys, monkeypatch):
    module.tiny_model(MINUTE, progress=False)
    assert capsys.readouterr() == ("", "")
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    home = module.tiny_model(MINUTE, rebuild=True)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "building the tiny model: 2/3 steps, eta 0:06"
    assert lines[-1].startswith("tiny model: pass@1 0.0")
    assert lines[-1].endswith(str(home))


def test_the_cache_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("ISENTROPIC_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(module.cache_root()) == "/a"
    monkeypatch.delenv("ISENTROPIC_CACHE")
    assert str(module.cache_root()) == "/b/isentropic"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert str(module.cache_root()) == "/c/.cache/isentropic"


def demonstrations(**changes):
    settings = replace(MINUTE, steps=20, batch=200, **changes)
    batches, odds = module._demonstrations(settings)
    symbols = ["", "", "", *module.ALPHABET]
    assert (batches[..., -1] == module.EOS).all()
    texts = ["".join(symbols[i] for i in ids) for ids in batches.flatten(0, 1).tolist()]
    return [(int(text[:2]), text[3], text[5:]) for text in texts], odds.flatten(0, 1)


def test_demonstrations_are_right_balanced_and_leave_out_the_held_out_targets():
    rows, odds = demonstrations(noise=0.0, hint=0.0)
    assert odds.shape == (4000, expr.max_completion_length, len(module.ANSWER_TOKENS))
    assert all(evaluate(text) == target for target, _, text in rows)
    targets = [target for target, _, _ in rows]
    assert set(targets) == set(range(100)) - set(HELD_OUT)
    assert max(map(targets.count, range(100))) < 100  # 50 expected of each


def test_noise_and_hint_have_the_shares_asked_for():
    rows, _ = demonstrations(noise=0.4, noise_from=0.5, hint=0.0)
    wrong = [evaluate(text) != target for target, _, text in rows]
    assert not any(wrong[:2000])
    assert sum(wrong[2000:]) / 2000 == pytest.approx(0.4 * 79 / 80, abs=0.03)
    assert not {target for target, _, _ in rows} & set(HELD_OUT)
    rows, _ = demonstrations(noise=0.0, hint=1.0)
    assert all(digit in text for _, digit, text in rows)


def test_hard_expressions_have_their_weight():
    rows, _ = demonstrations(noise=0.0, hard=0.0)
    assert not any(text[-2] == "*" or text.count("*") > 1 for _, _, text in rows)


@pytest.mark.parametrize("place", range(7))
def test_odds_are_those_of_all_expressions_weighed_one_by_one(place):
    """P(next | beginning, shown target, digit), by the definition: a sum over every expression that begins so."""
    noise, hint, hard = 0.3, 0.5, 0.2
    values, codes = enumerate_expressions(4)
    pairs = [(int(v), bytes(c).decode()) for v, c in zip(values, codes, strict=True) if int(v) not in HELD_OUT]
    weights = [hard if text[-2] == "*" or text.count("*") > 1 else 1.0 for _, text in pairs]
    total = [0.0] * 100
    for (value, _), weight in zip(pairs, weights, strict=True):
        total[value] += weight
    rows, odds = demonstrations(noise=noise, noise_from=0.0, hint=hint, hard=hard)
    symbols = DIGITS + OPERATORS
    for k in range(3):
        shown, digit, answer = rows[k]
        expected = torch.zeros(len(symbols) + 1, dtype=torch.float64)
        for (value, text), weight in zip(pairs, weights, strict=True):
            if text[:place] == answer[:place]:
                seen = (1 - noise) * (value == shown) + noise / 80
                likelihood = hint * text.count(digit) / 4 + (1 - hint) / 9
                expected[symbols.index(text[place])] += seen * likelihood * weight / total[value]
        torch.testing.assert_close(odds[k, place].double(), expected / expected.sum(), atol=1e-6, rtol=1e-5)
    assert torch.equal(odds[:, 7], torch.eye(13)[-1].expand(4000, 13))


def test_muon_moves_a_matrix_by_a_nearly_orthogonal_step():
    torch.manual_seed(0)
    for shape in [(8, 8), (8, 24), (24, 8)]:
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        module.Muon([p], weight_decay=0.0).step(lr=1.0)
        singular = torch.linalg.svdvals(p.detach()) / max(1.0, shape[0] / shape[1]) ** 0.5
        assert p.grad is None
        assert singular.min() > 0.6
        assert singular.max() < 1.3


def test_training_lowers_the_loss(cache):
    settings = replace(MINUTE, hidden=32, steps=60, batch=64)
    trained = module._new_model(settings)
    batches, _ = module._demonstrations(replace(settings, seed=1))

    def loss():
        logits = trained(input_ids=batches[0][:, :-1], logits_to_keep=8).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batches[0][:, -8:].flatten()).item()

    assert loss() == pytest.approx(torch.log(torch.tensor(99.0)).item(), abs=0.5)
    module._warm_start(trained, settings, lambda: None)
    assert loss() < 2.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be > 0, got 0; the default is"),
        ({"noise": 1.5}, r"noise must be a share in \[0, 1\], got 1.5"),
        ({"hidden": 50}, "hidden must be a multiple of 2 x heads = 4, got 50; 52 is the next one"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(MINUTE, **changes)


def test_names_resolve(cache, tmp_path, monkeypatch):
    assert resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    monkeypatch.setitem(MODELS, "tiny", "tiny_of_mine:build")
    (tmp_path / "tiny_of_mine.py").write_text("def build(*, rebuild):\n    return f'/models/{rebuild}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_model("tiny") == "/models/False"
    assert resolve_model("tiny", rebuild=True) == "/models/True"


def test_local_directories_resolve_if_they_hold_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert resolve_model("good") == "good"
    assert resolve_model("~/good") == str(tmp_path / "good")
    for name, got in [("empty", "a directory without it"), ("./nowhere", "nothing"), ("good/config.json", "a file")]:
        with pytest.raises(ValueError, match=f"must be a directory with a config.json, got {got}; point at one"):
            resolve_model(name)


def test_importing_models_needs_no_torch():
    code = "import sys, isentropic.models; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_the_default_model_is_where_reinforcement_learning_can_start(cache):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(module.tiny_model(progress=False))
    figures, related = module.evaluate(model, expr), module.evaluate(model, expr_digit)
    assert 0.2 < figures["pass@1"] < 0.5
    assert figures["entropy"] > 0.9
    assert figures["pass@16"] > 0.95
    assert 0.1 < related["pass@1"] < figures["pass@1"]
