"""What the gallery answers: lists, filters, states, pictures, stars; and whom it does not answer."""

from __future__ import annotations

import io
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.made_runs import PARAMS, MadeRun, is_held, many_lines
from zimage_runner.outputs.stars import starred

LOCAL = "http://127.0.0.1:8188"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def asked(client: Any, path: str, **params: Any) -> Any:
    answer = client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def seeds(client: Any, **params: Any) -> list[tuple[int, int]]:
    found = asked(client, "/api/pictures", sort="prompt", **params)
    assert found["total"] == len(found["pictures"])
    return [(row["index"], int(row["seed"])) for row in found["pictures"]]


def test_states(root: Path, gallery: Any) -> None:
    MadeRun(root / "a/done", ["x"], [1, 2]).add_all().finish()
    MadeRun(root / "a/failures", ["x"], [1, 2]).add_all(failed=[(0, 2)]).finish(status="failures")
    broken = MadeRun(root / "b/broken", ["x"], [1, 2])
    broken.add(0, 1)
    MadeRun(root / "b/before", ["x"], [1])
    running = MadeRun(root / "b/running", ["x"], [1, 2, 3])
    running.add(0, 1)
    lock = running.hold()
    client = gallery(root)
    states = {run["path"]: run["state"] for run in asked(client, "/api/runs")["runs"]}
    assert states == {
        "a/done": "finished", "a/failures": "failures", "b/broken": "interrupted", "b/before": "empty",
        "b/running": "running",
    }  # fmt: skip
    run = next(run for run in asked(client, "/api/runs")["runs"] if run["path"] == "b/running")
    assert (run["done"], run["planned"]) == (1, 3)
    assert run["memory"]["host"] > 0.01  # this process
    assert is_held(root / "b/running")  # looking took nothing from it
    running.add(0, 2)
    lock.release()
    client.gallery.watcher.look()
    run = next(run for run in asked(client, "/api/runs")["runs"] if run["path"] == "b/running")
    assert (run["state"], run["done"]) == ("interrupted", 2)


def test_a_lock_of_a_dead_process_is_not_a_running_one(root: Path, gallery: Any) -> None:
    run = MadeRun(root / "one", ["x"], [1, 2])
    run.add(0, 1)
    lock = run.hold()
    owner = json.loads((root / "one/.lock").read_text(encoding="utf-8"))
    lock.release()
    (root / "one/.lock").write_text(json.dumps(owner | {"started": "1"}), encoding="utf-8")
    assert asked(gallery(root), "/api/runs")["runs"][0]["state"] == "interrupted"


def test_a_multirun_is_one_entry(root: Path, gallery: Any) -> None:
    sweep = root / "multirun/x/2026-11-28_22-00-00"
    for job, steps in enumerate((4, 8)):
        params = {**PARAMS, "num_inference_steps": steps}
        overrides = [f"sampling.num_inference_steps={steps}", f"engine.batch_size={job}", "seeds=1", "output.root=x"]
        MadeRun(sweep / str(job), ["x", "y"], [1], params, overrides).add_all().finish()
    (sweep / "multirun.yaml").write_text("{}", encoding="utf-8")
    client = gallery(root)
    found = asked(client, "/api/runs")
    assert (len(found["sweeps"]), found["sweeps"][0]["jobs_in_all"], found["sweeps"][0]["state"]) == (1, 2, "finished")
    assert found["sweeps"][0]["varying"] == ["num_inference_steps", "engine.batch_size"]
    assert (found["sweeps"][0]["done"], found["sweeps"][0]["planned"]) == (4, 4)
    (sweep / ".hydra").mkdir()
    (sweep / ".hydra/jobs.jsonl").write_text("{}\n" * 3, encoding="utf-8")
    of_three = asked(client, "/api/runs")["sweeps"][0]
    assert (len(of_three["jobs"]), of_three["jobs_in_all"], of_three["state"]) == (2, 3, "interrupted")
    assert of_three["planned"] is None
    (sweep / ".hydra/jobs.jsonl").write_text("{}\n" * 2, encoding="utf-8")
    scope = "sweep:multirun/x/2026-11-28_22-00-00"
    assert asked(client, "/api/pictures", scope=scope)["total"] == 4
    grid = asked(client, "/api/grid", scope=scope, columns="num_inference_steps", rows="prompt", pages="seed")
    assert grid["columns"] == ["steps 4", "steps 8"]
    assert grid["rows"] == ["x", "y"]
    assert {(cell["row"], cell["column"], cell["prompt"]) for cell in grid["cells"]} == {
        (0, 0, "x"), (0, 1, "x"), (1, 0, "y"), (1, 1, "y"),
    }  # fmt: skip
    picture = client.get("/api/grid.png", params={"scope": scope, "columns": "num_inference_steps", "rows": "prompt"})
    with Image.open(io.BytesIO(picture.content)) as image:
        assert image.format == "PNG"
        assert image.width > 2 * PARAMS["width"]
    assert asked(client, "/api/picture/1")["neighbours"]["jobs"][0]["run"] == 2


