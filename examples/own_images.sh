#!/usr/bin/env bash
# A folder of images and one idea: from nothing to samples of two models, side by side. Their costs differ (curves prints
# them); `dit-in-dit match --config CONFIG --like RUN` makes a twin of equal cost.
#   pip install -e '.[viz]'
#   examples/own_images.sh FOLDER [STEPS]
set -euo pipefail
images=${1:?give a folder of images, with a folder for each class}
steps=${2:+--set train.steps=$2}

dit-in-dit data "$images" --out looked  # classes, sizes, copies; data.png shows eight images of each class
dit-in-dit train --data "$images" --out runs/mine $steps
dit-in-dit train --data "$images" --out runs/idea $steps --set model.inner.mixer=window  # the idea
for run in mine idea; do
  dit-in-dit sample "runs/$run" --num 16 --out "samples/$run" --film "samples/$run.webp"
  dit-in-dit evaluate "runs/$run" --num 64
done
dit-in-dit compare runs/mine runs/idea --out compared
dit-in-dit curves runs/mine runs/idea --out curves
