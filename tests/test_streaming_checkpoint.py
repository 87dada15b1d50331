"""Files are what safetensors itself would write; a checkpoint is there whole or not at all."""

import errno
import json
import os
import shutil
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.files.writing import file_bytes, write_safetensors
from offload_trainer.master import checkpoint as checkpoints
from offload_trainer.master.checkpoint import (
    CheckpointStore,
    _crc,
    find_checkpoint,
    open_checkpoint,
    whole_folder,
    write_json,
)

DTYPES = [
    torch.complex64,
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """NaN and negative zero included."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@st.composite
def tensor_maps(draw: st.DrawFn) -> dict[str, Tensor]:
    made = {}
    for name in draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), unique=True, max_size=5)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))  # no axis at all and empty tensors among them
        bits = torch.randint(0, 2, (*shape, 8), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        made[name] = (bits.sum(-1) - 4).to(draw(st.sampled_from(DTYPES)))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@settings(deadline=None)
@given(tensors=tensor_maps(), metadata=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
def test_a_file_reads_back_as_the_librarys_own(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]):
    ours, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"
    size, crc = write_safetensors(ours, tensors, metadata)
    assert crc == zlib.crc32(ours.read_bytes())
    save_file(tensors, theirs, metadata or None)  # with {} and no tensor the library writes what it cannot read
    assert size == ours.stat().st_size
    mine, expected = load_file(ours), load_file(theirs)
    assert mine.keys() == expected.keys() == tensors.keys()
    assert all(equal_bits(mine[name], expected[name]) for name in tensors)
    with safe_open(ours, framework="pt") as a, safe_open(theirs, framework="pt") as b:
        assert (a.metadata() or {}) == (b.metadata() or {}) == metadata
    assert file_bytes(tensors) == write_safetensors(ours, tensors)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    raw = torch.arange(256, dtype=torch.uint8)
    values = raw % 2 if dtype == torch.bool else raw  # every other byte is no bool
    tensors = {
        "odd": torch.ones(3, dtype=torch.bool),
        "values": values.view(dtype),
        "none": torch.empty(0, dtype=dtype),
    }
    write_safetensors(tmp_path / "file", tensors)
    loaded = load_file(tmp_path / "file")
    assert all(equal_bits(loaded[name], tensor) for name, tensor in tensors.items())


def test_views_and_parameters_are_written_as_they_look(tmp_path: Path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"turned": base.t(), "strided": base[:, ::2], "trained": torch.nn.Parameter(base[1])}
    write_safetensors(tmp_path / "file", tensors)
    assert all(equal_bits(load_file(tmp_path / "file")[name], tensor.detach()) for name, tensor in tensors.items())


# Checkpoints


def parts(value: float) -> dict[str, dict[str, Tensor]]:
    return {
        "weights": {"w": torch.full((4, 3), value), "n": torch.tensor(7)},
        "random": {"cpu": torch.arange(9, dtype=torch.uint8)},
    }


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Two good checkpoints."""
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(10, parts(1.0), {"note": "first"})
    store.save(20, parts(2.0), {"note": "second"})
    return store


def content(store: CheckpointStore) -> dict[str, bytes]:
    return {
        str(path.relative_to(store.folder)): path.read_bytes() for path in store.folder.rglob("*") if path.is_file()
    }


def test_what_is_saved_is_read(store: CheckpointStore):
    newest = store.newest()
    assert newest is not None and newest.meta["step"] == 20 and newest.meta["note"] == "second"
    targets = {"w": torch.zeros(4, 3), "n": torch.tensor(0)}
    newest.read_into("weights", targets)
    assert all(equal_bits(targets[name], tensor) for name, tensor in parts(2.0)["weights"].items())
    assert equal_bits(newest.read("random")["cpu"], parts(0)["random"]["cpu"])
    assert store.has(10) and not store.has(30)


def test_the_oldest_go_and_saving_again_replaces(store: CheckpointStore):
    store.save(30, parts(3.0), {})
    store.save(30, parts(4.0), {})
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000020", "step-00000030"]
    newest = store.newest()
    assert newest is not None and bool((newest.read("weights")["w"] == 4).all())


def test_what_a_killed_write_leaves_is_not_a_checkpoint_and_is_removed(store: CheckpointStore):
    shutil.copytree(store.folder / "step-00000020", store.folder / ".writing-step-00000030")
    newest = store.newest()
    assert newest is not None and newest.meta["step"] == 20
    store.save(40, parts(4.0), {})
    assert not list(store.folder.glob(".writing-*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


OF_ANOTHER_FORMAT = {"format": 99, "files": {}}


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("weights.safetensors", truncate, "weights.safetensors is damaged: [0-9]+ bytes of [0-9]+"),
        ("weights.safetensors", Path.unlink, "weights.safetensors is damaged: 0 bytes of"),
        ("checkpoint.json", truncate, "checkpoint.json is damaged"),
        ("checkpoint.json", Path.unlink, "holds no checkpoint"),
        ("checkpoint.json", lambda path: path.write_text("[]"), "is damaged"),
        (
            "checkpoint.json",
            lambda path: write_json(path, {"crc32": _crc(OF_ANOTHER_FORMAT), "content": OF_ANOTHER_FORMAT}),
            "format 99, this version reads",
        ),
    ],
)
def test_the_damaged_are_refused_and_passed_over(store: CheckpointStore, file: str, damage, message: str):
    damage(store.folder / "step-00000020" / file)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(store.folder / "step-00000020")
    assert "\n" not in str(caught.value)
    newest = store.newest()
    assert newest is not None and newest.meta["step"] == 10
    assert find_checkpoint(store.folder.parent).path == newest.path
    damage(store.folder / "step-00000010" / file)
    assert store.newest() is None
    for path in (store.folder, store.folder.parent):
        with pytest.raises(
            UserError, match=f"step-00000020.*{message}.*no older one in .*checkpoints is whole"
        ) as caught:
            find_checkpoint(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["checkpoint.json", "weights.safetensors", "random.safetensors"])
def test_not_one_bit_may_flip(store: CheckpointStore, file: str):
    path = store.folder / "step-00000020" / file
    raw = path.read_bytes()
    for place in range(0, len(raw), max(1, len(raw) // 40)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        try:
            open_checkpoint(path.parent)
        except UserError as error:
            assert "damaged" in str(error) and "\n" not in str(error)
        else:  # white space between JSON's words says nothing
            assert file == "checkpoint.json" and raw[place : place + 1].isspace()
    path.write_bytes(raw)
    assert open_checkpoint(path.parent).meta["step"] == 20


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"w": torch.zeros(4, 3)}, "n is .* there, absent here"),
        ({"w": torch.zeros(4, 3), "n": torch.tensor(0), "m": torch.zeros(2)}, r"m is absent there, \(2,\) here"),
        ({"w": torch.zeros(3, 4), "n": torch.tensor(0)}, r"w is \(4, 3\) there, \(3, 4\) here"),
    ],
)
def test_a_checkpoint_of_another_model_is_a_line_and_changes_nothing(
    store: CheckpointStore, targets: dict, message: str
):
    newest = store.newest()
    assert newest is not None
    with pytest.raises(UserError, match=f"is of another model: {message}"):
        newest.read_into("weights", targets)
    assert not any(bool(tensor.any()) for tensor in targets.values())
    with pytest.raises(UserError, match=r"has no moments.safetensors"):
        newest.check("moments", {})


