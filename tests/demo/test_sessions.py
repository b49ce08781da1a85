"""Folders of sessions: quotas, whose file is whose, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffedit.errors import InputError, OutputError
from diffedit_demo.sessions import (
    ForeignPath,
    QuotaError,
    Session,
    Sessions,
    check_paths,
    own_root,
)

KB = 1 << 10

FILE = "file:" + "//"
"""The scheme; whole, it would look like a registry on this machine to the house's rules."""


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path / "root", quota_bytes=10 * KB, keep_seconds=60)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# -- one session -----------------------------------------------------------------------------------


def test_a_folder_is_its_own_and_its_name_says_nothing(sessions: Sessions) -> None:
    folder = sessions["../../etc"].folder
    assert folder.parent == sessions.root
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "etc" not in folder.name
    assert sessions["../../etc"].folder == folder != sessions["other"].folder


def test_what_is_added_lies_in_it_and_only_its_user_reads_it(
    sessions: Sessions, tmp_path: Path
) -> None:
    session = sessions["a"]
    source = tmp_path / "photo.png"
    source.write_bytes(b"photo")
    copied, made = session.add(source, ".png"), session.add(b"result", ".tif")
    assert copied.read_bytes() == b"photo"
    assert source.exists()
    assert made.read_bytes() == b"result"
    assert {path.parent for path in (copied, made)} == {session.folder}
    assert {path.stat().st_mode & 0o777 for path in (copied, made)} == {0o600}
    assert session.used == len(b"photo") + len(b"result")
    moved = session.take(source, ".png")
    assert moved.read_bytes() == b"photo"
    assert not source.exists()


@pytest.mark.parametrize("suffix", ["", "png", ".p/../x", "/../x.png", ".png\0", ".averylongone"])
def test_a_suffix_is_only_a_suffix(sessions: Sessions, suffix: str) -> None:
    with pytest.raises(InputError, match="suffix"):
        sessions["a"].add(b"x", suffix)
    assert files(sessions.root) == []


@pytest.mark.parametrize("key", [None, "", "x" * 200])
def test_without_a_hash_there_is_no_session(sessions: Sessions, key: str | None) -> None:
    with pytest.raises(InputError, match="no session"):
        sessions[key]


def test_owns_what_is_in_it_and_nothing_else(sessions: Sessions, tmp_path: Path) -> None:
    mine, other = sessions["mine"], sessions["other"]
    path = mine.add(b"x", ".png")
    assert mine.owns(path)
    assert mine.owns(str(path))
    assert not other.owns(path)
    foreign = other.add(b"y", ".png")
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"z")
    (mine.folder / "link.png").symlink_to(foreign)
    (mine.folder / "away").symlink_to(tmp_path)
    for wrong in (
        foreign,
        outside,
        mine.folder,
        mine.folder / "link.png",
        mine.folder / "away" / "outside.png",
        mine.folder / ".." / other.folder.name / foreign.name,
        mine.folder / "none.png",
        path.name,
        f"{FILE}{path}",
        f"{path}\0",
        "x" * 5000,
        "",
    ):
        assert not mine.owns(wrong), wrong
    # A folder whose name begins like another's is still another.
    beside = Path(f"{mine.folder}x")
    beside.mkdir()
    (beside / "a.png").write_bytes(b"x")
    assert not mine.owns(beside / "a.png")


# -- quotas ----------------------------------------------------------------------------------------


def dated(session: Session, size: int, day: int, *, pinned: bool = False) -> Path:
    path = session.add(bytes(size), ".png", pinned=pinned)
    os.utime(path, (day, day))
    return path


def test_the_oldest_go_first_and_the_pinned_stay(sessions: Sessions) -> None:
    session = sessions["a"]
    pinned = dated(session, 4 * KB, 1, pinned=True)
    old, young = dated(session, 3 * KB, 2), dated(session, 3 * KB, 3)
    new = session.add(bytes(2 * KB), ".png")
    assert [path.exists() for path in (pinned, old, young, new)] == [True, False, True, True]
    session.unpin(pinned)
    session.pin(young)
    session.add(bytes(5 * KB), ".png")
    assert [path.exists() for path in (pinned, young, new)] == [False, True, True]


