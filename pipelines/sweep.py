"""The guidance sweep: which scale scores best, then final scores there and without guidance.

All scales share seeds and labels, so their scores differ by less than their error bars suggest:
differences are judged by paired errors. A grid gives every scale all samples. Halving gives all
scales a quarter, drops those that are surely worse, doubles, drops again: under half the samples.
The finals use other sample numbers than the search, so that the choice does not flatter them.

Everything is resumable: samples and features by shard, scores are computed again from features.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detok_pipe.evaluation.features import FeatureExtractor
from detok_pipe.evaluation.reference import Reference
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents import atomic
from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines.config import Precision
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import say
from detok_pipe.pipelines.rungs import edge_warning, halving_counts, samples_drawn, search
from detok_pipe.pipelines.sample import (
    ROWS_PER_SHARD,
    sample,
    sampled_classes,
    sampling_of,
)
from detok_pipe.pipelines.score import (
    Scores,
    check_comparable,
    metric_names,
    real_features,
    score,
)
from detok_pipe.pipelines.trained import (
    TrainedGenerator,
    TrainedTokenizer,
    check_tokenizer_fits,
)

Search = Literal["grid", "halving"]
SWEEP = "sweep.json"
SCORES = "scores.jsonl"

MAR_SCALES = (3.0, 3.5, 3.7, 3.8, 3.9, 4.0, 4.1, 4.3, 4.5)
FLOW_SCALES = (1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)
"""The published grids."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep does.

    Attributes:
        scales: guidance scales to compare.
        sampling: all other sampling options. unguided: those of the final score at scale 1.
        count: samples a scale in the last rung (of a grid: the only one).
        search: "grid" or "halving".
        final_count: samples of each final score; 0: no finals.
        seed: of all samples. precision: of the generator.
        batch_size: of sampling, decoding and features.
    """

    scales: tuple[float, ...]
    sampling: Sampling
    unguided: Sampling
    count: int = 10_000
    search: Search = "grid"
    final_count: int = 50_000
    seed: int = 0
    precision: Precision = "auto"
    batch_size: int = 64

    def __post_init__(self) -> None:
        folders = {search_path(Path(), scale) for scale in self.scales}
        if len(folders) != len(self.scales) or len(folders) < 2:
            raise ConfigError(f"scales: at least two different ones are needed, got {self.scales}")
        object.__setattr__(self, "scales", tuple(sorted(self.scales)))
        for scale in self.scales:
            dataclasses.replace(self.sampling, guidance_scale=scale)
        if self.count < 4 or self.final_count < 0 or self.final_count == 1:
            raise ConfigError(
                f"a sweep needs at least 4 samples a scale and 0 or at least 2 final ones, got "
                f"{self.count} and {self.final_count}"
            )
        if self.search not in ("grid", "halving"):
            raise ConfigError(f"search {self.search!r}: choose grid or halving")
        if self.search == "halving" and len(self.scales) < 4:
            raise ConfigError(f"halving saves nothing with {len(self.scales)} scales: use a grid")

    @property
    def rungs(self) -> tuple[int, ...]:
        """Samples a scale, rung after rung."""
        return halving_counts(self.count) if self.search == "halving" else (self.count,)

    @property
    def rows_per_shard(self) -> int:
        """At most the usual size, and such that the first rung ends with a shard, or nearly."""
        first = self.rungs[0]
        return math.ceil(first / math.ceil(first / ROWS_PER_SHARD))


def plan_for(
    generator: TrainedGenerator,
    *,
    scales: Sequence[float] | None = None,
    unguided_temperature: float | None = None,
    sampling: Sampling | None = None,
    **settings: Any,
) -> SweepPlan:
    """A plan with the published grid and sampling options of the generator's family.

    Args:
        settings: other fields of :class:`SweepPlan`.

    Raises:
        ConfigError: a value out of its range, or an option that the generator does not use.
    """
    name = generator.record["config"]["generator"]
    sampling = sampling or sampling_of(generator)
    if scales is None:
        scales = (
            MAR_SCALES if name.startswith(("mar-", "random-ar-", "raster-ar-")) else FLOW_SCALES
        )
    if unguided_temperature is None:
        unguided_temperature = sampling_of(generator, guidance_scale=1.0).temperature
    unguided = dataclasses.replace(sampling, guidance_scale=1.0, temperature=unguided_temperature)
    model = generator.model
    return SweepPlan(
        scales=tuple(scales),
        sampling=model.resolved(sampling),
        unguided=model.resolved(unguided),
        **settings,
    )


def search_path(out: Path, scale: float) -> Path:
    """Where a sweep's search samples of a scale are."""
    return out / "search" / f"cfg-{scale:g}"


def final_path(out: Path, scale: float) -> Path:
    """Where a sweep's final samples at the best scale are."""
    return out / "final" / f"cfg-{scale:g}"


def unguided_path(out: Path) -> Path:
    """Where a sweep's final samples without guidance are."""
    return out / "final" / "unguided"


