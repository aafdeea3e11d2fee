"""Directories of files that are there whole or not at all."""

import os
import stat

import pytest

from peftops.integrations.files import whole_directory


def test_a_directory_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_directory(tmp_path / "model", 0) as folder:
            (folder / "file").write_text("text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750
    assert (tmp_path / "model" / "file").read_text() == "text"


def test_nothing_is_left_of_a_directory_that_fails(tmp_path):
    with pytest.raises(KeyError), whole_directory(tmp_path / "model", 0) as folder:
        (folder / "file").write_text("text")
        raise KeyError
    assert not [*tmp_path.iterdir()]
