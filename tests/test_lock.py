"""Two trainings in one run folder: the second one is refused, and a killed one leaves no lock behind."""

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import tiny

from fasterrcnn_jax.atomic_write import is_temporary, write_atomically
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.scripts import train
from fasterrcnn_jax.training import run_folder

ROOT = Path(__file__).parents[1]

# Takes the lock, says so, and holds it until it is killed.
HOLD = """
import sys, time
from pathlib import Path
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.training import run_folder
try:
    with run_folder.locked(Path(sys.argv[1])):
        print("locked", flush=True)
        time.sleep(60)
except InputError as error:
    print(error, flush=True)
"""


def holder(run):
    command = [sys.executable, "-c", HOLD, str(run)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    process = holder(tmp_path)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match="another process is training in this run folder"), run_folder.locked(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with run_folder.locked(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_of_two_that_start_together_one_gets_the_lock(tmp_path):
    processes = [holder(tmp_path) for _ in range(2)]
    try:
        said = sorted(process.stdout.readline() for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert said[1] == "locked\n" and "another process is training" in said[0]


def test_training_in_a_folder_that_is_in_use_is_refused_in_one_line(tmp_path, capsys):
    tiny.write_voc(tmp_path / "voc", train=4, test=2)
    config = tiny.write_config(tmp_path / "config.py", tiny.config(tmp_path, steps=2))
    with run_folder.locked(tmp_path / "run"), tiny.restored_logging(), pytest.raises(SystemExit) as ended:
        train.main(["--config", str(config)])
    assert ended.value.code == 2
    assert f"error: --run {tmp_path / 'run'}: another process is training" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "checkpoints"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="--run .*file/run: .*file.* cannot be written: Not a directory"),
        run_folder.locked(tmp_path / "file" / "run"),
    ):
        pass


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    """Injected: root may write anywhere."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / ".lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    says = r"--run .*: .*\.lock cannot be written: Read-only file system"
    with pytest.raises(InputError, match=says), run_folder.locked(tmp_path):
        pass


def test_a_checkpoint_folder_that_cannot_be_made_is_named_before_the_first_step(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match="checkpoints cannot be written: File exists"), run_folder.locked(tmp_path):
        pass


def test_all_processes_are_refused_together(tmp_path, monkeypatch):
    """The others see nothing of the lock; process 0 tells them."""
    monkeypatch.setattr(run_folder, "is_main", lambda: False)
    monkeypatch.setattr(run_folder, "any_process", lambda flag: True)
    with pytest.raises(InputError, match="process 0 cannot train in this run folder"), run_folder.locked(tmp_path):
        pass
    monkeypatch.setattr(run_folder, "any_process", lambda flag: False)
    with run_folder.locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_stage_has_the_lock_of_the_run_around_it(tmp_path):
    """Alternating training holds one lock for its stages."""
    stage = run_folder.stage_folder(tmp_path, "1_rpn")
    for outer, inner in ((tmp_path, stage), (stage, tmp_path)):
        with (
            run_folder.locked(outer),
            pytest.raises(InputError, match=f"--run {inner}: another process is training"),
            run_folder.locked(inner),
        ):
            pass
    with run_folder.locked(stage), run_folder.locked(tmp_path / "other"):
        pass


LEFT = [
    ".config.json.4711.tmp", "images/.000002.png.4711.tmp", "failed/.step_00000002.npz.4711.tmp",
    "proposals/.train.safetensors.4711.tmp", "checkpoints/4.orbax-checkpoint-tmp",
    "stages/1_rpn/.metrics.jsonl.4711.tmp", "stages/1_rpn/checkpoints/4.orbax-checkpoint-tmp-17",
]  # fmt: skip
THEIRS = [
    "config.json", "images/000002.png", ".config.json.tmp", "notes.4711.tmp", "checkpoints/2", "evaluation/.a.4711.tmp",
    "checkpoints/1.damaged", "elsewhere/.a.4711.tmp",
]  # fmt: skip


def test_what_a_killed_run_left_is_removed_under_the_lock_and_said_in_one_line(tmp_path, caplog):
    for name in LEFT + THEIRS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "checkpoints/" in name:
            path.mkdir()
            path = path / "part"
        path.write_text("")
    with run_folder.locked(tmp_path / "stages" / "2_detector"), pytest.raises(InputError), run_folder.locked(tmp_path):
        pass
    assert all((tmp_path / name).exists() for name in LEFT)  # another process may be writing them
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"), run_folder.locked(tmp_path):
        assert not [name for name in LEFT if (tmp_path / name).exists()]
        assert all((tmp_path / name).exists() for name in THEIRS)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}: removed what a killed run left: ")
    assert all(Path(name).name in record.getMessage() for name in LEFT)


def test_a_temporary_file_has_the_name_that_is_removed(tmp_path, monkeypatch):
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: written.append(old) or replace(old, new))
    write_atomically(tmp_path / "a.json", "text")
    assert [is_temporary(path) for path in (*written, tmp_path / "a.json")] == [True, False]


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    """Without this order a power cut could leave an empty file under the name."""
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("renamed") or replace(*paths))
    write_atomically(tmp_path / "a.json", "text")
    assert done == [False, "renamed", True] and (tmp_path / "a.json").read_text() == "text"


def test_a_file_system_without_fsync_of_folders_is_enough(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    write_atomically(tmp_path / "a.json", "text")
    assert (tmp_path / "a.json").read_text() == "text"


# Takes the lock of a folder after the capabilities of root are dropped, so that permissions bind.
BOUND = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import launcher
launcher.drop_capabilities()
{HOLD}"""


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_folder_that_is_really_read_only_gives_one_sentence(tmp_path):
    run = tmp_path / "run"
    run.mkdir(mode=0o555)
    code = BOUND if os.geteuid() == 0 else HOLD
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True, text=True)
    run.chmod(0o755)
    assert done.stdout == f"--run {run}: {run}/checkpoints cannot be written: Permission denied\n", done.stderr[-500:]
