#!/bin/sh
# Write /opt/slimline/sbom.json (CycloneDX): the base's Debian packages and what /opt/slimline holds.
set -eu
cd "$(mktemp -d)"
/opt/installer/bin/cyclonedx-py environment /opt/slimline/bin/python --pyproject /pyproject.toml --output-reproducible --no-validate -o python.json
/opt/installer/bin/debsbom merge -t cdx --distro-name slimline -o image /inventory.cdx.json python.json
mv image.cdx.json /opt/slimline/sbom.json
