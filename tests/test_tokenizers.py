"""Opening published tokenizers: where weights are found, what is refused, what identifies them."""

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from baseline_making import CONFIGS, LATENTS, SIDES, small_state, write_small
from click.testing import CliRunner
from safetensors.torch import save_file

from detok_pipe.latents.errors import CheckpointError, ConfigError, WeightsError
from detok_pipe.pipelines import hub_weights
from detok_pipe.pipelines.cli import group
from detok_pipe.pipelines.published_tokenizers import PUBLISHED_TOKENIZERS, TokenizerChoice
from detok_pipe.pipelines.tokenizers import build_published, open_tokenizer

NAMES = list(PUBLISHED_TOKENIZERS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders with small weights of all four, by name."""
    root = tmp_path_factory.mktemp("small")
    return {name: write_small(name, root / name) for name in NAMES}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """An empty cache of the hub, and no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def offline(repository: str, name: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr(hub_weights, "hf_hub_download", offline)
    return cache


def opened(name: str, weights: Path):
    return open_tokenizer(TokenizerChoice(name, weights))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_describes_the_networks(name):
    published = PUBLISHED_TOKENIZERS[name]
    config = {
        "image_size": 256,
        "enc_patch_size": 16,
        "codebook_embed_dim": 32,
        "num_latent_tokens": 128,
        "encoder_model": "vit_base_patch14_dinov2.lvd142m",
        "decoder_model": "vit_base_patch14_dinov2.lvd142m",
        "use_ape": False,
        "use_rope": True,
        "rope_mixed": True,
        "enc_token_drop": 0.4,
        "vq_mean": 0.0,
        "vq_std": 1.0,
    }
    with torch.device("meta"):
        if name == "maetok":
            from detok_pipe.tokenizer.maetok import build

            model = build(config).model
        else:
            model = build_published(published).model
    assert (*model.grid, model.channels) == published.latents
    assert sum(p.numel() for p in model.parameters()) == published.parameters


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_each_opens_from_its_file_form(small, name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tokenizer = opened(name, small[name])
    assert torch.equal(before, torch.get_rng_state())
    model, (grid, channels) = tokenizer.model, LATENTS[name]
    assert (model.grid, model.channels, tokenizer.image_size) == (grid, channels, SIDES[name])
    assert tokenizer.stats.source == "published"
    assert tokenizer.identity["name"] == name
    images = torch.rand(2, 3, SIDES[name], SIDES[name]) * 2 - 1
    moments = model.encode_moments(images)
    assert moments.shape[-1] == channels * (2 if model.has_posterior else 1)
    assert model.decode(moments[..., :channels]).shape == images.shape
    again = opened(name, small[name])
    assert (again.identity, again.decoder) == (tokenizer.identity, tokenizer.decoder)


def test_the_file_itself_may_be_named(small):
    file = small["sd-vae"] / "diffusion_pytorch_model.safetensors"
    assert opened("sd-vae", file).identity == opened("sd-vae", small["sd-vae"]).identity
    with pytest.raises(CheckpointError, match=r"read as mar-vae, is of another model; missing"):
        opened("mar-vae", small["mar-vae"] / "kl16.ckpt")  # the published network is larger


def test_the_decoder_is_no_part_of_the_identity(small, tmp_path):
    state = small_state("maetok")
    for number, key in enumerate(("decoder.mask_token", "encoder.latent_tokens")):
        folder = tmp_path / str(number)
        shutil.copytree(small["maetok"], folder)
        save_file({**state, key: state[key] + 1}, folder / "model.safetensors")
        same = opened("maetok", folder).identity == opened("maetok", small["maetok"]).identity
        assert same == key.startswith("decoder")


def test_weights_of_another_tokenizer_are_refused(small, tmp_path):
    for name, other in (("va-vae", "mar-vae"), ("mar-vae", "va-vae"), ("sd-vae", "maetok")):
        folder = tmp_path / name
        shutil.copytree(small[other], folder)
        (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
        with pytest.raises(CheckpointError) as error:
            opened(name, folder)
        assert f"read as {name}, is of another model" in str(error.value)
        assert "keys:" in str(error.value)


def test_files_that_are_cut_short_or_hostile_are_refused(small, tmp_path):
    whole = (small["mar-vae"] / "kl16.ckpt").read_bytes()
    torch.save({"model": {"x": Path("/")}}, tmp_path / "hostile")
    torch.save({"model": 3}, tmp_path / "other")
    for content, message in (
        (whole[: len(whole) // 2], "cut short"),
        (b"", "cut short"),
        ((tmp_path / "hostile").read_bytes(), "could run code"),
        ((tmp_path / "other").read_bytes(), "no state dict"),
    ):
        (tmp_path / "kl16.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            opened("mar-vae", tmp_path)
    shutil.copytree(small["maetok"], tmp_path / "maetok")
    file = tmp_path / "maetok" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="cut short"):
        opened("maetok", tmp_path / "maetok")


def test_missing_weights_say_where_to_get_them(tmp_path):
    for name in NAMES:
        with pytest.raises(WeightsError) as error:
            open_tokenizer(name)
        repository = PUBLISHED_TOKENIZERS[name].repository
        assert f"https://huggingface.co/{repository}" in str(error.value)
        assert "no network" in str(error.value)
        assert "--weights" in str(error.value)
    with pytest.raises(WeightsError, match="no such file or folder"):
        opened("sd-vae", tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="holds none"):
        opened("sd-vae", tmp_path)
    for letter in "ab":
        (tmp_path / f"{letter}.pt").touch()
    with pytest.raises(WeightsError, match=r"holds a\.pt, b\.pt; name the file"):
        opened("sd-vae", tmp_path)


def test_maetok_needs_its_configuration(small, tmp_path):
    shutil.copy(small["maetok"] / "model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match=r"MAETok states no 'image_size'"):
        opened("maetok", tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
        opened("maetok", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["maetok"], "image_size": "32"}))
    with pytest.raises(ConfigError, match=r"config\.json: "):
        opened("maetok", tmp_path)


def hub_copy(folder: Path, repository: str, cache: Path, *, damaged: bool = False) -> None:
    """Files in the hub's cache, in its form: named by their SHA-256, linked from a snapshot."""
    place = cache / ("models--" + repository.replace("/", "--"))
    for part in ("blobs", "snapshots/abc", "refs"):
        (place / part).mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    for file in folder.iterdir():
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        blob = place / "blobs" / digest
        blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damaged else content)
        (place / "snapshots" / "abc" / file.name).symlink_to(blob)


def test_the_hub_cache_is_used_and_its_checksums_compared(small, no_hub):
    repository = PUBLISHED_TOKENIZERS["maetok"].repository
    hub_copy(small["maetok"], repository, no_hub)
    assert open_tokenizer("maetok").identity == opened("maetok", small["maetok"]).identity
    shown = CliRunner().invoke(group, ["tokenizers"]).output
    assert f"snapshots/abc/{PUBLISHED_TOKENIZERS['maetok'].weights}" in shown
    assert "128 x 32, 172.7 M parameters" in shown
    assert "get kl16.ckpt from https://huggingface.co/" in shown
    shutil.rmtree(no_hub)
    hub_copy(small["maetok"], repository, no_hub, damaged=True)
    with pytest.raises(WeightsError, match="damaged"):
        open_tokenizer("maetok")


def test_names_and_options_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"no run directory.*sd-vae, mar-vae"):
        open_tokenizer("sd-vea")
    with pytest.raises(ConfigError, match=r"belongs to a published tokenizer"):
        open_tokenizer(TokenizerChoice(str(tmp_path), tmp_path))
    result = CliRunner().invoke(group, ["encode", "--data", "x", "--out", "y", "--weights", "z"])
    assert result.exit_code == 2
    assert "Missing option '--tokenizer'" in result.output


def test_without_diffusers_the_extra_is_named(monkeypatch):
    import builtins
    import sys

    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "detok_pipe.tokenizer.kl_vae", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"diffusers: pip install 'detok-pipe\[baselines\]'"):
        build_published(PUBLISHED_TOKENIZERS["sd-vae"])
