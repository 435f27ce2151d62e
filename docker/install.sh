#!/bin/sh
# Install locked requirements, inside a build: install.sh step executor. All go to /opt/slimline, sbom to /opt/installer.
set -eu
for name in "$@"; do
    into=/opt/slimline where=
    [ "$name" != sbom ] || into=/opt/installer
    [ "$name" != torch-cpu ] || where="--find-links /wheels"
    /opt/installer/bin/uv pip install -q --python "$into" --cache-dir /cache --no-deps --require-hashes \
        $where -r "/requirements/$name.txt"
done
