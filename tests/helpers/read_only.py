"""A folder that one process, and those that it starts, can only read: a mount in a name space of its own."""

import ctypes
import os
import subprocess
from pathlib import Path

NEW_USERS, NEW_MOUNTS = 0x10000000, 0x00020000  # flags of unshare(2)
READ_ONLY = ("mount --make-rprivate / && mount --bind {root} {root} && mount -o remount,bind,ro {root} && "
             "! touch {root}/x 2> /dev/null")


def make_read_only(root):
    """Mount a folder so that this process, and those that it starts, can only read it."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_USERS | NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["sh", "-c", READ_ONLY.format(root=root)], check=True)
