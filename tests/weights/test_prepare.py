"""Prepared checkpoints: equal to their source bit by bit, atomic, remade when the source changes, bounded in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.written_memory import megabytes_to_write
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.model import Options
from zimage_runner.errors import UserError
from zimage_runner.model import Model, Prepare, Source, Verify
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.digest import sampled_digests
from zimage_runner.weights.find.layout import inspect
from zimage_runner.weights.find.resolve import resolve
from zimage_runner.weights.prepared import names, prepare, prepared
from zimage_runner.weights.prepared.compare import compare
from zimage_runner.weights.prepared.names import prepared_tensors
from zimage_runner.weights.safetensors_file import read_header


@pytest.fixture
def nano(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A small checkpoint that a test may damage."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "nano"))


@pytest.fixture(autouse=True)
def _copies_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch is a build with CUDA, with which copies are packed: test_packed_prepared.py."""
    monkeypatch.setattr(prepared, "reads_packed", lambda: False)


def local(path: Path, **options: object) -> Model:
    return Model(name="my model", source=Source.local, path=str(path), **options)  # pyright: ignore[reportArgumentType]


def published(path: Path, component: str) -> dict[str, torch.Tensor]:
    files = sorted((path / component).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_equals_the_source_as_the_reference_would_round_it(sharded: Path) -> None:
    """Compared with another reader and another way of rounding than the code under test uses."""
    found = prepare.build(resolve(local(sharded)), local(sharded))
    transformer = load_file(prepared.component_file(found.path, "transformer"))
    source = {name: tensor.to(torch.bfloat16) for name, tensor in published(sharded, "transformer").items()}
    qkv = torch.cat([source.pop(f"layers.2.attention.to_{name}.weight") for name in "qkv"])
    assert torch.equal(transformer["layers.2.attention.qkv.weight"], qkv)
    w13 = torch.cat([source.pop(f"noise_refiner.0.feed_forward.{name}.weight") for name in ("w1", "w3")])
    assert torch.equal(transformer["noise_refiner.0.feed_forward.w1w3.weight"], w13)
    kept = [name for name in source if name in transformer]
    assert len(kept) > 80
    assert all(torch.equal(transformer[name], source[name]) for name in kept)
    assert {tensor.dtype for tensor in transformer.values()} == {torch.bfloat16}
    comparison = compare(inspect(sharded), found)
    assert comparison.differences == []
    total = sum(file.size - file.data_start for file in found.weights.values())
    assert comparison.nbytes == total


def test_native_engine_loads_both_layouts_alike(nano: Path) -> None:
    found = prepare.build(resolve(local(nano)), local(nano))
    options = Options(dtype=torch.bfloat16)
    ours, theirs = load_model(found.path, options, published=nano), load_model(nano, options)
    for part in ("transformer", "text_encoder", "vae"):
        ours_named, theirs_named = (dict(getattr(m, part).named_parameters()) for m in (ours, theirs))
        assert ours_named.keys() == theirs_named.keys()
        assert all(torch.equal(ours_named[name], theirs_named[name]) for name in ours_named)


def test_holds_nothing_that_inference_does_not_need(nano: Path) -> None:
    found = prepare.build(resolve(local(nano)), local(nano))
    names = {component: set(file.tensors) for component, file in found.weights.items()}
    assert not [name for name in names["vae"] if name.startswith("encoder.")]
    assert not [name for name in names["text_encoder"] if name.startswith(("layers.3.", "norm."))]
    left_out = found.manifest["components"]["text_encoder"]["left_out"]
    assert "layers.3.mlp.down_proj.weight" in left_out
    assert sum(f.size for f in found.weights.values()) < inspect(nano).weight_bytes


def test_every_tensor_begins_aligned(sharded: Path) -> None:
    found = prepare.build(resolve(local(sharded)), local(sharded))
    for file in found.weights.values():
        assert file.data_start % 4096 == 0
        odd = [info.start for info in file.tensors.values() if info.nbytes % 256]
        starts = [info.start for info in file.tensors.values() if info.start < min(odd, default=file.size)]
        assert all(start % 256 == 0 for start in starts)


def test_digest_stays_that_of_the_source(nano: Path) -> None:
    checkpoint = resolve(local(nano))
    found = prepare.build(checkpoint, local(nano))
    assert found.manifest["source"]["digest"] == checkpoint.digest
    assert prepared.find(checkpoint, local(nano)) == found


def test_is_made_once(nano: Path) -> None:
    first = prepare.build(resolve(local(nano)), local(nano))
    inode = prepared.component_file(first.path, "vae").stat().st_ino
    again = prepare.build(resolve(local(nano)), local(nano))
    assert prepared.component_file(again.path, "vae").stat().st_ino == inode


def test_is_found_under_another_model_name(nano: Path) -> None:
    first = prepare.build(resolve(local(nano)), local(nano))
    other = local(nano)
    other.name = "zimage_turbo"
    assert prepared.find(resolve(other), other) == first


def test_is_remade_when_the_source_changes(nano: Path) -> None:
    first = prepare.build(resolve(local(nano)), local(nano))
    config = nano / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"shift": 6.0}), encoding="utf-8")
    second = prepare.build(resolve(local(nano)), local(nano))
    assert second.path != first.path
    assert not first.path.exists()
    assert json.loads((second.path / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))["shift"] == 6.0


