#!/usr/bin/env bash
# Everything that only a GPU can tell, most important first, each with a time limit; at most 12 minutes in all.
#
#   benchmarks/gpu_session.sh [--dry-run] [--steps "tests kernels"] [--other DIR] [--copy-to DIR]
#
# The CUDA extension must be built (HF_SPQR_CUDA=1 python setup.py build_ext --inplace). --other names another checkout
# with its extension built, whose kernels are timed beside these: its results get the ending "-other". --copy-to takes
# the logs and results. A step that fails or runs out of time does not stop the others; the table at the end says which.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
dry= other= copy_to= steps=
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1 ;;
        --other) other=$(cd "$2" && pwd) || exit 2; shift ;;
        --copy-to) copy_to=$2; shift ;;
        --steps) steps=" $2 "; shift ;;
        *) sed -n '2,10p' "$0"; exit 2 ;;
    esac
    shift
done
logs=build/gpu_session
summary=
mkdir -p "$logs"
export PYTHONPATH=.

# step NAME SECONDS COMMAND...: output to a log, its end to the screen
step() {
    local name=$1 seconds=$2 start=$SECONDS status
    shift 2
    [[ -z $steps || $steps == *" $name "* ]] || return
    if [ -n "$dry" ]; then
        printf '%-12s %4s s  %s\n' "$name" "$seconds" "$*"
        return
    fi
    timeout --kill-after=5 "$seconds" "$@" >"$logs/$name.log" 2>&1
    status=$?
    tail -n 25 "$logs/$name.log"
    summary+=$(printf '%-12s status %3s after %3s s' "$name" "$status" $((SECONDS - start)))$'\n'
    printf '%s' "$summary" >"$logs/summary.txt"
    [ -z "$copy_to" ] || { mkdir -p "$copy_to"; cp "$logs"/*.log "$logs/summary.txt" benchmarks/results/*.json "$copy_to"; }
}

few="1 8 16 64 128 512"
mine="torch bf16|spqr 3 bit|affine 4 bit g128, fp16"
tests="$PYTHON -m pytest -q -p no:cacheprovider tests/gpu"
# Ragged SpQR and affine matrices, of some hundred rows, with tokens for every kernel.
one="tests/gpu/test_kernels.py::test_linear"
short="$one[2-dtype0] $one[4-dtype1] $one[14-dtype0] $one[15-dtype2]"

step tests      150 $tests -x
step kernels    130 "$PYTHON" benchmarks/kernels_cuda.py --tokens $few --kinds "$mine"
if [ -n "$other" ]; then
    PYTHONPATH=$other step other 110 "$PYTHON" benchmarks/kernels_cuda.py --tokens $few --kinds "$mine" --ending=-other
fi
step racecheck   70 compute-sanitizer --tool racecheck --error-exitcode 9 $PYTHON -m pytest -q -p no:cacheprovider -x $short
step memcheck    40 compute-sanitizer --tool memcheck --error-exitcode 9 $PYTHON -m pytest -q -p no:cacheprovider -x $short
step prompt      40 "$PYTHON" benchmarks/prompt_cuda.py --tokens 128 512 --mib 32 64 96 512
step decode-7b   60 "$PYTHON" benchmarks/generate_cuda.py --models 7b
# 70B in bf16 takes 140 GB of memory: quantized only, all 80 layers.
step decode-70b  60 "$PYTHON" benchmarks/generate_cuda.py --models 70b --kinds spqr,affine --ending=-70b
step generate    60 "$PYTHON" benchmarks/generate_cuda.py --models 7b --kinds bf16,spqr --generate
[ -n "$dry" ] || printf '%s' "$summary"
