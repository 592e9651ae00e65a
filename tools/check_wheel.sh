#!/usr/bin/env bash
# Build the wheel and the source archive, install the wheel in a clean environment outside the repository, and use it there.
# Usage: tools/check_wheel.sh [FOLDER]   (default: build/wheel, made anew; PYTHON chooses the interpreter)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-build/wheel}
rm -rf "$folder"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

"${PYTHON:-python3}" -m venv "$folder/tools"
"$folder/tools/bin/python" -m pip install --quiet build
"$folder/tools/bin/python" -m build --outdir "$folder/dist" .

"${PYTHON:-python3}" -m venv "$folder/clean"
"$folder/clean/bin/python" -m pip install --quiet "$folder"/dist/*.whl

# outside of the checkout: what is not in the wheel is not there
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
cd "$outside"
program=$folder/clean/bin/disttempnet
"$program" env
"$program" demo --help > /dev/null
"$program" train debug name=wheel out=runs
"$program" evaluate runs/wheel
"$program" report runs/wheel --out report.html
"$program" launch cc12m_vitb32_v1_corrected --dry-run > /dev/null
"$program" compare compare --list > /dev/null
echo "the wheel works: $(ls "$folder"/dist)"
