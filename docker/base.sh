#!/usr/bin/env bash
# Make the base image from Debian's packages, where no registry is within reach: docker/base.sh podman NAME.
# Needs root and debootstrap. A minute; about 110 MB.
set -euo pipefail
engine=$1 name=$2
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,ca-certificates bookworm "$root/new" >"$root/log" 2>&1 ||
    { tail -n 20 "$root/log" >&2; exit 1; }
# Documentation, translations, time zones and other character sets; what is left runs Python and can still install packages.
tar --directory "$root/new" --create --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' --exclude='./var/log/*' \
    --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' \
    --exclude='./usr/share/info/*' --exclude='./usr/share/lintian/*' --exclude='./usr/lib/python3*/lib2to3/*' \
    --exclude='./usr/lib/python3*/pydoc_data/*' --exclude='./usr/lib/python3*/test/*' \
    --exclude='./usr/share/zoneinfo/[A-TV-Z]*' --exclude='./usr/lib/*/gconv/[A-TV-Z]*' . |
    "$engine" import - "$name" >&2
