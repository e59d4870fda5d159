"""Stage three, second half: sample latents -> pixels -> features, streamed and kept by shard.

No picture is ever written. Features are kept because they serve intervals, paired differences,
nested rungs of a sweep, precision and recall; a restart goes on with the missing shards. They
depend on the samples, the decoder's weights and the feature network, and the folder knows all
three: others are never mixed in.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detok_pipe.evaluation.features import FeatureExtractor
from detok_pipe.latents.atomic import atomic_file, write_json
from detok_pipe.latents.errors import CacheError, MismatchError, NonFiniteError
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.latents.stats import LatentStats
from detok_pipe.pipelines.decode import to_uint8
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.progress import progress
from detok_pipe.pipelines.trained import TrainedTokenizer, check_tokenizer_fits

PIXELS = "rounded to uint8"
"""How decoded images become pixels, for records (the published code truncates instead)."""


@dataclass(frozen=True)
class FeatureTable:
    """Features (N, D) fp32 and class logits (N, K) fp32 (None: the network has none)."""

    features: np.ndarray
    logits: np.ndarray | None

    def __len__(self) -> int:
        return len(self.features)

    def first(self, count: int) -> "FeatureTable":
        """The first rows: a smaller score of the same samples."""
        return FeatureTable(
            self.features[:count], None if self.logits is None else self.logits[:count]
        )

    @classmethod
    def joined(cls, parts: Iterable["FeatureTable"]) -> "FeatureTable":
        tables = list(parts)
        logits = [table.logits for table in tables if table.logits is not None]
        return cls(
            np.concatenate([table.features for table in tables]),
            np.concatenate(logits) if logits else None,
        )


@torch.inference_mode()
def decode_latents(tokenizer: TrainedTokenizer, stats: LatentStats, z: np.ndarray) -> Tensor:
    """Pixels of normalised latents.

    Args:
        stats: the normalisation to undo.
        z: (B, N, C).

    Returns:
        uint8 (B, 3, H, W) on the tokenizer's device.
    """
    device = next(tokenizer.model.parameters()).device
    latents = torch.from_numpy(np.array(z, dtype=np.float32)).to(device)
    return to_uint8(tokenizer.model.decode(stats.denormalize(latents)))


def features_of(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> FeatureTable:
    """Features of uint8 images (B, 3, H, W), batch after batch."""
    return FeatureTable.joined(_tables(extractor, batches))


def _tables(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Iterator[FeatureTable]:
    for images in batches:
        result = extractor(images)
        logits = result["logits"]
        yield FeatureTable(
            result["features"].float().cpu().numpy(),
            None if logits is None else logits.float().cpu().numpy(),
        )


class StoredFeatures:
    """The features of one sample store, one decoder and one feature network.

    Lives in the store's folder, under ``features``. Shards are those of the store.
    """

    def __init__(
        self, store: SampleStore, tokenizer: TrainedTokenizer, extractor: FeatureExtractor
    ) -> None:
        self.store = store
        self.tokenizer = tokenizer
        self.extractor = extractor
        self.identity: dict[str, Any] = {
            "samples": store.identity,
            "decoder": tokenizer.decoder,
            "network": extractor.settings,
            "pixels": PIXELS,
        }
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.path = store.path / "features" / f"{extractor.name.lower()}-{digest[:12]}"

    def compute(
        self,
        *,
        stop: int | None = None,
        batch_size: int = 64,
        processes: Processes | None = None,
        name: str = "features",
        quiet: bool = False,
    ) -> None:
        """Decode and extract this process's shards that are missing.

        Args:
            stop: only shards that begin before this row.
            name: shown beside the progress.

        Raises:
            MismatchError: the tokenizer's encoder is not the one that the latents come from, or
                its latents have another shape.
            CacheError: a sample shard is missing or damaged.
            NonFiniteError: a stored latent is NaN or infinite.
        """
        processes = processes or Processes()
        self._check_tokenizer()
        stop = self.store.count if stop is None else stop
        parts = [part for part in self._parts(stop) if processes.mine(part[0])]
        missing = [part for part in parts if not self._file(part[0]).is_file()]
        if missing and processes.is_main:
            write_json(self.path / "identity.json", self.identity)
        total, left = (sum(end - start for _, start, end in some) for some in (parts, missing))
        quiet = quiet or not processes.is_main
        with progress(name, total=total, initial=total - left, unit="images", quiet=quiet) as task:
            for shard, start, end in missing:
                rows = self._rows(shard, start)
                tables = []
                for begin in range(0, end - start, batch_size):
                    some = rows[begin : begin + batch_size]
                    images = decode_latents(self.tokenizer, self.store.stats, some)
                    tables.append(features_of(self.extractor, [images]))
                    task.advance(len(some))
                self._write(shard, FeatureTable.joined(tables))

    def read(self, stop: int | None = None) -> FeatureTable:
        """Features of rows 0 to ``stop``.

        Raises:
            CacheError: a shard is missing or damaged.
        """
        stop = self.store.count if stop is None else stop
        tables = [self._read(shard, end - start) for shard, start, end in self._parts(stop)]
        return FeatureTable.joined(tables).first(stop)

    def _parts(self, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first row, row after the last) of the shards that begin before ``stop``."""
        size, count = self.store.rows_per_shard, self.store.count
        return [
            (shard, start, min(start + size, count))
            for shard, start in enumerate(range(0, min(stop, count), size))
        ]

    def _file(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.npz"

    def _rows(self, shard: int, start: int) -> np.ndarray:
        rows = self.store.read_shard(shard)
        broken = ~np.isfinite(rows).all(axis=(1, 2))
        if broken.any():
            raise NonFiniteError(
                f"{self.store.path}: row {start + int(broken.argmax())} holds NaN or infinity; "
                "remove the store and draw the samples again"
            )
        return rows

    def _write(self, shard: int, table: FeatureTable) -> None:
        arrays: dict[str, Any] = {"features": table.features}
        if table.logits is not None:
            arrays["logits"] = table.logits
        path = self._file(shard)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def _read(self, shard: int, rows: int) -> FeatureTable:
        path = self._file(shard)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                table = FeatureTable(
                    arrays["features"], arrays["logits"] if "logits" in arrays.files else None
                )
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            raise CacheError(
                f"{path} is missing or damaged ({error}); remove it and score again"
            ) from error
        if len(table) != rows:
            raise CacheError(f"{path} has {len(table)} rows, its shard {rows}; remove it")
        return table

    def _check_tokenizer(self) -> None:
        wanted = {"fingerprint": self.store.identity["tokenizer"]}
        check_tokenizer_fits(self.tokenizer, wanted, f"the samples in {self.store.path}")
        model = self.tokenizer.model
        shape, ours = (tuple(model.grid), model.channels), (self.store.grid, self.store.channels)
        if shape != ours:
            raise MismatchError(
                f"the tokenizer {self.tokenizer.path} decodes latents {shape[0]} x {shape[1]}, "
                f"{self.store.path} holds {ours[0]} x {ours[1]}"
            )
