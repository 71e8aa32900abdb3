#!/usr/bin/env bash
# Gather in FOLDER what a GPU machine without a package index needs, below 60 MiB:
#
#     bash benchmarks/gpu/prepare.sh FOLDER [PYTHON]
#
# FOLDER gets wheels/ (of `lacking.txt`, for Python 3.12 on x86-64), model.gguf (the first four blocks of SmolLM2-135M
# with embedding and head, as they are packaged: Q8_0 and Q4_1), text/ (paragraphs to calibrate and to judge on) and
# revision. PYTHON (default: python3) has this package installed; pip and a registry are needed here, and nowhere else.
# `.gpu/` in the repository's root is ignored by git.
set -euo pipefail

folder=${1:?usage: bash benchmarks/gpu/prepare.sh FOLDER [PYTHON]}
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder/wheels"

download=("$python" -m pip download --quiet --no-deps --dest "$folder/wheels")
platforms=()
for platform in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 any; do
    platforms+=(--platform "$platform")
done
"${download[@]}" --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    --requirement "$here/lacking.txt"
# Hydra's parser comes as source alone.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" antlr4-python3-runtime==4.9.3

"$python" "$here/small_model.py" cut "$folder"
git -C "$here" rev-parse HEAD >"$folder/revision"

size=$(du --summarize --bytes "$folder" | cut --fields 1)
echo "$folder: $((size / 2**20)) MiB"
if ((size > 60 * 2**20)); then
    echo "that is more than 60 MiB" >&2
    exit 1
fi