@pytest.mark.parametrize("damage", ["truncate", "flip", "flip unsampled", "manifest", "config", "version"])
def test_damaged_one_is_not_used_and_remade(nano: Path, damage: str) -> None:
    checkpoint = resolve(local(nano))
    found = prepare.build(checkpoint, local(nano))
    file = prepared.component_file(found.path, "transformer")
    if damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif damage.startswith("flip"):
        raw = bytearray(file.read_bytes())
        raw[-1 if damage == "flip" else -100_000] ^= 1
        file.write_bytes(raw)
    elif damage == "manifest":
        (found.path / "manifest.json").write_text("{", encoding="utf-8")
    elif damage == "config":
        (found.path / "tokenizer/tokenizer.json").unlink()
    else:
        (found.path / "manifest.json").write_text(json.dumps(found.manifest | {"version": 0}), encoding="utf-8")
    assert prepared.find(checkpoint, local(nano)) is None
    assert compare(inspect(nano), prepare.build(checkpoint, local(nano))).differences == []


def test_one_that_holds_the_table_of_tokens_too_is_used(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of version 2 did, and nobody prepares again what is there."""
    checkpoint = resolve(local(nano))
    with monkeypatch.context() as patched:
        patched.setattr(
            names, "_is_used", lambda component, name, layers: component != "text_encoder" or "layers.3." not in name
        )
        older = prepare.build(checkpoint, local(nano))
    manifest = json.dumps(older.manifest | {"version": 2})
    (older.path / "manifest.json").write_text(manifest, encoding="utf-8")
    found = prepared.find(checkpoint, local(nano))
    assert found is not None
    assert found.path == older.path
    assert "embed_tokens.weight" in found.weights["text_encoder"].tensors
    assert compare(inspect(nano), found).differences == []
    found.weights["vae"].tensors["strange"] = next(iter(found.weights["vae"].tensors.values()))
    assert compare(inspect(nano), found).differences == ["vae: strange is not in the source"]
    del found.weights["vae"].tensors["strange"]
    load_model(found.path, Options(), published=nano)


@pytest.mark.parametrize("option", [Verify.first_use, Verify.always])
def test_one_altered_with_its_manifest_is_not_used(nano: Path, option: Verify) -> None:
    """A5: the digests of its making are kept in the runner's cache."""
    checkpoint = resolve(local(nano))
    found = prepare.build(checkpoint, local(nano))
    file = prepared.component_file(found.path, "transformer")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    component = found.manifest["components"]["transformer"]
    component["sha256"] = hashlib.sha256(raw).hexdigest()
    component["sampled_sha256"] = sampled_digests([read_header(file)])[0]
    (found.path / "manifest.json").write_text(json.dumps(found.manifest), encoding="utf-8")
    prepared.open_prepared(found.path)  # consistent with itself
    assert prepared.find(checkpoint, local(nano, verify=option)) is None
    assert compare(inspect(nano), prepare.build(checkpoint, local(nano))).differences == []


def test_altered_configs_are_not_used(nano: Path) -> None:
    checkpoint = resolve(local(nano))
    found = prepare.build(checkpoint, local(nano))
    config = found.path / "transformer/config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("256.0", "255.0"), encoding="utf-8")
    assert prepared.find(checkpoint, local(nano, verify=Verify.headers)) is None
    assert compare(inspect(nano), prepare.build(checkpoint, local(nano))).differences == []


def test_nobody_else_can_write_to_it_and_all_may_read(nano: Path) -> None:
    """A10, A1: whatever the umask is."""
    before = os.umask(0o002)
    try:
        found = prepare.build(resolve(local(nano)), local(nano))
    finally:
        os.umask(before)
    for path in [found.path, *found.path.rglob("*")]:
        assert path.stat().st_mode & 0o022 == 0, path
        assert path.stat().st_mode & 0o044 == 0o044, path


@pytest.mark.parametrize("place", ["", "transformer", "manifest.json", "transformer/config.json", ".."])
def test_one_that_others_can_write_to_is_not_used(nano: Path, caplog: pytest.LogCaptureFixture, place: str) -> None:
    checkpoint = resolve(local(nano))
    found = prepare.build(checkpoint, local(nano))
    (found.path / place).chmod(0o777)
    assert prepared.find(checkpoint, local(nano)) is None
    assert prepared.find(checkpoint, local(nano)) is None
    assert caplog.text.count("other users can write to it or to a folder above it: chmod -R go-w") == 1
    if place == "..":
        with pytest.raises(UserError, match=r"prepared can be written by others, who could change what is drawn"):
            prepare.build(checkpoint, local(nano))


def test_waiting_for_a_stopped_process_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A16."""
    lock = tmp_path / ".z-0123-packed.lock"
    code = (
        "from pathlib import Path\nfrom zimage_runner.weights.prepared.prepare import _lock\n"
        f"with _lock(Path({str(lock)!r})): print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
        monkeypatch.setattr(prepare, "TELL_SECONDS", 0.2)
        timer = threading.Timer(0.7, lambda: (holder.send_signal(signal.SIGCONT), holder.communicate("\n")))
        timer.start()
        with prepare._lock(lock):
            assert lock.read_text(encoding="utf-8").startswith(f"{os.getpid()} on ")
        timer.join()
    says = f"z-0123-packed: process {holder.pid}, which prepares it, is stopped: kill -CONT {holder.pid} lets it go on"
    assert caplog.text.count(says) >= 2


def test_comparison_sees_one_changed_bit(nano: Path) -> None:
    checkpoint = resolve(local(nano))
    found = prepare.build(checkpoint, local(nano))
    info = found.weights["transformer"].tensors["layers.1.attention.qkv.weight"]
    with prepared.component_file(found.path, "transformer").open("r+b") as file:
        file.seek(info.start + info.nbytes - 1)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x80]))
    assert compare(inspect(nano), found).differences == [
        "transformer: layers.1.attention.qkv.weight differs from the source"
    ]


def test_nothing_is_written_into_the_source(nano: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in nano.rglob("*")}
    prepare.build(resolve(local(nano)), local(nano))
    assert {p: p.stat().st_mtime_ns for p in nano.rglob("*")} == before


def test_lies_beside_the_downloads_where_they_can_be_written(nano: Path, tmp_path: Path, runner_cache: Path) -> None:
    beside = local(nano, cache_dir=str(tmp_path / "hub"))
    assert tmp_path / "hub" in prepare.build(resolve(beside), beside).path.parents
    (tmp_path / "file").write_text("", encoding="utf-8")
    blocked = local(nano, cache_dir=str(tmp_path / "file"))  # stands for a read-only mount: nothing can be made in it
    assert runner_cache in prepare.build(resolve(blocked), blocked).path.parents


def test_full_disk_is_said_before_anything_is_written(
    nano: Path, runner_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "free_bytes", lambda path: 10**8)
    with pytest.raises(UserError, match=r"has 0\.1 GB free of the 0\.5 GB needed: free some space") as error:
        prepare.build(resolve(local(nano)), local(nano))
    assert "\n" not in str(error.value)
    assert not list(runner_cache.rglob("*.safetensors"))
    assert prepare.ensure_prepared(resolve(local(nano)), local(nano, prepare=Prepare.always), "bfloat16") is None


@pytest.mark.parametrize(
    ("option", "dtype", "is_made"),
    [
        (Prepare.always, "bfloat16", True),
        (Prepare.always, "float32", False),  # the transformer is fp32: bf16 would round it
        (Prepare.auto, "bfloat16", False),  # small: nothing to gain
        (Prepare.never, "bfloat16", False),
    ],
)
def test_when_it_is_made_by_itself(sharded: Path, option: Prepare, dtype: str, is_made: bool) -> None:
    model = local(sharded, prepare=option)
    assert (prepare.ensure_prepared(resolve(model), model, dtype) is not None) == is_made


def test_lossless_one_serves_float32_too(nano: Path) -> None:
    model = local(nano, prepare=Prepare.always)
    found = prepare.ensure_prepared(resolve(model), model, "float32")
    assert found is not None
    assert found.is_lossless


def test_auto_prepares_large_ones(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "AUTO_BYTES", 1_000_000)
    model = local(sharded)
    assert prepare.ensure_prepared(resolve(model), model, "bfloat16") is not None


def test_killed_preparation_leaves_nothing_that_is_used(sharded: Path, runner_cache: Path) -> None:
    code = (
        "import os, signal; from zimage_runner.weights.prepared import prepare, prepared\n"
        "prepared.reads_packed = lambda: False\n"
        "from zimage_runner.weights.find.resolve import resolve\n"
        "from zimage_runner.model import *; write = os.pwrite; count = 0\n"
        "def pwrite(*args):\n"
        "    global count; count += 1\n"
        "    if count == 100: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*args)\n"
        f"os.pwrite = pwrite; m = Model(name='my model', source=Source.local, path={str(sharded)!r})\n"
        "prepare.build(resolve(m), m)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert list(runner_cache.rglob("*.safetensors"))
    checkpoint = resolve(local(sharded))
    assert prepared.find(checkpoint, local(sharded)) is None
    found = prepare.build(checkpoint, local(sharded))
    assert compare(inspect(sharded), found).differences == []
    folders = {path.name for path in found.path.parent.iterdir() if path.is_dir()}
    assert folders == {found.path.name}


def test_processes_at_once_make_one(nano: Path) -> None:
    code = (
        "from zimage_runner.weights.prepared import prepare, prepared\n"
        "from zimage_runner.weights.find.resolve import resolve\n"
        "from zimage_runner.model import *\n"
        f"m = Model(name='my model', source=Source.local, path={str(nano)!r})\n"
        "found = prepare.build(resolve(m), m)\n"
        "print(found.path, prepared.component_file(found.path, 'vae').stat().st_ino)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, encoding="utf-8")
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said[0] == said[1] != ""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Preparing 0.6 GB of fp32 takes no more memory than a few pieces of 32 MB, above what importing torch takes."""
    assert 0 < megabytes_to_write(tmp_path) < 400


def test_odd_dtypes_are_refused(nano: Path) -> None:
    file = nano / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"decoder.conv_in.bias": tensors["decoder.conv_in.bias"].double()}, file)
    with pytest.raises(UserError, match=r"tensor 'decoder\.conv_in\.bias' is F64: only F32, BF16, F16 can be prepared"):
        prepare.build(Checkpoint(path=nano, revision="r", digest="d" * 64), local(nano))


def test_published_text_encoder_names_lose_their_prefix() -> None:
    stored = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    stored += [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(11) for p in "qkvo"]
    tensors = prepared_tensors("text_encoder", stored, num_hidden_layers=11)
    assert [tensor.name for tensor in tensors][:3] == [
        "layers.0.self_attn.o_proj.weight", "layers.0.self_attn.qkv_proj.weight", "layers.1.self_attn.o_proj.weight",
    ]  # fmt: skip
    assert tensors[-1].sources == tuple(f"model.layers.9.self_attn.{p}_proj.weight" for p in "qkv")


@given(st.lists(st.sampled_from(["to_q", "to_k", "to_v", "norm_q", "to_out.0"]), unique=True))
def test_only_complete_groups_are_fused(parts: list[str]) -> None:
    names = [f"layers.0.attention.{part}.weight" for part in parts]
    tensors = prepared_tensors("transformer", names)
    assert sorted(source for tensor in tensors for source in tensor.sources) == sorted(names)
    assert any(len(tensor.sources) == 3 for tensor in tensors) == ({"to_q", "to_k", "to_v"} <= set(parts))
