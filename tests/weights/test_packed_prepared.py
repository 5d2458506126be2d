"""Packed prepared checkpoints: equal to their source, apart from plain ones, read by every reader, damage noticed."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.fake_cuda import FakeEvent, FakeStream, build_fake, host_tensor, on_device, pinned
from tests.support.written_memory import megabytes_to_write
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.model import Options
from zimage_runner.errors import UserError
from zimage_runner.model import Device, Model, Prepare, Source
from zimage_runner.prepare import main
from zimage_runner.weights.find.layout import inspect
from zimage_runner.weights.find.resolve import resolve
from zimage_runner.weights.load import load_tensors
from zimage_runner.weights.packed import format as packed
from zimage_runner.weights.packed import unpack
from zimage_runner.weights.packed.format import BLOCK, Frame, Packing
from zimage_runner.weights.preload import pinned_buffers, preload, source
from zimage_runner.weights.preload.cuda_driver import CudaDriver, CudaUnavailable, allocated_bytes
from zimage_runner.weights.preload.preload import Preload
from zimage_runner.weights.prepared import prepare, prepared
from zimage_runner.weights.prepared.compare import compare
from zimage_runner.weights.prepared.prepared import Prepared

PARTS = ("text_encoder", "transformer", "vae")


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the embedded model has many, most of them with several tensors."""
    monkeypatch.setattr(prepared, "reads_packed", lambda: True)  # as with a GPU
    monkeypatch.setattr(packed, "FRAME_VALUES", 16 * BLOCK)
    monkeypatch.setattr(pinned_buffers, "CHUNK_BYTES", 2 * 16 * BLOCK)


@pytest.fixture
def nano(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A small checkpoint that a test may damage."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "nano"))


def local(path: Path, **options: Any) -> Model:
    return Model(name="my model", source=Source.local, path=str(path), **options)


def build(path: Path, *, packed: bool = True, **options: Any) -> Prepared:
    return prepare.build(resolve(local(path, **options)), local(path, **options), packed)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].view(torch.int16), theirs[name].view(torch.int16)) and ours[name].dtype == torch.bfloat16
        for name in theirs
    )


@pytest.fixture
def both(sharded: Path) -> tuple[Prepared, Prepared]:
    """(packed, plain)"""
    return build(sharded), build(sharded, packed=False)


def test_every_reader_gives_the_plain_copys_bits(both: tuple[Prepared, Prepared], sharded: Path) -> None:
    ours, plain = both
    for part in PARTS:
        expected = load_file(prepared.component_file(plain.path, part))
        assert same(load_tensors([prepared.component_file(ours.path, part)]), expected)
    options = Options(dtype=torch.bfloat16)
    by_engine, expected = (load_model(copy.path, options, published=sharded) for copy in both)
    for part in PARTS:
        assert getattr(by_engine, part).state_dict().keys() == getattr(expected, part).state_dict().keys()
        for name, tensor in getattr(expected, part).state_dict().items():
            assert torch.equal(getattr(by_engine, part).state_dict()[name], tensor), name


def test_loads_within_inference_mode(nano: Path) -> None:
    """memory=streamed loads while it encodes; the threads that fill the memory are in no such mode."""
    file = nano / "vae" / "diffusion_pytorch_model.safetensors"
    noise = {  # cannot be packed, so that its frames are copied as they are
        name: (torch.randint(-(2**15), 2**15, tensor.shape, dtype=torch.int16) & 0x3FFF).view(torch.bfloat16).float()
        for name, tensor in load_file(file).items()
    }
    save_file(noise, file)
    found = build(nano)
    assert any(frame.counts is None for frame in found.packings["vae"].frames)
    with torch.inference_mode():
        tensors = load_tensors([found.weights["vae"].path])
    assert same(tensors, load_file(build(nano, packed=False).weights["vae"].path))


def test_takes_about_two_thirds_of_the_bytes(both: tuple[Prepared, Prepared]) -> None:
    ours, plain = (found.weights["transformer"].size for found in both)
    assert 0.65 * plain < ours < 0.72 * plain


