#!/bin/bash
# A wheel in an environment of its own, with the highest or the lowest versions that it allows: the short road, a talk, a report.
# bash tests/fresh.sh dist/yothalia-….whl highest|lowest-direct
set -euo pipefail
wheel=$(realpath "$1"); which=${2:-highest}
box=$(mktemp -d); trap 'rm -rf "$box"' EXIT; cd "$box"
python3 -m venv tools; tools/bin/pip install -q uv
tools/bin/uv venv -q --python "$(command -v python3)" env
tools/bin/uv pip install -q --python env/bin/python --resolution "$which" "$wheel"
tools/bin/uv pip list --python env/bin/python | grep -E '^(torch|transformers|peft|bitsandbytes|pydantic|papermill|numpy|pandas) '
export OMP_NUM_THREADS=2 YOTHALIA_PROGRESS=off
env/bin/yothalia check lesson
env/bin/yothalia run --name mine -p data=lesson -p questions=5 -p 'modes=[cloze]'
env/bin/yothalia report mine
echo 'Good morning!' | env/bin/yothalia chat mine --new-tokens 16
test -s _runs/mine/report.html
echo "The wheel works with the $which versions."
