"""A file that appears at once: old content or new, and nothing beside it."""

import os
from pathlib import Path

import pytest

from megatron.trainer.io import atomic_write
from megatron.trainer.io.atomic_write import AtomicFile, write_bytes, write_durably, write_text


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_target_has_its_old_content_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with atomic_write.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", ["old", None])
def test_failure_changes_nothing(tmp_path: Path, error: BaseException, old: str | None) -> None:
    path = tmp_path / "x.json"
    if old is not None:
        path.write_text(old)
    with pytest.raises(type(error)), atomic_write.atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert names(tmp_path) == ([] if old is None else ["x.json"])
    assert old is None or path.read_text() == old


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    pending = AtomicFile(tmp_path / "x")
    os.dup2(os.open("/dev/full", os.O_WRONLY), pending.file.fileno())
    pending.file.write(b"x")
    with pytest.raises(OSError, match="No space left"):
        pending.commit()
    pending.discard()
    assert names(tmp_path) == []


def test_content_is_on_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "x", "a", durable=True)
    temporary = atomic_write.temporary_path(tmp_path / "x").name
    assert calls == [f"sync {temporary}", "rename", f"sync {tmp_path.name}"]
    calls.clear()
    write_text(tmp_path / "x", "b")
    assert calls == ["rename"]


@pytest.mark.parametrize("content", ["\u00e9\n", b"\xc3\xa9\n"])
def test_durable_write_is_on_disk_under_its_own_name(
    tmp_path: Path, content: str | bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    write_durably(tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == b"\xc3\xa9\n"
    assert synced == [3]


def test_permissions_of_the_replaced_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    path.chmod(0o640)
    write_bytes(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o640


def test_new_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "x", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("where", ["target", "temporary"])
def test_link_is_replaced_and_not_written_through(tmp_path: Path, where: str) -> None:
    path, victim = tmp_path / "x", tmp_path / "victim"
    victim.write_text("mine")
    link = path if where == "target" else atomic_write.temporary_path(path)
    link.symlink_to(victim)
    write_text(path, "new")
    assert victim.read_text() == "mine"
    assert path.read_text() == "new"
    assert not path.is_symlink()
    assert names(tmp_path) == ["victim", "x"]


def test_text_is_utf8_without_translated_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "é\r\n\ud800", errors="replace")
    assert (tmp_path / "x").read_bytes() == b"\xc3\xa9\r\n?"
