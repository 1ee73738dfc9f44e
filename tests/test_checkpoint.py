"""Checkpoints: exact content back, whole or absent whenever a write is cut short, damage refused by name."""

import json
import os
import subprocess

import pytest
import safetensors.torch
import torch

from infopro_fast import whole_files
from infopro_fast.errors import CheckpointError
from infopro_fast.trainer import checkpoint
from infopro_fast.trainer.checkpoint import list_checkpoints, load, load_latest, name_of, save


def state_of(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "net": {
            "a.weight": torch.randn(3, 4, 2, 2, generator=g),
            "a.bias": torch.randn(3, generator=g, dtype=torch.float64),
        },
        "optimizers": [
            {
                "state": {0: {"momentum_buffer": torch.randn(3, generator=g)}, 1: {"momentum_buffer": None}},
                "lr": 0.1 + 0.2,
            }
        ],
        "half": torch.randn(5, generator=g).bfloat16(),
        "count": torch.tensor(7),
        "rng": torch.random.get_rng_state(),
        "flags": [True, None, "text", 2**60, 1e-310],
        "empty": {"tensor": torch.zeros(0, 3), "list": [], "dict": {}},
    }


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_round_trip_to_the_bit(tmp_path):
    path = save(tmp_path / "deep" / "folder", name_of(1, 2), state_of())
    assert path.name == "epoch0001-batch000002"
    assert_same(load(path), state_of())


def test_layouts_and_views(tmp_path):
    """Non-contiguous and shared tensors are stored by value; channels_last comes back as channels_last."""
    base = torch.arange(96.0).view(2, 3, 4, 4)
    state = {
        "last": base.contiguous(memory_format=torch.channels_last),
        "view": base[:, 1:2, ::2],
        "again": base,
        "same": base,
    }
    got = load(save(tmp_path, name_of(0, 0), state))
    assert_same(got, {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()})
    assert got["last"].stride() == state["last"].stride() and not got["last"].is_contiguous()
    assert got["again"].data_ptr() != got["same"].data_ptr()


