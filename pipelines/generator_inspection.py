"""How a generator is looked at while it trains: sample grids, a distance and the loss on rows that
are held out, all of the EMA weights."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from detok_pipe.evaluation.features import load_extractor
from detok_pipe.evaluation.reference import find_reference
from detok_pipe.generators.generator import Generator
from detok_pipe.latents.cache import LatentCache
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.pipelines.config import Execution, GeneratorConfig
from detok_pipe.pipelines.ema import warn_of_early_average
from detok_pipe.pipelines.find_tokenizer import tokenizer_if_any
from detok_pipe.pipelines.held_out import held_out_loss
from detok_pipe.pipelines.inspection import (
    Inspection,
    check_scores_meet_checkpoints,
    samples_folder,
    save_picture,
)
from detok_pipe.pipelines.preview import preview_grid
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import say
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice
from detok_pipe.pipelines.sample import sample, sampled_classes, sampling_of
from detok_pipe.pipelines.score import score
from detok_pipe.pipelines.trained import TrainedGenerator, TrainedTokenizer

_CLASSES, _COLUMNS = 8, 8
_SAMPLER: dict[str, Any] = {"steps": 50, "method": "euler", "clip": 5.0}
_ITERATIONS = 64  # the published recipe's too, while it trains


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a generator in training is looked at with; nothing in it changes the training.

    Samples come from the published sampler with fewer steps and bounded predictions, which suit
    a network that has only begun to learn; ``sample`` and ``sweep-cfg`` give the final ones.

    Attributes:
        val_every: steps between two losses on held-out rows, where there are any.
        sample_every: steps between two sample grids; None: none.
        score_every: steps between two scores; None: none.
        tokenizer: decodes the samples; by default the one found beside the run or the cache.
        reference: statistics to score against: a file, or a published name.
        count: samples to score.
        features: network of the Fréchet distance. resolution: of efficientnet-lite2's input.
        weights_dir: where published weights lie.
    """

    val_every: int = 1000
    sample_every: int | None = None
    score_every: int | None = None
    tokenizer: TokenizerChoice | Path | None = None
    reference: Path | None = None
    count: int = 1000
    features: str = "inception"
    resolution: int | None = None
    weights_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("val_every", "sample_every", "score_every", "count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be positive, and is {value}")
        if self.score_every is not None and self.reference is None:
            raise ConfigError(
                "--score-every needs statistics of real images to compare with: name them with "
                "--score-ref (fid-stats makes them)"
            )
        if self.reference is not None and self.score_every is None:
            raise ConfigError(
                f"--score-ref {self.reference} is for scores, and none are asked for: give the "
                "steps between them with --score-every, or leave it out"
            )

    def check_keep_best(self, execution: Execution) -> None:
        """Check that there are scores to keep the best checkpoint by, where that is asked for.

        Raises:
            ConfigError: there are none, or they fall between the checkpoints.
        """
        if execution.keep_best != "score":
            return
        if self.score_every is None:
            raise ConfigError(
                "--keep-best score needs scores: ask for them with --score-every and --score-ref, "
                "or choose --keep-best loss"
            )
        check_scores_meet_checkpoints("--score-every", self.score_every, execution)


