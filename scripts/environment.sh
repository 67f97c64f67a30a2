# Sourced by quickstart.sh and test.sh: goes to the repository and activates .venv, which it creates
# if there is none and brings up to date if requirements.txt has changed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() { # prints the first interpreter that runs and is new enough (pyenv's shims may not run)
    for name in python3 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed, and none was found on the PATH" >&2
    return 2
}

checksum() { # macOS has shasum instead of sha256sum; both print the same
    if command -v sha256sum >/dev/null 2>&1; then sha256sum; else shasum -a 256; fi
}

stamp=.venv/requirements.sha256
wanted=$(checksum <requirements.txt)
if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "Installing requirements.txt into .venv (about 6 GB, a few minutes the first time)"
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python)
        "$python" -m venv .venv
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    echo "$wanted" >"$stamp"
fi
source .venv/bin/activate