def test_any_safetensors_reader_opens_it(both: tuple[Prepared, Prepared]) -> None:
    path = prepared.component_file(both[0].path, "vae")
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["packed"]
        assert json.loads(file.metadata()["packing"])["version"] == packed.VERSION
        assert file.get_tensor("packed").dtype == torch.uint8


def test_frames_begin_aligned(both: tuple[Prepared, Prepared]) -> None:
    packings = both[0].packings.values()
    assert all(len(packing.frames) > 1 for packing in packings)
    assert all(frame.offset % 4096 == 0 for packing in packings for frame in packing.frames)


def test_both_exist_and_neither_deletes_the_other(nano: Path) -> None:
    plain = build(nano, packed=False)
    ours = build(nano)
    assert ours.path != plain.path
    model = local(nano)
    for form, expected in ((False, plain), (True, ours), (None, ours)):
        assert prepared.find(resolve(model), model, form) == expected
        assert prepare.build(resolve(model), model, form) == expected
    config = nano / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"shift": 6.0}), encoding="utf-8")
    build(nano)
    assert not plain.path.exists()
    assert not ours.path.exists()


def test_a_plain_manifest_does_not_make_packed_files_plain(nano: Path) -> None:
    found = build(nano)
    (found.path / "manifest.json").write_text(json.dumps(found.manifest | {"packed": False}), encoding="utf-8")
    with pytest.raises(prepared.UnusablePrepared, match="do not agree on whether they are packed"):
        prepared.open_prepared(found.path)


def test_is_the_same_file_every_time(nano: Path) -> None:
    first = {part: prepared.component_file(build(nano).path, part).read_bytes() for part in PARTS}
    found = build(nano)
    shutil.rmtree(found.path)
    again = {part: prepared.component_file(build(nano).path, part).read_bytes() for part in PARTS}
    assert first == again


def test_noise_is_stored_as_it_is(nano: Path) -> None:
    file = nano / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        noise = torch.randint(-(1 << 15), 1 << 15, tensor.shape, dtype=torch.int16)
        tensors[name] = noise.view(torch.bfloat16)
    save_file(tensors, file)
    found, plain = build(nano), build(nano, packed=False)
    assert all(frame.counts is None for frame in found.packings["vae"].frames)
    assert same(load_tensors([found.weights["vae"].path]), load_file(plain.weights["vae"].path))
    assert found.weights["vae"].size - plain.weights["vae"].size < 64 << 10


