"""The whole pipeline on real pictures: what ``detok-pipe quickstart`` runs.

Every stage calls the function behind the command of the same name, in this process. A stage's
outcome and time are kept in ``stages.json`` once it is done, so that a second run finds it;
the long stages (training, encoding, sampling) also go on in the middle.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detok_pipe.evaluation.features import FeatureExtractor, load_extractor
from detok_pipe.evaluation.reference import Reference, read_reference
from detok_pipe.latents import atomic
from detok_pipe.latents.cache import LatentCache, open_cache
from detok_pipe.latents.convert import convert
from detok_pipe.latents.errors import CacheError, CheckpointError, MismatchError
from detok_pipe.latents.manifest import MANIFEST
from detok_pipe.latents.plan import first_difference
from detok_pipe.latents.sample_store import SampleStore, open_sample_store
from detok_pipe.latents.verify import describe, verify
from detok_pipe.pipelines.config import Execution, GeneratorConfig, TokenizerConfig, to_json
from detok_pipe.pipelines.demo_presets import Demo
from detok_pipe.pipelines.emoji import EmojiImages, make_emoji_images
from detok_pipe.pipelines.encode import encode, make_plan
from detok_pipe.pipelines.fid_stats import fid_stats
from detok_pipe.pipelines.images import ImageSource, open_images
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import say
from detok_pipe.pipelines.quickstart_comparisons import compare
from detok_pipe.pipelines.quickstart_page import REPORT, STAGES, write_page
from detok_pipe.pipelines.reconstruct import evaluate_tokenizer
from detok_pipe.pipelines.run_directory import locked
from detok_pipe.pipelines.score import real_features
from detok_pipe.pipelines.sweep import final_path, plan_for, sweep
from detok_pipe.pipelines.train_generator import train_generator
from detok_pipe.pipelines.train_tokenizer import train_tokenizer
from detok_pipe.pipelines.trained import (
    TrainedGenerator,
    TrainedTokenizer,
    load_generator,
    load_tokenizer,
)

_SETTINGS = "quickstart.json"


def _read_record(file: Path, *parts: str) -> dict[str, Any]:
    """The record in a file, of which ``parts`` must be records too."""
    try:
        record = json.loads(file.read_bytes())
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(record, dict):
        raise _damaged(file, f"a {type(record).__name__} instead of a record")
    for part in parts:
        if not isinstance(record.get(part), dict):
            raise _damaged(file, f"it has no record {part}")
    return record


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is damaged ({problem}); remove it and run the same command again, which finds "
        "what is done"
    )


class Quickstart:
    """One quickstart in one folder; :meth:`run` does what is missing."""

    def __init__(
        self,
        out: Path,
        preset: str,
        demo: Demo,
        *,
        seed: int,
        device: torch.device,
        quiet: bool,
    ) -> None:
        self.out = out
        self.preset = preset
        self.demo = dataclasses.replace(
            demo,
            tokenizer=dataclasses.replace(demo.tokenizer, seed=seed),
            generator=dataclasses.replace(demo.generator, seed=seed),
        )
        self.seed = seed
        self.device = device
        self.quiet = quiet
        self.execution = Execution(
            device=str(device), log_every=10, checkpoint_every=200, keep_checkpoints=1, quiet=quiet
        )
        self.stages: dict[str, dict[str, Any]] = {}

    # The parts that several stages use, each loaded once.

    @cached_property
    def images(self) -> EmojiImages:
        return make_emoji_images(self.out / "images", quiet=self.quiet)

    @cached_property
    def train_images(self) -> ImageSource:
        return open_images(self.images.train)

    @cached_property
    def held_out_images(self) -> ImageSource:
        return open_images(self.images.held_out)

    @cached_property
    def tokenizer(self) -> TrainedTokenizer:
        return load_tokenizer(self.out / "tokenizer", device=self.device)

    @cached_property
    def cache(self) -> LatentCache:
        return open_cache(self.out / "cache")

    @cached_property
    def generator(self) -> TrainedGenerator:
        return load_generator(self.out / "generator", device=self.device)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        return load_extractor(
            "efficientnet-lite2", resolution=self.demo.resolution, device=self.device
        )

    @cached_property
    def reference(self) -> Reference:
        return read_reference(self.out / "reference.npz")

    @cached_property
    def real(self) -> np.ndarray:
        """Features of the training images of the generator's classes."""
        features = real_features(self.reference, self.extractor)
        assert features is not None  # they are kept in the file
        return features

    def run(self) -> Path:
        """Do the stages that are not done; returns the report's path.

        Raises:
            MismatchError: the folder holds a quickstart of other settings.
            LockedError: another quickstart is running in the folder.
            CheckpointError: a record of the folder is damaged.
            StorageError: the disk is full or read-only, or a link that leads nowhere is in the way.
        """
        with atomic.storage_errors(self.out):
            atomic.make_folder(self.out)
        with locked(self.out):
            self._check_settings()
            atomic.remove_temporaries(self.out)
            for name, stage, made in (
                ("images", self.make_images, "images"),
                ("tokenizer", self.train_tokenizer, "tokenizer/checkpoints"),
                ("reconstructions", self.reconstruct, None),
                ("encode", self.encode, f"cache/{MANIFEST}"),
                ("verify and convert", self.check_cache, f"cache-zarr/{MANIFEST}"),
                ("generator", self.train_generator, "generator/checkpoints"),
                ("reference statistics", self.reference_statistics, "reference.npz"),
                ("guidance sweep", self.sweep, "sweep/final"),
                ("comparisons", self.compare, "comparisons"),
                ("report", self.report, REPORT),
            ):
                self._do(name, stage, made)
        return self.out / REPORT

    def _check_settings(self) -> None:
        wanted = json.loads(json.dumps({"seed": self.seed, **dataclasses.asdict(self.demo)}))
        file = self.out / _SETTINGS
        if file.exists():
            stored = _read_record(file, "tokenizer", "generator")
            # Settings that came later had their defaults.
            for part, kind in (("tokenizer", TokenizerConfig), ("generator", GeneratorConfig)):
                stored[part] = {**to_json(kind()), **stored[part]}
            difference = first_difference(stored, wanted)
            if difference is not None:
                name, there, now = difference
                raise MismatchError(
                    f"{self.out} holds a quickstart of another preset, seed or version: its {name} "
                    f"is {there!r}, now it is {now!r}; give another --out, or remove the folder"
                )
        else:
            atomic.write_json(file, wanted)
        done = self.out / STAGES
        self.stages = _read_record(done) if done.exists() else {}
        for name, outcome in self.stages.items():
            if not isinstance(outcome, dict) or not outcome.keys() >= {"seconds", "result"}:
                raise _damaged(done, f"{name} has no seconds and result")

    def _do(self, name: str, stage: Callable[[], dict[str, Any] | None], made: str | None) -> None:
        """Do a stage, unless it is done and what it ``made`` is still in the folder."""
        if name in self.stages and (made is None or (self.out / made).exists()):
            return
        say(f"== {name}", quiet=self.quiet)
        start = time.perf_counter()
        result = stage() or {}
        self.stages[name] = {"seconds": time.perf_counter() - start, "result": result}
        atomic.write_json(self.out / STAGES, self.stages)

    # The stages, in order.

    def make_images(self) -> dict[str, Any]:
        """Draw the image set; a tenth is held out."""
        return {"training": self.images.train_counts, "held out": self.images.held_out_counts}

    def train_tokenizer(self) -> None:
        """Stage one."""
        train_tokenizer(
            self.demo.tokenizer, self.images.train, self.out / "tokenizer", self.execution
        )

    def reconstruct(self) -> dict[str, Any]:
        """Measure the tokenizer on the held-out images."""
        return evaluate_tokenizer(
            self.tokenizer.model,
            self.held_out_images,
            image_size=self.tokenizer.image_size,
            extractor=self.extractor,
            device=self.device,
            quiet=self.quiet,
        )

    def encode(self) -> dict[str, Any]:
        """Write the latent cache of the training images."""
        plan = make_plan(self.tokenizer, self.train_images, shards=4, device=self.device)
        encode(
            self.tokenizer,
            self.train_images,
            self.out / "cache",
            plan,
            device=self.device,
            quiet=self.quiet,
        )
        return describe(self.out / "cache")

    def check_cache(self) -> dict[str, Any]:
        """Verify the cache, write it as Zarr too, and verify that."""
        lines = []
        convert(self.out / "cache", self.out / "cache-zarr", "zarr")
        for name in ("cache", "cache-zarr"):
            problems = verify(self.out / name)
            if problems:
                raise CacheError(f"{self.out / name}: {problems[0]}")
            lines.append(f"{name}: every file is as it was written")
        return {"verify": lines, "zarr": describe(self.out / "cache-zarr")}

    def train_generator(self) -> None:
        """Stage two."""
        train_generator(
            self.demo.generator, self.out / "cache", self.out / "generator", self.execution
        )

    def class_rows(self, source: ImageSource) -> np.ndarray:
        """Numbers of the source's images whose class the generator learns."""
        names = self.demo.generator.classes or tuple(source.class_names)
        return np.flatnonzero(np.isin(source.labels, [source.class_names.index(n) for n in names]))

    def reference_statistics(self) -> None:
        """Statistics of the training images of the generator's classes."""
        fid_stats(
            self.train_images,
            self.extractor,
            self.out / "reference.npz",
            size=self.tokenizer.image_size,
            rows=self.class_rows(self.train_images),
            quiet=self.quiet,
        )

    def sweep(self) -> dict[str, Any]:
        """Stage three: guidance scales, then the score at the best."""
        plan = plan_for(
            self.generator,
            scales=self.demo.scales,
            sampling=self.demo.sampling,
            count=self.demo.sweep_count,
            final_count=self.demo.final_count,
            seed=self.seed,
            batch_size=100,
        )
        return sweep(
            plan,
            self.generator,
            self.tokenizer,
            self.extractor,
            self.reference,
            self.out / "sweep",
            processes=Processes(device=self.device),
            quiet=self.quiet,
        )

    def final_store(self) -> SampleStore:
        """The samples at the best scale."""
        best = self.stages["guidance sweep"]["result"]["best"]
        return open_sample_store(final_path(self.out / "sweep", best))

    def compare(self) -> dict[str, Any]:
        """Score what the trained model must beat, and real images; probe the classes."""
        return compare(self)

    def report(self) -> dict[str, Any]:
        """Draw the pictures and write the page."""
        return write_page(self)
