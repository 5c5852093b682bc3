#!/bin/sh
# The CPU suite on every torch we support, each in a virtual environment of its own:
#     tests/run_on_torch.sh [VERSION ...]        default: 2.11.0 2.13.0 2.15.0
# PYTHON and PYTEST are as in the Makefile; the environments, VENVS/.venv-torch-VERSION, stand in
# the checkout unless VENVS says where. Exit status 1: a suite failed, or a version had none. With
# VERSION "installed" the suite runs in the environment of `python3`, in which nothing is installed.
#
# "+cpu" is asked for by name, because a bare version takes the CUDA build and its gigabytes; that
# build is taken where the index of CPU wheels cannot be reached or has none.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
options=${PYTEST:--n auto --dist loadgroup}
venvs=${VENVS:-.}
summary=
failed=0
[ $# -gt 0 ] || set -- 2.11.0 2.13.0 2.15.0

report() {
    summary="$summary$1: $2
"
    [ "$2" = passed ] || failed=$((failed + 1))
}

suite() {
    # No GPU, so that every machine runs the same tests.
    # shellcheck disable=SC2086
    if CUDA_VISIBLE_DEVICES= "$2" -m pytest $options; then
        report "$1" passed
    else
        report "$1" failed
    fi
}

# The lock file, but what came with torch stays as it came: NVRTC, setuptools, Triton.
constraints() {
    # The CPU wheels come without Triton: for them, the one that each torch was built for. The
    # interpreter of Triton 3.6 converts arrays of one element to int, which NumPy 2.4 refuses.
    triton= numpy=
    case $1 in
        2.11.*) triton=3.6.0 numpy=2.2.6 ;;
        2.15.*) triton=3.9.0 ;;
    esac
    awk -F== -v triton="$triton" -v numpy="$numpy" '
        function name(text) { text = tolower(text); gsub(/[-_.]+/, "-", text); return text }
        FILENAME != "constraints.txt" { came[name($1)]; print; next }
        /^#/ || NF < 2 || name($1) in came { next }
        $1 == "triton" && triton { sub(/==[0-9.]+/, "==" triton) }
        $1 == "numpy" && numpy { sub(/==[0-9.]+/, "==" numpy) }
        { print }' "$2" constraints.txt
}

for version; do
    if [ "$version" = installed ]; then
        suite installed "$python"
        continue
    fi
    venv=$venvs/.venv-torch-$version
    pip="$venv/bin/python -m pip --disable-pip-version-check"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || exit 1
    if [ ! -s "$venv/with-torch.txt" ]; then
        if ! $pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu \
            "torch==$version+cpu"; then
            echo "torch $version: no CPU wheel to be had; taking the CUDA build (gigabytes)"
            if ! $pip install --quiet "torch==$version"; then
                report "torch $version" "no wheel for this Python"
                continue
            fi
        fi
        $pip list --format=freeze >"$venv/with-torch.txt" || exit 1
    fi
    constraints "$version" "$venv/with-torch.txt" >"$venv/constraints.txt"
    if $pip install --quiet -c "$venv/constraints.txt" -e '.[test]' &&
        $pip list --format=freeze | grep -E "^torch==$version(\+|$)"; then
        suite "torch $version" "$venv/bin/python"
    else
        report "torch $version" "not installed"
    fi
done
printf '%s' "$summary"
[ "$failed" -eq 0 ]
