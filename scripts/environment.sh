# Sourced by quickstart.sh and test.sh: goes to the repository and activates .venv, which it creates
# if there is none and brings up to date if requirements.txt has changed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/requirements.sha256
wanted=$(sha256sum <requirements.txt)
if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed, found $("$python" --version)" >&2
        exit 2
    }
    echo "Installing requirements.txt into .venv (about 6 GB, a few minutes the first time)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    echo "$wanted" >"$stamp"
fi
source .venv/bin/activate
