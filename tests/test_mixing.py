"""MixUp and CutMix: what a batch becomes, runs that use them, and settings that do not go with them."""

from __future__ import annotations

import signal

import pytest
import torch

from infopro_fast import errors
from infopro_fast.data import mixing
from infopro_fast.errors import ConfigError
from infopro_fast.trainer import fit, resume
from tests import tiny_run
from tests.tiny_run import assert_same_weights, at_step

pytest.importorskip("torchvision")
pytestmark = pytest.mark.usefixtures("few_images")
IMAGE, LABEL = torch.rand(6, 3, 8, 8), torch.tensor([0, 4, 2, 2, 1, 3])


def test_mixup_mixes_images_and_labels_in_one_share():
    image, p = mixing(0.4, None, 5)(IMAGE, LABEL, 1)
    other = LABEL.roll(1) != LABEL
    share = p[other].gather(1, LABEL[other, None])[:, 0]
    assert 0 < share[0] < 1 and torch.equal(share, share[:1].expand_as(share))
    torch.testing.assert_close(image, share[0] * IMAGE + (1 - share[0]) * IMAGE.roll(1, 0))
    torch.testing.assert_close(p.sum(1), torch.ones(6))


def test_cutmix_gives_a_label_its_share_of_the_pixels():
    image, p = mixing(None, 1.0, 5)(IMAGE, LABEL, 3)
    kept = (image == IMAGE).all(1).double().mean((1, 2))
    other = LABEL.roll(1) != LABEL
    assert 0 < kept[0] < 1
    torch.testing.assert_close(p.gather(1, LABEL[:, None])[other, 0].double(), kept[other], rtol=0, atol=1e-6)


def test_the_seed_alone_decides():
    """Both kinds come up; torch's generator stays where it is."""
    mix, before = mixing(0.4, 1.0, 5), torch.get_rng_state()
    found = [mix(IMAGE, LABEL, seed) for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(found[5], mix(IMAGE, LABEL, 5)))
    pasted = [bool((image == IMAGE).flatten(1).any(1).all()) for image, _ in found]
    assert any(pasted) and not all(pasted)


def test_a_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    settings = dict(local_loss="softmax", mixup=0.2, cutmix=1.0, epochs=2)
    alone = fit(tiny_run.config(tmp_path / "alone", **settings))
    plain = fit(tiny_run.config(tmp_path / "plain", local_loss="softmax", epochs=2))
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda trainer, metrics: signal.raise_signal(signal.SIGINT))
        with pytest.raises(errors.Stopped):
            fit(tiny_run.config(tmp_path / "run", **settings))
    assert_same_weights(resume(tmp_path / "run"), alone)
    with pytest.raises(AssertionError):
        assert_same_weights(plain, alone)


@pytest.mark.parametrize("settings, words", (
    (dict(mixup=0.2), "mixup: local_loss contrast needs the label of each image: expected softmax"),
    (dict(cutmix=1.0, local_loss="softmax", order="sequential"), "cutmix: expected order simultaneous"),
    (dict(mixup=0.0, local_loss="softmax"), "mixup: expected a positive number, got 0.0"),
))
def test_settings_that_do_not_go_together(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        fit(tiny_run.config(tmp_path, **settings))
