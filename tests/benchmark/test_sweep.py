"""Many runs at once: the results of one by one, each made once, whatever is killed meanwhile."""

import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import dask
import psutil
import pytest
from distributed import LocalCluster

from bitstack_nb import Protocol, load_results, run
from bitstack_nb.benchmark.sweeps import sweep
from bitstack_nb.cli import main
from bitstack_nb.results.provenance import command_line

SMALL = Protocol(
    tasks=("imdb", "ag_news"), train_size=32, test_size=28, max_length=16, epochs=1, batch_size=16
)
FOUR = [
    replace(SMALL, seed=seed).with_strategy(strategy)
    for seed in (0, 1)
    for strategy in ("finetune", "bitstack")
]
OPTIONS = ["--tasks=imdb,ag_news", "--train-size=32", "--test-size=28", "--max-length=16"]
OPTIONS += [
    "--epochs=1",
    "--batch-size=16",
    "--seeds=0,1",
    "--strategy=finetune,bitstack",
]  # the same four


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """The folder of the four results as ``run`` makes them."""
    folder = tmp_path_factory.mktemp("one_by_one")
    for protocol in FOUR:
        run(protocol, output=folder)
    return folder


def assert_same(found, expected):
    """The folders hold the same results, and nothing else."""
    assert {file.name for file in found.iterdir()} == {file.name for file in expected.iterdir()}
    for file in found.iterdir():
        (one,), (other,) = load_results(file), load_results(expected / file.name)
        assert (one.protocol, one.matrix, one.locks) == (other.protocol, other.matrix, other.locks)


def stamps(folder):
    """Which file each result is: another one if it was written again."""
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.json")}


def kill_a_worker(folder, killed):
    """Kill a process below this one that has a run in hand, behind its first stage."""
    while not killed:
        for state in folder.glob("*.state/stage-1"):
            lock = str(state.parent.with_suffix(".lock"))
            for process in psutil.Process().children(recursive=True):
                try:
                    if lock in [file.path for file in process.open_files()]:
                        killed.append(state.parent.stem)
                        process.kill()
                        return
                except psutil.Error:  # it has ended meanwhile
                    pass
        time.sleep(0.005)


def test_what_is_missing_is_run_and_what_fails_is_named(one_by_one, tmp_path, capsys):
    """Two results copied from another machine, one run that cannot go on, and one to do."""
    for protocol in FOUR[:2]:
        shutil.copy(one_by_one / f"{protocol.name}.json", tmp_path)
    before, bad = stamps(tmp_path), FOUR[2].name
    (tmp_path / f"{bad}.state" / "stage-1").mkdir(parents=True)
    command = ["sweep", *OPTIONS, "--jobs=1", "--output", str(tmp_path)]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert "4/4" in shown.err and bad not in shown.out and FOUR[3].name in shown.out
    named, last = shown.err.strip().splitlines()[-2:]
    assert named.startswith(f"{bad}: the state to resume from is damaged: delete ")
    assert last == "error: 1 of 4 runs have failed: the same command tries them again"
    shutil.rmtree(tmp_path / f"{bad}.state")
    assert main([*command, "--quiet"]) == 0
    assert "run/s" not in capsys.readouterr().err
    assert_same(tmp_path, one_by_one)
    assert before.items() <= stamps(tmp_path).items()
    (result,) = load_results(tmp_path / f"{bad}.json")
    assert result.provenance["command"] == command_line()  # not the worker's


def test_a_killed_worker_loses_nothing_and_repeats_nothing(one_by_one, tmp_path):
    """loky ends all workers then; the others' runs are resumed too."""
    killed = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path, killed), daemon=True)
    killer.start()
    failed = sweep(FOUR, output=tmp_path, jobs=2)
    killer.join()
    if failed:  # no run had ended yet
        assert all("a worker was killed" in why for why in failed.values())
        done = stamps(tmp_path)
        assert sweep(FOUR, output=tmp_path, jobs=1) == {}
        assert done.items() <= stamps(tmp_path).items()
    assert_same(tmp_path, one_by_one)


def test_a_run_that_kills_its_workers_is_given_up_by_dask(tmp_path, monkeypatch):
    killed = []
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        cluster = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)
    with cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        killer = threading.Thread(target=kill_a_worker, args=(tmp_path, killed), daemon=True)
        killer.start()
        failed = sweep(FOUR[:1], output=tmp_path, backend="dask")
    assert killed == [FOUR[0].name]
    assert failed == {killed[0]: "KilledWorker"}


def test_a_backend_says_what_it_needs(tmp_path, monkeypatch):
    how = {"output": tmp_path}
    with pytest.raises(ValueError, match="jobs is 0, expected at least 1"):
        sweep(FOUR, jobs=0, **how)
    with pytest.raises(ValueError, match=r"jobs is 2.*dask"):
        sweep(FOUR, backend="dask", jobs=2, **how)
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="DASK_SCHEDULER_ADDRESS"):
        sweep(FOUR, backend="dask", **how)
    with pytest.raises(ValueError, match=r"'slurm'.*loky"):
        sweep(FOUR, backend="slurm", **how)
    for backend, package in (("dask", "distributed"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=f"pip install {package}"):
            sweep(FOUR, backend=backend, **how)
    assert not list(tmp_path.iterdir())


def test_the_runs_of_a_sweep_end_with_it(tmp_path):
    """SIGTERM, as of a batch system, goes to the sweep alone."""
    command = [sys.executable, "-m", "bitstack_nb", "sweep", *OPTIONS, "--epochs=500", "--jobs=2"]
    sweeping = psutil.Popen([*command, "--output", tmp_path], stderr=subprocess.PIPE)
    while len([*tmp_path.glob("*.lock")]) < 2:
        assert sweeping.poll() is None
        time.sleep(0.1)
    workers = sweeping.children(recursive=True)
    sweeping.terminate()
    assert sweeping.wait(60) == 130
    assert b"continues after the last finished task" in sweeping.stderr.read()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