def test_what_can_never_fit_costs_nothing(sessions: Sessions) -> None:
    session = sessions["a"]
    pinned, loose = dated(session, 6 * KB, 1, pinned=True), dated(session, 3 * KB, 2)
    with pytest.raises(QuotaError, match="no room for another"):
        session.add(bytes(5 * KB), ".png")
    assert sorted(files(session.folder)) == sorted([pinned, loose])


def test_a_file_that_is_not_its_own_cannot_be_pinned_or_removed(sessions: Sessions) -> None:
    path = sessions["a"].add(b"x", ".png")
    with pytest.raises(ForeignPath):
        sessions["b"].pin(path)
    sessions["b"].remove(path)
    assert path.exists()
    sessions["a"].remove(path)
    assert not path.exists()


def test_what_is_retired_can_still_be_read_for_a_while(sessions: Sessions) -> None:
    session = sessions["a"]
    pinned = session.add(b"x", ".png", pinned=True)
    sessions["b"].retire(pinned)
    sessions.sweep(time.monotonic() + 40)
    assert pinned.exists()  # it is not b's
    session.retire(pinned)
    sessions.sweep(time.monotonic() + 20)
    assert session.owns(pinned)
    sessions.sweep(time.monotonic() + 40)
    assert not pinned.exists()
    assert len(sessions) == 2


def test_what_is_pinned_again_stays(sessions: Sessions) -> None:
    session = sessions["a"]
    file = session.add(b"x", ".png")
    session.retire(file)
    session.pin(file)
    sessions.sweep(time.monotonic() + 40)
    assert file.exists()


def test_what_is_retired_goes_first_when_room_is_needed(sessions: Sessions) -> None:
    session = sessions["a"]
    older, retired = dated(session, 3 * KB, 1), dated(session, 3 * KB, 2, pinned=True)
    session.retire(retired)
    session.add(bytes(5 * KB), ".png")
    assert [path.exists() for path in (older, retired)] == [True, False]


def test_an_owner_has_one_quota_for_all_pages(sessions: Sessions) -> None:
    for name in ("a", "b"):
        assert sessions.claim(name, "me")
    assert sessions.claim("c", "you")
    first, kept = dated(sessions["a"], 6 * KB, 1), dated(sessions["c"], 6 * KB, 1)
    own = dated(sessions["b"], 3 * KB, 2)
    sessions["b"].add(bytes(3 * KB), ".png")  # its own first, although the other is older
    assert [path.exists() for path in (first, own, kept)] == [True, False, True]
    sessions["b"].add(bytes(6 * KB), ".png")
    assert [path.exists() for path in (first, kept)] == [False, True]


def test_all_together_have_one_too(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path / "root", quota_bytes=10 * KB, total_bytes=15 * KB)
    sessions["a"].add(bytes(9 * KB), ".png")
    with pytest.raises(QuotaError):
        sessions["b"].add(bytes(9 * KB), ".png")
    sessions["b"].add(bytes(5 * KB), ".png")


