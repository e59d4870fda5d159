"""Speed of scoring against the usual route: PNG files that torch-fidelity reads.

    python benchmarks/scoring.py                        # samples of 256 pixels, both networks
    python benchmarks/scoring.py --images 2000 --device cuda

Both routes decode the same latents with the same tokenizer and use the same feature network; the
tokenizer is small, because its time is the same on both sides. Our images/s are those of decode
and features. Inception has random weights. On a CPU expect 2 times with Inception, 4 times with
EfficientNet-lite2 at 128 pixels, and 10 times for the Fréchet step at 2048 dimensions.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy.linalg
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from detok_pipe.evaluation.features import FeatureExtractor, InceptionFeatures, load_extractor
from detok_pipe.evaluation.frechet import FeatureStats, FrechetReference, feature_stats
from detok_pipe.evaluation.reference import read_reference, write_reference
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.latents.stats import LatentStats
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.score import score
from detok_pipe.pipelines.stored_features import decode_latents
from detok_pipe.pipelines.trained import TrainedTokenizer
from detok_pipe.tokenizer.model import LDeTok

SIDE = 256


def tokenizer(device: torch.device) -> TrainedTokenizer:
    """A small l-DeTok whose pictures are smooth enough for PNG to be of a usual size."""
    torch.manual_seed(0)
    size = (64, 2, 2)
    model = LDeTok(image_size=SIDE, patch_size=16, channels=16, encoder=size, decoder=size)
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = model.to(device).eval().requires_grad_(False)
    return TrainedTokenizer(model, SIDE, {"fingerprint": "benchmark"}, "benchmark", Path("-"), 0)


def samples(path: Path, count: int) -> SampleStore:
    """Random latents."""
    store = SampleStore.open(
        path,
        {"tokenizer": "benchmark"},
        count=count,
        grid=(16, 16),
        channels=16,
        stats=LatentStats.identity(16),
        rows_per_shard=64,
    )
    rng = np.random.default_rng(0)
    for shard, start, stop in store.pending():
        store.commit(shard, rng.standard_normal((stop - start, 256, 16)))
    return store


def inception_state(folder: Path) -> Path:
    """Random weights in torch-fidelity's format."""

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            return None

    nothing = folder / "nothing.pth"
    torch.save({}, nothing)
    network = Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(nothing))
    path = folder / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


class Wrapped(FeatureExtractorBase):
    """Our small network under torch-fidelity's interface."""

    network: FeatureExtractor

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: dict[str, Any] = dict(self.network(images))
        return tuple(found[name] for name in self.features_list)


def through_files(
    store: SampleStore,
    decoder: TrainedTokenizer,
    folder: Path,
    batch: int,
    settings: dict[str, Any],
) -> None:
    """Decode to PNG files, then let torch-fidelity read and score them."""
    folder.mkdir()
    for start in range(0, store.count, batch):
        z = store.read(start, min(start + batch, store.count))
        pixels = decode_latents(decoder, store.stats, z).permute(0, 2, 3, 1).cpu().numpy()
        for number, image in enumerate(pixels, start):
            Image.fromarray(image).save(folder / f"{number:06d}.png")
    torch_fidelity.calculate_metrics(
        input1=str(folder), isc=True, batch_size=batch, verbose=False, cache=False, **settings
    )


def timed(function: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def one_round(
    root: Path,
    extractor: FeatureExtractor,
    settings: dict[str, Any],
    count: int,
    device: torch.device,
) -> tuple[float, float]:
    """Seconds of our route and of the route through files, on the same fresh samples."""
    decoder, batch, store = tokenizer(device), 32, samples(root / "samples", count)
    stats = feature_stats(np.random.default_rng(0).standard_normal((64, extractor.dimensions)))
    write_reference(
        root / "reference.npz",
        stats,
        extractor=extractor.name,
        settings={},
        image_size=SIDE,
        source={},
    )
    reference = read_reference(root / "reference.npz")
    _ = reference.frechet  # the reference's root is computed once a sweep
    processes = Processes(device=device)
    files = timed(lambda: through_files(store, decoder, root / "png", batch, settings))
    ours = timed(
        lambda: score(
            store,
            decoder,
            extractor,
            reference,
            batch_size=batch,
            processes=processes,
            quiet=True,
        )
    )
    # The other route has no Fréchet step here: it depends on the dimensions, not on the images.
    return ours - timed(lambda: reference.frechet.distance(stats)), files


def compare_routes(
    name: str,
    extractor: FeatureExtractor,
    theirs: dict[str, Any],
    *,
    count: int,
    repeats: int,
    device: torch.device,
) -> None:
    """Both routes in turn; prints images a second and the median ratio."""
    settings = {"cuda": device.type == "cuda", **theirs}
    rounds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(one_round(Path(folder), extractor, settings, count, device))
    ratios = [files / ours for ours, files in rounds]
    ours, files = (count / min(seconds) for seconds in zip(*rounds, strict=True))
    click.echo(
        f"{name:28} ours {ours:8.1f} images/s, files {files:8.1f}, "
        f"ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
    )


def compare_frechet(dimensions: int, repeats: int) -> None:
    """Our Fréchet step with a cached root against scipy.linalg.sqrtm."""
    rng = np.random.default_rng(0)
    spectrum = np.sqrt(np.arange(1, dimensions + 1) ** -0.8)

    def drawn() -> FeatureStats:
        return feature_stats(rng.standard_normal((2 * dimensions, dimensions)) * spectrum)

    one, two = drawn(), drawn()
    reference = FrechetReference(two)

    def by_sqrtm() -> float:
        root = scipy.linalg.sqrtm(one.sigma @ two.sigma).real
        difference = one.mu - two.mu
        return float(difference @ difference + np.trace(one.sigma + two.sigma - 2 * root))

    ours = min(timed(lambda: reference.distance(one)) for _ in range(repeats))
    start = time.perf_counter()
    distance = by_sqrtm()
    theirs = time.perf_counter() - start
    error = abs(reference.distance(one) / distance - 1)
    click.echo(
        f"Fréchet step, {dimensions:4} dimensions  ours {ours:.2f} s, sqrtm {theirs:.2f} s, "
        f"ratio {theirs / ours:.1f}, relative difference {error:.1e}"
    )


@click.command()
@click.option("--images", default=64, show_default=True, help="To score; the small network 4x.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dimensions", default=2048, show_default=True, help="Of the Fréchet step.")
def main(images: int, repeats: int, device: str, dimensions: int) -> None:
    """Print one line a comparison."""
    where = torch.device(device)
    with tempfile.TemporaryDirectory() as folder:
        weights = inception_state(Path(folder))
        compare_routes(
            "Inception",
            InceptionFeatures(torch.load(weights, weights_only=True), device=where),
            {
                "feature_extractor": "inception-v3-compat",
                "feature_extractor_weights_path": str(weights),
            },
            count=images,
            repeats=repeats,
            device=where,
        )
    Wrapped.network = load_extractor("efficientnet-lite2", resolution=128, device=where)
    torch_fidelity.register_feature_extractor("efficientnet-lite2-128", Wrapped)
    compare_routes(
        "EfficientNet-lite2 at 128",
        Wrapped.network,
        {"feature_extractor": "efficientnet-lite2-128"},
        count=4 * images,
        repeats=repeats,
        device=where,
    )
    compare_frechet(dimensions, repeats)


if __name__ == "__main__":
    main()
