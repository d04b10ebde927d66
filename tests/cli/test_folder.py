import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_spqr.cli.common import CommandError
from hf_spqr.cli.folder import check_output, check_space, complete_folder


def test_new_empty_and_old_folders_are_replaced(tmp_path: Path) -> None:
    for prepare in ("new", "empty", "old"):
        out = tmp_path / "a" / prepare
        if prepare != "new":
            out.mkdir()
        if prepare == "old":
            (out / "old").write_text("old")
        with complete_folder(out) as partial:
            assert partial.parent == out.parent
            (partial / "new").write_text("new")
        assert [path.name for path in out.iterdir()] == ["new"]
        assert out.stat().st_mode & 0o700 == 0o700
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["empty", "new", "old"]


@pytest.mark.parametrize(("mask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, mask: int, folder: int, file: int) -> None:
    """safetensors writes weights that only their owner may read."""
    before = os.umask(mask)
    try:
        with complete_folder(tmp_path / "out") as partial:
            (partial / "deep").mkdir(0o700)
            (partial / "deep" / "weights").touch(0o600)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "out", *sorted((tmp_path / "out").rglob("*")))]
    assert modes == [folder, folder, file]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(RuntimeError, match="broken"), complete_folder(out) as partial:
        (partial / "new").write_text("new")
        raise RuntimeError("broken")
    assert (out / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_room_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=1 << 20))
    out = tmp_path / "a" / "b"
    assert check_space(out, 1 << 19) is None
    assert "1.00 MiB left" in str(check_space(out, 1 << 20))
    with pytest.raises(CommandError, match=r"at least 1.00 MiB, and .* has 1.00 MiB left"):
        check_space(out, (1 << 20) + 1)
    out.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert check_space(tmp_path / "link" / "b" / "c", 0) is None
    assert asked == [tmp_path] * 3 + [out]


def test_what_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "new", overwrite=False)
    out = tmp_path / "out"
    out.mkdir()
    check_output(out, overwrite=False)
    (out / "letters.txt").write_text("dear")
    with pytest.raises(CommandError, match="not empty"):
        check_output(out, overwrite=False)
    with pytest.raises(CommandError, match="does not look like a model"):
        check_output(out, overwrite=True)
    (out / "config.json").write_text("{}")
    check_output(out, overwrite=True)
    with pytest.raises(CommandError, match="choose another output"):
        check_output(out, overwrite=True, inputs=(str(out),))
    with pytest.raises(CommandError, match="choose another output"):
        check_output(tmp_path, overwrite=True, inputs=(str(out),))
    check_output(out, overwrite=True, inputs=("hub/name",))
    with pytest.raises(CommandError, match="choose another output"):  # a file that is read lies in it
        check_output(out, overwrite=True, inputs=(tmp_path / "model", out / "letters.txt"))
    with pytest.raises(CommandError, match="is no folder that may be written"):
        check_output(out / "letters.txt" / "new", overwrite=False)
    with monkeypatch.context() as mounted, pytest.raises(CommandError, match="is a mount point"):
        mounted.setattr(Path, "is_mount", lambda path: path == out)
        check_output(out, overwrite=True)
    (tmp_path / "link").symlink_to(out)
    for path in (out / "config.json", tmp_path / "link"):
        with pytest.raises(CommandError, match="not a folder"):
            check_output(path, overwrite=True)
