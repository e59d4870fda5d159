"""Images rebuilt from corrupted latents: which corruption, and what is counted."""

import numpy as np
import pytest
import torch

from detok_pipe.evaluation.reconstruction import psnr
from detok_pipe.pipelines.corruption_study import study_corruption
from detok_pipe.pipelines.pictures import labelled_grid
from detok_pipe.pipelines.reconstruct import rebuild
from detok_pipe.tokenizer.model import LDeTok

SIZE = 16
PIXELS = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)


class Recorder(LDeTok):
    """A small tokenizer that remembers the corruption that it was given last."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            image_size=SIZE, patch_size=4, channels=4, encoder="16,1,1", decoder="16,1,1"
        )

    def rebuild(self, images, noise, **corruption):
        self.seen = corruption
        return super().rebuild(images, noise, **corruption)


@pytest.mark.parametrize("gamma", [0.0, 3.0])
def test_each_level_and_ratio_is_a_cell(gamma: float) -> None:
    model = Recorder()
    arguments = {"levels": (0.0, 1.0), "ratios": (0.0, 0.5), "gamma": gamma}
    study = study_corruption(model, PIXELS, batch_size=4, **arguments)
    assert [(cell.level, cell.hidden) for cell in study.cells] == [
        (0.0, 0.0),
        (0.0, 0.5),
        (1.0, 0.0),
        (1.0, 0.5),
    ]
    assert study.cell(1.0, 0.5) is study.cells[3]
    clean = rebuild(model, torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1)
    assert (study.cells[0].rebuilt.int() - clean.int()).abs().max() <= 1
    original = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    for cell in study.cells:
        assert cell.sigma == pytest.approx(cell.level * study.latent_std)
        assert cell.psnr == pytest.approx(psnr(original, cell.rebuilt).mean().item())
    whole = study_corruption(model, PIXELS, batch_size=6, **arguments)
    for one, other in zip(study.cells, whole.cells, strict=True):
        assert (one.rebuilt.int() - other.rebuilt.int()).abs().max() <= 1
    rows = study.rows(PIXELS, slice(0, None, 2))
    assert [len(row.cells) for row in rows] == [3] * 5
    assert rows[-1].label.startswith("noise 1, 50% hidden: ")
    for row, images in zip(rows[:2], (original, study.cells[0].rebuilt), strict=True):
        wanted = images[::2].permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal([np.asarray(cell[0]) for cell in row.cells], wanted)
    assert labelled_grid(rows).width > 3 * 96


def test_an_interpolative_decoder_gets_the_same_noise_to_signal_ratio() -> None:
    model = Recorder()
    study = study_corruption(model, PIXELS, levels=(1.5,), ratios=(0.0,), gamma=3.0)
    tau = model.seen["tau"]
    assert tau * 3.0 / (1 - tau) == pytest.approx(1.5 * study.latent_std)


def test_levels_may_be_absolute() -> None:
    model = Recorder()
    study = study_corruption(model, PIXELS, levels=(1.5,), ratios=(0.0,), unit=1.0)
    assert study.cells[0].sigma == model.seen["gamma"] == 1.5
    assert study.latent_std != 1.0
