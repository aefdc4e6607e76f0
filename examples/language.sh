#!/usr/bin/env bash
# A small Llama that has read children's stories learns the style of Shakespeare's plays.
#
#   examples/language.sh DATA OUTPUT [options of svftool finetune]
#
# DATA holds
#   checkpoints/stories260K/                  karpathy/tinyllamas' stories260K as a transformers folder
#   text/shakespeare_{train,eval}.jsonl       64 and 128 passages, one {"text": ...} a line
# Any folder of a causal language model and any JSONL or CSV of texts do.
set -euo pipefail
data=$1 output=$2
shift 2

svftool decompose "$data/checkpoints/stories260K" -o "$output/factors"

# Rates of language models this small are above the default; docs/experiments/shakespeare.md tells how 0.03 was found.
svftool finetune "$output/factors" -o "$output/play.svf.safetensors" --task language \
    --data "$data/text/shakespeare_train.jsonl" --eval "$data/text/shakespeare_eval.jsonl" \
    --sequence-length 128 --batch-size 8 --lr 0.03 "$@"

# A folder that transformers loads like the base.
svftool merge "$output/factors" "$output/play.svf.safetensors" -o "$output/merged"