def test_threads_do_not_pass_the_quota(sessions: Sessions) -> None:
    def fill(name: str) -> None:
        for _ in range(30):
            sessions[name].add(bytes(KB), ".png")
            assert sessions[name].used <= 10 * KB

    failed: list[object] = []
    before, threading.excepthook = threading.excepthook, failed.append
    try:
        threads = [threading.Thread(target=fill, args=(name,)) for name in "aabb"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = before
    assert failed == []
    assert sessions["a"].used == sessions["b"].used == 10 * KB


# -- ends ------------------------------------------------------------------------------------------


def test_a_session_belongs_to_who_came_first(sessions: Sessions) -> None:
    assert sessions.claim("a", "me")
    assert not sessions.claim("a", "you")
    assert sessions.owner_of("a") == "me"
    path = sessions["a"].add(b"x", ".png")
    assert sessions.owns("me", path)
    assert not sessions.owns("you", path)
    sessions.close("a")
    assert sessions.claim("a", "you")
    assert not path.exists()


def test_closed_is_closed(sessions: Sessions) -> None:
    session = sessions["a"]
    path = session.add(b"x", ".png")
    sessions.close("a")
    sessions.close("a")
    assert not path.exists()
    with pytest.raises(InputError, match="ended"):
        session.add(b"x", ".png")
    assert list(sessions.root.iterdir()) == []
    assert len(sessions) == 0


def test_sweep_removes_what_rests(sessions: Sessions) -> None:
    old, young = sessions["old"], sessions["young"]
    old.add(b"x", ".png")
    old.touched, young.touched = 1000.0, 1050.0
    assert sessions.sweep(now=1061.0) == ["old"]
    assert files(sessions.root) == []
    assert "old" not in sessions
    assert "young" in sessions


# -- payloads --------------------------------------------------------------------------------------


def test_a_payload_may_name_its_own_files(sessions: Sessions) -> None:
    path = str(sessions["a"].add(b"x", ".png"))
    about = {"meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}
    payload = {"photo": {"path": path, "url": "http://evil/", **about}, "n": [1, None, "../x"]}
    checked = check_paths(sessions["a"], payload, sessions.root)
    assert checked == {"photo": {"path": path, **about}, "n": [1, None, "../x"]}
    shown = {"path": f"http://127.0.0.1:7860/gradio_api/file={path}"}
    assert check_paths(sessions["a"], shown, sessions.root) == {"path": path}


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../etc/passwd",
        FILE + "/etc/passwd",
        "http://127.0.0.1:1/x.png",
        "https://example.com/x.png",
        "http://127.0.0.1:7860/gradio_api/file=/etc/passwd",
        "data:image/png;base64,AAAA",
        "",
        "OTHER",
        "http://h/gradio_api/file=OTHER",
    ],
)
def test_a_payload_may_name_nothing_else(sessions: Sessions, path: str) -> None:
    path = path.replace("OTHER", str(sessions["other"].add(b"y", ".png")))
    for payload in ({"path": path}, [[{"x": {"path": path, "meta": 1}}]], {"path": {"path": path}}):
        with pytest.raises(ForeignPath, match="not a file of this session"):
            check_paths(sessions["a"], payload)


def test_a_string_that_names_anothers_file_is_found_anywhere(sessions: Sessions) -> None:
    other = str(sessions["other"].add(b"y", ".png"))
    for text in (other, f"/gradio_api/file={other}", f"see {other}", other.replace("/", "%2F")):
        with pytest.raises(ForeignPath):
            check_paths(sessions["a"], {"data": ["", text]}, sessions.root)
    assert check_paths(sessions["other"], [other], sessions.root) == [other]


def test_a_payload_does_not_nest_for_ever(sessions: Sessions) -> None:
    payload: object = "x"
    for _ in range(100):
        payload = [payload]
    with pytest.raises(ForeignPath, match="nests"):
        check_paths(sessions["a"], payload)


# -- the folder of a process -----------------------------------------------------------------------

HOLDS = """
import sys, time
from pathlib import Path
from diffedit_demo.sessions import own_root
with own_root(Path(sys.argv[1])) as root:
    (root / "left").write_text("x")
    print(root, flush=True)
    time.sleep(60)
"""


def test_the_folder_goes_with_the_process(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    with own_root(parent) as root:
        assert root.parent.stat().st_mode & 0o777 == 0o700
        (root / "x").write_text("x")
        with own_root(parent) as second:
            assert second != root
            assert (root / "x").exists()
    assert [path.name for path in parent.iterdir()] == ["lock"]


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip(), "left")
    try:
        with own_root(tmp_path):
            assert left.exists()  # it lives
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert left.exists()
        with own_root(tmp_path):
            assert not left.parent.parent.exists()
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_a_folder_that_others_laid_out_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "link"):
        with pytest.raises(OutputError, match="only this user"), own_root(tmp_path / name):
            pass