def inspections(
    preview: Preview,
    config: GeneratorConfig,
    cache: LatentCache,
    averaged: Callable[[], Generator],
    record: Mapping[str, Any],
    *,
    held_out: np.ndarray | None,
    accelerator: Accelerator,
    latents: Path,
    out: Path,
) -> list[Inspection]:
    """Losses on held-out rows ("val/loss"), sample grids, ``samples/step-XXXXXXXX-samples.png``,
    and scores, as ``preview`` says.

    Args:
        averaged: gives the EMA network, whole, in evaluation mode; every process calls it.
        record: what the run's ``config.json`` says of its configuration and latents.
        held_out: rows, or None. latents: the folder of ``cache``. out: the run directory.

    Raises:
        ConfigError, WeightsError: no tokenizer is found that could decode; only where scores, or
            a tokenizer, were asked for: else there are no grids.
        InputError, WeightsError: the reference or the feature network is not to be had.
    """
    found = []
    if held_out is not None:

        def measure(step: int) -> Mapping[str, float]:
            return {"val/loss": held_out_loss(averaged(), cache, held_out, config, accelerator)}

        found.append(Inspection(preview.val_every, measure))
    if preview.sample_every is None and preview.score_every is None:
        return found
    processes = Processes(accelerator)
    with processes.main_first():
        tokenizer, missing = tokenizer_if_any(
            cache.tokenizer,
            latents,
            out,
            named=preview.tokenizer,
            wanted=preview.score_every is not None,
            device=processes.device,
        )
    if tokenizer is None:
        say(f"no sample grids: {missing}", quiet=not processes.is_main)
        return found
    sampler = _Sampler(config, cache, averaged, record, out)
    if preview.sample_every is not None:
        found.append(_grids(preview.sample_every, sampler, tokenizer, accelerator))
    if preview.score_every is not None:
        found.append(_scores(preview, sampler, tokenizer, processes))
    return found


class _Sampler:
    """Draws samples of a network in training."""

    def __init__(
        self,
        config: GeneratorConfig,
        cache: LatentCache,
        averaged: Callable[[], Generator],
        record: Mapping[str, Any],
        out: Path,
    ) -> None:
        self.cache = cache
        self.out = out
        self._config = config
        self._averaged = averaged
        self._record = dict(record)

    def generator(self, step: int) -> TrainedGenerator:
        """The EMA network after ``step`` steps; every process calls."""
        config = self._config
        warn_of_early_average(step, config.ema, config.ema_warmup)
        return TrainedGenerator(
            model=self._averaged(),
            stats=self.cache.stats,
            grid=self.cache.grid,
            class_names=list(self.cache.class_names),
            identity={"step": step, "tokenizer": self.cache.tokenizer["fingerprint"]},
            record=self._record,
            path=self.out,
        )

    @contextmanager
    def samples(
        self,
        generator: TrainedGenerator,
        processes: Processes,
        count: int,
        classes: Sequence[int] | None = None,
    ) -> Iterator[SampleStore]:
        """A store of ``count`` samples, which is gone afterwards."""
        folder, model = samples_folder(self.out) / ".drawn", generator.model
        options = model.used(_SAMPLER | {"iterations": min(_ITERATIONS, model.tokens)})
        processes.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        yield sample(
            generator,
            folder,
            count=count,
            sampling=sampling_of(generator, **options),
            classes=classes,
            precision=self._config.precision,
            processes=processes,
            quiet=True,
        )
        processes.wait()
        processes.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))


def _grids(
    every: int, sampler: _Sampler, tokenizer: TrainedTokenizer, accelerator: Accelerator
) -> Inspection:
    def draw(step: int) -> Mapping[str, float]:
        generator = sampler.generator(step)
        if accelerator.is_main_process:
            alone = Processes(device=accelerator.device)
            classes = sampled_classes(generator)[:_CLASSES]
            with sampler.samples(generator, alone, _COLUMNS * len(classes), classes) as store:
                grid = preview_grid(store, tokenizer)
            save_picture(accelerator, sampler.out, "samples", grid, step)
        return {}

    return Inspection(every, draw)


def _scores(
    preview: Preview, sampler: _Sampler, tokenizer: TrainedTokenizer, processes: Processes
) -> Inspection:
    assert preview.score_every is not None
    assert preview.reference is not None
    with processes.main_first():
        reference = find_reference(preview.reference, weights_dir=preview.weights_dir)
        extractor = load_extractor(
            preview.features,
            resolution=preview.resolution,
            weights_dir=preview.weights_dir,
            device=processes.device,
        )
    reference.check(
        extractor=extractor.name,
        dimensions=extractor.dimensions,
        image_size=tokenizer.image_size,
    )

    def measure(step: int) -> Mapping[str, float]:
        generator = sampler.generator(step)
        with sampler.samples(generator, processes, preview.count) as store:
            processes.wait()
            scores, _ = score(
                store, tokenizer, extractor, reference, processes=processes, quiet=True
            )
        return {name: measured.value for name, measured in scores.metrics.items()}

    return Inspection(preview.score_every, measure)