@pytest.mark.parametrize(
    ("asks", "expected"),
    [
        ({}, [(0, 1), (0, 2), (0, 30), (1, 1), (1, 2), (1, 30)]),
        ({"q": "CAT"}, [(0, 1), (0, 2), (0, 30)]),
        ({"q": "ÉTÉ red"}, [(1, 1), (1, 2), (1, 30)]),
        ({"q": "red cat"}, []),
        ({"q": '"a cat"'}, [(0, 1), (0, 2), (0, 30)]),
        ({"q": "seed=2-40"}, [(0, 2), (0, 30), (1, 2), (1, 30)]),
        ({"q": "seed!=1,30 cat"}, [(0, 2)]),
        ({"q": "seed>2"}, [(0, 30), (1, 30)]),
        ({"q": "size=64x48", "status": "failed"}, [(1, 2)]),
        ({"q": "size=1x1"}, []),
        ({"q": "steps>=8 steps<9"}, [(0, 1), (0, 2), (0, 30), (1, 1), (1, 2), (1, 30)]),
        ({"q": "steps=4"}, []),
        ({"q": "model=zimage_nano seed=1"}, [(0, 1), (1, 1)]),
        ({"q": "status=done seed=2"}, [(0, 2)]),
        ({"q": "a=b"}, []),
        ({"q": "%"}, []),
    ],
)
def test_filters(root: Path, gallery: Any, asks: dict[str, str], expected: list[tuple[int, int]]) -> None:
    MadeRun(root / "one", ["a cat", "été, a red bird"], [1, 2, 30]).add_all(failed=[(1, 2)]).finish()
    assert seeds(gallery(root), **asks) == expected


@pytest.mark.parametrize(
    ("asks", "text"),
    [
        ({"q": "seed=x"}, "seed=x: write seed=7, seed=1-9,42 or seed>7"),
        ({"q": "size>5x5"}, "size>5x5: write size=5x5, or width>..."),
        ({"status": "odd"}, "status=odd: choose done, failed"),
        ({"sort": "odd"}, "sort=odd: choose newest, oldest, prompt, seed, slowest, largest"),
    ],
)
def test_questions_that_make_no_sense(root: Path, gallery: Any, asks: dict[str, str], text: str) -> None:
    MadeRun(root / "one", ["a cat"], [1]).add_all()
    answer = gallery(root).get("/api/pictures", params=asks)
    assert (answer.status_code, answer.json()["detail"]) == (400, text)


def test_the_index_grows_with_the_ledger_and_starts_anew_with_another(root: Path, gallery: Any) -> None:
    run = MadeRun(root / "one", ["a cat"], [1, 2, 3])
    run.add(0, 1)
    ledger = root / "one/records.jsonl"
    with ledger.open("a", encoding="utf-8") as file:
        file.write('{"item":"items/00000_p/seed_9","status":"ok"')  # torn
    client = gallery(root)
    assert seeds(client) == [(0, 1)]
    ledger.write_bytes(ledger.read_bytes().rpartition(b"\n")[0] + b"\n")  # as the next process cuts it off
    run.add(0, 2, error="it broke")
    run.add(0, 2)  # the last line of an item wins
    client.gallery.watcher.look()
    assert seeds(client, status="done") == [(0, 1), (0, 2)]
    ledger.write_text(
        "not json\n" + ledger.read_text(encoding="utf-8").replace("seed_2", "seed_3").replace('"seed":2', '"seed":3'),
        encoding="utf-8",
    )
    client.gallery.watcher.look()
    assert seeds(client, status="done") == [(0, 1), (0, 3)]
    other = gallery(root)  # the same file is open elsewhere: a temporary index
    assert seeds(other, status="done") == [(0, 1), (0, 3)]


