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


def test_of_a_set_on_disk_all_photographs_are_read(read, tmp_path):
    benchmark_input(data_dir=tmp_path)
    assert set(read) == {5000}
