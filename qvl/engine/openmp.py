"""How the threads of torch's operations wait for each other on a CPU: asleep. (Those of our kernels are our own.)

The OpenMP runtime of torch reads its environment once, when torch is imported, and by default its threads spin for
about a millisecond at the end of each operation. On cores that anything else wants too, each waits spinning for a
thread that cannot run meanwhile: tokens then take tens of times as long. Knows environment variables. Does not import
torch.
"""

from __future__ import annotations

from collections.abc import MutableMapping

ASLEEP = ("OMP_WAIT_POLICY", "PASSIVE")
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # whoever sets one of them has chosen


def wait_asleep(environment: MutableMapping[str, str]) -> None:
    """Let waiting threads sleep, unless the user chose otherwise. In vain once torch is imported."""
    if not any(name in environment for name in CHOICES):
        name, value = ASLEEP
        environment[name] = value
