#!/bin/sh
# Bring a backup to FOLDER: BACKUP by name, or the newest that is complete.
set -eu
aws() { command aws ${MLFLOW_S3_ENDPOINT_URL:+--endpoint-url "$MLFLOW_S3_ENDPOINT_URL"} "$@"; }
cd "$FOLDER"
name=${BACKUP:-}
if [ -z "$name" ]; then
    bucket=${BACKUPS#s3://} prefix=
    case $bucket in */*) prefix=${bucket#*/}/ bucket=${bucket%%/*} ;; esac
    name=$(aws s3api list-objects-v2 --bucket "$bucket" --prefix "$prefix" --output text \
        --query "Contents[?ends_with(Key, '/SHA256SUMS')].[Key]" | sed "s|^$prefix||; s|/SHA256SUMS$||" | sort | tail -n 1)
fi
case $name in '' | None)
    echo "there is no complete backup at $BACKUPS. See what there is: aws s3 ls $BACKUPS/" >&2
    exit 1
    ;;
esac
aws s3 cp --only-show-errors --recursive "$BACKUPS/$name/" .
sha256sum --check --quiet SHA256SUMS
echo "fetched $BACKUPS/$name/"
