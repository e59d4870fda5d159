"""Sample stores: the same samples whatever the processes, batches and interruptions."""

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from score_making import MODEL, QUICK, Rank, tiny_generator, tiny_tokenizer

from detok_pipe.generators.backbone import LabelEmbedding
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError, MismatchError, NonFiniteError
from detok_pipe.pipelines import sample as module
from detok_pipe.pipelines.preview import write_preview
from detok_pipe.pipelines.sample import labels_of, sample, sampled_classes, sampling_of


def test_same_samples_from_any_number_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = tiny_generator(tmp_path)
    settings = {"count": 22, "sampling": QUICK, "rows_per_shard": 5, "batch_size": 3}
    whole = sample(generator, tmp_path / "one", **settings, quiet=True)
    for rank in (2, 0, 1):
        parts = sample(generator, tmp_path / "three", processes=Rank(rank, 3), **settings)
        assert ("sample: 10/10 samples" in capsys.readouterr().err) == (rank == 0)
    assert whole.complete
    assert parts.complete
    np.testing.assert_array_equal(whole.read(0, 22), parts.read(0, 22))


def test_interrupted_sampling_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    generator = tiny_generator(tmp_path)
    settings = {"count": 20, "sampling": QUICK, "rows_per_shard": 4, "quiet": True}
    whole = sample(generator, tmp_path / "whole", **settings)
    first = sample(generator, tmp_path / "again", stop=8, **settings)
    assert first.missing() == [2, 3, 4]
    (tmp_path / "again" / "00001.safetensors").unlink()
    again = sample(generator, tmp_path / "again", **settings)
    np.testing.assert_array_equal(whole.read(0, 20), again.read(0, 20))


def test_samples_follow_from_their_numbers(tmp_path: Path) -> None:
    """Neither the batch size nor where a store begins changes a sample."""
    generator = tiny_generator(tmp_path)
    settings = {"sampling": QUICK, "quiet": True}
    whole = sample(generator, tmp_path / "a", count=12, batch_size=12, **settings).read(0, 12)
    later = sample(generator, tmp_path / "b", count=6, first=6, batch_size=2, **settings)
    np.testing.assert_allclose(whole[6:], later.read(0, 6), atol=2e-3)
    assert np.abs(whole[:6].astype(float) - whole[6:]).mean() > 0.1
    other = sample(generator, tmp_path / "c", count=12, seed=1, **settings).read(0, 12)
    assert np.abs(whole.astype(float) - other).mean() > 0.1


def test_scales_share_noise(tmp_path: Path) -> None:
    generator = tiny_generator(tmp_path)
    rows = [
        sample(
            generator,
            tmp_path / f"{scale}",
            count=6,
            sampling=sampling_of(generator, guidance_scale=scale, steps=3, method="euler"),
            quiet=True,
        )
        .read(0, 6)
        .astype(float)
        for scale in (1.0, 1.05)
    ]
    between = np.abs(rows[0] - rows[1]).mean()
    assert 0 < between < 0.05 * np.abs(rows[0] - rows[0][::-1]).mean()


def test_other_settings_are_another_store(tmp_path: Path) -> None:
    out = tmp_path / "store"
    settings = {"count": 4, "sampling": QUICK, "quiet": True}
    sample(tiny_generator(tmp_path), out, **settings)
    with pytest.raises(MismatchError, match="weights"):
        sample(tiny_generator(tmp_path, seed=9), out, **settings)
    with pytest.raises(MismatchError, match="guidance_scale"):
        sample(tiny_generator(tmp_path), out, count=4, sampling=Sampling(), quiet=True)
    with pytest.raises(MismatchError, match="seed"):
        sample(tiny_generator(tmp_path), out, seed=3, **settings)


def test_weights_are_cast_once_and_states_stay_fp32(tmp_path: Path) -> None:
    """bf16: near the samples of fp32, and the caller's network is left as it was."""
    generator = tiny_generator(tmp_path)
    settings = {"count": 8, "sampling": QUICK, "quiet": True}
    exact, low = (
        sample(generator, tmp_path / precision, precision=precision, **settings)
        .read(0, 8)
        .astype(float)
        for precision in ("fp32", "bf16")
    )
    assert all(p.dtype == torch.float32 for p in generator.model.parameters())
    assert 0 < np.linalg.norm(low - exact) < 0.02 * np.linalg.norm(exact)