def test_snapshot_is_of_the_moment(tmp_path):
    """The tensors may change right after the call."""
    weight = torch.ones(3)
    path = save(tmp_path, name_of(0, 0), {"w": weight})
    weight.zero_()
    assert load(path)["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), torch.nn.Linear(1, 1)])
def test_what_it_cannot_hold_leaves_nothing(tmp_path, value):
    with pytest.raises(ValueError, match="checkpoint: a.b: expected tensors and scalars"):
        save(tmp_path, name_of(0, 0), {"a": {"b": value}})
    assert list(tmp_path.iterdir()) == []


def test_two_tensors_of_one_name(tmp_path):
    with pytest.raises(ValueError, match="a.b: two tensors"):
        save(tmp_path, name_of(0, 0), {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})


def test_keeps_the_last_two(tmp_path):
    for position in ((0, 0), (0, 9), (0, 10), (2, 0), (10, 3)):
        save(tmp_path, name_of(*position), state_of(sum(position)))
    assert [p.name for p in list_checkpoints(tmp_path)] == [name_of(2, 0), name_of(10, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [name_of(2, 0), name_of(10, 3)]
    path, state = load_latest(tmp_path)
    assert path.name == name_of(10, 3)
    assert_same(state, state_of(13))


@pytest.mark.parametrize(
    "places", [((9999, 0), (10000, 0), (10001, 0)), ((3, 999_999), (3, 1_000_000), (3, 1_000_001))]
)
def test_numbers_of_any_length_are_in_order(tmp_path, places):
    """Where a number gets one more digit, the checkpoint just written is the last one, and stays."""
    for seed, place in enumerate(places):
        assert save(tmp_path, name_of(*place), state_of(seed)).is_dir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [name_of(*place) for place in places[1:]]
    assert_same(load_latest(tmp_path)[1], state_of(2))


def test_folders_of_other_names_are_left_alone(tmp_path):
    (tmp_path / "epoch0001-batch000000.copy").mkdir()
    for epoch in range(3):
        save(tmp_path, name_of(epoch, 0), state_of())
    assert [path.name for path in list_checkpoints(tmp_path)] == [name_of(1, 0), name_of(2, 0)]
    assert (tmp_path / "epoch0001-batch000000.copy").is_dir()


def test_checksums_are_those_of_coreutils(tmp_path):
    path = save(tmp_path, name_of(0, 0), state_of())
    subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True, capture_output=True
    )


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["a bit", "the end", "all"])
def test_damage_is_refused_by_name(tmp_path, file, damage):
    """Any bit: the checkpoint is refused, the one before it named but not used; asked for, it is used."""
    save(tmp_path, name_of(1, 0), state_of(1))
    path = save(tmp_path, name_of(2, 0), state_of(2))
    content = bytearray((path / file).read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
    elif damage == "the end":
        del content[-1:]
    if damage == "all":
        (path / file).unlink()
    else:
        (path / file).write_bytes(bytes(content))
    if file == "SHA256SUMS" and damage == "the end":  # only the last newline: the sums are all there
        assert_same(load_latest(tmp_path)[1], state_of(2))
        return
    hint = f"to continue from the one before it, {name_of(1, 0)}, add --resume-previous"
    with pytest.raises(CheckpointError, match=f"checkpoint .*{path.name} is damaged: .*; {hint}"):
        load_latest(tmp_path)
    with pytest.raises(CheckpointError):  # still refused: nothing was decided for the user
        load_latest(tmp_path)
    used, state = load_latest(tmp_path, previous=True)
    assert used.name == name_of(1, 0)
    assert_same(state, state_of(1))
    assert [p.name for p in list_checkpoints(tmp_path)] == [name_of(1, 0)] and (
        tmp_path / f"unused-{path.name}"
    ).is_dir()
    assert_same(load_latest(tmp_path)[1], state_of(1))


def test_swapped_files_are_refused(tmp_path):
    """Each file whole, but of two checkpoints."""
    one, two = save(tmp_path, name_of(1, 0), state_of(1)), save(tmp_path, name_of(2, 0), state_of(2))
    (two / "tensors.safetensors").write_bytes((one / "tensors.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="tensors.safetensors: SHA-256 expected"):
        load(two)


def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="expected a checkpoint, found 0"):
        load_latest(tmp_path)
    path = save(tmp_path, name_of(0, 0), state_of())
    with pytest.raises(CheckpointError, match="expected a checkpoint before the last one, found 1"):
        load_latest(tmp_path, previous=True)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError) as error:
        load_latest(tmp_path)
    assert "--resume-previous" not in str(error.value)  # there is none


class Killed(BaseException):
    pass


STEPS = [
    "mkdir",
    "tensors.safetensors",
    "state.json",
    "SHA256SUMS",
    "sync",
    "rename",
    "renamed",
    "retire",
    "retired",
]


@pytest.mark.parametrize("step", STEPS)
def test_cut_short_at_any_step(tmp_path, monkeypatch, step):
    """A write that stops at any step, without clean-up, leaves the last two whole checkpoints to load."""
    save(tmp_path, name_of(1, 0), state_of(1))
    save(tmp_path, name_of(2, 0), state_of(2))
    write, rename, sync, remove = (
        whole_files.write_file,
        os.rename,
        whole_files.sync_folder,
        whole_files.remove,
    )

    def cut(*args, **kwargs):
        raise Killed

    def write_half(path, content, *rest):
        if path.name == step:
            path.write_bytes(content[: len(content) // 2])
            raise Killed
        write(path, content, *rest)

    def rename_cut(source, target):
        if step == "rename" or (step == "retire" and target.name.startswith(".aside-")):
            raise Killed
        rename(source, target)
        if step == "renamed" or (step == "retired" and target.name.startswith(".aside-")):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(whole_files, "write_file", write_half)
        patch.setattr(checkpoint.os, "rename", rename_cut)
        patch.setattr(whole_files, "remove", lambda path: None)  # a killed process cleans nothing up
        if step == "mkdir":
            patch.setattr(checkpoint, "serialize", cut)
        if step == "sync":
            patch.setattr(whole_files, "sync_folder", cut)
        with pytest.raises(Killed):
            save(tmp_path, name_of(3, 0), state_of(3))
    assert (whole_files.sync_folder, whole_files.remove) == (sync, remove)

    arrived = step in ("renamed", "retire", "retired")
    path, state = load_latest(tmp_path)
    assert path.name == name_of(3 if arrived else 2, 0)
    assert_same(state, state_of(3 if arrived else 2))
    whole = list_checkpoints(tmp_path)
    assert len(whole) >= 2
    for each in whole:
        assert_same(load(each), state_of(int(each.name[5:9])))
    checkpoint.clean(tmp_path)
    save(tmp_path, name_of(3, 0), state_of(3))  # and the next one is written as if nothing had been
    assert [p.name for p in list_checkpoints(tmp_path)] == [name_of(2, 0), name_of(3, 0)]
    assert len(list(tmp_path.iterdir())) == 2


def test_failed_write_cleans_up(tmp_path, monkeypatch):
    """A full disk: the error is raised, nothing half-written stays, the last checkpoint is whole."""
    save(tmp_path, name_of(1, 0), state_of(1))

    def full(path, content, *rest):
        path.write_bytes(content[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, name_of(2, 0), state_of(2))
    assert [p.name for p in tmp_path.iterdir()] == [name_of(1, 0)]
    with pytest.raises(OSError, match="No space left"):
        whole_files.replace_file(tmp_path / "file", b"new content")
    assert not (tmp_path / "file").exists() and len(list(tmp_path.iterdir())) == 1


def test_replace_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    whole_files.replace_file(path, b"old")
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        whole_files.replace_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_hold_no_pickle(tmp_path):
    path = save(tmp_path, name_of(0, 0), state_of())
    assert sorted(p.name for p in path.iterdir()) == ["SHA256SUMS", "state.json", "tensors.safetensors"]
    json.loads((path / "state.json").read_text())
    assert set(safetensors.torch.load_file(path / "tensors.safetensors")) >= {
        "net.a.weight",
        "optimizers.0.state.0.momentum_buffer",
        "rng",
    }


def test_not_finite_names_the_tensor():
    state = {
        "net": {"w": torch.tensor([1.0, float("inf")]), "n": torch.tensor([1])},
        "opt": [{"m": torch.tensor(float("nan"))}],
    }
    assert list(checkpoint.not_finite(state)) == ["net.w", "opt.0.m"]
    assert list(checkpoint.not_finite(state_of())) == []
