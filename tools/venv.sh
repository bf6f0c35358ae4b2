#!/usr/bin/env bash
# Makes the virtual environment and installs qvl into it, once: tools/venv.sh VENV [EXTRAS]
#
# Knows how to get from a bare python3 (with or without its venv module) to an environment that holds qvl as an editable
# install at the versions of constraints/versions.txt. A stamp of the files that decide the result makes later calls free.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
extras=${2:-}
stamp="$venv/.qvl-installed${extras:+-$extras}"
want=$(cat pyproject.toml constraints/versions.txt tools/venv.sh | sha256sum)

fresh() { [ -x "$venv/bin/qvl" ] && [ -f "$1" ] && [ "$(cat "$1")" = "$want" ]; }
if fresh "$stamp" || { [ -z "$extras" ] && fresh "$venv/.qvl-installed-dev"; }; then exit 0; fi

new_enough() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' 2>/dev/null; }

find_python() {
  local name
  for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
    if new_enough "$name"; then echo "$name"; return; fi
  done
  echo "qvl needs Python 3.10 or newer; python3 here is: $(python3 --version 2>&1). Name one with PYTHON=/path/to/python3" >&2
  exit 1
}

# Debian and Ubuntu keep venv's bundled pip in a package of its own (python3-venv). Without it the environment is made
# empty, and the system's pip installs a pip into it.
make_venv() {
  local python=$1
  if "$python" -m venv "$venv" >/dev/null 2>&1; then return; fi
  rm -rf "$venv"
  if "$python" -m venv --without-pip "$venv" 2>/dev/null && "$python" -m pip --python "$venv/bin/python" install -q pip; then return; fi
  rm -rf "$venv"
  if "$python" -m virtualenv -q "$venv" 2>/dev/null; then return; fi
  rm -rf "$venv"
  echo "qvl: $python can make no virtual environment. On Debian and Ubuntu: sudo apt-get install -y python3-venv" >&2
  exit 1
}

[ -x "$venv/bin/python" ] || { python=$(find_python); echo "qvl: creating $venv with $("$python" --version)"; make_venv "$python"; }
echo "qvl: installing into $venv (once; PyTorch is the large part, this can take minutes)"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
"$venv/bin/python" -m pip install -qq --no-compile -c constraints/versions.txt -e ".${extras:+[$extras]}"
# pip would compile on one core. What cannot be compiled here (files for other versions of Python) nobody imports.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$venv/bin/python" -m compileall -qq -j 0 -x '/tests/' "$site" || true
echo "$want" > "$stamp"
