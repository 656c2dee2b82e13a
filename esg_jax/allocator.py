"""Memory of the host that stays with the process, for programs that run on CPUs.

XLA's CPU backend takes the buffers of a program from the C library and gives them back after every run. glibc returns
large ones to the kernel at once, which then fills page after page with zeros again: a quarter of a training step (see
docs/benchmarks.md). With the settings here they stay, in pages of 2 MiB.
"""

import os
import platform
import sys

_TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"


def keep_memory() -> None:
    """Starts this program again under the same process id with glibc's allocator tuned, unless the user tuned it.

    glibc reads its settings when a process starts, so call it before anything else, from a script only. Elsewhere than
    on Linux with glibc it does nothing.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = _TUNABLES
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
