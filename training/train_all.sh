#!/usr/bin/env bash
# Every training stage, overlapped so that no accelerator waits:
#   training/train_all.sh [processes, one a GPU] [config overrides ...]
# Needs `python -m training.prepare` and `python -m training.tokenizer` before. Ends with <data.work>/nano.
set -euo pipefail
export PYTHONUNBUFFERED=1
processes=${1:-1}
shift || true
launch=(python3 -m torch.distributed.run --standalone --nproc-per-node "$processes" -m)
nice python3 -m training.pools "$@" &
pools=$!
"${launch[@]}" training.train_transformer "$@" & # compiles, then waits for the VAE and the captions
transformer=$!
# an autoencoder that is there already is kept
[ -n "${KEEP_VAE:-}" ] || "${launch[@]}" training.train_vae "$@"
wait "$pools"
wait "$transformer"
