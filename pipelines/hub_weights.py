"""Weights of published tokenizers: found locally or in the hub's cache, or downloaded; read safely.

The hub announces the SHA-256 of a large file, and its cache keeps the file under that name: what
was downloaded is compared with it whenever it is opened. Nobody publishes checksums elsewhere, so
for ``--weights`` there is none to compare with; a cache records the hash of the tensors it was
made with.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from detok_pipe.evaluation.weights import check_sha256
from detok_pipe.generators.state_dicts import state_dict_of, unpickled
from detok_pipe.latents.errors import WeightsError
from detok_pipe.pipelines.published_tokenizers import PublishedTokenizer

CONFIG = "config.json"
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_NESTED = ("state_dict", "model")


@dataclass(frozen=True)
class Files:
    """Where a tokenizer's weights are, and its ``config.json`` if it has one."""

    weights: Path
    config: Path | None


def find_files(
    published: PublishedTokenizer, given: Path | None = None, *, download: bool = True
) -> Files:
    """The files of a published tokenizer; those of the hub are compared with its checksum.

    Args:
        given: ``--weights``: a file, or a folder with one weights file and perhaps a
            ``config.json``. None: the hub's cache, else a download into it.

    Raises:
        WeightsError: they are nowhere (says where to get them), or a checksum is wrong.
    """
    if given is not None:
        return _given(published, given)
    weights = _from_hub(published, published.weights, download)
    announced = weights.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", announced):
        check_sha256(weights, announced)
    config = published.config_file
    return Files(weights, None if config is None else _from_hub(published, config, download))


def _given(published: PublishedTokenizer, given: Path) -> Files:
    if given.is_dir():
        files = sorted(path for path in given.iterdir() if path.suffix in _SUFFIXES)
        named = [path for path in files if path.name == published.weights]
        if len(named or files) != 1:
            found = ", ".join(path.name for path in files) or "none"
            raise WeightsError(
                f"--weights {given}: it should hold {published.weights} or one other weights "
                f"file, and holds {found}; name the file itself"
            )
        config = given / CONFIG
        return Files((named or files)[0], config if config.is_file() else None)
    if not given.is_file():
        raise WeightsError(f"--weights {given}: no such file or folder; {where_to_get(published)}")
    config = given.parent / CONFIG
    beside = published.config_file is not None and config.is_file()
    return Files(given, config if beside else None)


def cached(published: PublishedTokenizer, name: str) -> Path | None:
    """A file in the hub's cache, unchecked, or None."""
    path = try_to_load_from_cache(published.repository, name)
    return Path(path) if isinstance(path, str) else None


def _from_hub(published: PublishedTokenizer, name: str, download: bool) -> Path:
    path = cached(published, name)
    if path is not None:
        return path
    reason = "it is not downloaded for this"
    if download:
        try:
            return Path(hf_hub_download(published.repository, name))
        except (OSError, ValueError, HfHubHTTPError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = f"the download failed ({lines[0]})"
    raise WeightsError(
        f"{name} of {published.repository} is not in the hub's cache, and {reason}; "
        f"{where_to_get(published)}"
    )


def where_to_get(published: PublishedTokenizer) -> str:
    """What to do about missing weights."""
    files = published.weights + (f" and {published.config_file}" if published.config_file else "")
    return (
        f"get {files} from https://huggingface.co/{published.repository} and name the file, or "
        "its folder, with --weights"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict on the CPU, from safetensors or a PyTorch file, there also one nested under
    "state_dict" or "model". No code in the file runs.

    Raises:
        WeightsError, CheckpointError: missing, cut short, no state dict, or with other objects.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is cut short or no safetensors file: {error}") from error
    content: Any = unpickled(path)
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            return state_dict_of(path, name, content[name])
    return state_dict_of(path, "the file itself", content)