def test_pages_of_one_version_fit_together(root: Path, gallery: Any) -> None:
    run = MadeRun(root / "one", ["a cat"], range(9))
    for seed in range(6):
        run.add(0, seed)
    client = gallery(root)
    first = asked(client, "/api/pictures", limit=3)
    run.add(0, 6)
    client.gallery.watcher.look()
    second = asked(client, "/api/pictures", limit=3, offset=3, version=first["version"])
    assert [p["seed"] for p in first["pictures"] + second["pictures"]] == ["5", "4", "3", "2", "1", "0"]
    assert asked(client, "/api/pictures", limit=1)["pictures"][0]["seed"] == "6"


def test_seeds_beyond_javascripts_numbers_are_exact(root: Path, gallery: Any) -> None:
    big = 2**63 - 1
    MadeRun(root / "one", ["a cat"], [big]).add_all()
    client = gallery(root)
    assert asked(client, "/api/pictures", q=f"seed={big}")["pictures"][0]["seed"] == str(big)


def test_a_picture_and_what_made_it(root: Path, gallery: Any) -> None:
    run = MadeRun(root / "one", ["it's a cat", "b"], [1, 2]).add_all(failed=[(1, 2)])
    client = gallery(root)
    found = asked(client, "/api/picture/1")
    assert found["path"] == str(root / "one" / run.item(0, 1) / "image.png")
    assert [near["seed"] for near in found["neighbours"]["seeds"]] == ["2"]
    assert [near["index"] for near in found["neighbours"]["prompts"]] == [1]
    assert client.get("/picture/1").content == Path(found["path"]).read_bytes()
    with Image.open(io.BytesIO(client.get("/thumb/1", params={"s": 160}).content)) as image:
        assert (image.format, image.size) == ("WEBP", (64, 48))
    assert client.get("/thumb/1", params={"s": 9999}).status_code == 400
    failed = asked(client, "/api/picture/4")
    assert (failed["status"], failed["error"], failed["reproduce"]) == ("failed", "BadPictureError: all black", None)
    Path(found["path"]).write_bytes(b"cut")
    assert "3 bytes instead of" in asked(client, "/api/picture/1")["damage"]
    assert client.get("/thumb/1", params={"v": "x"}).status_code == 404
    Path(found["path"]).unlink()
    assert "missing" in asked(client, "/api/picture/1")["damage"]
    assert client.get("/picture/1").status_code == 404
    for number in (99, 1 << 63, -(1 << 63) - 1, 10**30):
        for path in ("picture", "thumb", "api/picture"):
            assert client.get(f"/{path}/{number}").status_code == 404


def test_the_command_draws_the_same_picture(tmp_path: Path, root: Path, gallery: Any, cli: Any) -> None:
    import shlex

    prompt = 'it\'s "red" ${x} \\ $(echo) 熊猫 (8k)'
    words = ["seeds=5", "warmup=none", "model=zimage_nano", "sampling.num_inference_steps=2", f"output.root={root}"]
    assert cli(f"prompt={prompt}", *words)[0] == 0
    command = asked(gallery(root), "/api/picture/1")["command"]
    again = shlex.split(command)
    assert again[:3] == ["python", "-m", "zimage_runner"]
    assert cli(*again[3:], "warmup=none", f"output.root={tmp_path / 'again'}")[0] == 0
    records = [
        json.loads(next(place.rglob("record.json")).read_text(encoding="utf-8")) for place in (root, tmp_path / "again")
    ]
    assert records[0]["prompt"] == records[1]["prompt"] == prompt
    assert records[0]["pixels_sha256"] == records[1]["pixels_sha256"]


