"""The default model: heads over masked features, for labels of any kind."""

from __future__ import annotations

import pytest
import torch

from bss_ray.models import LateFusion

ROWS = 5


@pytest.fixture
def model() -> LateFusion:
    torch.manual_seed(0)
    return LateFusion({"audio": (1, 8, 8), "text": (6,)}, num_classes=3, width=16, dropout=0.5).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {
        "audio": torch.randint(0, 255, (ROWS, 1, 8, 8), generator=random, dtype=torch.uint8),
        "text": torch.randn(ROWS, 6, generator=random),
        "label": torch.zeros(ROWS),
    }


def test_features_are_what_the_heads_are_given(model: LateFusion, batch: dict[str, torch.Tensor]) -> None:
    outputs = model.train()(batch)  # after dropout: in train mode it makes a difference
    features = outputs["features"]
    assert list(outputs) == ["audio", "text", "fused", "features"]
    assert {name: tuple(values.shape) for name, values in features.items()} == {
        "audio": (ROWS, 16),
        "text": (ROWS, 16),
        "fused": (ROWS, 32),
    }
    for name in ("audio", "text"):
        torch.testing.assert_close(model.heads[name](features[name]), outputs[name])
    torch.testing.assert_close(model.fused(features["fused"]), outputs["fused"])
    torch.testing.assert_close(torch.cat([features["audio"], features["text"]], dim=-1), features["fused"])


def test_an_absent_modality_tells_the_fused_head_nothing(model: LateFusion, batch: dict[str, torch.Tensor]) -> None:
    there = torch.tensor([True, False, True, False, True])
    whole, masked = model(batch), model({**batch, "has_audio": there})
    torch.testing.assert_close(masked["fused"][there], whole["fused"][there])
    noise = {**batch, "audio": batch["audio"].clone(), "has_audio": there}
    noise["audio"][~there] = 77
    torch.testing.assert_close(model(noise)["fused"], masked["fused"])
    assert masked["features"]["fused"][~there, :16].abs().sum() == 0
    assert not torch.allclose(masked["fused"][~there], whole["fused"][~there])
    torch.testing.assert_close(masked["text"], whole["text"])


def test_masks_keep_the_precision(model: LateFusion, batch: dict[str, torch.Tensor]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model({**batch, "has_text": torch.arange(ROWS) > 1})
    assert outputs["fused"].dtype == outputs["features"]["text"].dtype == torch.bfloat16
