"""Uploading a finished run: to a local server that speaks the Hub's protocol, and what is said when
it does not."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants
import pytest

from odelt_fast import load_model
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.main import main
from odelt_fast.train.run import train
from tests.helpers.training import SMALLER, small_run


class Hub(BaseHTTPRequestHandler):
    """Makes repositories and takes commits whose files are sent inline; keeps what it was sent."""

    files: ClassVar[dict[str, bytes]] = {}
    refuses: ClassVar[str] = ""  # part of the path of requests that fail
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        if self.refuses and self.refuses in self.path:
            return self.answer({"error": "no more space"}, 507)
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            return self.answer(
                {"url": f"http://{self.headers['Host']}/someone/{name}", "name": f"someone/{name}"}
            )
        if self.path == "/api/validate-yaml":  # of the card's header
            return self.answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            wanted = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": wanted})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = {
            "commitUrl": f"http://{self.headers['Host']}/someone/run/commit/1",
            "commitOid": "1",
            "success": True,
            "hookOutput": "",
        }
        return self.answer(commit)

    def do_GET(self) -> None:
        self.answer(
            {
                "sha": "0",
                "siblings": [],
                "id": "someone/run",
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        )

    def answer(self, value: dict, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.files, Hub.asked, Hub.refuses = {}, [], ""
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield Hub
    server.shutdown()


def small(folder: Path) -> TrainConfig:
    return small_run(folder, model=SMALLER, steps=2, push_to_hub=True)


def test_finished_run_is_uploaded(hub: type[Hub], tmp_path: Path) -> None:
    folder = train(small(tmp_path / "run"))
    assert hub.asked[0] == "/api/repos/create"
    assert set(hub.files) == {"config.json", "model.safetensors", "README.md"}
    for name, content in hub.files.items():
        assert content == (folder / name).read_bytes()


def test_failed_upload_leaves_the_run_and_says_how_to_try_again(
    hub: type[Hub],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.refuses = "/commit/"
    options = [
        "--push-to-hub",
        "--hub-model-id",
        "someone/run",
        "--output-dir",
        str(tmp_path / "run"),
        "--steps",
        "1",
    ]
    options += ["--model.hidden-size", "16", "--train-batch-size", "16", "--sampling-steps", "0"]
    assert main(options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the run is complete in")
    assert "hf upload someone/run" in error
    assert load_model(tmp_path / "run").config.hidden_size == 16


def test_repository_that_cannot_be_had_stops_the_run_before_its_first_step(
    hub: type[Hub], tmp_path: Path
) -> None:
    hub.refuses = "/repos/create"
    with pytest.raises(
        ValueError, match=r"--push-to-hub: no repository 'run' can be had"
    ) as mistake:
        train(small(tmp_path / "run"))
    assert "\n" not in str(mistake.value)
    assert not (tmp_path / "run").exists()