def test_stars_are_kept_in_the_run(root: Path, gallery: Any) -> None:
    run = MadeRun(root / "one", ["a cat"], [1, 2, 3]).add_all()
    client = gallery(root)
    assert client.post("/api/star", json={"pictures": [1, 2], "star": 1}).status_code == 200
    assert client.post("/api/star", json={"pictures": [2], "star": -1}).status_code == 200
    assert starred(root / "one") == {run.item(0, 1)}
    client.gallery.watcher.look()
    assert seeds(client, star="starred") == [(0, 1)]
    assert seeds(client, star="rejected") == [(0, 2)]
    assert seeds(client, star="kept") == [(0, 1), (0, 3)]
    run.add(0, 1)  # drawn again: the star stays
    client.gallery.watcher.look()
    assert seeds(client, star="starred") == [(0, 1)]
    assert sorted(os.listdir(root / "one")) == [".hydra", "items", "prompts.jsonl", "records.jsonl", "stars.json"]
    (root / "one/stars.json").write_text("{", encoding="utf-8")
    answer = client.post("/api/star", json={"pictures": [1], "star": 0})
    assert (answer.status_code, "damaged" in answer.json()["detail"]) == (400, True)
    assert (root / "one/stars.json").read_text(encoding="utf-8") == "{"
    for body in ({"pictures": [], "star": 1}, {"pictures": [1], "star": 7}, {"pictures": ["1"], "star": 1}, {}):
        assert client.post("/api/star", json=body).status_code == 400


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, root: Path, gallery: Any) -> None:
    outside = MadeRun(tmp_path / "outside", ["secret"], [1]).add_all()
    run = MadeRun(root / "one", ["a cat"], [1, 2, 3]).add_all()
    os.symlink(outside.folder, root / "link")
    pictures = [root / "one" / run.item(0, seed) / "image.png" for seed in (1, 2, 3)]
    secret = outside.folder / outside.item(0, 1) / "image.png"
    pictures[0].unlink()
    pictures[0].symlink_to(secret)
    os.rename(pictures[1].parent, tmp_path / "moved")
    pictures[1].parent.symlink_to(secret.parent)
    pictures[2].unlink()
    os.mkfifo(pictures[2])  # would hang whoever opens it as a file
    with (root / "one/records.jsonl").open("a", encoding="utf-8") as ledger:
        for item in (
            "items/../../outside",
            "../outside/items/00000_p/seed_1",
            "/etc/passwd",
            "items/00009_a\nb/seed_1",
        ):
            ledger.write(json.dumps({"item": item, "status": "ok", "fingerprint": "f", "bytes": 1}) + "\n")
    client = gallery(root)
    assert [run["path"] for run in asked(client, "/api/runs")["runs"]] == ["one"]
    assert seeds(client) == [(0, 1), (0, 2), (0, 3)]
    for number in (1, 2, 3):
        for path in (f"/picture/{number}", f"/thumb/{number}"):
            assert client.get(path).status_code == 404
    assert asked(client, "/api/picture/2")["record"] == {}
    for path in ("/page/..%2fserver.py", "/page/server.py", "/../x", "/stars.json", "/openapi.json", "/docs"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("headers", "method"),
    [
        ({"host": "evil.example"}, "GET"),
        ({"host": "127.0.0.1.evil.example:8188"}, "GET"),
        ({"origin": "http://evil.example"}, "GET"),
        ({"origin": "null"}, "POST"),
        ({"origin": "http://127.0.0.1:1"}, "POST"),
        ({"sec-fetch-site": "cross-site"}, "POST"),
    ],
)
def test_strangers_are_refused(root: Path, gallery: Any, headers: dict[str, str], method: str) -> None:
    MadeRun(root / "one", ["a cat"], [1]).add_all()
    path = "/api/runs" if method == "GET" else "/api/star"
    client = gallery(root)
    answer = client.request(method, path, headers=headers, json={"pictures": [1], "star": 1})
    assert answer.status_code == 403
    assert not (root / "one/stars.json").exists()
    fine = {"host": "localhost:8188", "origin": "http://localhost:8188", "sec-fetch-site": "same-origin"}
    assert client.request(method, path, headers=fine, json={"pictures": [1], "star": 1}).status_code == 200


def test_every_answer_forbids_foreign_code(root: Path, gallery: Any) -> None:
    root.mkdir()
    for path in ("/", "/page/main.js", "/api/runs", "/nothing"):
        headers = gallery(root).get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"


