"""Caches of other projects come in exactly; what is broken in them is quarantined."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import InputError, Interrupted
from detok_pipe.latents.import_cache import import_cache, open_foreign
from detok_pipe.latents.loader import LatentLoader
from detok_pipe.latents.stats import LatentStats
from detok_pipe.latents.verify import verify

COUNT = 21
RNG = np.random.default_rng(0)
MEAN = RNG.standard_normal((2, COUNT, 4, 3, 2)).astype(np.float32)
LOGVAR = RNG.uniform(-8, 0, (2, COUNT, 4, 3, 2)).astype(np.float32)
LABELS = np.arange(COUNT) % 3


def tokens(values):
    """(R, C, h, w) -> (R, N, C)."""
    return values.reshape(len(values), 4, 6).transpose(0, 2, 1)


def mar(root):
    for i in range(COUNT):
        folder = root / f"n{LABELS[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        both = [np.concatenate([MEAN[v, i], LOGVAR[v, i]]) for v in range(2)]
        np.savez(folder / f"{i:03d}.JPEG.npz", moments=both[0], moments_flip=both[1])


def lightningdit(root):
    root.mkdir()
    for k, rows in enumerate(np.array_split(np.arange(COUNT), 4)):
        save_file(
            {"latents": MEAN[0, rows], "latents_flip": MEAN[1, rows], "labels": LABELS[rows]},
            root / f"latents_rank00_shard{k:03d}.safetensors",
        )


def edm2(root):
    listed = []
    for i in range(COUNT):
        name = f"{i // 10:05d}/img-mean-std-{i:08d}.npy"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, np.concatenate([MEAN[0, i], np.exp(0.5 * LOGVAR[0, i])]))
        listed.append([name, int(LABELS[i])])
    (root / "dataset.json").write_text(json.dumps({"labels": listed}))


def quarantine_reasons(cache):
    lines = (cache / "quarantine.jsonl").read_bytes().splitlines()
    return [json.loads(line)["reason"] for line in lines]


@pytest.mark.parametrize("make", [mar, lightningdit, edm2])
@pytest.mark.parametrize("store_format", ["webdataset", "zarr"])
def test_rows_come_in_exactly(tmp_path, make, store_format):
    make(tmp_path / "theirs")
    import_cache(
        tmp_path / "theirs",
        tmp_path / "ours",
        stats=LatentStats.identity(4),
        store_format=store_format,
        shards=3,
        rows_per_record=4,
    )
    assert verify(tmp_path / "ours") == []
    cache = open_cache(tmp_path / "ours")
    assert (cache.num_rows, cache.grid, cache.channels, cache.num_classes) == (COUNT, (3, 2), 4, 3)
    paths = [
        json.loads(x)["path"]
        for x in (tmp_path / "ours" / "sources.jsonl").read_text().split("\n")[:-1]
    ]
    number = {"mar": lambda p: int(p[3:6]), "edm2": lambda p: int(p[-12:-4])}.get(make.__name__)
    ids = [number(paths[i]) if number else i for i in cache.source_ids]
    assert sorted(ids) == list(range(COUNT))
    np.testing.assert_array_equal(cache.labels, LABELS[ids])
    rows = np.arange(COUNT)
    for v, view in enumerate(cache.views):
        wanted = tokens(MEAN[v, ids]).astype(np.float16)
        np.testing.assert_array_equal(cache.rows(rows, view), wanted)
        if make is not lightningdit:
            std = tokens(np.exp(0.5 * LOGVAR[v, ids])).astype(np.float16)
            np.testing.assert_array_equal(cache.rows(rows, view, "std"), std)
    assert cache.views == (("image",) if make is edm2 else ("image", "mirror"))
    assert cache.has_posterior == (make is not lightningdit)
    loader = LatentLoader(cache, 4, 0, sample_posterior=cache.has_posterior)
    assert next(iter(loader)).z.shape == (4, 6, 4)


def test_broken_items_are_quarantined_and_their_own_statistics_used(tmp_path):
    mar(tmp_path / "theirs")
    files = sorted((tmp_path / "theirs").rglob("*.npz"))
    files[2].write_bytes(files[2].read_bytes()[:50])
    np.savez(files[3], moments=np.zeros((8, 3, 2), np.float32))
    np.savez(files[4], moments=np.zeros((8, 9, 9), np.float32), moments_flip=np.zeros((8, 9, 9)))
    np.savez(files[5], moments=np.array([{}], object), moments_flip=np.zeros((8, 3, 2)))
    nan = np.full((8, 3, 2), np.nan, np.float32)
    np.savez(files[6], moments=nan, moments_flip=nan)
    manifest = import_cache(tmp_path / "theirs", tmp_path / "ours", rows_per_record=4)
    assert (manifest.count, manifest.quarantined) == (COUNT - 5, 5)
    reasons = quarantine_reasons(tmp_path / "ours")
    for reason, part in zip(
        reasons,
        ["zip", "moments_flip", "shape (4, 9, 9)", "allow_pickle", "not finite"],
        strict=True,
    ):
        assert part in reason
    cache = open_cache(tmp_path / "ours")
    written = np.concatenate([cache.rows(range(cache.num_rows), v) for v in cache.views])
    np.testing.assert_allclose(written.reshape(-1, 4).std(0, dtype=np.float64), 1, atol=1e-3)
    assert verify(tmp_path / "ours") == []


@pytest.mark.parametrize(
    ("save", "position", "reason"),
    [
        (np.savez_compressed, "data", "while decompressing"),  # a block of a type that there is not
        (np.savez, "method", "NotImplementedError"),
        (np.savez, "encrypted", "RuntimeError"),
    ],
)
def test_flipped_bits_cost_one_item(tmp_path, save, position, reason):
    mar(tmp_path / "theirs")
    bad = sorted((tmp_path / "theirs").rglob("*.npz"))[2]
    with np.load(bad) as arrays:
        save(bad, **arrays)
    data = bytearray(bad.read_bytes())
    directory = data.index(b"PK\x01\x02")
    first = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    place, bits = {
        "data": (first, 0b110),
        "method": (directory + 10, 0b1000000),
        "encrypted": (directory + 8, 1),
    }[position]
    data[place] |= bits
    bad.write_bytes(data)
    manifest = import_cache(tmp_path / "theirs", tmp_path / "ours", rows_per_record=4)
    assert manifest.quarantined == 1
    assert reason in quarantine_reasons(tmp_path / "ours")[0]


def test_an_interruption_is_no_bad_item(tmp_path):
    mar(tmp_path / "theirs")
    foreign = open_foreign(tmp_path / "theirs")

    def interrupted(i):
        raise Interrupted("terminated", 15)

    with pytest.raises(Interrupted):
        dataclasses.replace(foreign, read=interrupted).item(0)


def test_shards_of_bfloat16(tmp_path):
    mean = {n: torch.from_numpy(MEAN[v]) for v, n in enumerate(("latents", "latents_flip"))}
    tensors = {name: values.bfloat16() for name, values in mean.items()}
    (tmp_path / "theirs").mkdir()
    save_torch_file(
        {**tensors, "labels": torch.from_numpy(LABELS)}, tmp_path / "theirs" / "x.safetensors"
    )
    import_cache(tmp_path / "theirs", tmp_path / "ours", stats=LatentStats.identity(4))
    cache = open_cache(tmp_path / "ours")
    wanted = tokens(tensors["latents"].float().numpy()[cache.source_ids]).astype(np.float16)
    np.testing.assert_array_equal(cache.rows(np.arange(COUNT)), wanted)


@pytest.mark.parametrize("label", [-7, 2**31 - 1, 2**33, 2**40, 0.5])
@pytest.mark.parametrize("make", [lightningdit, edm2])
def test_labels_that_are_none(tmp_path, make, label):
    make(tmp_path / "theirs")
    if make is edm2:
        file = tmp_path / "theirs" / "dataset.json"
        listed = json.loads(file.read_text())["labels"]
        file.write_text(json.dumps({"labels": [*listed[:-1], [listed[-1][0], label]]}))
    else:
        file = tmp_path / "theirs" / "latents_rank00_shard003.safetensors"
        latents = {"latents": MEAN[0, :2], "latents_flip": MEAN[1, :2]}
        save_file({**latents, "labels": np.array([0, label])}, file)
    # In a shard, a label of 0.5 makes a float of the first one too.
    with pytest.raises(InputError, match=rf"{file.name}: ({label}|0\.0) is no label; .* from -1"):
        import_cache(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_shard_without_rows(tmp_path):
    zero = np.zeros((), np.float32)
    save_file(
        {"latents": zero, "latents_flip": zero, "labels": np.zeros(1, int)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(InputError, match=r"x\.safetensors is no shard of latents: IndexError"):
        import_cache(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize("make", [mar, edm2])
def test_names_that_are_no_unicode(tmp_path, make):
    theirs = tmp_path / "theirs"
    make(theirs)
    first = min(p for p in theirs.rglob("*.*") if p.suffix != ".json")
    odd = os.fsdecode(b"\xff") + first.name
    first.rename(first.with_name(odd))
    if make is mar:
        first.parent.rename(theirs / os.fsdecode(b"c\xe9"))
        next(theirs.rglob(odd)).write_bytes(b"")
    manifest = import_cache(theirs, tmp_path / "ours", rows_per_record=4)
    assert verify(tmp_path / "ours") == []
    names = (tmp_path / "ours" / "sources.jsonl").read_text()
    assert json.dumps("\\xff" + first.name)[1:-1] in names
    if make is mar:
        assert "c\\xe9" in manifest.class_names
        assert manifest.quarantined == 1


def test_nothing_to_import(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        import_cache(tmp_path / "none", tmp_path / "ours")
    with pytest.raises(InputError, match=r"neither \.npz files"):
        import_cache(tmp_path, tmp_path / "ours")
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(InputError, match="none of 1 items can be read"):
        import_cache(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_processes_share_the_work(tmp_path):
    mar(tmp_path / "theirs")
    settings = {"shards": 3, "rows_per_record": 4}
    done = [
        import_cache(tmp_path / "theirs", tmp_path / "two", rank=r, world=2, **settings)
        for r in (1, 0)
    ]
    assert done[0] is None
    assert done[1] == import_cache(tmp_path / "theirs", tmp_path / "one", **settings)
