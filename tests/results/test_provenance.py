"""Provenance: this process, the commit, and whether the code differs from it."""

import json
import random
import shlex
import subprocess
import sys

import numpy as np
import torch

from bitstack_nb.results.provenance import CODE, code_digest, git_state, provenance


def test_provenance_describes_this_process_and_leaves_the_rng():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = provenance()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == torch.__version__
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["cpu"] and len(found["gpus"]) == torch.cuda.device_count()
    assert shlex.split(found["command"]) == ["python", *sys.orig_argv[1:]]
    assert found["date"].endswith("+00:00")
    assert (CODE.parent / "results").is_dir()  # so that a change in any room is seen
    assert provenance(command="python -m bitstack_nb run")["command"].endswith("run")


def test_provenance_knows_the_commit_and_whether_the_code_differs(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    file = tmp_path / "package" / "code.py"
    file.parent.mkdir()
    file.write_text("x = 1")
    assert git_state(file) is None  # no repository
    git("init", "-q")
    assert git_state(file) is None  # not tracked: some other project's repository
    git("add", "package/code.py")
    git("commit", "-q", "-m", "one")
    clean = git_state(file)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "result.json").write_text("{}")
    assert git_state(file) == clean
    (file.parent / "more.py").write_text("y = 2")
    assert git_state(file) == clean | {"dirty": True}
    before = code_digest(tmp_path / "package")
    file.write_text("x = 2")
    assert code_digest(tmp_path / "package") != before
