"""Two trainings in one run folder: the second one is refused, and a killed one leaves no lock behind."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

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

    monkeypatch.setattr(run_folder.FileLock, "acquire", refuse)
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
