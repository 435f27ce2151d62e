#!/bin/sh
# Bring a backup to FOLDER: BACKUP by its name, or `newest` for the newest that is complete.
set -eu
aws() { command aws ${MLFLOW_S3_ENDPOINT_URL:+--endpoint-url "$MLFLOW_S3_ENDPOINT_URL"} "$@"; }
cd "$FOLDER"
name=$BACKUP
if [ "$name" = newest ]; then
    bucket=${BACKUPS#s3://} prefix=
    case $bucket in */*) prefix=${bucket#*/}/ bucket=${bucket%%/*} ;; esac
    name=$(aws s3api list-objects-v2 --bucket "$bucket" --prefix "$prefix" --output text \
        --query "Contents[?ends_with(Key, '/SHA256SUMS')].[Key]" | sed "s|^$prefix||; s|/SHA256SUMS$||; /^None$/d" | sort | tail -n 1)
fi
if [ -z "$name" ]; then
    echo "there is no complete backup at $BACKUPS. See what there is: aws s3 ls $BACKUPS/" >&2
    exit 1
fi
aws s3 cp --only-show-errors --recursive "$BACKUPS/$name/" .
sha256sum --check --quiet SHA256SUMS
echo "fetched $BACKUPS/$name/"
