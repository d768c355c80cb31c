# Sourced by the other scripts: a virtual environment in .venv with this project installed.
# use_environment EXTRA installs `.[EXTRA]` (or `.` for "") once for each pyproject.toml.
use_environment() {
    local extra="$1" python="${PYTHON:-python3}" stamp
    if [ ! -x .venv/bin/python ]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
            exit 2
        fi
        "$python" -m venv .venv
    fi
    stamp=".venv/installed-${extra:-base}"
    # Another folder's installation is not this one's.
    if ! cmp -s <(echo "$PWD"; cat pyproject.toml) "$stamp"; then
        echo "Installing into .venv (a few minutes, once)"
        .venv/bin/python -m pip install --quiet --editable ".${extra:+[$extra]}"
        (echo "$PWD"; cat pyproject.toml) > "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
