"""The same samples whatever the number of processes and restarts; each once an epoch."""

import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from cache_making import plan_of, write_cache

from detok_pipe.latents import loader as loader_module
from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import CacheError, ConfigError, MismatchError
from detok_pipe.latents.loader import LatentLoader
from detok_pipe.latents.noise import Noise

MODES = ("resident", "block")
COUNT = 100


@pytest.fixture(scope="module", params=["webdataset", "zarr"])
def cache(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "c"
    write_cache(path, plan_of(COUNT, format=request.param, rows_per_shard=16), bad=(5, 50))
    return open_cache(path)


def take(loader, batches):
    stream = iter(loader)
    found = [next(stream) for _ in range(batches)]
    stream.close()
    return found


def columns(batches):
    """Batches of any number of processes as rows sorted by position."""
    ids = torch.cat([b.ids for b in batches])
    order = ids.argsort()
    return [torch.cat([getattr(b, n) for b in batches])[order] for n in ("ids", "rows", "z")]


@pytest.mark.parametrize("mode", MODES)
def test_same_global_batches_for_any_number_of_processes(cache, mode):
    alone = take(LatentLoader(cache, 16, 3, mode=mode), 9)
    for world in (2, 4, 8):
        ranks = [
            take(LatentLoader(cache, 16, 3, rank=r, world=world, mode=mode), 9)
            for r in range(world)
        ]
        for step, whole in enumerate(alone):
            parts = [batches[step] for batches in ranks]
            assert {len(p.ids) for p in parts} == {16 // world}
            for one, many in zip(columns([whole]), columns(parts), strict=True):
                assert torch.equal(one, many)


@pytest.mark.parametrize("store_format", ["webdataset", "zarr"])
def test_an_epoch_reads_only_the_files_that_it_uses(tmp_path, store_format):
    write_cache(tmp_path / "c", plan_of(COUNT, format=store_format, rows_per_shard=16))
    cache = open_cache(tmp_path / "c")
    wanted = {extent.file for extent in cache.manifest.arrays["image/mean"]}
    others = {e.file for extents in cache.manifest.arrays.values() for e in extents} - wanted
    loader = LatentLoader(cache, 20, 3, views=("image",), sample_posterior=False, mode="resident")
    assert cache.reader.count == COUNT  # maps the files
    for file in others:
        (cache.path / file).unlink()
    rows = torch.cat([batch.rows for batch in take(loader, 5)])
    assert sorted(rows.tolist()) == list(range(COUNT))
    assert len(others) == (1 if store_format == "webdataset" else 3) * len(wanted)


@pytest.mark.parametrize("mode", MODES)
def test_restart_at_any_position_and_with_other_processes(cache, mode):
    whole = take(LatentLoader(cache, 8, 3, mode=mode), 20)
    for start in (0, 1, 11, 13):
        loader = LatentLoader(cache, 8, 3, mode=mode)
        take(loader, start)
        assert loader.samples_consumed == 8 * start
        state = loader.state()
        later = []
        for rank in range(2):
            again = LatentLoader(cache, 8, 3, rank=rank, world=2, mode=mode)
            again.load_state(state)
            later.append(take(again, 20 - start))
        for step, pair in enumerate(zip(*later, strict=True)):
            for one, many in zip(columns([whole[start + step]]), columns(pair), strict=True):
                assert torch.equal(one, many)


@pytest.mark.parametrize("mode", MODES)
def test_each_row_once_an_epoch_across_straddling_batches(cache, mode):
    n = cache.num_rows
    rows = torch.cat([b.rows for b in take(LatentLoader(cache, 7, 0, mode=mode), 3 * n // 7 + 1)])
    for epoch in range(3):
        assert sorted(rows[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_what_a_batch_holds(cache):
    loader = LatentLoader(cache, 64, 9)
    views = set()
    for batch in take(loader, 3):
        assert batch.z.dtype == torch.float32
        assert batch.condition.dtype == batch.ids.dtype == batch.rows.dtype == torch.int64
        assert batch.condition.tolist() == cache.labels[batch.rows.numpy()].tolist()
        noise = Noise(9, batch.ids)
        eps = noise.normal("posterior", batch.z.shape[1:])
        for i, u in enumerate(noise.uniform("view", ()).tolist()):
            view = cache.views[int(u * 2)]
            views.add(view)
            row = batch.rows[i : i + 1].numpy()
            mean = torch.from_numpy(cache.rows(row, view, "mean")).float()
            std = torch.from_numpy(cache.rows(row, view, "std")).float()
            torch.testing.assert_close(batch.z[i : i + 1], mean + std * eps[i : i + 1])
    assert views == {"image", "mirror"}


def test_mean_of_one_view_alone(cache):
    loader = LatentLoader(cache, 32, 0, views=("mirror",), sample_posterior=False)
    (batch,) = take(loader, 1)
    expected = cache.rows(batch.rows.numpy(), "mirror").astype(np.float32)
    np.testing.assert_array_equal(batch.z.numpy(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_subset(cache, mode):
    rows = np.flatnonzero(cache.labels == 1)
    loader = LatentLoader(cache, 5, 0, subset=rows, mode=mode)
    assert loader.epoch_length == len(rows)
    seen = torch.cat([b.rows for b in take(loader, len(rows))])
    assert sorted(set(seen.tolist())) == rows.tolist()
    assert torch.bincount(seen)[rows].tolist() == [5] * len(rows)
    with pytest.raises(MismatchError, match="its subset was"):
        LatentLoader(cache, 5, 0, mode=mode).load_state(loader.state())


def test_state_of_something_else_is_refused(cache):
    state = LatentLoader(cache, 8, 3).state()
    for field, value in (("seed", 4), ("cache", "0" * 64), ("order_version", 2), ("views", ["x"])):
        with pytest.raises(MismatchError, match=f"its {field} was"):
            LatentLoader(cache, 8, 3).load_state(state | {field: value})
    with pytest.raises(MismatchError, match="its mode was"):
        LatentLoader(cache, 8, 3, mode="block").load_state(state)


def test_auto_mode_follows_memory_but_keeps_a_resumed_order(cache, monkeypatch):
    assert LatentLoader(cache, 8, 3).mode == "resident"
    state = LatentLoader(cache, 8, 3, mode="block").state()
    monkeypatch.setattr(loader_module, "memory_bytes", lambda: 1000)
    assert LatentLoader(cache, 8, 3).mode == "block"
    monkeypatch.undo()
    loader = LatentLoader(cache, 8, 3)
    loader.load_state(state)
    assert loader.mode == "block"


def test_bad_settings(cache):
    for settings in (
        {"global_batch": 0},
        {"global_batch": 10, "world": 4},
        {"rank": 1},
        {"subset": np.array([], np.int64)},
        {"subset": np.array([0, 0])},
        {"subset": np.array([0, COUNT])},
        {"views": ()},
        {"world": 3, "global_batch": 9, "mode": "block"},
    ):
        with pytest.raises(ConfigError):
            LatentLoader(cache, **({"global_batch": 8, "seed": 0} | settings))
    with pytest.raises(CacheError, match="no side/mean"):
        LatentLoader(cache, 8, 0, views=("side",))


def test_mean_only_cache_needs_no_posterior(tmp_path):
    plan = plan_of(8, fields=("mean",), views=("image",))
    write_cache(tmp_path / "c", plan)
    cache = open_cache(tmp_path / "c")
    with pytest.raises(ConfigError, match="sample_posterior off"):
        LatentLoader(cache, 4, 0)
    assert take(LatentLoader(cache, 4, 0, sample_posterior=False), 1)[0].z.shape == (4, 6, 4)


def test_batch_larger_than_the_cache_and_one_row(tmp_path):
    write_cache(tmp_path / "c", plan_of(1))
    batches = take(LatentLoader(open_cache(tmp_path / "c"), 6, 0), 2)
    assert batches[1].rows.tolist() == [0] * 6
    assert len({tuple(z.flatten().tolist()) for b in batches for z in b.z}) == 12


def test_a_failed_read_reaches_the_training_loop(cache, monkeypatch):
    def broken(*_):
        raise OSError("disk on fire")

    loader = LatentLoader(cache, 8, 0)
    monkeypatch.setattr(type(cache.reader), "read", broken)
    with pytest.raises(OSError, match="on fire"):
        next(iter(loader))


def test_cache_travels_to_worker_processes(cache):
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again.rows([3]), cache.rows([3]))


def test_far_positions(cache):
    (batch,) = take(LatentLoader(cache, 8, 0, position=8 * 10**11), 1)
    assert batch.ids.tolist() == list(range(8 * 10**11, 8 * 10**11 + 8))


def test_a_file_cut_short_while_in_use_ends_the_process_and_says_where(tmp_path):
    """Nothing can be raised there: the system stops whoever touches a page that is gone."""
    write_cache(tmp_path / "c")
    code = """if True:
        import faulthandler, resource, sys
        from detok_pipe.latents.cache import open_cache
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # this death needs no core dump
        faulthandler.enable()  # as the command line does
        cache = open_cache(sys.argv[1])
        cache.rows([0])
        for record in cache.manifest.files:
            open(cache.path / record.path, "r+b").truncate(0)
        cache.rows(range(cache.num_rows))
        print("went on")
    """
    command = [sys.executable, "-c", code, tmp_path / "c"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == -signal.SIGBUS
    assert b"Bus error" in done.stderr
    assert b"row_reader.py" in done.stderr
    assert done.stdout == b""


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_the_cpu(cache):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cpu = take(LatentLoader(cache, 16, 3), 12)
    gpu = take(LatentLoader(cache, 16, 3, device="cuda"), 12)
    for a, b in zip(cpu, gpu, strict=True):
        assert b.z.device.type == b.ids.device.type == "cuda"
        assert torch.equal(a.rows, b.rows.cpu())
        torch.testing.assert_close(a.z, b.z.cpu(), rtol=1e-5, atol=1e-5)


def test_a_deterministic_encoder_has_nothing_to_draw_from(tmp_path):
    encoder = {"fingerprint": "e" * 64, "posterior": False}
    plan = plan_of(8, fields=("mean",), views=("image",), encoder=encoder)
    write_cache(tmp_path / "c", plan)
    cache = open_cache(tmp_path / "c")
    drawn = take(LatentLoader(cache, 4, 0), 3)
    means = take(LatentLoader(cache, 4, 0, sample_posterior=False), 3)
    for one, other in zip(drawn, means, strict=True):
        assert torch.equal(one.z, other.z)
