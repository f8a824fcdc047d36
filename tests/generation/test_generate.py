"""`odelt-fast generate`: every picture once, the Sampler's, whatever is killed, divided or batched;
formats, object stores, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from odelt_fast.checkpoints.folder import load_model, save_model
from odelt_fast.cli import main
from odelt_fast.generation.generator import Generation, generate
from odelt_fast.generation.processes import Processes
from odelt_fast.images import open_source
from odelt_fast.sampling.noise import drawn_labels
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler
from tests.helpers.forked import start, wait
from tests.helpers.object_store import object_store
from tests.helpers.serving import HANG
from tests.helpers.small_model import latent_model, random_model
from tests.stress.kill_generate import Torture, check, pictures, torment

FEW = Torture(images=1100, shard_length=500)  # two shards and a short one; batches of 500
FORMATS = ["webdataset", "npz", "lance"]


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with object_store() as url:
        yield url


def small(out: Path, *more: str) -> list[str]:
    """25 images in three shards."""
    count = ["--num-images", "25", "--shard-length", "10", "--steps", "1", "--depth", "4"]
    return ["generate", *count, "--dtype", "float32", "--quiet", "--out", str(out), *more]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# What is made


@pytest.mark.parametrize("form", FORMATS)
def test_every_picture_is_there_once_and_the_sampler_s(form: str, tmp_path: Path) -> None:
    if form == "lance":
        pytest.importorskip("lance")
    torture = Torture(FEW.images, FEW.shard_length, form)
    assert main(torture.command(str(tmp_path / "out"))) == 0
    check(torture, str(tmp_path / "out"))


def test_shards_are_read_as_data_to_train_on(tmp_path: Path) -> None:
    assert main(small(tmp_path)) == 0
    with pytest.warns(UserWarning, match=r"1 \.json"):  # the record of the settings
        source = open_source(tmp_path)
    images, labels = source.read_many(range(25))
    sampler = Sampler(load_model("digits", "cpu", depth=4), 4, 1)
    drawn = to_uint8(sampler(25, seed=0)).astype(np.float32) / 127.5 - 1
    assert np.abs(images[:, 0] - drawn[..., 0]).max() < 1.01 / 127.5  # other batches: one level
    assert labels.tolist() == drawn_labels(0, range(25), 10).tolist()


@pytest.mark.parametrize("form", FORMATS[:2])
def test_any_number_of_processes_leaves_the_same_bytes(form: str, tmp_path: Path) -> None:
    """Threads stand for the processes: each makes every n-th shard."""
    sampler = Sampler(random_model(), 4, 2, batch_size=4)
    wanted = Generation(num_images=25, seed=5, format=form, shard_length=6)

    def run(out: Path, processes: int) -> None:
        barrier = threading.Barrier(processes)

        def work(index: int) -> None:
            process = Processes(index, processes, torch.device("cpu"), lambda: barrier.wait(60))
            generate(sampler, wanted, str(out), process, about={}, show=False)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run(tmp_path / "1", 1)
    assert len(content(tmp_path / "1")) == 6
    for processes in (2, 3, 7):
        run(tmp_path / str(processes), processes)
        assert content(tmp_path / str(processes)) == content(tmp_path / "1")


def test_another_batch_size_goes_on_and_changes_no_picture(tmp_path: Path) -> None:
    assert main(small(tmp_path / "one", "--batch-size", "4")) == 0
    assert main(small(tmp_path / "two", "--batch-size", "9")) == 0
    torture = Torture(25, 10)
    one, two = (list(pictures(torture, str(tmp_path / name))) for name in ("one", "two"))
    for (_, a, label), (_, b, other) in zip(one, two):
        assert np.abs(a.astype(int) - b).max() <= 1  # rounded to levels
        assert label == other
    (tmp_path / "one" / "images-000001.tar").unlink()
    kept = content(tmp_path / "one")
    assert main(small(tmp_path / "one", "--batch-size", "4")) == 0
    mended = content(tmp_path / "one")
    assert mended.keys() - kept.keys() == {"images-000001.tar"}
    assert all(mended[name] == kept[name] for name in kept)


def test_labels_are_taken_in_turn(tmp_path: Path) -> None:
    assert main(small(tmp_path, "--labels", "3", "10", "7")) == 0
    labels = [label for _, _, label in pictures(Torture(25, 10), str(tmp_path))]
    assert labels == ([3, 10, 7] * 9)[:25]


def test_latents_and_models_without_classes(tmp_path: Path) -> None:
    model, out = save_model(latent_model(), tmp_path / "latents"), tmp_path / "out"
    options = ["generate", "--model", str(model), "--num-images", "5", "--format", "npz"]
    assert main([*options, "--dtype", "float32", "--quiet", "--out", str(out)]) == 0
    with np.load(out / "images-000000.npz") as arrays:
        expected = Sampler(latent_model())(5).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(arrays["arr_0"], expected)
        assert arrays["arr_1"].tolist() == drawn_labels(0, range(5), 3).tolist()
    alone = save_model(random_model(num_classes=1), tmp_path / "alone")
    assert (
        main(["generate", "--model", str(alone), "--num-images", "5", "--out", str(out / "a")]) == 0
    )
    assert open_source(out / "a" / "images-000000.tar").num_classes == 1


# Kills and object stores


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process leaves of the images that the tests below divide."""
    out = tmp_path_factory.mktemp("divided")
    assert main(many(out)) == 0
    return content(out)


