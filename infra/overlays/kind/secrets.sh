#!/bin/sh
# Print the Secrets that infra/ refers to, with passwords made up now:
#   infra/overlays/kind/secrets.sh | kubectl apply -f -
# Once: a second time makes up others, which the database and MLflow do not know.
set -eu
new() { openssl rand -hex 16; }

secret() { # NAMESPACE NAME KEY VALUE [KEY VALUE]...
    printf -- '---\napiVersion: v1\nkind: Secret\nmetadata: {namespace: %s, name: %s}\nstringData:\n' "$1" "$2"
    shift 2
    while [ $# -gt 0 ]; do
        printf '  %s: "%s"\n' "$1" "$2"
        shift 2
    done
}

key=$(new) reader=$(new)
secret slimline mlflow-database PGUSER mlflow PGPASSWORD "$(new)"
secret slimline mlflow-server MLFLOW_FLASK_SERVER_SECRET_KEY "$(new)" MLFLOW_AUTH_ADMIN_PASSWORD "$(new)"
secret slimline mlflow-reader username reader password "$reader"
for namespace in slimline team; do
    secret "$namespace" slimline-s3 AWS_ACCESS_KEY_ID slimline AWS_SECRET_ACCESS_KEY "$key"
done
secret team slimline-mlflow username team password "$(new)"
