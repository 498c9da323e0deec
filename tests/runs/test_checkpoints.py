"""Checkpoints: what makes one whole, which one is taken, which ones are deleted."""

import json
import time

import pytest

from isentropic.runs import checkpoints
from isentropic.runs.checkpoints import MANIFEST, Choice, choose, clear_unfinished, damage, digest, rotate, seal
from isentropic.runs.record import Record


def save(run, step, sealed=True, complete=True):
    """A checkpoint with a file of each kind."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    import zipfile

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data.pkl", bytes(500))
    for name in ("config.json", "trainer_state.json", *(["isentropic.json"] if complete else [])):
        (folder / name).write_text(json.dumps({"step": step}))
    if sealed:
        seal(folder)
    return folder


@pytest.mark.parametrize("sealed", [True, False])
def test_every_file_that_is_cut_is_found(tmp_path, sealed):
    names = sorted(path.name for path in save(tmp_path / "whole", 8, sealed).iterdir())
    assert damage(tmp_path / "whole" / "checkpoint-8") is None
    for name in names:
        for keep in (0.0, 0.5):
            folder = save(tmp_path / f"{name}{keep}", 8, sealed)
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: int(keep * len(content))])
            assert name in damage(folder), (name, keep)


def test_other_bytes_and_a_missing_file_are_found_by_the_manifest(tmp_path):
    folder = save(tmp_path, 8)
    content = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(content[:60] + b"\x01" + content[61:])
    assert damage(folder) == "optimizer.pt is not what was written"
    assert damage(folder, digests=False) is None
    (folder / "optimizer.pt").unlink()
    assert damage(folder) == "optimizer.pt is missing"
    (folder / MANIFEST).write_text('{"files": {"a": 3}}')
    assert damage(folder) == f"{MANIFEST} cannot be read"


def test_the_last_whole_one_is_chosen_and_the_newer_ones_are_named(tmp_path):
    assert choose(Record(tmp_path)) == Choice(None, [])
    for step in (8, 16, 100):
        save(tmp_path, step)
    save(tmp_path, 120, complete=False)
    run = Record(tmp_path)
    assert choose(run) == Choice(tmp_path / "checkpoint-100", [])
    (tmp_path / "checkpoint-100" / "config.json").write_text("")
    assert choose(run) == Choice(tmp_path / "checkpoint-16", ["checkpoint-100: config.json has 0 of 13 bytes"])
    clear_unfinished(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-16", "checkpoint-8"]


def test_rotation_keeps_the_last_whole_ones(tmp_path):
    run = Record(tmp_path)
    for step in (8, 16, 24):
        save(tmp_path, step)
    save(tmp_path, 12, complete=False)
    (tmp_path / "checkpoint-24" / "model.safetensors").write_bytes(b"")
    rotate(run, 1)
    assert [step for step, _ in run.checkpoints()] == [16, 24]
    assert not (tmp_path / "checkpoint-12").exists()
    rotate(run, 2)
    assert [step for step, _ in run.checkpoints()] == [16, 24]
    save(tmp_path, 32)
    rotate(run, 1)
    assert [step for step, _ in run.checkpoints()] == [32]


def test_the_best_one_is_spared(tmp_path):
    run = Record(tmp_path)
    for step in (8, 16, 24, 32):
        save(tmp_path, step)
    rotate(run, 1, spare=16)
    assert [step for step, _ in run.checkpoints()] == [16, 32]


def test_no_whole_one_is_deleted_while_too_few_are_whole(tmp_path):
    folder = save(tmp_path, 8)
    (folder / "config.json").write_text("")
    save(tmp_path, 4, complete=False)
    rotate(Record(tmp_path), 1)
    assert folder.exists()


def test_a_large_file_is_read_in_part_at_both_ends_and_between(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_BLOCK", 16)
    monkeypatch.setattr(checkpoints, "_BLOCKS", 4)
    path = tmp_path / "a"
    content = bytes(1000)
    path.write_bytes(content)
    whole = digest(path)
    for at, seen in ((0, True), (999, True), (330, True), (100, False)):
        path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
        assert (digest(path) != whole) is seen
    path.write_bytes(bytes(1000)[:500] + bytes(500))
    assert digest(path) == whole


def test_a_digest_costs_little(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**32)  # a hole: no bytes on the disk
    began = time.monotonic()
    digest(path)
    assert time.monotonic() - began < 2


def test_the_files_of_other_processes_are_left_out(tmp_path, monkeypatch):
    folder = save(tmp_path, 8, sealed=False)
    (folder / "rng_state_1.pth").write_bytes(b"half")
    monkeypatch.setenv("WORLD_SIZE", "2")
    seal(folder)
    assert "rng_state_1.pth" not in json.loads((folder / MANIFEST).read_text())["files"]
    assert damage(folder) == "rng_state_1.pth was cut short"