@pytest.mark.parametrize("damage", ["truncate", "flip", "flip unsampled", "table"])
def test_damaged_one_is_not_used_and_remade(nano: Path, damage: str) -> None:
    found = build(nano)
    file = found.weights["transformer"].path
    raw = bytearray(file.read_bytes())
    if damage == "truncate":
        del raw[len(raw) // 2 :]
    elif damage == "table":
        place = raw.index(b"[[", raw.index(b"frames")) + 2
        raw[place] ^= 1
    else:
        raw[found.packings["transformer"].frames[-1].offset if damage == "flip" else -100_000] ^= 1
    file.write_bytes(raw)
    checkpoint = resolve(local(nano))
    assert prepared.find(checkpoint, local(nano)) is None
    assert compare(inspect(nano), prepare.build(checkpoint, local(nano))).differences == []


def flip(found: Prepared, part: str, place: int) -> None:
    raw = bytearray(found.weights[part].path.read_bytes())
    raw[place] ^= 0x80
    found.weights[part].path.write_bytes(raw)


def test_comparison_sees_one_changed_bit(nano: Path) -> None:
    found = build(nano)
    assert compare(inspect(nano), found).differences == []
    packing = found.packings["transformer"]
    info = packing.unpacked.tensors["layers.1.attention.qkv.weight"]
    frame = next(f for f in packing.frames if f.start <= info.start < f.start + 2 * f.values)
    mantissas = frame.offset + 16 * -(-frame.values // BLOCK)
    flip(found, "transformer", mantissas + (info.start - frame.start) // 2)
    assert compare(inspect(nano), found).differences == [
        "transformer: layers.1.attention.qkv.weight differs from the source"
    ]


def test_a_frame_that_contradicts_itself_differs(nano: Path) -> None:
    found = build(nano)
    frame = found.packings["vae"].frames[0]
    level1 = frame.offset + 16 * -(-frame.values // BLOCK) + frame.values
    flip(found, "vae", level1)
    flip(found, "vae", level1 + 1)
    assert [text for text in compare(inspect(nano), found).differences if "differs from the source" in text]


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_tensor_of_another_shape_differs_and_is_not_read(nano: Path, is_packed: bool) -> None:
    found = build(nano, packed=is_packed)
    packing = found.packings["vae"] if is_packed else None
    file = found.weights["vae"] if packing is None else packing.unpacked
    last = max(file.tensors, key=lambda name: file.tensors[name].start)
    moved = dataclasses.replace(file.tensors[last], shape=(1,), nbytes=2, start=file.size - 2)
    changed = dataclasses.replace(file, tensors=file.tensors | {last: moved})
    if packing is None:
        found.weights["vae"] = changed
    else:
        found.packings["vae"] = dataclasses.replace(packing, unpacked=changed)
    assert compare(inspect(nano), found).differences == [f"vae: {last} is missing or of another shape or dtype"]


def test_a_frame_that_contradicts_itself_is_told_in_one_line(nano: Path) -> None:
    """Where its digests were not compared: model.verify=headers, and no sampled block in the damaged bytes."""
    found = build(nano)
    frame = found.packings["vae"].frames[0]
    file, place = found.weights["vae"].path, frame.offset + 16 * -(-frame.values // BLOCK) + frame.values
    raw = bytearray(file.read_bytes())
    has_far = any(raw[place] >> shift & 3 == 3 for shift in (0, 2, 4, 6))
    raw[place] = 0 if has_far else 0xFF  # another number of values on the next level
    file.write_bytes(raw)
    weights = source.WeightsSource(resolve(local(nano)), local(nano), found, None)
    weights.settle("cpu", "float32")
    said = f"^{re.escape(str(file))} is damaged: .*: delete {re.escape(str(found.path))}, and it is made"
    with pytest.raises(UserError, match=said):
        weights.tensors("vae")


def test_a_copy_that_is_damaged_does_not_verify(capsys: pytest.CaptureFixture[str], nano: Path) -> None:
    options = ("model=local", f"model.path={nano}")
    assert main(["build", *options]) == 0
    copy = next((Path(os.environ["ZIMAGE_RUNNER_CACHE"]) / "prepared").glob("local-*"))
    file = prepared.component_file(copy, "vae")
    os.truncate(file, file.stat().st_size - 1)
    assert main(["verify", *options]) == 1
    assert f"prepared: {copy} CANNOT BE USED" in capsys.readouterr().out


def test_verify_command(capsys: pytest.CaptureFixture[str], sharded: Path) -> None:
    options = (
        "model=local",
        f"model.path={sharded}",
    )
    assert main(["build", *options]) == 0
    assert main(["verify", *options]) == 0
    assert re.search(r"-packed equals the source rounded to bfloat16 \(239 tensors", capsys.readouterr().out)


def test_a_plain_copy_that_is_there_goes_on_being_used(nano: Path) -> None:
    model = local(nano, prepare=Prepare.always)
    plain = build(nano, packed=False)
    assert prepare.ensure_prepared(resolve(model), model, "bfloat16") == plain
    assert prepare.build(resolve(model), model) == plain


def test_a_copy_without_room_is_told_once_and_tried_again_when_there_is_more(
    nano: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, free = local(nano, prepare=Prepare.always), 10**8
    monkeypatch.setattr(prepared, "free_bytes", lambda path: free)
    assert prepare.ensure_prepared(resolve(model), model, "bfloat16") is None
    assert caplog.text.count("loading the published files, which is slower: cannot prepare my model") == 1
    monkeypatch.setattr(prepare, "build", lambda *args: pytest.fail("tried again"))
    assert prepare.ensure_prepared(resolve(model), model, "bfloat16") is None
    monkeypatch.undo()
    monkeypatch.setenv("ZIMAGE_RUNNER_CACHE", str(nano.parent / "cache"))
    assert caplog.text.count("loading the published files") == 1


@pytest.mark.parametrize("reads", [True, False])
def test_the_form_that_this_machine_reads_sooner_is_made_and_found(
    nano: Path, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    monkeypatch.setattr(prepared, "reads_packed", lambda: reads)
    model = local(nano)
    made = prepare.build(resolve(model), model)
    assert bool(made.packings) == reads
    other = build(nano, packed=not reads)
    assert prepared.find(resolve(model), model) == made != other


def test_killed_preparation_leaves_nothing_that_is_used(sharded: Path, runner_cache: Path) -> None:
    code = (
        "import os, signal; from zimage_runner.weights.packed import format as packed\n"
        "from zimage_runner.weights.prepared import prepare\n"
        "from zimage_runner.weights.find.resolve import resolve\n"
        "from zimage_runner.model import *; write = os.pwrite; count = 0; packed.FRAME_VALUES = 16384\n"
        "def pwrite(*args):\n"
        "    global count; count += 1\n"
        "    if count == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*args)\n"
        f"os.pwrite = pwrite; m = Model(name='m', source=Source.local, path={str(sharded)!r})\n"
        "prepare.build(resolve(m), m, True)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert list(runner_cache.rglob("*.safetensors"))
    assert prepared.find(resolve(local(sharded)), local(sharded)) is None
    assert compare(inspect(sharded), build(sharded)).differences == []


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Packing 0.6 GB of fp32 with frames of full size takes no more than a few of them for each thread."""
    assert 0 < megabytes_to_write(tmp_path, "packed") < 800


@pytest.fixture
def driver(tmp_path: Path) -> CudaDriver:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc for the fake driver")
    return build_fake(tmp_path)


@pytest.fixture
def travelling(
    nano: Path, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[source.WeightsSource, Prepared]]:
    """What a run begins with: the packed copy on its way through the driver."""
    found = build(nano)
    monkeypatch.setattr(preload, "CudaDriver", lambda: driver)
    monkeypatch.setattr(source, "torch_is_cpu_only", lambda: False)
    monkeypatch.setattr(source, "_wrap", host_tensor)
    before = allocated_bytes()
    weights = source.begin(resolve(local(nano)), local(nano), Device.auto)
    assert weights.is_travelling
    yield weights, found
    del weights
    assert allocated_bytes() == before


def launches(driver: CudaDriver) -> int:
    return ctypes.c_int.in_dll(driver._lib, "fake_launches").value


def test_travels_packed_and_arrives_unpacked(
    pace: None, travelling: tuple[source.WeightsSource, Prepared], driver: CudaDriver, nano: Path
) -> None:  # fmt: skip
    weights, found = travelling
    plain = build(nano, packed=False)
    weights.device = "cuda"  # settle("cuda") would, on a machine with a GPU
    for part in PARTS:
        tensors = weights.tensors(part)
        assert tensors is not None
        assert same(tensors, load_file(plain.weights[part].path))
        assert all(tensor.data_ptr() % 16 == 0 for name, tensor in tensors.items() if tensor.nbytes % 256 == 0)
        del tensors
    frames = [frame for packing in found.packings.values() for frame in packing.frames]
    unpacked = sum(frame.counts is not None for frame in frames)
    assert launches(driver) == unpacked
    late = ctypes.c_int.in_dll(driver._lib, "fake_late").value
    assert late == (len(frames) + unpacked if "FAKE_CUDA_LAZY" in os.environ else 0)
    assert pinned(driver) == 0


def test_the_device_holds_no_more_than_weights_and_staging(nano: Path, driver: CudaDriver) -> None:
    packing = build(nano).packings["transformer"]
    path, before = packing.unpacked.path, allocated_bytes()
    most = []
    record = driver.record
    driver.record = lambda *args: most.append(allocated_bytes()) or record(*args)  # type: ignore[method-assign]
    buffer = Preload([(path, 0, 0)], packings={path: packing}, driver=driver).take(path)
    assert len(most) == len(packing.frames)
    assert max(most) - before <= packing.unpacked.size + pinned_buffers.THREADS * pinned_buffers.CHUNK_BYTES
    assert allocated_bytes() - before == packing.unpacked.size == len(on_device(buffer))
    del buffer
    assert allocated_bytes() == before


@pytest.mark.parametrize(("variable", "value"), [("FAKE_CUDA_CAPABILITY", "75"), ("FAKE_CUDA_REFUSES_CODE", "1")])
def test_where_no_kernel_runs_the_slow_way_is_taken_and_said_once(
    nano: Path, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    variable: str, value: str,
) -> None:  # fmt: skip
    gc.collect()
    before = allocated_bytes()  # tests before this one may have left tensors
    build(nano)
    plain = build(nano, packed=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(preload, "CudaDriver", lambda: driver)
    monkeypatch.setattr(source, "torch_is_cpu_only", lambda: False)
    weights = source.begin(resolve(local(nano)), local(nano), Device.auto)
    weights.device = "cuda"
    monkeypatch.setattr("zimage_runner.weights.load.load_tensors", lambda paths, device: load_tensors(paths, "cpu"))
    for part in PARTS:
        tensors = weights.tensors(part)
        assert tensors is not None
        assert same(tensors, load_file(plain.weights[part].path))
    assert caplog.text.count("weights are loaded the slow way") == 1
    assert (pinned(driver), allocated_bytes()) == (0, before)


def test_a_damaged_frame_arrives_without_harm(nano: Path, driver: CudaDriver) -> None:
    """Digests are compared before; what is damaged after that has other values and nothing else."""
    found = build(nano)
    packing = found.packings["text_encoder"]
    path = packing.unpacked.path
    raw = bytearray(path.read_bytes())
    for frame in packing.frames:
        raw[frame.offset + 4 : frame.offset + 16] = os.urandom(12)
    path.write_bytes(raw)
    buffer = Preload([(path, 0, 0)], packings={path: packing}, driver=driver).take(path)
    assert buffer.nbytes == packing.unpacked.size


def test_a_packed_file_that_ends_early_is_an_error(nano: Path, driver: CudaDriver) -> None:
    packing = build(nano).packings["text_encoder"]
    path = packing.unpacked.path
    os.truncate(path, packing.frames[1].offset + 10)
    load = Preload([(path, 0, 0)], packings={path: packing}, driver=driver)
    with pytest.raises(OSError, match="ended at byte"):
        load.take(path)
    load.close()


def test_on_the_cpu_a_lossless_packed_copy_is_unpacked(nano: Path) -> None:
    model = local(nano)
    found = build(nano)
    weights = source.WeightsSource(resolve(model), model, found, None)
    weights.settle("cpu", "float32")
    tensors = weights.tensors("vae")
    assert tensors is not None
    assert same(tensors, load_file(build(nano, packed=False).weights["vae"].path))


def test_preloading_needs_neither_torch_nor_numpy(nano: Path, driver: CudaDriver, tmp_path: Path) -> None:
    found = build(nano)
    library = str(tmp_path / "libcuda_fake.so")
    code = (
        "import sys; from pathlib import Path; from zimage_runner.weights.preload import preload\n"
        "from zimage_runner.weights.packed import format as packed\n"
        "from zimage_runner.weights.prepared import prepared\n"
        "from zimage_runner.weights.preload.cuda_driver import CudaDriver\n"
        f"found = prepared.open_prepared(Path({str(found.path)!r})); packing = found.packings['vae']\n"
        "path = packing.unpacked.path\n"
        f"driver = CudaDriver(library={library!r})\n"
        "load = preload.Preload([(path, 0, 0)], packings={path: packing}, driver=driver)\n"
        "assert load.take(path).nbytes == packing.unpacked.size\n"
        "assert not {'torch', 'numpy', 'triton'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_of_the_kernel_reach_who_takes(nano: Path, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    packing = build(nano).packings["vae"]
    path = packing.unpacked.path

    def failing(*args: Any) -> None:
        raise CudaUnavailable("cuLaunchKernel failed with CUDA error 700")

    monkeypatch.setattr(driver, "launch", failing)
    load = Preload([(path, 0, 0)], packings={path: packing}, driver=driver)
    with pytest.raises(CudaUnavailable, match="cuLaunchKernel"):
        load.take(path)
    load.close()
    assert pinned(driver) == 0


def test_loading_with_torchs_streams(nano: Path, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with torch's streams replaced and the driver's memory that of the host."""

    class Stream(FakeStream):
        cuda_stream = 1

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    packing = build(nano).packings["transformer"]
    expected = load_file(build(nano, packed=False).weights["transformer"].path)
    assert same(unpack.load_packed([packing], "cpu", 3), expected)
    assert launches(driver) == 0
    monkeypatch.setattr(unpack, "CudaDriver", lambda index: driver)
    monkeypatch.setattr(unpack, "is_cuda", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    unpack._unpacker_of.cache_clear()
    for times in (1, 2):
        assert same(unpack.load_packed([packing], "cpu", 3), expected)
        assert launches(driver) == times * sum(frame.counts is not None for frame in packing.frames)
    assert ctypes.c_int.in_dll(driver._lib, "fake_modules").value == 1
    unpack._unpacker_of.cache_clear()


def test_an_interruption_ends_the_unpacking(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the main thread waits for the others: they do not read the rest of the file first."""
    packing = build(nano).packings["transformer"]
    begun, read_on, frames = threading.Event(), threading.Event(), []
    read, join = unpack._read, threading.Thread.join

    def slow(packing: Packing, frame: Frame, data: torch.Tensor) -> None:
        frames.append(frame)
        begun.set()
        read_on.wait()
        read(packing, frame, data)

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        monkeypatch.setattr(threading.Thread, "join", join)
        begun.wait()
        threading.Timer(0.05, read_on.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(unpack, "_read", slow)
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack.load_packed([packing], "cpu", 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "unpack-weights"]
    assert len(frames) == 1 < len(packing.frames)


@pytest.mark.parametrize("packed", [True, False])
def test_a_disk_that_fills_up_is_told_in_one_line(nano: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    write, written = os.pwrite, []

    def pwrite(*args: Any) -> int:
        written.append(args)
        if len(written) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(UserError, match=r"^cannot prepare my model in .*No space left on device: free some space"):
        build(nano, packed=packed)
    assert [path.suffix for path in prepared.roots(local(nano))[-1].iterdir()] == [".lock"]
    monkeypatch.setattr(os, "pwrite", write)
    assert compare(inspect(nano), build(nano, packed=packed)).differences == []


def test_two_processes_may_remove_the_same_superseded_copy(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the plain and the packed copy are under two locks."""
    old = build(nano)
    config = nano / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"shift": 6.0}), encoding="utf-8")
    rmtree = shutil.rmtree

    def overtaken(path: Path, *args: Any, **options: Any) -> None:
        if path == old.path:
            rmtree(path)  # by the other process
        rmtree(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", overtaken)
    assert build(nano).path.is_dir()
    assert not old.path.exists()


@pytest.mark.gpu
def test_a_gpu_gets_the_plain_copys_bits(both: tuple[Prepared, Prepared], sharded: Path) -> None:
    ours, plain = both
    expected = {part: load_file(plain.weights[part].path) for part in PARTS}

    def is_expected(part: str, tensors: dict[str, torch.Tensor] | None) -> bool:
        assert tensors is not None
        return same({name: tensor.cpu() for name, tensor in tensors.items()}, expected[part])

    weights = source.begin(resolve(local(sharded)), local(sharded), Device.auto)
    weights.settle("cuda", "bfloat16")
    assert weights.is_travelling
    for part in PARTS:
        assert is_expected(part, weights.tensors(part))  # through the preloader
        assert is_expected(part, weights.tensors(part))  # read again
        assert is_expected(part, load_tensors([ours.weights[part].path], "cuda"))
