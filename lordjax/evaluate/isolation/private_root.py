"""A file system of its own: the files that Python needs, read-only, and a bounded ``/tmp``.

It needs a mount namespace and the right to mount. See mount(2), mount_setattr(2), pivot_root(2).
"""

from __future__ import annotations

import ctypes
import os

from lordjax.evaluate.isolation.kernel_calls import call, machine
from lordjax.evaluate.isolation.python_files import DEVICES, readable

READ_ONLY, NO_SET_ID, NO_DEVICES, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 4096, 1 << 14, 1 << 18
DETACH = 2  # of umount2
MOUNT_SETATTR, WHOLE_TREE, WORKING_DIRECTORY = 442, 0x8000, -100
PIVOT_ROOT = (155, 41)  # by machine
WORK = "/tmp/work"  # the program's directory
WRITABLE = ("/tmp", "/dev/shm")
INSTALLED = ("site-packages", "dist-packages")


def enter(at: str, size: int) -> bool:
    """Makes a new root directory and changes to it.

    Args:
      at: an empty directory, where it is mounted while it is made.
      size: bytes of all files that may be written.

    Returns:
      Whether it was possible; if not, nothing has changed.
    """
    number = machine()
    if number is None:
        return False
    try:
        call("mount", None, b"/", None, RECURSIVE | PRIVATE, None)
        memory_files(at, 1 << 20, "755")
    except OSError:
        return False
    try:
        fill(at, size)
        os.chdir(at)
        call("syscall", PIVOT_ROOT[number], b".", b".")  # the old root is now above the new one
    except OSError:
        call("umount2", at.encode(), DETACH)
        return False
    call("umount2", b".", DETACH)
    os.chdir(WORK)
    return True


def fill(root: str, size: int) -> None:
    """Mounts the files of a new root; all that was mounted before ``WRITABLE`` is read-only."""
    for path in (*readable(), *DEVICES):
        place(root, path)
    for path in ("/proc", *WRITABLE):
        os.makedirs(root + path)
    hide_installed(root)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SET_ID, 0, 0, 0)
    start, tree = ctypes.c_long(WORKING_DIRECTORY), WHOLE_TREE
    call("syscall", MOUNT_SETATTR, start, root.encode(), tree, attributes, 32)
    temporary, shared = (root + path for path in WRITABLE)
    memory_files(temporary, size, "1777")
    for path in (root + WORK, f"{temporary}/shared"):
        os.mkdir(path)
        os.chmod(path, 0o1777)
    bind(f"{temporary}/shared", shared)


def place(root: str, path: str) -> None:
    """Binds a file or directory to the same path below the new root; keeps symbolic links."""
    folder, target = os.path.dirname(path), root + path
    if folder != "/" and not os.path.lexists(root + folder):
        parents(root, folder)
    if os.path.lexists(target):
        return
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        place(root, os.path.realpath(path))
    elif os.path.isdir(path):
        os.mkdir(target)
        bind(path, target)
    elif os.path.exists(path):
        os.close(os.open(target, os.O_CREAT, 0o444))
        bind(path, target)


def parents(root: str, folder: str) -> None:
    """Makes a directory below the new root with all above it, through links as they are."""
    above = os.path.dirname(folder)
    if above != "/" and not os.path.lexists(root + above):
        parents(root, above)
    if os.path.islink(folder):
        os.symlink(os.readlink(folder), root + folder)
        folder = os.path.realpath(folder)
        if not os.path.lexists(root + folder):
            parents(root, folder)
    elif not os.path.lexists(root + folder):
        os.mkdir(root + folder)


def hide_installed(root: str) -> None:
    """Puts an empty directory over packages that are installed in the standard library's folder."""
    for name in INSTALLED:
        path = root + os.path.join(os.path.dirname(os.__file__), name)
        if os.path.isdir(path):
            bind(f"{root}/proc", path)


def bind(path: str, target: str) -> None:
    """Shows a file or directory at a second place."""
    call("mount", os.fsencode(path), os.fsencode(target), None, BIND | RECURSIVE, None)


def memory_files(at: str, size: int, mode: str) -> None:
    """Mounts an empty file system in memory."""
    options = f"size={max(size, 4096)},nr_inodes=4096,mode={mode}".encode()
    call("mount", b"tmpfs", os.fsencode(at), b"tmpfs", NO_SET_ID | NO_DEVICES, options)
