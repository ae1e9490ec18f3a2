#!/bin/sh
# Train a classifier in continuous integration and fail the job when it is not good enough. Offline.
#
#     sh examples/ci.sh DATA [MIN_ACCURACY] [OUTPUT]
#     sh examples/ci.sh demo/images 0.9          after `tlcli demo`, which makes that folder
#
# DATA           a folder of images (a folder a class, or train/ and val/ above them), or a CSV file
# MIN_ACCURACY   the gate: top-1 accuracy on val, 0 to 1; 0.8 unless given
# OUTPUT         where check.json, finetune.json, evaluation.json and the run go; ci-output unless given
#
# Expected on the demo's digits: top-1 accuracy about 0.95 on 360 val images, in about 20 s on two cores, and
# a second time, when no feature is computed, in about 15 s. Keep TLCLI_HOME between jobs to get the same.
#
# The last line of stdout is for the job's log; everything else stands in OUTPUT's JSON files. Exit codes:
#     0  trained, and at least MIN_ACCURACY
#     2  usage, such as a gate that is no number
#     3  the data is missing or would poison training; stderr says what
#     4  the backbone cannot be loaded        5  device, memory, disk or permission
#     6  trained, but below MIN_ACCURACY; evaluation.json has the worst mistakes
#
# TLCLI=/path/to/venv/bin/tlcli names a tlcli that is not on PATH. Needs python3 to read JSON.
set -eu

if [ $# -lt 1 ] || [ $# -gt 3 ]; then
  echo "usage: $0 DATA [MIN_ACCURACY] [OUTPUT]" >&2
  exit 2
fi
data=$1
gate=${2:-0.8}
out=${3:-ci-output}
case $gate in
  0 | 1 | 1.0) valid=yes ;;
  0.*[!0-9]*) valid=no ;;
  0.[0-9]*) valid=yes ;;
  *) valid=no ;;
esac
if [ "$valid" = no ]; then
  echo "$0: MIN_ACCURACY is '$gate', not a number from 0 to 1, such as 0.9" >&2
  exit 2
fi
if [ -n "${TLCLI:-}" ]; then
  PATH=$(dirname "$TLCLI"):$PATH
fi

# value FILE NAME...: print one value of a JSON document, such as `value finetune.json metrics val`.
value() {
  python3 -c '
import json, sys
found = json.load(open(sys.argv[1], encoding="utf-8"))
for name in sys.argv[2:]:
    found = found[name]
print(found)
' "$@"
}

mkdir -p "$out"

# Bad data ends the script here with exit code 3, by `set -e`: stdout stays empty, stderr says why.
tlcli data check "$data" --json > "$out/check.json"

tlcli finetune "$data" --backbone bundled -o "$out/run" --overwrite --offline --json > "$out/finetune.json"

# Below the gate tlcli exits with 6 and still prints the document, so the code is kept, not obeyed at once.
code=0
tlcli evaluate "$out/run" --min-accuracy "$gate" --json > "$out/evaluation.json" || code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 6 ]; then
  exit "$code"
fi

accuracy=$(value "$out/evaluation.json" top1_accuracy)
low=$(value "$out/evaluation.json" interval low)
high=$(value "$out/evaluation.json" interval high)
images=$(value "$out/evaluation.json" num_images)
skipped=$(value "$out/finetune.json" features images_skipped)
passed=$(value "$out/evaluation.json" gate passed)
echo "accuracy=$accuracy interval=$low..$high images=$images skipped=$skipped gate=$gate passed=$passed"
exit "$code"
