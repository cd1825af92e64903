#!/usr/bin/env bash
# Trains a sweep of runs sequentially and prints the report. See `./sweep.sh --help`.
set -euo pipefail

usage() {
    cat <<'END'
Train all models of a table of the paper, or any sweep, and print the report of all runs.

  ./sweep.sh TABLE [override …]      TABLE: table1 … table5, or all (38 rows)
  ./sweep.sh compact [override …]    the compact benchmark: every token mixer in the same small ViT
  ./sweep.sh compact-families …      the same in CCT, CvT, PiT and LeViT, with four attentions
  ./sweep.sh override …              same as: python train.py -m override …
  ./sweep.sh --plan …                only list the runs and their cost (same as: python -m vix plan)

  ./sweep.sh --config-dir DIR …      with an additional directory of config files

Overrides are Hydra's: key=value, or key=a,b,c to sweep over values; paths in them are relative to the
directory of this script, like outputs/. Finished runs are skipped, and interrupted runs are resumed, so the same
command continues an interrupted sweep.

  ./sweep.sh table1 seed=0,1,2 trainer.epochs=10
  ./sweep.sh all
  ./sweep.sh compact seed=0,1,2
  ./sweep.sh experiment=vin,vip attention.heads=2,4,8
  ./sweep.sh experiment=quickstart seed=0,1,2
  ./sweep.sh table2 hydra.sweep.dir=outputs/table2      other directory than outputs/
  ./sweep.sh --plan table3 trainer.epochs=10            exit code 1 if a run would be refused
  ./sweep.sh --plan --measure table1                    measures time and memory in a few training steps

The report is printed, and written to the sweep's directory (report.md, report.csv and figures), even if runs
fail; the exit code is then not 0. To sort or filter the report, see: python -m vix report --help
END
}

absolute() { # called before this script changes its working directory
    case "$1" in
        /* | "~"*) printf '%s\n' "$1" ;;
        *) printf '%s\n' "$PWD/$1" ;;
    esac
}

plan=()
flags=()   # Hydra's options that select the config files; they precede the overrides
while [[ ${1:-} == -* ]]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --plan) plan=(python -m vix plan) ;;
        --measure) flags+=("$1") ;;
        -m | --multirun) ;;
        -cd=*) flags+=("--config-dir=$(absolute "${1#*=}")") ;;
        -cd | -cp | -cn | --config-dir | --config-path | --config-name)
            [[ $# -ge 2 ]] || { echo "error: $1: requires a value" >&2; exit 2; }
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
            echo "error: $1: unknown table; valid: table1 to table5, or all for every row" >&2
            exit 2
        fi
        missing=""
        for row in $rows; do
            [[ -e conf/experiment/$row.yaml ]] || missing+=" $row"
        done
        if [[ -n $missing ]]; then
            echo "error: $1: conf/experiment/ lacks a file for:$missing" >&2
            exit 2
        fi
        shift
        set -- "experiment=${rows//$'\n'/,}" "$@"
        ;;
    compact)
        # The attentions of LeViT and CvT are softmax attention, made for those models.
        mixers=$(basename -s .yaml conf/attention/*.yaml | grep -vx -e levit -e cvt)
        shift
        set -- experiment=compact "attention=${mixers//$'\n'/,}" "$@"
        ;;
    compact-families)
        shift
        set -- experiment=compact_cct,compact_cvt,compact_pit,compact_levit attention=softmax,performer,linformer,nystrom "$@"
        ;;
esac

if [[ ${#plan[@]} -gt 0 ]]; then
    exec "${plan[@]}" ${flags[@]+"${flags[@]}"} "$@"
fi
VIX_REPORT=1 exec python train.py -m ${flags[@]+"${flags[@]}"} "$@"
