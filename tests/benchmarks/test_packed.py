"""What the benchmark of packed bits measures, on sizes that take no time; no number depends on a clock."""

import math

import pytest

from bnn_jax.benchmarks import packed
from bnn_jax.benchmarks.packed import Conv, Network, benchmark_packed, summarize
from bnn_jax.benchmarks.packed_tables import plot_packed, print_packed


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "PAUSE_SECONDS", 0.0)
        patch.setattr(packed, "LEAST_SECONDS", 0.0)
        return benchmark_packed(
            matmuls=((3, 64, 5),),
            convs=(Conv("tiny", 6, 32, 8, 2), Conv("depthwise", 6, 8, 8, 2, groups=8)),
            conv_batches=(1, 2),
            networks=(Network("lenet", 16, 10, (1,), 1, {"input_quantizer": "ste_sign", "kernel_quantizer": "xnor"}),),
            repeats=2,
        )


@pytest.mark.full
def test_rows_have_every_peer_that_is_installed(found):
    (matmul,) = found["matmul"]
    assert {"packed", "packed_from_float", "float32", "int8"} <= set(matmul["ms"])
    assert [row["batch"] for row in found["conv"]] == [1, 2] * 2
    for row in (matmul, *found["conv"]):
        for who, gmacs in row["gmacs"].items():
            macs = gmacs * row["ms"][who] * 1e6
            weights = 3 * 3 * 8 * (1 if row.get("groups") == 8 else 32)
            assert math.isclose(macs, 3 * 64 * 5 if "shape" in row else row["batch"] * 3 * 3 * weights)


@pytest.mark.full
def test_every_row_says_its_path_and_the_time_of_it(found):
    assert found["matmul"][0]["path"] == "bits"
    assert [row["path"] for row in found["conv"]] == ["bits"] * 2 + ["float32"] * 2
    for row in found["conv"]:
        of_path = "packed_from_float" if row["path"] == "bits" else "numbers_from_float"
        assert row["ms"]["chosen"] == row["ms"][of_path]
    (network,) = found["network"]
    assert network["path"] == "bits 1, float32 1" and {"on_bits", "on_float32"} <= network["ms"].keys()
    assert {"conv: chosen over packed_from_float", "network: packed over on_float32"} <= found["summary"].keys()


@pytest.mark.full
def test_networks_have_their_memory_and_their_file(found):
    (row,) = found["network"]
    assert set(row["ms"]) == set(row["peak_memory"]) == {"packed", "trained", "float32", "on_bits", "on_float32"}
    assert 0 < row["file_bytes"] < row["peak_memory"]["float32"]
    assert math.isclose(row["images_per_second"]["packed"] * row["ms"]["packed"], 1e3)


def test_ratios_are_geometric_means():
    rows = [{"ms": {"packed": 1.0, "float32": 2.0}}, {"ms": {"packed": 1.0, "float32": 8.0}}]
    summary = summarize({"matmul": rows, "conv": [], "network": []})
    assert summary == {"matmul: packed over float32": {"geometric_mean": pytest.approx(4.0), "worst": 2.0, "best": 8.0}}


@pytest.mark.full
def test_the_picture_is_written(found, tmp_path):
    assert plot_packed(found, tmp_path / "packed.png").stat().st_size > 10_000


def test_nothing_is_begun_when_the_time_is_over(tmp_path, capsys):
    network = Network("lenet", 16, 10, (1,), 1)
    measured = benchmark_packed(
        matmuls=((3, 64, 5),), convs=(Conv("tiny", 6, 32, 8, 2),), networks=(network,), minutes=-1.0
    )
    assert measured["network"] == measured["conv"] == measured["matmul"] == []
    left = ["lenet", "conv 6x6x32, batch 1", "conv 6x6x32, batch 64", "3x64x5"]
    assert measured["not_measured"] == left
    print_packed(measured)
    assert f"out of time before: {', '.join(left)}" in capsys.readouterr().out
    assert plot_packed(measured, tmp_path / "packed.png").stat().st_size > 1000


@pytest.mark.parametrize(("backend", "pauses"), [("cpu", 6), ("gpu", 0)])
def test_there_are_pauses_for_the_threads_of_cpu_peers_alone(monkeypatch, backend, pauses):
    slept = []
    monkeypatch.setattr(packed.time, "sleep", lambda seconds: slept.append(seconds) if seconds else None)
    monkeypatch.setattr(packed.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(packed, "MOST_CALLS", 1)
    packed._medians({"one": lambda: None, "other": lambda: None}, repeats=1)
    assert len(slept) == pauses
