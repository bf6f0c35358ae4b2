"""Seconds from the command to the first 200 on /ready: `python tools/time_to_ready.py PORT FOLDER [FLAGS OF SERVE]`.

The server goes on; its process number is the last word of the output, its log lies in serve-PORT.log of the folder that
$OUT names (else of the working folder).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

LIMIT = 300.0


def main() -> int:
    port, *rest = sys.argv[1:]
    log = Path(os.environ.get("OUT", ".")) / f"serve-{port}.log"
    command = [sys.executable, "-m", "qvl", "serve", *rest, "--port", port, "--log-level", "info"]
    started = time.monotonic()
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    while time.monotonic() - started < LIMIT and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1):
                print(f"ready after {time.monotonic() - started:.2f} s, process {server.pid}")
                return 0
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    print(log.read_text()[-3000:])
    return 1


if __name__ == "__main__":
    sys.exit(main())
