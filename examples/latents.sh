#!/usr/bin/env bash
# Photos, a VAE and several GPUs: latents, training, samples, an export.
#   pip install -e '.[viz]'
#   examples/latents.sh PHOTOS VAE [PROCESSES [PRESET [--set KEY=VALUE ...]]]
# VAE is a folder or a Hub id, such as stabilityai/sd-vae-ft-ema.
set -euo pipefail
photos=${1:?give a folder of photos} vae=${2:?give a VAE: a folder or a Hub id} processes=${3:-8} preset=${4:-dit-in-dit-b2}
launch=(torchrun --standalone --nproc-per-node "$processes" -m dit_in_dit)

"${launch[@]}" encode --data "$photos" --vae "$vae" --size 256 --out latents
dit-in-dit data latents --out looked
"${launch[@]}" train --data latents --preset "$preset" --out runs/latents "${@:5}"
"${launch[@]}" sample runs/latents -n 8 --out samples/latents
dit-in-dit evaluate runs/latents --against "$photos" --num 8
dit-in-dit export runs/latents --format pipeline --out pipeline  # --push USER/NAME uploads it
