#!/bin/sh
# Makes the roles and the database, once, when the database's volume is new (the image runs it as the superuser).
# To be repeated by hand where PostgreSQL is already there: it changes passwords and nothing that exists.
set -eu

secrets=${TALLYMARK_SECRETS:-/run/secrets}
for name in owner writer reader; do
    if [ ! -s "$secrets/${name}_password" ]; then
        echo "the secret $secrets/${name}_password is missing, empty or cannot be read by $(id -un)" >&2
        exit 1
    fi
done
export TALLYMARK_SECRETS="$secrets"

# Passwords are read by psql itself: in its arguments whoever lists processes would see them.
psql -v ON_ERROR_STOP=1 --no-psqlrc --quiet --username "${POSTGRES_USER:-postgres}" --dbname "${POSTGRES_DB:-postgres}" <<'SQL'
\set owner_password `cat "$TALLYMARK_SECRETS/owner_password"`
\set writer_password `cat "$TALLYMARK_SECRETS/writer_password"`
\set reader_password `cat "$TALLYMARK_SECRETS/reader_password"`
SET password_encryption = 'scram-sha-256';
SET log_statement = 'none';

SELECT format('CREATE ROLE %I', name)
FROM unnest(ARRAY['tallymark_owner', 'tallymark_writer', 'tallymark_reader']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

ALTER ROLE tallymark_owner LOGIN NOINHERIT NOCREATEDB NOCREATEROLE NOSUPERUSER PASSWORD :'owner_password';
ALTER ROLE tallymark_writer LOGIN NOINHERIT NOCREATEDB NOCREATEROLE NOSUPERUSER CONNECTION LIMIT 50 PASSWORD :'writer_password';
ALTER ROLE tallymark_reader LOGIN NOINHERIT NOCREATEDB NOCREATEROLE NOSUPERUSER CONNECTION LIMIT 20 PASSWORD :'reader_password';
-- Who only reads cannot keep the database busy for ever.
ALTER ROLE tallymark_reader SET statement_timeout = '5min';
ALTER ROLE tallymark_reader SET default_transaction_read_only = on;

SELECT 'CREATE DATABASE tallymark OWNER tallymark_owner'
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'tallymark') \gexec
REVOKE ALL ON DATABASE tallymark FROM PUBLIC;
GRANT CONNECT ON DATABASE tallymark TO tallymark_writer, tallymark_reader;

\connect tallymark
REVOKE ALL ON SCHEMA public FROM PUBLIC;
SELECT 'CREATE EXTENSION IF NOT EXISTS timescaledb'
WHERE EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb') \gexec
SQL
