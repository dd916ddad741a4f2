"""What a result says about where it comes from."""

import json
import os
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jax
import numpy as np
import pytest

import bnn_jax
from bnn_jax.analysis.documents import provenance_section
from bnn_jax.analysis.provenance import cpu, git_state, installed_versions, provenance


def git(folder, *arguments):
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path):
    """A package `lib` with one committed file, in a checkout of its own."""
    folder = tmp_path / "checkout" / "lib"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("x = 1\n")
    git(folder, "init", "--quiet", "..")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_provenance_is_plain_json_of_this_process():
    found = provenance()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"date", "python", "platform", "versions", "xla_flags", "device", "cpu", "git"}
    when = datetime.fromisoformat(found["date"])
    assert when.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=5)
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["device"] == {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
    }
    assert 1 <= found["cpu"]["cores"] <= os.cpu_count()


def test_flags_of_xla_are_told(monkeypatch):
    flags = "--xla_gpu_deterministic_ops=true  --xla_dump_to=/home/me/dump"
    monkeypatch.setenv("XLA_FLAGS", flags)
    found = provenance()
    assert found["xla_flags"] == ["--xla_gpu_deterministic_ops=true"]
    assert provenance_section(found).splitlines()[-1] == "- XLA flags: --xla_gpu_deterministic_ops=true"
    monkeypatch.delenv("XLA_FLAGS")
    assert provenance()["xla_flags"] == []
    assert "XLA flags" not in provenance_section(provenance())


def test_provenance_names_no_path_of_the_machine():
    text = json.dumps(provenance())
    assert not re.search(r'["\s]/\w', text)
    for path in (Path(bnn_jax.__file__).parents[1], Path.home(), Path.cwd()):
        assert len(path.parts) == 1 or str(path) not in text


def test_a_distribution_that_is_not_installed_is_left_out():
    assert installed_versions(("no-such-distribution-here", "numpy")) == {"numpy": np.__version__}


def test_a_cpu_without_a_readable_model_has_cores_only(monkeypatch):
    def refuse(self, *args, **kw):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr("platform.processor", lambda: "")
    assert set(cpu()) == {"cores"}


def test_the_first_core_of_linux_and_its_wide_instructions(monkeypatch):
    core = "processor\t: {}\nmodel name\t: Some CPU @ 2 GHz: {}\nflags\t\t: fpu avx avx2 avx512f{}\n\n"
    text = core.format(0, "fast", " avx512_vpopcntdq") + core.format(1, "slow", "")
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    found = cpu()
    assert found["model"] == "Some CPU @ 2 GHz: fast"
    assert found["features"] == ["avx2", "avx512f", "avx512_vpopcntdq"]


def test_a_clean_checkout(package):
    assert git_state(package) == {"commit": git(package, "rev-parse", "HEAD"), "dirty": False}


def test_a_changed_file_makes_it_dirty(package):
    (package / "__init__.py").write_text("x = 2\n")
    assert git_state(package)["dirty"] is True


@pytest.mark.parametrize(
    ("path", "dirty"),
    [("lib/new.py", True), ("new.py", True), ("results/digits/report.md", False), ("lib/results/a", True)],
)
def test_an_untracked_file_makes_it_dirty_unless_it_is_a_result(package, path, dirty):
    file = package.parent / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("new")
    assert git_state(package)["dirty"] is dirty


def test_the_checkout_around_an_ignored_package_is_not_its_own(package):
    inner = package.parent / "env" / "lib"
    inner.mkdir(parents=True)
    (inner / "__init__.py").write_text("")
    assert git_state(inner) == {"commit": "unknown", "dirty": "unknown"}


def test_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == {"commit": "unknown", "dirty": "unknown"}


def test_no_git(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(package) == {"commit": "unknown", "dirty": "unknown"}


def test_a_git_that_fails(package):
    (package.parent / ".git" / "HEAD").write_text("broken")
    assert git_state(package) == {"commit": "unknown", "dirty": "unknown"}


def test_the_checkout_of_a_git_hook_is_not_taken_for_it(package, tmp_path, monkeypatch):
    commit = git(package, "rev-parse", "HEAD")
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert git_state(package) == {"commit": commit, "dirty": False}
