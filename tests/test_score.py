"""Streaming scores: equal to a score of all images at once, resumable, with every setting."""

import dataclasses
import json
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from safetensors.numpy import save
from score_making import QUICK, TinyFeatures, tiny_generator, tiny_reference, tiny_tokenizer
from torch import Tensor, nn

from detok_pipe.evaluation.frechet import FrechetReference, feature_stats
from detok_pipe.evaluation.kernel_distance import kernel_distance
from detok_pipe.latents.errors import (
    CacheError,
    InputError,
    MismatchError,
    NonFiniteError,
)
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.latents.stats import LatentStats
from detok_pipe.pipelines.sample import sample
from detok_pipe.pipelines.score import (
    append_record,
    check_comparable,
    metric_names,
    score,
)
from detok_pipe.pipelines.stored_features import StoredFeatures, decode_latents


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    generator = tiny_generator(tmp_path)
    return sample(
        generator, tmp_path / "samples", count=40, sampling=QUICK, rows_per_shard=8, quiet=True
    )


def test_stream_equals_all_at_once(store: SampleStore, tmp_path: Path) -> None:
    tokenizer, reference = tiny_tokenizer(), tiny_reference(tmp_path / "ref.npz")
    scores, record = score(store, tokenizer, TinyFeatures(), reference, batch_size=3, quiet=True)
    z = torch.from_numpy(store.read(0, 40).astype(np.float32))
    pixels = tokenizer.model.decode(store.stats.denormalize(z)) * 127.5 + 127.5
    images = pixels.clamp(0, 255).round().to(torch.uint8)
    assert images.float().std() > 5
    features = TinyFeatures()(images)["features"].numpy()
    expected = FrechetReference(feature_stats(reference.features)).score(features)
    fd = scores.metrics["FD-EffLite2@32"]
    assert fd.value == pytest.approx(expected.value, rel=1e-5)
    assert fd.error == pytest.approx(expected.standard_error, rel=1e-5)
    kernel = kernel_distance(features, reference.features)
    assert scores.metrics["KD-EffLite2@32"].value == pytest.approx(kernel.value, rel=1e-4)
    assert set(scores.metrics) == {m.name for m in metric_names("FD-EffLite2@32").values()}
    assert record["settings"]["samples"]["seed"] == 0
    assert record["settings"]["count"] == 40
    assert record["settings"]["pixels"] == "rounded to uint8"


def test_features_are_computed_once(store: SampleStore, tmp_path: Path) -> None:
    tokenizer, reference = tiny_tokenizer(), tiny_reference(tmp_path / "ref.npz")
    extractor = TinyFeatures()
    part, _ = score(store, tokenizer, extractor, reference, count=16, quiet=True)
    assert extractor.images == 16
    whole, _ = score(store, tokenizer, extractor, reference, quiet=True)
    assert extractor.images == 40
    assert part.frechet.count == 16
    again, _ = score(store, tokenizer, extractor, reference, count=16, quiet=True)
    assert extractor.images == 40
    assert again.metrics == part.metrics
    assert whole.metrics != part.metrics
    tuned = tiny_tokenizer(decoder="another")
    score(store, tuned, extractor, reference, quiet=True)
    assert extractor.images == 80


def test_damaged_features_are_named(store: SampleStore, tmp_path: Path) -> None:
    tokenizer, extractor = tiny_tokenizer(), TinyFeatures()
    stored = StoredFeatures(store, tokenizer, extractor)
    stored.compute(quiet=True)
    file = stored.path / "shard-00002.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CacheError, match=r"shard-00002\.npz is missing or damaged"):
        stored.read()


def test_few_samples_are_noted(store: SampleStore, tmp_path: Path) -> None:
    reference = tiny_reference(tmp_path / "ref.npz")
    _, record = score(store, tiny_tokenizer(), TinyFeatures(), reference, count=6, quiet=True)
    assert record["metrics"]["FD-EffLite2@32"]["error"] is None
    assert "6 samples are not more than the 6 feature dimensions" in record["notes"][0]


