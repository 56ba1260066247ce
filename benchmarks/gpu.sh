#!/usr/bin/env bash
# Ask a GPU everything in benchmarks/gpu.py, on a machine that has PyTorch and perhaps no network.
#
#   bash benchmarks/gpu.sh fetch     beforehand, with a network: wheels of what may be missing
#   bash benchmarks/gpu.sh OUT       on the machine: results in OUT, in less than ten minutes
#
# Take along the whole working tree and .wheels/, which git ignores. PYTHON_VERSION is the machine's.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:?fetch, or a folder for the results}" = fetch ]; then
    python3 -m pip download --quiet --no-deps --only-binary=:all: --dest .wheels \
        --implementation cp --python-version "${PYTHON_VERSION:-3.12}" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
        rasterio affine attrs certifi click click-plugins cligj shapely segmentation-models-pytorch
    ls -sh .wheels
    exit
fi

if compgen -G ".wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    for wheel in .wheels/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done  # needs no pip
    export PYTHONPATH="$site"
fi
python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
out=$1
shift
exec env PYTHONUNBUFFERED=1 python3 benchmarks/gpu.py "$out" "$@"
