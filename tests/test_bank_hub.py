"""A task bank goes to a Hub on this machine by the real client, and comes back; then offline."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from hub_server import COMMIT, serve
from tiny_backbones import write_backbones

CLIENT = """
import json, os, sys, urllib.request
from bitstack_nb import TaskBank

bank = TaskBank.from_pretrained("someone/bert", sparsity=0.05)
rows = [("red sun", "warm"), ("blue moon", "cold")] * 8
bank.learn("colours", rows, epochs=1, progress=False)
print(bank.push_to_hub("me/bank"), file=sys.stderr)
own = [bank.digests, bank.predict(["red rain"], task="colours")]
found = {"base": bank.base, "own": own, "errors": []}
for key in ("again", "offline"):
    other = TaskBank.from_pretrained("me/bank")
    found[key] = [other.digests, other.predict(["red rain"], task="colours")]
    if key == "again":
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").read()
for ask in (
    lambda: bank.push_to_hub("me/bank"),
    lambda: TaskBank.from_pretrained("me/other"),
    lambda: TaskBank.from_pretrained(sys.argv[1]).push_to_hub("me/bank"),
):
    try:
        ask()
    except ValueError as error:
        found["errors"].append(str(error))
print(json.dumps(found))
"""


class Hub(unittest.TestCase):
    def test_there_and_back(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        backbones = write_backbones(folder / "models" / "someone")
        variables = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        variables |= {"HF_ENDPOINT": serve(folder), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x"}
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(backbones["gpt2"])],
            env={**os.environ, **variables},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr[-3000:])
        found = json.loads(done.stdout)
        self.assertEqual(found["base"], {"name": "someone/bert", "revision": COMMIT})
        self.assertEqual((found["again"], found["offline"]), (found["own"], found["own"]))
        files = {file.name for file in (folder / "models" / "me" / "bank").iterdir()}
        self.assertLessEqual(
            {"bank.json", "bank.safetensors", "README.md", "tokenizer.json"}, files
        )
        push, absent, local = found["errors"]
        self.assertIn("no connection to the Hub", push)
        self.assertIn("no connection to the Hub and no copy in the cache", absent)
        self.assertIn("include_base=True copies it", local)
        self.assertIn(COMMIT, done.stderr)


if __name__ == "__main__":
    unittest.main()