def test_compiled_samples_are_the_same(tmp_path: Path) -> None:
    settings = {"count": 3, "sampling": QUICK, "precision": "fp32", "quiet": True}
    plain = sample(tiny_generator(tmp_path), tmp_path / "a", **settings)
    compiled = sample(tiny_generator(tmp_path), tmp_path / "b", compiled=True, **settings)
    np.testing.assert_allclose(compiled.read(0, 3), plain.read(0, 3), atol=2e-3)


def test_compiled_networks_do_not_outlive_their_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, copies = module._prepared, []

    def noted(*arguments: Any) -> Any:
        model = prepared(*arguments)
        copies.append(weakref.ref(model))
        return model

    monkeypatch.setattr(module, "_prepared", noted)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    generator = tiny_generator(tmp_path)
    gc.disable()
    try:
        for seed in range(2):
            out = tmp_path / f"{seed}"
            sample(generator, out, count=1, sampling=QUICK, seed=seed, compiled=True, quiet=True)
    finally:
        gc.enable()
    assert [copy() for copy in copies] == [None, None]


def test_failure_to_compile_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object) -> None:
        raise OSError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    with pytest.raises(ConfigError, match=r"--compile does not work here: .*no compiler here\. It"):
        sample(
            tiny_generator(tmp_path),
            tmp_path / "x",
            count=1,
            sampling=QUICK,
            compiled=True,
            quiet=True,
        )


def test_preview(tmp_path: Path) -> None:
    """Few classes stand in rows of their own, many in the order of the samples."""
    generator, tokenizer = tiny_generator(tmp_path), tiny_tokenizer()
    generator.record["latents"]["num_classes"] = 10
    generator.model.y_embedder = LabelEmbedding(10, MODEL["width"])
    sizes = {}
    for name, classes in (("few", [0, 2]), ("many", list(range(10)))):
        store = sample(
            generator, tmp_path / name, count=11, classes=classes, sampling=QUICK, quiet=True
        )
        picture = write_preview(store, tokenizer)
        assert picture == tmp_path / name / "preview.png"
        with Image.open(picture) as image:
            sizes[name] = image.size
    # Two rows both times: of 6 and 5 samples of a class; of 8 and 3 samples in order.
    assert sizes["few"][1] == sizes["many"][1]
    assert sizes["few"][0] < sizes["many"][0]


def test_labels_are_balanced_and_those_trained_on(tmp_path: Path) -> None:
    assert labels_of(np.arange(7), [4, 2, 9]).tolist() == [4, 2, 9, 4, 2, 9, 4]
    assert sampled_classes(tiny_generator(tmp_path)) == [0, 1, 2]
    assert sampled_classes(tiny_generator(tmp_path, classes=["c", "a"])) == [2, 0]
    unlabelled = tiny_generator(tmp_path)
    unlabelled.record["latents"]["num_classes"] = 0
    assert sampled_classes(unlabelled) == [-1]
    sample(unlabelled, tmp_path / "u", count=2, sampling=QUICK, quiet=True)


def test_broken_samples_and_bad_requests(tmp_path: Path) -> None:
    generator = tiny_generator(tmp_path)
    with pytest.raises(ConfigError, match="at least 1"):
        sample(generator, tmp_path / "x", count=0, sampling=QUICK)
    with pytest.raises(ConfigError, match=r"less than 2\^63"):
        sample(generator, tmp_path / "x", count=2, first=2**63 - 1, sampling=QUICK)
    with pytest.raises(ConfigError, match="class 3"):
        sample(generator, tmp_path / "x", count=2, sampling=QUICK, classes=[3])
    with pytest.raises(ConfigError, match="guidance_scale"):
        sampling_of(generator, guidance_scale=-1.0)
    for parameter in generator.model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with pytest.raises(NonFiniteError, match="2 of 2 samples, first number 0, are NaN"):
        sample(generator, tmp_path / "nan", count=2, sampling=QUICK, quiet=True)
