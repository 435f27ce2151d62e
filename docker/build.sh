#!/usr/bin/env bash
# Build the images named, or all but gpu: docker/build.sh [cpu] [gpu] [language] [tensorrt] [llm] [mlflow].
# Writes build/images.json (what a compiled pipeline calls them, and what they are) and build/sbom/IMAGE.json.
# Settings: BASE (a base image, or `debootstrap` to make one), ENGINE (docker or podman), REGISTRY (to push to), PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${BASE:-python:3.11-slim-bookworm}
images=("$@")
[ ${#images[@]} -gt 0 ] || images=(cpu language tensorrt llm mlflow)
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' slimline/__init__.py)
revision=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision=$revision-dirty
ca=${SSL_CERT_FILE:-}

say() { printf '%s\n' "$*" >&2; }

find_engine() {
    for engine in ${ENGINE:-docker podman}; do
        if "$engine" info >/dev/null 2>&1; then
            echo "$engine"
            return
        fi
    done
    say "No container engine answers (tried: ${ENGINE:-docker podman}). Start Docker, or install podman and buildah."
    return 1
}

# The CPU build of torch is on no common index: pip finds it, by its own settings or at PyTorch's, and checks its hash.
fetch_torch() {
    local python
    python=$("$engine" run --rm --network none "$base" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    for index in "" "--extra-index-url ${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"; do
        "${PYTHON:-python3}" -m pip download -q --no-deps --require-hashes --only-binary=:all: --python-version "$python" \
            --platform manylinux_2_28_x86_64 $index -d build/wheels -r requirements/torch-cpu.txt 2>/dev/null && return
    done
    say "No CPU build of torch for Python $python within reach: neither in pip's settings nor at TORCH_INDEX."
    return 1
}

engine=$(find_engine)
mkdir -p build/wheels build/sbom
if [ "$base" = debootstrap ]; then
    base=localhost/slimline-base:bookworm
    "$engine" image inspect "$base" >/dev/null 2>&1 || docker/base.sh "$engine" "$base"
fi
case " ${images[*]} " in *" cpu "* | *" language "* | *" llm "*) fetch_torch ;; esac

entries=()
if [ -f build/images.json ]; then  # what was built before and is not built now
    mapfile -t entries < <(sed -n 's/,*$//; /^  "/p' build/images.json | grep -v "$(printf 'slimline-%s:\n' "${images[@]}")")
fi
for image in "${images[@]}"; do
    name=slimline-$image
    say "Building $name:$revision on $base."
    "$engine" build -q --network host -f docker/Dockerfile --target "$image" --build-context wheels=build/wheels \
        --build-arg BASE_IMAGE="$base" --build-arg VERSION="$version" --build-arg REVISION="$revision" \
        --build-arg SOURCE="${SOURCE:-unknown}" ${ca:+--secret id=ca,src="$ca"} \
        -t "$name:$revision" -t "$name:$version" . >&2
    "$engine" run --rm --network none --entrypoint cat "$name:$revision" /opt/slimline/sbom.json >"build/sbom/$image.json"
    reference=$("$engine" image inspect --format '{{.Id}}' "$name:$revision")
    if [ -n "${REGISTRY:-}" ]; then
        "$engine" tag "$name:$revision" "$REGISTRY/$name:$revision"
        "$engine" push -q "$REGISTRY/$name:$revision" >&2
        reference=$("$engine" image inspect --format '{{index .RepoDigests 0}}' "$REGISTRY/$name:$revision")
    fi
    entries+=("  \"$name:$version\": \"$reference\"")
done
{ echo "{"; printf '%s\n' "${entries[@]}" | sed '$!s/$/,/'; echo "}"; } >build/images.json
say "build/images.json says what they are."
