#!/bin/sh
# Carry FOLDER's dumps to BACKUPS/<time>/, their sums last: a backup without them is not complete, and is never restored.
# Then leave the newest KEEP of those that are complete, and nothing older.
set -eu
aws() { command aws ${MLFLOW_S3_ENDPOINT_URL:+--endpoint-url "$MLFLOW_S3_ENDPOINT_URL"} "$@"; }
cd "$FOLDER"
sha256sum --check --quiet SHA256SUMS
name=$(date -u +%Y-%m-%dT%H-%M-%SZ)
aws s3 cp --only-show-errors --recursive --exclude SHA256SUMS . "$BACKUPS/$name/"
aws s3 cp --only-show-errors SHA256SUMS "$BACKUPS/$name/SHA256SUMS"
bucket=${BACKUPS#s3://} prefix=
case $bucket in */*) prefix=${bucket#*/}/ bucket=${bucket%%/*} ;; esac
keys=$(aws s3api list-objects-v2 --bucket "$bucket" --prefix "$prefix" --output text --query "Contents[].[Key]" |
    sed "s|^$prefix||")
oldest=$(printf '%s\n' "$keys" | sed -n 's|/SHA256SUMS$||p' | sort -r | head -n "$KEEP" | tail -n 1)
for old in $(printf '%s\n' "$keys" | sed -n 's|/.*||p' | sort -u); do
    if [ "$old" != "$oldest" ] && [ "$(printf '%s\n%s\n' "$old" "$oldest" | sort | head -n 1)" = "$old" ]; then
        aws s3 rm --only-show-errors --recursive "$BACKUPS/$old/"
        echo "removed $old"
    fi
done
echo "kept $BACKUPS/$name/"
