#!/usr/bin/env bash
# Refactor every model folder in MODELS into OUT, one after the other; run it again after it was killed, and it goes on.
#
#     refactor-all.sh MODELS OUT [OPTION of prism-refactor]...
#
# Beside each OUT/NAME come NAME.json (summary) and NAME.log (progress, a JSON object a line). Ends with the exit code of the last
# model that failed; the others are done all the same. PRISM_REQUIRE is a condition that must hold for each (exit code 4).
set -uo pipefail
models=$1 out=$2
shift 2
mkdir -p "$out"
# A shell forgets an interrupt that the command it waits for survives.
trap 'exit 130' INT
code=0
for model in "$models"/*/; do
    name=$(basename "$model")
    if [ -e "$out/$name/prism.json" ]; then
        grep -q '"holds": false' "$out/$name.json" && code=4
        continue
    fi
    prism-refactor "$model" "$out/$name" --resume --json --log-json --require "${PRISM_REQUIRE:-error@50%<0.3}" "$@" \
        > "$out/$name.json" 2>> "$out/$name.log"
    ended=$?
    # Interrupted or terminated: so is the batch.
    case $ended in
        0) ;;
        130 | 143) exit "$ended" ;;
        *) code=$ended ;;
    esac
done
exit "$code"
