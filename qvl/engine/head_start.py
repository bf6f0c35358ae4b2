"""What an engine on a GPU waits for at its start, begun in threads while Python imports: they hold no interpreter.

    main    | import torch ............. | import the engine, resolve ...... | kernels, weights, ...
    thread  | driver, CUDA context ..... |
    thread                               | Triton's key ... | first kernel . |
    thread                               | C for its driver |

Nothing here is needed, and nothing here may fail a start: whoever comes first does the work, the other finds it done.
Knows the CUDA driver's names and Triton's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import threading

# What a kernel may put on a thread's stack beyond what its compiler knew to be needed. The driver holds that for every
# thread that the GPU can run at a time: at its own 1,024 bytes 264 MiB of an H200. Nothing here calls what no compiler
# could see through.
STACK_SIZE, STACK_BYTES = 0, 256  # the driver's number for this limit


def begin_context(device: str) -> None:
    """The driver and the context of the first GPU, which torch will use: some tenths of a second, seconds with many."""
    if device != "cpu":
        # Read by the driver when it starts; torch would set it, but later than this.
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
        threading.Thread(target=_retain_context, name="qvl-context", daemon=True).start()


def _retain_context() -> None:
    with contextlib.suppress(OSError, AttributeError):  # no driver, or not what we know
        cuda = ctypes.CDLL("libcuda.so.1")  # calls through it leave the interpreter to others
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
            retained = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
            if retained and cuda.cuCtxPushCurrent_v2(context) == 0:
                cuda.cuCtxSetLimit(STACK_SIZE, ctypes.c_size_t(STACK_BYTES))
                cuda.cuCtxPopCurrent_v2(ctypes.byref(context))


def begin_triton() -> threading.Thread:
    """Once torch is there: import Triton, make it ready, and compile a first kernel with it."""
    thread = threading.Thread(target=_read_triton, name="qvl-triton", daemon=True)
    thread.start()
    return thread


def _read_triton() -> None:
    with contextlib.suppress(ImportError, OSError):  # not there, or another version: it is read when it is needed
        from triton.runtime.cache import triton_key

        driver = threading.Thread(target=_make_driver, name="qvl-driver", daemon=True)
        driver.start()
        triton_key()  # a hash of 400 MB of libraries
        driver.join()
        from qvl.kernels.gpu import gpu_problem

        gpu_problem()


def _make_driver() -> None:
    """On a machine's first start the C compiler runs for it, most of a second. What fails is told by a first kernel."""
    with contextlib.suppress(ImportError, AttributeError, OSError, RuntimeError, subprocess.SubprocessError):
        from triton.runtime import driver

        from qvl.kernels.triton_cache import settle_cache

        settle_cache()
        driver.active.get_current_device()