def test_what_does_not_belong_together(store: SampleStore, tmp_path: Path) -> None:
    reference, extractor = tiny_reference(tmp_path / "ref.npz"), TinyFeatures()
    with pytest.raises(MismatchError, match="fingerprint is 'other'"):
        score(store, tiny_tokenizer(fingerprint="other"), extractor, reference, quiet=True)
    other = tiny_reference(tmp_path / "32.npz", size=32)
    with pytest.raises(MismatchError, match="32 pixels a side"):
        score(store, tiny_tokenizer(), extractor, other, quiet=True)
    other = tiny_reference(tmp_path / "fid.npz", name="FID")
    with pytest.raises(MismatchError, match="was made for FID"):
        score(store, tiny_tokenizer(), extractor, other, quiet=True)
    with pytest.raises(InputError, match="has 40 samples; 41"):
        score(store, tiny_tokenizer(), extractor, reference, count=41, quiet=True)
    assert extractor.images == 0


def test_missing_damaged_and_nan_shards_are_named(store: SampleStore, tmp_path: Path) -> None:
    reference = tiny_reference(tmp_path / "ref.npz")

    def scored() -> None:
        score(store, tiny_tokenizer(), TinyFeatures(), reference, quiet=True)

    shard = store.path / "00001.safetensors"
    rows, whole = store.read_shard(1), shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CacheError, match=r"00001\.safetensors: its checksum is wrong"):
        scored()
    rows[5] = np.nan  # no writer of ours would
    checksum = f"{store.digest} crc32c {google_crc32c.value(rows.tobytes())}"
    shard.write_bytes(save({"z": rows}, metadata={"store": checksum}))
    with pytest.raises(NonFiniteError, match="row 13 holds NaN"):
        scored()
    shard.write_bytes(whole)
    (store.path / "00004.safetensors").unlink()
    with pytest.raises(CacheError, match="1 of 5 shards"):
        scored()


def test_only_the_scale_may_differ_in_a_curve(store: SampleStore, tmp_path: Path) -> None:
    reference = tiny_reference(tmp_path / "ref.npz")
    _, record = score(store, tiny_tokenizer(), TinyFeatures(), reference, quiet=True)
    path = tmp_path / "scores.jsonl"
    record["notes"] = ["a name\u2028of two lines"]
    for _ in range(2):
        append_record(path, record)
        with path.open("a") as file:
            file.write('{"cut sho')
    one, two = (json.loads(line) for line in path.read_bytes().splitlines()[::2])
    two["settings"]["samples"]["sampling"]["guidance_scale"] = 9.0
    check_comparable([one, two])
    two["settings"]["samples"]["sampling"]["temperature"] = 0.5
    with pytest.raises(MismatchError, match=r"samples.sampling.temperature is 1\.0 in one and 0"):
        check_comparable([one, two])


def test_decoding_rounds_and_clamps() -> None:
    class Pixels(nn.Linear):  # its parameters say where it computes
        def decode(self, z: Tensor) -> Tensor:
            return z.transpose(1, 2).unflatten(2, (2, 2))

    tokenizer = dataclasses.replace(tiny_tokenizer(), model=Pixels(1, 1))
    stats = LatentStats(np.ones(3), np.full(3, 2.0))
    # (B, N, C): four pixels of three channels; the decoder gets 1 + 2 z.
    z = [[[-1.0, 0.0, -0.5], [-1.25, 1.0, -0.25], [-0.625, -0.75, -0.375], [-99, 99, -0.125]]]
    images = decode_latents(tokenizer, stats, np.array(z, np.float16))
    assert images.dtype == torch.uint8
    # 127.5 + 127.5 (1 + 2 z), where it lies between 0 and 255: 0, -63.75, 95.625, ...
    assert images.tolist() == [
        [
            [[0, 0], [96, 0]],
            [[255, 255], [64, 255]],
            [[128, 191], [159, 223]],  # 127.5, 191.25, 159.375, 223.125
        ]
    ]
