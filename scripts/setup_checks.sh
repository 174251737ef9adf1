# What it takes to make a Python environment, and one clear line where something of it is missing; for the scripts
# beside it to source.

setup_say() { printf '[set-up] %s\n' "$*"; }

setup_fail() {
    printf '[set-up] ERROR: %s\n' "$*" >&2
    exit 1
}

setup_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return
        fi
    done
    setup_fail "found no python3.10 or newer with the venv module (tried: ${PYTHON:-python3, python3.10 to 3.13, python})." \
        "Install one (Debian and Ubuntu: python3 and python3-venv), or name it: PYTHON=/path/to/python3."
}

setup_check_disk() {
    local free_kib
    free_kib=$(df -Pk "$1" | awk 'NR == 2 { print $4 }')
    if [ "$free_kib" -lt $(($2 * 1024 * 1024)) ]; then
        setup_fail "$1 has $((free_kib / 1024)) MiB free, the environment takes up to $2 GiB. Free some space and try again."
    fi
}

# an environment in folder $1 that will take up to $2 GiB, unless there is one, with a pip that reaches its index
setup_make_venv() {
    local venv=$1 python
    python=$(setup_find_python) || exit 1
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        setup_check_disk "$PWD" "$2"
        setup_say "creating ${venv##*/} with $("$python" --version)"
        "$python" -m venv --clear "$venv" || setup_fail "could not create $venv."
    fi
    # a small request first: without an index it fails within seconds and not after the retries of every package
    "$venv/bin/python" -m pip install --quiet --retries 1 --timeout 20 --upgrade pip "setuptools>=77" ||
        setup_fail "pip cannot reach its package index. Check the network or pip's configuration (pip config list)."
}

# into environment $1 what is called $2, by the other arguments of pip
setup_pip() {
    local venv=$1 what=$2
    shift 2
    "$venv/bin/python" -m pip install --quiet "$@" || setup_fail "pip could not install $what; its own message is above."
}
