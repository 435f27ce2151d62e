#!/bin/sh
# Take out of /opt/slimline what nothing uses: tests, sources in C, copies, symbols; then compile what every step imports.
# `trim.sh encoders` leaves of transformers' 400 families those that slimline/allowlist.py takes.
set -eu
cd /opt/slimline/lib/python3*/site-packages
find . -type d \( -name tests -o -name test -o -name include \) -prune -exec rm -rf {} +
find . -type f \( -name '*.py[ix]' -o -name '*.px[di]' -o -name '*.h' -o -name '*.c' -o -name '*.cc' -o -name '*.cpp' \
    -o -name '*.a' \) ! -path './torch/*' -delete
# Arrow's network protocol, SciPy's file formats, what tests are made of; and ONNX Runtime's second copy of itself.
rm -rf pyarrow/*flight* scipy/io sqlalchemy/testing alembic/testing huggingface_hub/cli onnx/backend/test
[ -d onnxruntime_genai ] || rm -rf onnxruntime/capi/libonnxruntime.so.*  # GenAI links against that copy
for library in pyarrow/libarrow_python*.so.*.*.*; do  # a wheel has no links, so it holds each of these three times
    [ ! -f "$library" ] || ln -sf "$(basename "$library")" "${library%.*.*}"
    [ ! -f "$library" ] || ln -sf "$(basename "$library")" "${library%.so.*}.so"
done
# lm-eval's own tasks, 70 MB, which read their data from a network that no step has.
[ ! -d lm_eval/tasks ] || find lm_eval/tasks -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
# Of AWS's services, the store's alone.
[ ! -d botocore/data ] || find botocore/data -mindepth 1 -maxdepth 1 -type d \
    ! -name s3 ! -name sts ! -name sso ! -name sso-oidc ! -name signin -exec rm -rf {} +
[ "${1:-}" != encoders ] || find transformers/models -mindepth 1 -maxdepth 1 -type d ! -name auto ! -name bert \
    ! -name roberta ! -name xlm_roberta ! -name electra ! -name distilbert ! -name encoder_decoder -exec rm -rf {} +
# Symbols that only a debugger reads. Libraries in *.libs were patched after they were linked: strip breaks such.
find . -type f -name '*.so*' -size +1M ! -path './*.libs/*' ! -path './torch/*' ! -path './*tensorrt*' \
    -exec strip --strip-unneeded {} +
# A step finds its root file system read-only, so what it imports is compiled here.
PYTHONDONTWRITEBYTECODE= /opt/slimline/bin/python /usr/local/bin/_warm.py
