"""AV-Digits: the file, the table function, and the script that made the file."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bss_ray.data import av_digits as module
from bss_ray.data.av_digits import SPLITS, av_digits_table
from bss_ray.errors import DataError
from scripts import make_av_digits as make

ROWS = {"train": 2156, "validation": 720, "test": 718}


@pytest.fixture(scope="module")
def stored() -> pa.Table:
    return pq.read_table(module.FILE)


@pytest.fixture(scope="module")
def clean() -> dict[str, np.ndarray]:
    return av_digits_table("train")


@pytest.fixture(scope="module")
def mixed() -> dict[str, np.ndarray]:
    return av_digits_table("train", mispaired=0.4)


def same_content(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rows of equal content, bool (N,)."""
    return (left == right).reshape(len(left), -1).all(axis=1)


class TestFile:
    def test_is_small_and_holds_two_rows_per_image(self, stored):
        assert module.FILE.stat().st_size <= 6 * 2**20
        assert stored.schema.equals(make.SCHEMA)
        images, counts = np.unique(stored["image_id"].to_numpy(), return_counts=True)
        assert images.tolist() == list(range(1797))
        assert set(counts.tolist()) == {make.TAKES}

    def test_metadata_says_how_to_read_it(self, stored):
        metadata = {key.decode(): value.decode() for key, value in stored.schema.metadata.items()}
        assert metadata.items() >= make._metadata(seed=0, version="1.51").items()

    def test_no_image_is_in_two_splits(self, stored):
        splits_of = {}
        for image, split in zip(stored["image_id"].to_pylist(), stored["split"].to_pylist(), strict=True):
            splits_of.setdefault(image, set()).add(split)
        assert all(len(splits) == 1 for splits in splits_of.values())

    def test_is_not_sorted_by_label(self, stored):
        label = stored["label"].to_numpy()
        assert len(np.unique(label[:100])) == 10

    def test_noise_is_in_its_range(self, stored):
        snr = stored["snr_db"].to_numpy()
        low, high = make.SNR_DB
        assert low <= snr.min() < low + 0.5
        assert high - 0.5 < snr.max() <= high


@pytest.mark.parametrize("split", SPLITS)
def test_table_columns(split):
    table = av_digits_table(split)
    shapes = {name: (column.dtype.name, column.shape[1:]) for name, column in table.items()}
    assert shapes == {
        "image": ("float32", (1, 8, 8)),
        "audio": ("float32", (1, 32, 32)),
        "label": ("int64", ()),
        "mispaired": ("bool", ()),
        "image_id": ("int32", ()),
        "snr_db": ("float32", ()),
    }
    assert {len(column) for column in table.values()} == {ROWS[split]}
    assert np.unique(table["label"]).tolist() == list(range(10))
    assert np.bincount(table["label"]).min() >= 0.09 * ROWS[split]  # stratified
    assert not table["mispaired"].any()


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_inputs_are_roughly_standardised(clean, modality):
    assert abs(clean[modality].mean()) < 0.05
    assert abs(clean[modality].std() - 1) < 0.05


class TestMispaired:
    @pytest.mark.parametrize("share", [0.001, 0.1, 0.4, 0.999])
    def test_share_is_exact(self, share):
        table = av_digits_table("train", mispaired=share)
        assert table["mispaired"].sum() == round(share * ROWS["train"])

    def test_each_half_lost_one_modality_and_the_label_stayed(self, clean, mixed):
        kept_image = same_content(clean["image"], mixed["image"])
        kept_audio = same_content(clean["audio"], mixed["audio"])
        count = round(0.4 * ROWS["train"])
        assert (~kept_audio).sum() == count // 2
        assert (~kept_image).sum() == count - count // 2
        assert np.array_equal(mixed["mispaired"], ~(kept_image & kept_audio))
        assert (kept_image | kept_audio).all()
        assert np.array_equal(mixed["label"], clean["label"])

    @pytest.mark.parametrize(("modality", "companion"), [("image", "image_id"), ("audio", "snr_db")])
    def test_donors_are_original_rows_of_another_label(self, clean, mixed, modality, companion):
        row_of = {content.tobytes(): row for row, content in enumerate(clean[modality])}
        lost = np.flatnonzero(~same_content(clean[modality], mixed[modality]))
        donors = np.array([row_of[mixed[modality][row].tobytes()] for row in lost])
        assert (clean["label"][donors] != clean["label"][lost]).all()
        assert np.array_equal(mixed[companion][lost], clean[companion][donors])

    def test_seed_decides(self, mixed):
        again = av_digits_table("train", mispaired=0.4, seed=0)
        other = av_digits_table("train", mispaired=0.4, seed=1)
        assert all(np.array_equal(again[name], mixed[name]) for name in mixed)
        assert not np.array_equal(other["mispaired"], mixed["mispaired"])


class TestErrors:
    def test_unknown_split_names_the_nearest(self):
        with pytest.raises(DataError, match=r"no split 'valid': did you mean 'validation'\?"):
            av_digits_table("valid")

    @pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
    def test_share_outside_its_range(self, share):
        with pytest.raises(DataError, match=rf"must be in \[0, 1\), got {share}"):
            av_digits_table("train", mispaired=share)

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_only_training_rows_are_re_paired(self, split):
        with pytest.raises(DataError, match="only training rows are re-paired"):
            av_digits_table(split, mispaired=0.1)


class TestScript:
    def test_log_mel_shows_a_tone_at_its_band_and_level(self):
        hertz = 1000.0
        tone = np.sin(2 * np.pi * hertz * np.arange(make.CLIP) / make.SAMPLE_RATE)
        decibels = make.log_mel(tone)
        assert decibels.shape == module.AUDIO_SHAPE
        weight = make.mel_filters()[:, round(hertz * make.WINDOW / make.SAMPLE_RATE)]
        assert (decibels.argmax(axis=0) == weight.argmax()).all()

    def test_quantising_round_trips_within_half_a_level(self):
        low, high = module.AUDIO_DB_RANGE
        decibels = np.linspace(low, high, 1000)
        back = module._decibels(make.quantise(decibels).astype(np.float32))
        assert np.abs(back - decibels).max() <= 0.5 * (high - low) / 255 + 1e-5

    @pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the program espeak-ng")
    def test_rows_made_again_are_those_of_the_file(self, stored):
        if f"espeak-ng {make.espeak_version()}" != stored.schema.metadata[b"generator"].decode():
            pytest.skip("the file was made with another version of espeak-ng")
        order = make._generator(0, stream=1).permutation(stored.num_rows)
        for position in range(5):
            row = stored.slice(position, 1).to_pylist()[0]
            again = make.speak_row(row["label"], int(order[position]), seed=0)
            assert (again["voice"], again["speed"], again["pitch"]) == (row["voice"], row["speed"], row["pitch"])
            # One level of tolerance: another CPU may round a decibel the other way.
            assert np.abs(again["audio"].astype(int) - np.array(row["audio"])).max() <= 1
            other = make.speak_row(row["label"], int(order[position]), seed=1)
            assert not np.array_equal(other["audio"], again["audio"])

    def test_missing_espeak_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        with pytest.raises(ImportError, match="apt install espeak-ng"):
            make.make_table(seed=0)
