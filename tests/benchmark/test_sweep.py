"""Many runs at once: the results of one by one, each made once, whatever is killed meanwhile."""

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import dask
import psutil
import pytest
from distributed import LocalCluster
from filelock import FileLock
from joblib import cpu_count

from bitstack_nb.benchmark import runner as benchmark
from bitstack_nb.benchmark import sequence
from bitstack_nb.benchmark.protocol import Protocol
from bitstack_nb.benchmark.sweeps import sweep
from bitstack_nb.cli import main, one_run, parser, protocols
from bitstack_nb.results.result import load_results

FAST = ["--tasks=imdb,ag_news", "--train-size=32", "--test-size=28", "--max-length=16"]
FOUR = [*FAST, "--seeds=0,1", "--shuffle-tasks", "--strategy=finetune,bitstack"]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """The folder of the four results as `run` makes them."""
    folder = tmp_path_factory.mktemp("one_by_one")
    assert main(["run", *FOUR, "--quiet", "--output", str(folder)]) == 0
    return folder


def assert_same(found, expected):
    """The folders hold the same results, and nothing else."""
    assert {file.name for file in found.iterdir()} == {file.name for file in expected.iterdir()}
    for file in found.iterdir():
        (one,), (other,) = load_results(file), load_results(expected / file.name)
        assert one.protocol == other.protocol
        assert one.matrix == other.matrix
        assert one.locks == other.locks


def stamps(folder):
    """Which file each result is: another one if it was written again."""
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.json")}


def holder(lock, workers):
    """The process of the workers that has in hand the run which holds the lock."""
    for worker in map(psutil.Process, workers):
        for run in worker.children(recursive=True):
            if str(lock) in [file.path for file in run.open_files()]:
                return worker
    return None


def test_what_is_missing_is_run_and_what_fails_is_named(one_by_one, tmp_path, capsys):
    """Two results copied from another machine, one run that cannot go on, and one to do."""
    finetune = sorted(one_by_one.glob("finetune-*.json"))
    for file in finetune:
        shutil.copy(file, tmp_path)
    before = stamps(tmp_path)
    bad, good = sorted(file.stem for file in one_by_one.glob("bitstack-*.json"))
    (tmp_path / f"{bad}.state" / "stage-1").mkdir(parents=True)
    command = ["sweep", *FOUR, "--jobs=2", "--output", str(tmp_path)]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert "4/4" in shown.err
    named, last = shown.err.strip().splitlines()[-2:]
    assert named.startswith(f"{bad}: the state to resume from is damaged: delete ")
    assert last == "error: 1 of 4 runs have failed: the same command tries them again"
    assert good in shown.out and bad not in shown.out
    shutil.rmtree(tmp_path / f"{bad}.state")
    assert main([*command, "--quiet"]) == 0
    assert "run/s" not in capsys.readouterr().err
    assert_same(tmp_path, one_by_one)
    assert before.items() <= stamps(tmp_path).items()
    (result,) = load_results(tmp_path / f"{good}.json")
    python, *arguments = shlex.split(result.provenance["command"])
    assert (python, *arguments[:3]) == ("python", "-m", "bitstack_nb", "run")
    again = parser().parse_args(arguments[2:])
    assert protocols(again) == [Protocol.from_dict(result.protocol)]


def test_a_worker_killed_midway_loses_nothing_and_repeats_nothing(one_by_one, tmp_path, capsys):
    """With it goes the run it had in hand, behind its first task; the other worker resumes it."""
    killed = {}

    def kill(workers):
        while len(done := stamps(tmp_path)) < 4:
            time.sleep(0.01)
            for state in tmp_path.glob("*.state/stage-1"):
                lock = state.parent.with_suffix(".lock")
                hit = done and holder(lock, workers)
                if hit:
                    killed.update(run=lock.stem, at=datetime.now(UTC), done=done)
                    for process in (*hit.children(recursive=True), hit):  # the machine is gone
                        process.kill()
                    return

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        killer = threading.Thread(target=kill, args=([w.pid for w in cluster.workers.values()],))
        killer.start()
        with dask.config.set({"scheduler-address": cluster.scheduler_address}):
            command = ["sweep", *FOUR, "--quiet", "--backend=dask", "--output", str(tmp_path)]
            assert main(command) == 0, capsys.readouterr().err
        killer.join()
    assert_same(tmp_path, one_by_one)
    assert killed["done"].items() <= stamps(tmp_path).items()
    (resumed,) = load_results(tmp_path / f"{killed['run']}.json")
    assert datetime.fromisoformat(resumed.provenance["date"]) < killed["at"]
    assert all(len(r.times["train"]) == 2 for r in load_results(tmp_path))
    assert capsys.readouterr().out.count(".json") == 4


