"""Hooks that wait for the import of another library."""

import sys

import pytest

from peftops.integrations.registration import when_imported


@pytest.fixture
def finders():
    """Python's list of finders, as it was."""
    before = list(sys.meta_path)
    yield before
    sys.meta_path[:] = before


def test_the_call_comes_once_after_the_module_has_run(tmp_path, monkeypatch, finders):
    (tmp_path / "a_late_module.py").write_text("size = 3")
    monkeypatch.syspath_prepend(tmp_path)
    sizes = []
    when_imported("a_late_module", lambda: sizes.append(sys.modules["a_late_module"].size))
    assert sizes == []
    import a_late_module  # noqa: F401

    assert sizes == [3] and sys.meta_path == finders
    when_imported("a_late_module", lambda: sizes.append(4))
    assert sizes == [3, 4]
    del sys.modules["a_late_module"]


def test_a_module_that_is_not_installed_is_missing_as_ever(finders):
    calls = []
    when_imported("a_module_that_nobody_wrote", lambda: calls.append(1))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_wrote"):
        import a_module_that_nobody_wrote  # noqa: F401
    assert calls == []
