"""A full or forbidden disk becomes one sentence; everything else stays what it was."""

from __future__ import annotations

import errno
import os

import pytest

from switch_t5.errors import UserError
from switch_t5.storage import FAILING, storage_errors, writable_directory


def test_a_writable_directory_is_made_with_its_parents_and_left_empty(tmp_path):
    directory = writable_directory(tmp_path / "runs" / "1")
    assert directory == tmp_path / "runs" / "1"
    assert list(directory.iterdir()) == []


def test_a_directory_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        writable_directory(tmp_path / "file")
    assert str(caught.value) == (f"MODEL_DIR {tmp_path}/file cannot be written (File exists): name a folder that can.")


def test_a_directory_under_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^MODEL_DIR .*/file/run cannot be written \(Not a directory\)"):
        writable_directory(tmp_path / "file" / "run")


def test_a_device_without_room_is_the_users_to_mend():
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(UserError) as caught,
        storage_errors("Writing /dev/full", "nothing is lost"),
    ):
        file.write(b"x")
    assert str(caught.value) == (
        "Writing /dev/full failed (No space left on device): make room there; nothing is lost."
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_lack_of_permission_is_the_users_to_mend(number):
    with pytest.raises(UserError) as caught, storage_errors("Writing x"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == (f"Writing x failed ({os.strerror(number)}): name a folder that can be written.")


def test_the_error_number_inside_a_tensorstore_text_counts():
    text = "RESOURCE_EXHAUSTED: Failed to write 8 bytes to file 4: No space left [os_error_code='28']"
    with pytest.raises(UserError, match="No space left on device"), storage_errors("Saving"):
        raise ValueError(text)


def test_the_cause_of_an_error_counts():
    error = RuntimeError("the save failed")
    error.__cause__ = OSError(errno.ENOSPC, "full")
    with pytest.raises(UserError, match="No space left on device"), storage_errors("Saving"):
        raise error


@pytest.mark.parametrize("number", FAILING)
def test_a_disk_that_is_out_of_order_is_the_users_to_mend(number):
    with pytest.raises(UserError) as caught, storage_errors("Saving", "nothing is lost"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"Saving failed ({os.strerror(number)}): see to that disk; nothing is lost."


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EINVAL, "invalid"), KeyError("x")])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, storage_errors("Saving"):
        raise error
    assert caught.value is error
