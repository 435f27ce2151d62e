#!/bin/sh
# Carry FOLDER's dumps to BACKUPS/<time>/, their sums last: a backup without them is not complete, and is never restored.
# Then leave the newest KEEP of those that are complete, and nothing older.
set -eu
aws() { command aws ${MLFLOW_S3_ENDPOINT_URL:+--endpoint-url "$MLFLOW_S3_ENDPOINT_URL"} "$@"; }
cd "$FOLDER"
sha256sum --check --quiet SHA256SUMS
name=$(date -u +%Y-%m-%dT%H-%M-%SZ)
for file in *.dump SHA256SUMS; do
    aws s3 cp --only-show-errors "$file" "$BACKUPS/$name/$file"
done
bucket=${BACKUPS#s3://} prefix=
case $bucket in */*) prefix=${bucket#*/}/ bucket=${bucket%%/*} ;; esac
complete=$(aws s3api list-objects-v2 --bucket "$bucket" --prefix "$prefix" --output text \
    --query "Contents[?ends_with(Key, '/SHA256SUMS')].[Key]" | sed "s|^$prefix||; s|/SHA256SUMS$||" | sort -r)
oldest=$(printf '%s\n' "$complete" | head -n "$KEEP" | tail -n 1)
for old in $(aws s3 ls "$BACKUPS/" | sed -n 's|.*PRE \(.*\)/$|\1|p'); do
    if [ "$(printf '%s\n%s\n' "$old" "$oldest" | sort | head -n 1)" = "$old" ] && [ "$old" != "$oldest" ]; then
        aws s3 rm --only-show-errors --recursive "$BACKUPS/$old/"
        echo "removed $old"
    fi
done
echo "kept $BACKUPS/$name/"