def test_a_token(root: Path, gallery: Any) -> None:
    root.mkdir()
    client = gallery(root, base="http://192.168.1.5:80", local=False, token="secret-secret")
    assert client.get("/api/runs").status_code == 403
    assert client.get("/?token=wrong").status_code == 403
    assert client.get("/api/runs", headers={"authorization": "Bearer secret-secret"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example", "authorization": "Bearer secret-secret"}).status_code == 403
    answer = client.get("/?token=secret-secret", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=Strict" in answer.headers["set-cookie"]
    assert client.get("/api/runs").status_code == 200  # by its cookie


def test_thumbnails_are_bounded(tmp_path: Path, root: Path) -> None:
    from zimage_runner.view.folder import Folder
    from zimage_runner.view.stored import Stored
    from zimage_runner.view.thumbs import Thumbnails

    run = MadeRun(root / "one", ["a cat"], range(8)).add_all()
    with Folder(root) as folder:
        thumbnails = Thumbnails(folder, tmp_path / "cache", 300)
        for seed in range(8):
            thumbnails.get(Stored("one", run.item(0, seed), "image.png", 0, None), "v", 160)
    kept = list((tmp_path / "cache").rglob("*.webp"))
    assert 0 < len(kept) < 8
    assert sum(file.stat().st_size for file in kept) <= 300


def test_ten_thousand_and_a_restart(tmp_path: Path, root: Path, gallery: Any) -> None:
    many_lines(root / "big", 10_000, seeds=2)
    client = gallery(root)
    found = asked(client, "/api/pictures", q="fox hour width=768", sort="oldest", limit=5)
    assert found["total"] == 0  # every third prompt is narrow, and the foxes are among the others
    assert asked(client, "/api/pictures", q="lighthouse width=768")["total"] == 2 * 834
    middle = asked(client, "/api/pictures", sort="prompt", offset=5000, limit=1)["pictures"][0]
    assert (middle["index"], middle["seed"]) == (2500, "0")
    position = asked(client, f"/api/position/{middle['id']}", sort="prompt")
    assert position == {"position": 5000, "total": 10_000}
    client.gallery.close()
    again = gallery(root)  # the index is kept: nothing is read twice
    assert list(again.gallery.index.grow(1)) == []
    assert asked(again, "/api/pictures")["total"] == 10_000


def test_an_index_that_is_damaged_is_built_again(root: Path, gallery: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledgers have it all. Whether the thread that follows the runs finds it, or a page does."""
    run = MadeRun(root / "a", ["x"], [1, 2, 3])
    run.add(0, 1)
    client = gallery(root)
    assert seeds(client) == [(0, 1)]
    with client.gallery.index._writer as db:
        db.execute("UPDATE runs SET base='{', overrides='{'")  # a text that cannot be what was put there
    run.add(0, 2)
    client.gallery.watcher.look()
    assert seeds(client) == [(0, 1), (0, 2)]

    def damaged(*_: Any) -> Any:
        raise sqlite3.DatabaseError("database disk image is malformed")

    with monkeypatch.context() as patch:
        patch.setattr("zimage_runner.view.server.rows_of", damaged)
        answer = client.get("/api/pictures")
    assert answer.status_code == 503
    assert "malformed) and is built again" in answer.json()["detail"]
    run.add(0, 3)
    client.gallery.watcher.look()
    assert seeds(client) == [(0, 1), (0, 2), (0, 3)]
    with client.gallery.index._writer as db:
        db.execute("UPDATE runs SET ledger=CAST(X'31FF' AS TEXT)")  # no UTF-8
    run.add(0, 4)
    client.gallery.watcher.look()
    assert seeds(client) == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_an_index_that_is_locked_is_not_built_again(root: Path, gallery: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    MadeRun(root / "a", ["x"], [1])
    client = gallery(root)
    index = client.gallery.index
    monkeypatch.setattr(index, "begin_anew", lambda: pytest.fail("nothing is wrong with it"))
    with sqlite3.connect(root / "other.sqlite", timeout=0) as one, sqlite3.connect(root / "other.sqlite") as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="locked") as locked:
            one.execute("CREATE TABLE x (y)")
    monkeypatch.setattr(client.gallery.watcher, "_look", lambda: (_ for _ in ()).throw(locked.value))
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        client.gallery.watcher.look()
