# Sourced by quickstart.sh, test.sh and .ci/run: goes to the repository and puts a Python with the
# packages of a file first on the PATH.
#
#     source scripts/environment.sh requirements.txt|requirements-dev.txt|requirements.lock
#
# An environment of the user's own is taken as it is, and nothing is installed into it: that of
# REPA_E_PYTHON=/path/to/python, or the active one of venv or conda (conda's base is none). Without
# one, .venv (or $VENV) is made, and brought up to date when the file has changed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}

find_python() { # prints the first interpreter that runs and is new enough (pyenv's shims may not run)
    for name in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
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

own_python() { # prints the python of the environment that the user has chosen, if any
    if [ "${REPA_E_PYTHON:-}" ]; then
        echo "$REPA_E_PYTHON"
    elif [ "${VIRTUAL_ENV:-}" ] && [ ! "$VIRTUAL_ENV" -ef "$venv" ]; then
        echo "$VIRTUAL_ENV/bin/python"
    elif [ "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        echo "$CONDA_PREFIX/bin/python"
    fi
}

use_own() { # PYTHON FILE: its folder comes first on the PATH, if it has the packages of the file
    if [ "$(basename "$1")" != python ] || [ ! -x "$1" ]; then
        echo "error: $1 is not the file \"python\" of an environment" >&2
        return 2
    fi
    "$1" -m utils.process.installation "${2/.lock/-dev.txt}" || return
    export PATH="$(cd "$(dirname "$1")" && pwd):$PATH"
}

state_of() { # FILE: the checksum of everything that it lists
    case $1 in
    requirements-dev.txt) cat requirements.txt "$1" | checksum ;;
    *) checksum <"$1" ;;
    esac
}

install() { # FILE, into $venv, unless it is there already
    local stamps=$venv/installed file covered flags=
    [ "$(cat "$stamps/$1" 2>/dev/null)" != "$(state_of "$1")" ] || return 0
    echo "Installing $1 into $venv (about 6 GB, a few minutes the first time)"
    if ! $venv/bin/python -m pip --version >/dev/null 2>&1; then # none, or one that was cut short
        local python
        python=$(find_python) || return
        "$python" -m venv --clear "$venv" || return
    fi
    rm -rf "$stamps" # from here to the end, nothing is known to be there
    case $1 in # the lock has every package of requirements-dev.txt, and that has requirements.txt
    requirements.lock) covered="$1 requirements-dev.txt requirements.txt" flags=--require-hashes ;;
    requirements-dev.txt) covered="$1 requirements.txt" ;;
    *) covered=$1 ;;
    esac
    $venv/bin/python -m pip install --quiet --disable-pip-version-check $flags -r "$1" || return
    mkdir -p "$stamps"
    for file in $covered; do state_of "$file" >"$stamps/$file"; done
}

own=$(own_python)
if [ "$own" ]; then
    use_own "$own" "$1"
else
    install "$1"
    source $venv/bin/activate
fi