def test_a_full_disk_is_found_before_writing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch):
    before = content(store)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    with pytest.raises(UserError, match=r"no room for a checkpoint in .*: it needs .* B, 100 B are free"):
        store.save(30, parts(3.0), {})
    assert content(store) == before


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, RuntimeError("anything"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_what_was_there(store: CheckpointStore, monkeypatch, error: BaseException):
    before = content(store)

    def breaks(path: Path, tensors: dict[str, Tensor]) -> tuple[int, int]:
        path.write_bytes(b"half of it")
        if path.name == "random.safetensors":
            raise error
        return 10, 0

    monkeypatch.setattr(checkpoints, "write_safetensors", breaks)
    expected = UserError if error is FULL else type(error)
    with pytest.raises(expected, match="No space left on device" if error is FULL else None):
        store.save(30, parts(3.0), {})
    assert content(store) == before
    newest = store.newest()
    assert newest is not None and newest.meta["step"] == 20


def export(path: Path, text: str) -> None:
    with whole_folder(path) as folder:
        (folder / "file").write_text(text)


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path):
    disk, link = tmp_path / "disk", tmp_path / "export"
    (disk / "here").mkdir(parents=True)
    link.symlink_to(disk / "here")
    for text in ("first", "second"):
        export(link, text)
        assert link.is_symlink() and (disk / "here" / "file").read_text() == text
    with pytest.raises(RuntimeError), whole_folder(link):
        raise RuntimeError
    assert (link / "file").read_text() == "second"
    assert [path.name for path in disk.iterdir()] == ["here"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "export"]


