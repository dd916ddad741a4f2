"""What the tests of pictures share."""

import pytest


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved during a test, to look at what they hold."""
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (saved.append(self), savefig(self, *args, **kw)))
    return saved
