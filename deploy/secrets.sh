#!/bin/sh
# Makes what the containers must know and nobody else: a token, Redis' password and certificate, Grafana's password.
#   sh deploy/secrets.sh [FOLDER]        the default, deploy/secrets, is what docker-compose.yml mounts; git ignores it
# Files are readable in the containers; the folder is closed to other users of this machine.
set -eu
folder=${1:-$(dirname "$0")/secrets}
command -v openssl > /dev/null || { echo "secrets.sh: the openssl command is missing; install it" >&2; exit 1; }
[ ! -e "$folder/robodual.toml" ] || { echo "secrets.sh: $folder has secrets already; move them away first" >&2; exit 1; }
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"

token=$(openssl rand -hex 32)
password=$(openssl rand -hex 32)
digest=$(printf %s "$password" | openssl dgst -sha256 -r | cut -d ' ' -f 1)
printf %s "$token" > token
openssl rand -hex 16 > grafana_password

curve="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
# shellcheck disable=SC2086
openssl req -x509 $curve -keyout ca.key -out ca.pem -subj "/CN=RoboDual Serve" -days 3650 2> /dev/null
# shellcheck disable=SC2086
openssl req $curve -keyout redis.key -out redis.csr -subj "/CN=redis" 2> /dev/null
echo "subjectAltName=DNS:redis,DNS:localhost,IP:127.0.0.1" > redis.ext
openssl x509 -req -in redis.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 825 -extfile redis.ext -out redis.pem 2> /dev/null
rm redis.csr redis.ext

cat > robodual.toml << TOML
[shared]
redis_url = "rediss://robodual:$password@redis:6379/0?ssl_ca_certs=/run/secrets/ca.pem"
tokens = ["$token"]
TOML

cat > redis.conf << CONF
port 0
tls-port 6379
tls-cert-file /run/secrets/redis.pem
tls-key-file /run/secrets/redis.key
tls-ca-cert-file /run/secrets/ca.pem
tls-auth-clients no
save ""
appendonly no
maxmemory 1gb
maxmemory-policy volatile-ttl
user default off
user health on nopass -@all +ping
user robodual on #$digest resetchannels -@all ~robodual:* &robodual:* \
+ping +subscribe +unsubscribe +publish +evalsha +script|load +hget +hmget +hset +hsetnx +del +pexpire
CONF
chmod 644 token grafana_password ca.pem redis.pem redis.key redis.conf robodual.toml
chmod 600 ca.key ./*.srl 2> /dev/null || true
echo "$folder: token, robodual.toml, redis.conf, certificates and grafana_password are made"