def many(out: Path) -> list[str]:
    """15 shards."""
    return small(out, "--num-images", "1500", "--shard-length", "100", "--device", "cpu")


def started(out: Path, process: Callable[[], bool]) -> None:
    """Waits until the first shard is there, while `process` goes on."""
    until = time.monotonic() + HANG
    while not any(out.glob("*.tar")):
        assert process()
        assert time.monotonic() < until
        time.sleep(0.002)


def workers_of(agent: int) -> dict[str, int]:
    """The processes that torchrun has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, KeyError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == agent:
                pairs = (path / "environ").read_bytes().decode().split("\0")
                variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                found[variables["RANK"]] = int(path.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_torchrun_divides_the_shards_and_any_number_goes_on_after_a_kill(
    divided: dict[str, bytes], tmp_path: Path
) -> None:
    """Two hosts of one process each, of which one is killed; the rest is made by one process."""
    out, log = tmp_path / "out", (tmp_path / "log").open("w+")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint"]
        rendezvous += [f"127.0.0.1:{probe.getsockname()[1]}"]
    agents = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", *rendezvous]
    command = [*agents, "-m", "odelt_fast.cli", *many(out)]
    hosts = [subprocess.Popen(command, stdout=log, stderr=log) for _ in range(2)]
    try:
        started(out, lambda: all(host.poll() is None for host in hosts))
        ranks = [workers_of(host.pid) for host in hosts]
        assert sorted(rank for found in ranks for rank in found) == ["0", "1"]
        os.kill(next(found["1"] for found in ranks if "1" in found), signal.SIGKILL)
        codes = [host.wait(HANG) for host in hosts]
    finally:
        for host in hosts:
            host.terminate()
            host.wait()
    log.seek(0)
    said = log.read()
    assert all(codes), said
    kept = content(out)
    assert 1 < len(kept) < len(divided), said
    assert all(kept[name] == divided[name] for name in kept if name[0] == "i")
    assert main(many(out)) == 0
    assert content(out) == divided


def test_a_process_whose_fellow_has_died_finishes_its_share_and_says_so(
    divided: dict[str, bytes], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def share() -> None:
        with log.open("a") as said, contextlib.redirect_stderr(said):
            assert main(many(out)) == 0

    rank0, rank1 = start(share, 2, log)
    started(out, lambda: True)
    os.kill(rank1, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(rank1, 0)[1]) == -signal.SIGKILL
    os.waitpid(rank0, 0)
    said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith("error: another process of this run has ended")
    assert set(content(out)) >= {f"images-{shard:06d}.tar" for shard in range(0, 15, 2)}
    assert wait(start(share, 3, log), time.monotonic() + HANG, log)
    assert content(out) == divided


def test_kills_lose_nothing(tmp_path: Path) -> None:
    """`python -m tests.stress.kill_generate` at small size."""
    torture = Torture(4000, 500, processes=2)
    assert torment(torture, 3, 1, str(tmp_path), tmp_path)["kills"] == 3


def test_kills_lose_nothing_in_an_object_store(store: str, tmp_path: Path) -> None:
    counts = torment(Torture(2500, 500), 2, 2, f"{store}/killed", tmp_path)
    assert counts["kills"] == 2


def test_a_lance_table_of_a_killed_run_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("lance")
    torture, out = Torture(2500, 500, "lance"), tmp_path / "out"
    assert main(torture.command(str(out))) == 0
    data = out / "images.lance" / "data"
    assert len(list(data.iterdir())) == 5
    # as after a kill: fragments of which one is not there, one was never named, and no table
    (out / "fragment-000003.json").unlink()
    shutil.rmtree(out / "images.lance" / "_versions")
    (data / "half.lance").write_bytes(next(data.iterdir()).read_bytes()[:100])
    assert main(torture.command(str(out))) == 0
    check(torture, str(out))
    assert len(list(data.iterdir())) == 5


@pytest.mark.parametrize("form", FORMATS)
def test_an_object_store_holds_what_a_folder_does(form: str, store: str, tmp_path: Path) -> None:
    if form == "lance":
        pytest.importorskip("lance")
    torture, out = Torture(FEW.images, FEW.shard_length, form), f"{store}/{form}"
    for place in (out, str(tmp_path)):
        assert main(torture.command(place)) == 0
    for (i, a, x), (j, b, y) in zip(pictures(torture, out), pictures(torture, str(tmp_path))):
        assert (i, x) == (j, y)
        assert np.array_equal(a, b)


# What is refused, in one line


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (["--seed", "1"], "seed"),
        (["--num-images", "26"], "num_images"),
        (["--shard-length", "9"], "shard_length"),
        (["--format", "npz"], "format"),
        (["--labels", "1"], "labels"),
        (["--steps", "2"], "operation"),
        (["--guidance-scale", "2"], "operation"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--model", "mnist"], "model_sha256"),
    ],
)
def test_other_images_are_not_put_into_the_same_folder(
    changes: list[str], name: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(made)
    assert main(small(made, *changes)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {made} holds images with {name} ")
    assert said.endswith(": name another --out\n")
    assert content(made) == before


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    assert main(small(folder)) == 0
    return folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-images", "0"], "--num-images must be at least 1, not 0"),
        (["--shard-length", "0"], "--shard-length must be at least 1, not 0"),
        (["--labels", "elf"], "--labels: "),
        (["--solver", "dopri5", "--steps", "3"], "--steps has no effect on dopri5"),
        (["--out", "s3://no-such-bucket-anywhere/x"], "s3://no-such-bucket-anywhere/x cannot be"),
        (["--out", "gopher://x/y"], "gopher://x/y cannot be opened: "),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    options: list[str],
    says: str,
    store: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(small(tmp_path / "out", *options)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {says}")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images-000001.tar").write_bytes(b"somebody's")
    assert main(small(tmp_path)) == 2
    assert "holds other files: name a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images-000001.tar"]


def test_without_credentials_it_says_so(
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    assert main(small(tmp_path, "--out", f"{store}/secret")) == 2
    assert "there are no credentials for it" in capsys.readouterr().err
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_full_disk_is_one_line_and_no_half_shard(tmp_path: Path) -> None:
    """A limit on the size of files stands for it, in a process of its own."""
    log = tmp_path / "log"
    child = os.fork()
    if child == 0:
        sys.stderr = log.open("w")
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
        code = main(small(tmp_path / "out"))
        sys.stderr.flush()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    said = log.read_text()
    assert said.startswith(f"error: {tmp_path}/out/images-000000.tar cannot be written: ")
    assert set(content(tmp_path / "out")) == {"generation.json"}
    assert main(small(tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["complete"]
