"""The benchmark of the input says what it read and how many cores that took; no number depends on a clock."""

from types import SimpleNamespace

import pytest

from bnn_jax.benchmarks import input as benchmark
from bnn_jax.benchmarks.input import FedLoop, benchmark_input

RATES = {0: 800.0, 1: 430.0, 2: 680.0}


@pytest.fixture
def read(monkeypatch):
    """Of each run the images that it may read."""
    images = []

    def run(opened, count, workers, batch_size, steps, step_seconds):
        images.append(count)
        return FedLoop(1.0, 0.0, RATES[workers]), 0.1

    monkeypatch.setattr(benchmark, "_run", run)
    monkeypatch.setattr(benchmark, "usable_cores", lambda: {0, 1})
    monkeypatch.setattr(benchmark, "open_stream", lambda *_, **__: SimpleNamespace(train=range(5000)))
    monkeypatch.setattr(benchmark, "write_synthetic_imagenet", lambda *_, **__: None)
    return images


def test_every_worker_and_what_feeds_the_device_take_a_core(read):
    found = benchmark_input(gpu_images_per_second=3400.0)
    assert found["images_per_second_per_core"] == 400.0 and found["cores_needed"] == 8.5
    assert set(read) == {512}


@pytest.mark.full
def test_the_photographs_it_makes_up_are_read(monkeypatch):
    monkeypatch.setattr(benchmark, "SIDES", (40, 40))
    found = benchmark_input(workers=(0,), batch_size=8, steps=2, gpu_images_per_second=1e4)
    assert [row["workers"] for row in found["rows"]] == [0, 1]
    assert all(row["images_per_second"] > 0 for row in found["rows"])


def test_of_a_set_on_disk_all_photographs_are_read(read, tmp_path):
    benchmark_input(data_dir=tmp_path)
    assert set(read) == {5000}
