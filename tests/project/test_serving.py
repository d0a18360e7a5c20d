"""The server of docs/serving.md: its code runs, and concurrent requests change no answer."""

import asyncio
import re
from itertools import cycle, islice, product
from pathlib import Path

import httpx

from bitstack_nb import TaskBank

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
TEXTS = ["red rain", "green snow wind", "sun", "moon rain rain . wind", "blue", "wind"]
LABELS = {"colours": ["red", "green"], "sky": ["sun", "moon", "blue"], "weather": ["rain", "snow"]}


def saved(folder: Path, backbone: Path, *names: str) -> Path:
    bank = TaskBank.from_pretrained(backbone, sparsity=0.05)
    for name in names:
        rows = [(f"{word} {other}", word) for word in LABELS[name] for other in (".", "wind")]
        bank.learn(name, rows, labels=LABELS[name], epochs=1, progress=False)
    bank.save_pretrained(folder)
    return folder


def answers(app, questions: list[dict]) -> list[httpx.Response]:
    """The answers to requests that are all sent at once."""

    async def post_all():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://bank") as client:
            return await asyncio.gather(*(client.post("/predict", json=q) for q in questions))

    return asyncio.run(post_all())


def test_200_mixed_concurrent_requests_are_answered_as_one_by_one(folders, tmp_path, monkeypatch):
    server, adopting = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BANK", str(saved(Path("bank"), folders["bert"], "colours", "sky")))
    exec(server, page := {"__name__": "serve"})
    app, bank = page["app"], page["bank"]
    assert page["tasks"]() == {name: LABELS[name] for name in ("colours", "sky")}

    mixed = islice(cycle(product(TEXTS, ("colours", "sky", None))), 200)
    questions = [{"text": text, "task": task} for text, task in mixed]
    one_by_one = [bank.predict(q["text"], task=q["task"])[0] for q in questions]
    assert [answer.json() for answer in answers(app, questions)] == one_by_one

    saved(Path("new_bank"), folders["bert"], "weather")
    exec(adopting, page)
    known = [(q, answer) for q, answer in zip(questions, one_by_one, strict=True) if q["task"]]
    assert [answer.json() for answer in answers(app, [q for q, _ in known])] == [
        a for _, a in known
    ]
    weather, wrong = ({"text": "rain", "task": task} for task in ("weather", "none"))
    found, refused = answers(app, [weather, wrong])
    assert found.json() == bank.predict("rain", task="weather")[0]
    assert refused.status_code == 422 and "no task 'none'" in refused.json()["detail"]
