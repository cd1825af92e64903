#!/usr/bin/env bash
# Trains many runs, one after another, and prints the report. `./sweep.sh --help`
set -euo pipefail

usage() {
    cat <<'END'
Train a whole table of the paper, or any sweep, and print the report of all runs.

  ./sweep.sh TABLE [override …]      TABLE: table1 … table5, or all (38 rows)
  ./sweep.sh override …              the same as: python train.py -m override …
  ./sweep.sh --plan …                only say what that would do: runs, costs, refusals (the same as: python -m vix plan)

  ./sweep.sh --config-dir DIR …      with configs of your own, next to those of conf/

Overrides are Hydra's: key=value, or key=a,b,c to sweep over values. Finished runs are not run again, and
interrupted ones continue, so the same command picks up where it stopped.

  ./sweep.sh table1 seed=0,1,2 trainer.epochs=10
  ./sweep.sh all
  ./sweep.sh experiment=vin,vip attention.heads=2,4,8
  ./sweep.sh experiment=quickstart seed=0,1,2
  ./sweep.sh table2 hydra.sweep.dir=outputs/table2      elsewhere than in outputs/
  ./sweep.sh --plan table3 trainer.epochs=10            exit status 1 if a run would be refused
  ./sweep.sh --plan --measure table1                    trains each model for a few steps, to tell hours and memory

The report (a table here; report.md, report.csv and pictures in the sweep's directory) comes also after failed
runs; the exit status is then not 0. Make it again, sorted or filtered, with: python -m vix report --help
END
}

absolute() { # before this script goes to its own directory
    case "$1" in
        /* | "~"*) printf '%s\n' "$1" ;;
        *) printf '%s\n' "$PWD/$1" ;;
    esac
}

plan=()
flags=()   # Hydra's options that say where configs come from; the program takes them before the overrides
while [[ ${1:-} == -* ]]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --plan) plan=(python -m vix plan) ;;
        --measure) flags+=("$1") ;;
        -m | --multirun) ;;
        -cd | -cp | -cn | --config-dir | --config-path | --config-name)
            [[ $# -ge 2 ]] || { echo "error: $1: a value is needed" >&2; exit 2; }
            value=$2
            if [[ $1 == -cd || $1 == --config-dir ]]; then value=$(absolute "$2"); fi
            flags+=("$1" "$value")
            shift
            ;;
        --config-dir=*) flags+=("--config-dir=$(absolute "${1#*=}")") ;;
        *) flags+=("$1") ;;
    esac
    shift
done
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")"

case "$1" in
    all | table*)
        rows=$(awk -F, -v table="${1#table}" 'NR > 1 && (table == "all" || $2 == table) { print $1 }' vix/runs/published.csv)
        if [[ -z $rows ]]; then
            echo "error: $1: the paper has table1 to table5; all means every row" >&2
            exit 2
        fi
        missing=""
        for row in $rows; do
            [[ -e conf/experiment/$row.yaml ]] || missing+=" $row"
        done
        if [[ -n $missing ]]; then
            echo "error: $1: conf/experiment/ has no file for:$missing" >&2
            exit 2
        fi
        shift
        set -- "experiment=${rows//$'\n'/,}" "$@"
        ;;
esac

if [[ ${#plan[@]} -gt 0 ]]; then
    exec "${plan[@]}" ${flags[@]+"${flags[@]}"} "$@"
fi
VIX_REPORT=1 exec python train.py -m ${flags[@]+"${flags[@]}"} "$@"
