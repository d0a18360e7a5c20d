"""What holds the project together: README, CI, recorded results, and a light import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitstack_nb import Protocol
from bitstack_nb.results import load_results

ROOT = Path(__file__).resolve().parent.parent


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(
        r"```sh\n(pip install .*unittest.*)\n```", (ROOT / "README.md").read_text()
    )
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*/*.json")), ids=lambda f: f.name)
def test_recorded_results_say_what_was_run(file):
    (result,) = load_results(file)
    if "published" in result.provenance:
        assert file.parent.name == "published"
        return
    assert Protocol.from_dict(result.protocol).name == file.stem
    assert result.provenance["git"]["dirty"] is False
    assert "python -m bitstack_nb run" in result.provenance["command"]
    samples = [data["sample"] for data in result.provenance["data"].values()]
    assert all(len(digest) == 64 for sample in samples for digest in sample.values())


def test_the_method_alone_imports_neither_transformers_nor_data_libraries():
    code = (
        "import sys, bitstack_nb; bitstack_nb.BitStack\n"
        "print([m for m in ('transformers', 'datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
