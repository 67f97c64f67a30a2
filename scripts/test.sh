#!/usr/bin/env bash
# The whole test suite: lint, format, tests. `scripts/test.sh fast` leaves out the slow tests; other
# arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # small networks: threads only wait for each other
export HF_HUB_OFFLINE=1 # no test downloads anything
ruff check .
ruff format --check .
# a file stays with one worker: its fixtures are made once; tests/conftest.py gives the order
workers="-n 2 --dist loadfile --no-loadscope-reorder"
if [ "${1:-}" = fast ]; then
    exec python -m pytest $workers -m "not slow" "${@:2}"
fi
exec python -m pytest $workers "$@"