class _Work:
    """The parts that a sweep works with; :func:`sweep` runs it."""

    def __init__(
        self,
        plan: SweepPlan,
        generator: TrainedGenerator,
        tokenizer: TrainedTokenizer,
        extractor: FeatureExtractor,
        reference: Reference,
        out: Path,
        *,
        processes: Processes,
        compiled: bool,
        quiet: bool,
    ) -> None:
        self.plan = plan
        self.generator = generator
        self.tokenizer = tokenizer
        self.extractor = extractor
        self.reference = reference
        self.out = out
        self.processes = processes
        self.compiled = compiled
        self.quiet = quiet
        self.real = real_features(
            reference, extractor, batch_size=plan.batch_size, processes=processes, quiet=quiet
        )

    def score_at(self, scale: float, rung: int) -> tuple[Scores, dict[str, Any]]:
        """Scores of the first ``rung`` search samples of a scale, drawn as far as missing."""
        sampling = dataclasses.replace(self.plan.sampling, guidance_scale=scale)
        return self._scored(
            search_path(self.out, scale), sampling, total=self.plan.count, count=rung, first=0
        )

    def final(self, sampling: Sampling, path: Path) -> tuple[Scores, dict[str, Any]]:
        """Scores of final samples, on sample numbers that the search did not use."""
        classes = len(sampled_classes(self.generator))
        # A multiple of the classes, so that the finals are balanced like the search.
        first = -(-self.plan.count // classes) * classes
        total = self.plan.final_count
        return self._scored(path, sampling, total=total, count=total, first=first)

    def _scored(
        self, path: Path, sampling: Sampling, *, total: int, count: int, first: int
    ) -> tuple[Scores, dict[str, Any]]:
        plan, scale = self.plan, sampling.guidance_scale
        what = f"at {scale:g}" if first == 0 else f"final at {scale:g}"
        store = sample(
            self.generator,
            path,
            count=total,
            stop=count,
            sampling=sampling,
            seed=plan.seed,
            first=first,
            batch_size=plan.batch_size,
            rows_per_shard=min(plan.rows_per_shard, total),
            precision=plan.precision,
            processes=self.processes,
            name=f"sample {what}",
            compiled=self.compiled,
            quiet=self.quiet,
        )
        scores, record = score(
            store,
            self.tokenizer,
            self.extractor,
            self.reference,
            count=count,
            real=self.real,
            expect_at=plan.count if count < total else None,
            batch_size=plan.batch_size,
            processes=self.processes,
            name=f"score {what}",
            quiet=self.quiet,
        )
        value = next(iter(scores.metrics.values()))
        error = "" if value.error is None else f" ± {value.error:.3g}"
        if self.processes.is_main:
            say(
                f"{what}, {count:,} samples: {self.extractor.name} {value.value:.4g}{error}",
                quiet=self.quiet,
            )
        return scores, record


def sweep(
    plan: SweepPlan,
    generator: TrainedGenerator,
    tokenizer: TrainedTokenizer,
    extractor: FeatureExtractor,
    reference: Reference,
    out: Path,
    *,
    processes: Processes | None = None,
    compiled: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run a sweep, or what is missing of it, and write ``out/sweep.json``.

    Args:
        compiled: see ``sample``.

    Returns:
        What ``sweep.json`` holds: "rungs" (by rung: count and, by scale, metrics, difference to
        the best with its paired error, whether it went on), "best" scale, "final" records,
        "warnings", and every setting.

    Raises:
        ConfigError: halving's first rung has too few samples for an interval.
        MismatchError: ``out`` holds another sweep's samples, or parts do not belong together.
        NonFiniteError, CacheError, StorageError: see ``sample`` and ``score``.
    """
    processes = processes or Processes(device=next(generator.model.parameters()).device)
    if plan.search == "halving" and plan.rungs[0] <= extractor.dimensions:
        raise ConfigError(
            f"halving compares {plan.rungs[0]} samples first, which must be more than the "
            f"{extractor.dimensions} feature dimensions: use at least "
            f"{4 * (extractor.dimensions + 1)} samples a scale, or a grid"
        )
    # Before hours of sampling, not after.
    check_tokenizer_fits(
        tokenizer,
        {"fingerprint": generator.identity["tokenizer"]},
        f"the generator {generator.path}",
    )
    reference.check(
        extractor=extractor.name,
        dimensions=extractor.dimensions,
        image_size=tokenizer.image_size,
    )
    work = _Work(
        plan,
        generator,
        tokenizer,
        extractor,
        reference,
        out,
        processes=processes,
        compiled=compiled,
        quiet=quiet,
    )
    records: dict[tuple[float, int], dict[str, Any]] = {}

    def score_at(scale: float, count: int) -> Scores:
        scores, records[scale, count] = work.score_at(scale, count)
        return scores

    rungs, best = search(plan.scales, plan.rungs, score_at)
    last = [record for (_, count), record in records.items() if count == plan.count]
    check_comparable(last)
    finals: list[dict[str, Any]] = []
    if plan.final_count:
        guided = dataclasses.replace(plan.sampling, guidance_scale=best)
        finals.append(work.final(guided, final_path(out, best))[1])
        if plan.unguided != guided:
            finals.append(work.final(plan.unguided, unguided_path(out))[1])
    result = {
        "version": 1,
        "generator": generator.identity,
        "run": str(generator.path),
        "plan": json.loads(json.dumps(dataclasses.asdict(plan))),
        "metrics": [dataclasses.asdict(m) for m in metric_names(extractor.name).values()],
        "rungs": rungs,
        "best": best,
        "samples": samples_drawn(rungs),
        "samples of a full grid": len(plan.scales) * plan.count,
        "final": finals,
        "warnings": [*last[-1]["notes"], *edge_warning(plan.scales, best)],
        "settings": {k: v for k, v in last[-1]["settings"].items() if k != "samples"},
        "reference": str(reference.path),
        "reference made from": reference.made_from,
        "tokenizer": str(tokenizer.path),
        "tokenizer name": tokenizer.identity.get("name"),
    }
    if processes.is_main:
        atomic.write_json(out / SWEEP, result)
        lines = (json.dumps(record, ensure_ascii=False) for record in [*last, *finals])
        atomic.write_text(out / SCORES, "".join(f"{line}\n" for line in lines))
    processes.wait()
    return result