def test_the_recorded_command_repeats_its_run_only():
    """Whatever of the many settings a run has, in the order its seed has drawn."""
    options = ["--preset=published", "--tasks=imdb,dbpedia_2-3,yelp,ag_news_binary", "--seeds=0,3"]
    options += ["--shuffle-tasks", "--strategy=finetune,bitstack,recall,ewc,lora,replay,joint"]
    options += ["--sparsity=0,0.05", "--budget=union,fresh", "--importance=gradient,fisher"]
    options += ["--n-batches=2,3", "--strength=1e-05,7", "--rank=3", "--replay-size=1,2"]
    options += ["--head-steps=0,4"]
    options += ["--learning-rate=2e-05", "--train-size=1.0", "--test-size=12", "--epochs=1.5"]
    options += ["--data=/some where", "--head-learning-rate=0.01", "--sampling=head"]
    given = parser().parse_args(["sweep", *options])
    found = protocols(given)
    assert len({protocol.name for protocol in found}) == len(found) > 50
    for protocol in found:
        again = parser().parse_args(one_run(protocol, given)[2:])
        assert protocols(again) == [protocol]


def test_a_run_that_kills_its_workers_is_given_up(tmp_path):
    """The cluster has one thread, which joblib alone would leave idle and do all of it here."""
    deadly = f"import os; os.getppid() == {os.getpid()} or os.kill(os.getppid(), 9)"
    good = "import sys; open(sys.argv[1], 'w').close()"
    files = [tmp_path / name for name in "abc"]
    commands = {file: ["-c", deadly if file.name == "b" else good, str(file)] for file in files}
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        cluster = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)
    with cluster, dask.config.set({"scheduler-address": cluster.scheduler_address}):
        failed = sweep(commands, backend="dask")
    assert failed[tmp_path / "b"].startswith("KilledWorker")
    # Dask may blame what was in the killed worker's queue too; nothing is neither done nor named.
    assert sorted([*failed, *tmp_path.iterdir()]) == files


# One run, two processes --------------------------------------------------------------------------

ONE = Protocol(tasks=("imdb",), train_size=16, test_size=8, max_length=16, epochs=1)


def test_a_second_process_waits_and_takes_the_firsts_result(tmp_path, monkeypatch, caplog):
    first = benchmark.run(ONE, output=tmp_path / "first")
    monkeypatch.setattr(sequence, "train", lambda *_, **__: pytest.fail("trained again"))
    second = []
    with FileLock(tmp_path / f"{ONE.name}.lock"):
        waiting = threading.Thread(
            target=lambda: second.append(benchmark.run(ONE, output=tmp_path))
        )
        waiting.start()
        while "waiting" not in caplog.text:
            assert waiting.is_alive()
            time.sleep(0.01)
        first.save(tmp_path / f"{ONE.name}.json")
    waiting.join()
    assert second == [first]
    assert {file.name for file in tmp_path.iterdir()} == {"first", f"{ONE.name}.json"}


def test_a_killed_process_holds_up_nobody(tmp_path):
    code = (
        "import sys, filelock; filelock.FileLock(sys.argv[1]).acquire(); print(flush=True); input()"
    )
    lock = tmp_path / f"{ONE.name}.lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        holder.kill()
    benchmark.run(ONE, output=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [f"{ONE.name}.json"]


# Commands and workers -----------------------------------------------------------------------------


def test_runs_at_once_share_the_cores(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    code = "import sys, torch; open(sys.argv[1], 'w').write(str(torch.get_num_threads()))"
    files = [tmp_path / "a", tmp_path / "b"]
    assert not sweep({file: ["-c", code, str(file)] for file in files}, jobs=2)
    assert [int(file.read_text()) for file in files] == [max(1, cpu_count() // 2)] * 2


def test_each_failure_has_its_reason(tmp_path):
    codes = {
        "killed": "import os; os.kill(os.getpid(), 9)",
        "nothing": "pass",
        "raises": "raise OSError('the disk is full')",
        "silent": "raise SystemExit(3)",
    }
    failed = sweep({tmp_path / name: ["-c", code] for name, code in codes.items()}, jobs=1)
    reasons = {path.name: why for path, why in failed.items()}
    assert reasons.keys() == codes.keys()
    assert "SIGKILL" in reasons["killed"]
    assert "share this folder" in reasons["nothing"]
    assert reasons["raises"] == "OSError: the disk is full"
    assert "3" in reasons["silent"]


def test_what_a_backend_needs_is_said(tmp_path, monkeypatch):
    commands = {tmp_path / "a": ["-c", "pass"]}
    with pytest.raises(ValueError, match="jobs is 0, expected at least 1"):
        sweep(commands, jobs=0)
    with pytest.raises(ValueError, match=r"jobs is 2.*dask"):
        sweep(commands, backend="dask", jobs=2)
    with dask.config.set({"scheduler-address": None}):
        with pytest.raises(ValueError, match="DASK_SCHEDULER_ADDRESS"):
            sweep(commands, backend="dask")
    with pytest.raises(ValueError, match=r"'slurm'.*loky"):
        sweep(commands, backend="slurm")
    for backend, package in (("dask", "distributed"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=f"pip install .*{package}"):
            sweep(commands, backend=backend)
