#!/bin/sh
# The CPU suite on every torch we support, each in a virtual environment of its own:
#     tests/run_on_torch.sh [VERSION ...]        default: 2.11.0 2.13.0 2.15.0
# PYTHON and PYTEST are as in the Makefile. A version without a CPU wheel is reported and skipped;
# the exit status is 1 if a suite failed or none ran. With VERSION "installed" the suite runs in
# the environment that `python3` is of, in which nothing is installed.
#
# "+cpu" is asked for by name: a bare version takes the CUDA build and its gigabytes.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
options=${PYTEST:--n auto --dist loadgroup}
ran=0 failed=0
[ $# -gt 0 ] || set -- 2.11.0 2.13.0 2.15.0

suite() {
    ran=$((ran + 1))
    "$1" -c 'import torch; print("torch", torch.__version__)'
    # No GPU, so that every machine runs the same tests.
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES= "$1" -m pytest $options || failed=$((failed + 1))
}

for version; do
    if [ "$version" = installed ]; then
        suite "$python"
        continue
    fi
    venv=.venv-torch-$version
    pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || exit 1
    if ! $pip install --extra-index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu"
    then
        echo "torch $version: no CPU wheel for this Python here; skipped"
        continue
    fi
    # Everything else as the lock file has it, but the Triton that belongs to the oldest torch.
    case $version in 2.11.*) triton=3.6.0 ;; *) triton= ;; esac
    sed -e '/^torch==/d' ${triton:+-e "s/^triton==[0-9.]*/triton==$triton/"} constraints.txt \
        >"$venv/constraints.txt"
    $pip install -c "$venv/constraints.txt" -e '.[test]' || exit 1
    suite "$venv/bin/python"
done
echo "$ran suites run, $failed failed"
[ "$ran" -gt 0 ] && [ "$failed" -eq 0 ]
