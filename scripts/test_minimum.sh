#!/usr/bin/env bash
# The fast tests with the oldest versions that requirements.txt allows, in .venv-minimum (6 GB), which is
# made on first use by Python 3.11 or 3.12. Run by hand after a change of requirements; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset VIRTUAL_ENV CONDA_PREFIX REPA_E_PYTHON # the versions are the point
VENV=.venv-minimum PYTHON=python3.11 source scripts/environment.sh requirements-minimum.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" "$@"
