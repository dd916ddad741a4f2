"""The pages of the zoo: a row and a section for every network, with or without the files of results."""

import re
import sys
from pathlib import Path

import pytest

from bnn_jax.models import MODELS
from bnn_jax.models.build import build_model
from bnn_jax.models.extents import EXTENTS, extent_of
from bnn_jax.zoo import PRETRAINED

EXTENSIONS = str(Path(__file__).parents[2] / "docs" / "_extensions")


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, EXTENSIONS)
    import zoo_pages

    yield zoo_pages
    sys.path.remove(EXTENSIONS)


SIZE = {"name": "bireal18", "parameters": 11_690_000, "megabits": 33.6, "payload_bytes": 4_200_000}
SIZE |= {"macs": {"full_precision": 138_000_000, "binary": 1_680_000_000, "ternary": 0, "multibit": 0}}
SIZE |= {"costs": [0, 57_800_000]}
PROVENANCE = {"cpu": {"cores": 2, "model": "Some CPU"}, "versions": {"jax": "0.10.2"}, "date": "2026-11-29T00:00:00"}
PROVENANCE |= {"git": {"commit": "0123456789abcdef"}}
LATENCY = {"network": [{"name": "bireal18", "ms": {"packed": 10.0, "float32": 45.0}}], "provenance": PROVENANCE}
LATENCY |= {"not_measured": ["bireal34", "resnet18"]}


def rows_of(page):
    found = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page, re.S)
    strip = lambda cell: re.sub("<[^>]+>", "", cell)
    return {strip(name): [strip(cell) for cell in re.findall(r"<td>(.*?)</td>", cells, re.S)] for name, cells in found}


def test_a_row_for_every_network_without_any_file(pages):
    rows = rows_of(pages.index_page({}, {}))
    assert list(rows) == list(MODELS)
    assert all(len(cells) == len(pages.HEADINGS) - 1 for cells in rows.values())
    assert rows["bireal18"][4:] == ["–"] * 9 and rows["bireal18"][:3] == ["Liu 2018", "ImageNet", "56.4 [4]"]


def test_the_numbers_are_those_of_the_files(pages):
    page = pages.index_page({"rows": [SIZE]}, LATENCY)
    assert rows_of(page)["bireal18"][4:] == ["11.7", "33.6", "1,680", "138", "4,200", "10", "45", "4.5", "57.8"]
    assert rows_of(page)["bireal34"][4:] == ["–"] * 9
    real = SIZE | {"name": "resnet18", "megabits": 32e-6 * SIZE["parameters"]}
    assert rows_of(pages.index_page({"rows": [real]}, {}))["resnet18"][8] == "–"  # no packed file
    assert "2 cores of Some CPU, jax 0.10.2, commit 0123456789ab, 2026-11-29. The 2 networks that" in page
    assert "did not reach" not in pages.index_page({"rows": [SIZE]}, LATENCY | {"not_measured": []})


def test_every_pretrained_network_is_told(pages):
    page = pages.index_page({}, {})
    for name, record in PRETRAINED.items():
        assert f"| `{name}` |" in page and f"({record.correct:,} of {record.examples:,})" in page


def test_published_accuracies_have_sources_and_networks(pages):
    assert set(pages.PUBLISHED) <= set(MODELS) and set(EXTENTS) <= set(MODELS)
    page = pages.index_page({}, {})
    for accuracy, source in pages.PUBLISHED.values():
        assert 40 < accuracy < 95 and f"{source}." in page


def test_short_instances_can_be_built_and_those_alike_share_a_picture(pages):
    drawn = {name: pages.architecture(pages.shortened(name)) for name in MODELS}
    assert drawn["bireal18"] == drawn["bireal34"] != drawn["xnor_resnet18"]
    assert len(set(drawn.values())) < len(MODELS)


@pytest.mark.parametrize("name", ["resnet6", "binaryconnect_convnet"])
def test_a_section_has_the_line_that_builds_it_and_a_picture_told_in_words(pages, name, tmp_path):
    path = tmp_path / "pictures" / f"{name}.png"
    picture = pages.picture_of(pages.shortened(name), extent_of(name), path, newest=0.0)
    drawn = path.stat().st_mtime_ns
    assert pages.picture_of(None, extent_of(name), path, newest=0.0) == picture  # not drawn again
    assert path.stat().st_mtime_ns == drawn
    section = pages.section(name, picture)
    assert section.startswith(f"## {name}\n")
    network = eval(re.search("```python\n(.*)\n```", section)[1], {"build_model": build_model})
    assert pages.architecture(network) == pages.architecture(build_model(name, num_classes=10))
    if name == "resnet6":
        assert "\n:alt: Gradient paths of a short resnet6: smallest costs N: 0, " in section
    else:
        assert "```{image}" not in section and section.endswith("No binary products.\n")


def test_the_machine_of_the_latencies(pages):
    where = {
        "cpu": {"cores": 2, "model": "CPU"},
        "versions": {"jax": "1.2"},
        "git": {"commit": "a" * 40},
        "date": "2020-01-02T",
    }
    assert pages.machine_of({}) == "not measured yet."
    found = pages.machine_of({"provenance": where, "not_measured": []})
    assert found == "2 cores of CPU, jax 1.2, commit aaaaaaaaaaaa, 2020-01-02."
    where["cpu"]["features"] = ["avx2", "avx512f"]
    found = pages.machine_of({"provenance": where, "not_measured": ["a", "b"]})
    assert found.startswith("2 cores of CPU (avx2, avx512f), jax 1.2")
    assert found.endswith("2020-01-02. The 2 networks that it did not reach in its time have a –.")