@pytest.mark.parametrize("leads", ["somewhere", "nowhere"])
def test_links_that_were_left_over_are_in_nobodys_way(tmp_path: Path, leads: str):
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "mine").touch()
    export(tmp_path / "export", "first")
    for name in (".old-export", ".writing-export"):
        (tmp_path / name).symlink_to(tmp_path / leads)
    export(tmp_path / "export", "second")
    assert (tmp_path / "export" / "file").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "somewhere"]
    assert (tmp_path / "somewhere" / "mine").exists()


def test_no_checkpoint_at_all(tmp_path: Path):
    assert CheckpointStore(tmp_path / "nowhere").newest() is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_new_run_moves_what_a_longer_one_left_aside(store: CheckpointStore):
    """Else the first checkpoint of the new run would be the oldest, and dropped."""
    before = content(store)
    assert store.begin(20) is None
    aside = store.begin(10)
    assert aside is not None and [path.name for path in aside.iterdir()] == ["step-00000020"]
    assert store.begin(0) != aside
    assert store.is_empty()
    store.save(5, parts(1.0), {})
    newest = store.newest()
    assert newest is not None and newest.meta["step"] == 5
    assert before


def test_checkpoints_behind_a_link_are_moved_aside_where_they_are(store: CheckpointStore, monkeypatch):
    disk, replace = store.folder.parent / "disk", os.replace
    disk.mkdir()
    replace(store.folder, disk / "here")
    store.folder.symlink_to(disk / "here")

    def on_one_disk(source: Path, target: Path) -> None:
        if Path(source).resolve().parents[1] != Path(target).resolve().parents[1]:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", on_one_disk)
    assert store.begin(10) == disk / "here-earlier-1"
    (disk / "here-earlier-2").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot move .*step-00000010 aside, to .*here-earlier-2: File exists"):
        store.begin(0)


@pytest.mark.parametrize("broken", [1, 2], ids=["before the old one moves", "between the two renames"])
def test_saving_a_step_again_never_leaves_neither(store: CheckpointStore, monkeypatch, broken: int):
    replace, calls = os.replace, []

    def breaks(source: Path, target: Path) -> None:
        calls.append(source)
        if len([call for call in calls if Path(call).suffix != ".tmp"]) == broken:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", breaks)
    with pytest.raises(KeyboardInterrupt):
        store.save(20, parts(9.0), {})
    monkeypatch.undo()
    newest = store.newest()
    assert newest is not None and newest.meta["step"] == 20


def test_a_folder_renamed_to_another_step_is_damaged(store: CheckpointStore):
    store.folder.joinpath("step-00000020").rename(store.folder / "step-00000023")
    newest = store.newest()
    assert newest is not None and newest.meta["step"] == 10
    with pytest.raises(UserError, match=r"step-00000023/checkpoint.json is damaged \(it is of step 20\)"):
        find_checkpoint(store.folder / "step-00000023")
